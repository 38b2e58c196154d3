"""The same answer from other frameworks, with which a usage request is compared.

Each peer looks the key's digest up in the database that ``SQLiteTokenStore`` made, and sends the same answer. If a
framework leaves a choice, the faster one is taken: Django without middleware and with a persistent connection,
SQLAlchemy with a connection for every thread, FastAPI without a model of the answer.

A server in a process of its own serves :func:`application`. ``PEER`` names the peer, ``TOKENS_DATABASE`` the database.
"""

# There is no "from __future__ import annotations": FastAPI evaluates the annotations of a view, and would not find the
# names that are local to a function.

import hashlib
import importlib.util
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calling import USAGE_PATH

from usage_middleware import SQLiteTokenStore, UsageMiddleware

_MOST_THREADS = 64
_CONTENT_TYPE = "application/json; charset=utf-8"

# The headers that every answer must have, besides Content-Type and Content-Length.
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Access-Control-Allow-Origin": "*",
}
_FIELDS = (
    "name",
    "total_used",
    "total_available",
    "unlimited_quota",
    "model_limits",
    "model_limits_enabled",
    "expires_at",
)
_SELECT = f"SELECT {', '.join(_FIELDS)} FROM tokens WHERE digest = ?"


@dataclass(frozen=True)
class Peer:
    """A way to answer the usage request.

    :param packages: what must be installed, by the names for import.
    :param make: makes the application for a database.
    :param calls: how many calls make a turn. A slow peer needs fewer to be measured.
    """

    name: str
    packages: tuple[str, ...]
    make: Callable[[Path], AbstractContextManager[Any]]
    is_asgi: bool = False
    calls: int = 100

    @property
    def missing(self) -> list[str]:
        return [package for package in self.packages if importlib.util.find_spec(package) is None]


def present(peers: tuple[Peer, ...]) -> tuple[list[Peer], list[str]]:
    """Return the peers that are installed, and a line for each that is not."""
    lines = [f"{peer.name}: left out, {' and '.join(peer.missing)} is not installed" for peer in peers if peer.missing]
    return [peer for peer in peers if not peer.missing], lines


def hand_written(connection: sqlite3.Connection) -> Callable[[str], str]:
    """Return the least work that a usage request needs: one look-up by digest, one ``json.dumps``."""

    def answer(key: str) -> str:
        return json.dumps(_answer(*connection.execute(_SELECT, (_digest(key),)).fetchone()))

    return answer


@contextmanager
def hand_written_by_thread(path: Path) -> Iterator[Callable[[str], str]]:
    """Yield the same for threads: each has a connection of its own, as SQLite's documentation advises."""
    local = threading.local()
    with ExitStack() as stack:

        def answer(key: str) -> str:
            try:
                by_hand = local.by_hand
            except AttributeError:
                connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)  # closed elsewhere
                by_hand = local.by_hand = hand_written(stack.enter_context(closing(connection)))
            return by_hand(key)

        yield answer


def _answer(
    name: str,
    used: int,
    available: int,
    unlimited_quota: bool,
    model_limits: str,
    model_limits_enabled: bool,
    expires_at: int,
) -> dict[str, Any]:
    return {
        "code": True,
        "message": "ok",
        "data": {
            "object": "token_usage",
            "name": name,
            "total_granted": used + available,
            "total_used": used,
            "total_available": available,
            "unlimited_quota": unlimited_quota == 1,
            "model_limits": {} if model_limits == "{}" else json.loads(model_limits),
            "model_limits_enabled": model_limits_enabled == 1,
            "expires_at": expires_at,
        },
    }


def _answer_from(row: Any) -> dict[str, Any]:
    return _answer(*(getattr(row, field) for field in _FIELDS))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _key(authorization: str) -> str:
    return authorization.removeprefix("Bearer ").removeprefix("sk-")


@contextmanager
def usage_middleware(path: Path) -> Iterator[Any]:
    with SQLiteTokenStore(path) as store:
        yield UsageMiddleware(_no_application, store)


def _no_application(environ: Any, start_response: Any) -> list[bytes]:
    start_response("404 Not Found", [("Content-Length", "0")])
    return []


@contextmanager
def bare_wsgi(path: Path) -> Iterator[Any]:
    with hand_written_by_thread(path) as answer:

        def app(environ: Any, start_response: Any) -> list[bytes]:
            body = answer(_key(environ["HTTP_AUTHORIZATION"])).encode()
            headers = {"Content-Type": _CONTENT_TYPE, "Content-Length": str(len(body)), **_HEADERS}
            start_response("200 OK", list(headers.items()))
            return [body]

        yield app


@contextmanager
def flask_view(path: Path) -> Iterator[Any]:
    with hand_written_by_thread(path) as answer:
        yield _flask_app(answer, _HEADERS)


@contextmanager
def bare_flask_view(path: Path) -> Iterator[Any]:
    with hand_written_by_thread(path) as answer:
        yield _flask_app(answer, {})


@contextmanager
def flask_with_sqlalchemy(path: Path) -> Iterator[Any]:
    from sqlalchemy import select
    from sqlalchemy.orm import Session

    with _mapped(path) as (engine, row):

        def answer(key: str) -> str:
            with Session(engine) as session:
                return json.dumps(_answer_from(session.scalars(select(row).where(row.digest == _digest(key))).one()))

        yield _flask_app(answer, _HEADERS)


def _flask_app(answer: Callable[[str], str], headers: dict[str, str]) -> Any:
    from flask import Flask, Response, request

    flask_app = Flask(__name__, static_folder=None)

    @flask_app.get(USAGE_PATH)
    def usage() -> Response:
        return Response(answer(_key(request.headers["Authorization"])), headers=headers, content_type=_CONTENT_TYPE)

    return flask_app.wsgi_app


@contextmanager
def _mapped(path: Path) -> Iterator[tuple[Any, Any]]:
    """Yield an engine, and the tokens table as a class of SQLAlchemy's ORM."""
    from sqlalchemy import BigInteger, Integer, LargeBinary, Text, create_engine
    from sqlalchemy.orm import DeclarativeBase, mapped_column

    class Base(DeclarativeBase):
        pass

    class Row(Base):
        __tablename__ = "tokens"

        id = mapped_column(Integer, primary_key=True)
        digest = mapped_column(LargeBinary, unique=True)
        name = mapped_column(Text)
        total_used = mapped_column(BigInteger)
        total_available = mapped_column(BigInteger)
        unlimited_quota = mapped_column(Integer)
        model_limits = mapped_column(Text)
        model_limits_enabled = mapped_column(Integer)
        expires_at = mapped_column(BigInteger)

    engine = create_engine(f"sqlite:///{path}", pool_size=_MOST_THREADS)
    try:
        yield engine, Row
    finally:
        engine.dispose()


@contextmanager
def django_view(path: Path) -> Iterator[Any]:
    import django
    from django.conf import settings

    # Django can be configured only once in a process, and the database with it.
    settings.configure(
        ALLOWED_HOSTS=["*"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(path), "CONN_MAX_AGE": None}},
        ROOT_URLCONF=__name__,
    )
    django.setup()
    from django.core.wsgi import get_wsgi_application
    from django.db import connections, models
    from django.http import JsonResponse
    from django.urls import path as route

    class Row(models.Model):
        digest = models.BinaryField(unique=True)
        name = models.TextField()
        total_used = models.BigIntegerField()
        total_available = models.BigIntegerField()
        unlimited_quota = models.IntegerField()
        model_limits = models.TextField()
        model_limits_enabled = models.IntegerField()
        expires_at = models.BigIntegerField()

        class Meta:
            app_label = "tokens"
            db_table = "tokens"
            managed = False

    def usage(request: Any) -> JsonResponse:
        row = Row.objects.get(digest=_digest(_key(request.headers["Authorization"])))
        return JsonResponse(_answer_from(row), headers=_HEADERS, content_type=_CONTENT_TYPE)

    urlpatterns.append(route(USAGE_PATH.removeprefix("/"), usage))
    try:
        yield get_wsgi_application()
    finally:
        connections.close_all()


urlpatterns: list[Any] = []  # Django looks for this name in the module


@contextmanager
def fastapi_threads(path: Path) -> Iterator[Any]:
    """Yield a ``def`` view, which FastAPI runs in a thread: what its documentation shows for SQL databases."""
    from fastapi import Request
    from sqlalchemy import select
    from sqlalchemy.orm import Session

    with _mapped(path) as (engine, row):
        app = _fastapi()

        @app.get(USAGE_PATH)
        def usage(request: Request) -> Any:
            digest = _digest(_key(request.headers["authorization"]))
            with Session(engine) as session:
                return _fastapi_response(_answer_from(session.scalars(select(row).where(row.digest == digest)).one()))

        yield app


@contextmanager
def fastapi_loop(path: Path) -> Iterator[Any]:
    """Yield an ``async def`` view that blocks the loop during its short query. It needs no thread, so it is faster."""
    from fastapi import Request
    from sqlalchemy import select
    from sqlalchemy.orm import Session

    with _mapped(path) as (engine, row):
        app = _fastapi()

        @app.get(USAGE_PATH)
        async def usage(request: Request) -> Any:
            digest = _digest(_key(request.headers["authorization"]))
            with Session(engine) as session:
                return _fastapi_response(_answer_from(session.scalars(select(row).where(row.digest == digest)).one()))

        yield app


def _fastapi() -> Any:
    from fastapi import FastAPI

    return FastAPI(openapi_url=None)


def _fastapi_response(answer: dict[str, Any]) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse(answer, headers=_HEADERS, media_type=_CONTENT_TYPE)


OURS = Peer("UsageMiddleware, SQLiteTokenStore", (), usage_middleware)
BARE_WSGI = Peer("a bare WSGI function, by hand", (), bare_wsgi)
FLASK = Peer("Flask view", ("flask",), flask_view)
BARE_FLASK = Peer("Flask view, bare", ("flask",), bare_flask_view)
FLASK_SQLALCHEMY = Peer("Flask view with SQLAlchemy's ORM", ("flask", "sqlalchemy"), flask_with_sqlalchemy, calls=50)
DJANGO = Peer("Django view with its ORM", ("django",), django_view, calls=50)
FASTAPI = Peer("FastAPI with SQLAlchemy's ORM, def", ("fastapi", "sqlalchemy"), fastapi_threads, True, calls=50)
FASTAPI_ASYNC = Peer(
    "FastAPI with SQLAlchemy's ORM, async def", ("fastapi", "sqlalchemy"), fastapi_loop, True, calls=50
)

_ALL = (OURS, BARE_WSGI, FLASK, BARE_FLASK, FLASK_SQLALCHEMY, DJANGO, FASTAPI, FASTAPI_ASYNC)


def application() -> Any:
    """Return the application of a server that runs in a process of its own."""
    (peer,) = (peer for peer in _ALL if peer.name == os.environ["PEER"])
    return _open_until_exit.enter_context(peer.make(Path(os.environ["TOKENS_DATABASE"])))


_open_until_exit = ExitStack()
