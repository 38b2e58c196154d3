"""What :func:`open_store` and the constructors make of a text, and that nothing is loaded or connected for it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import psutil
import pytest
from sqlalchemy import URL, create_engine

from usage_middleware import MemoryTokenStore, SQLAlchemyTokenStore, SQLiteTokenStore, StoreError, open_store

SECRET = "s3cret"
NOWHERE = "127.0.0.1:1"


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        pytest.param("memory:", MemoryTokenStore, None, id="memory"),
        pytest.param("tokens.db", SQLiteTokenStore, "'{here}/tokens.db'", id="path"),
        pytest.param("/srv/tokens.db", SQLiteTokenStore, "'/srv/tokens.db'", id="absolute path"),
        pytest.param("C:tokens.db", SQLiteTokenStore, "'{here}/C:tokens.db'", id="path with a colon"),
        pytest.param("sqlite:///tokens.db", SQLiteTokenStore, "'{here}/tokens.db'", id="sqlite, relative"),
        pytest.param("sqlite:////srv/tokens.db", SQLiteTokenStore, "'/srv/tokens.db'", id="sqlite, absolute"),
        *(
            pytest.param(f"{scheme}://host/name", SQLAlchemyTokenStore, f"'{driver}://host/name'", id=scheme)
            for scheme, driver in {
                "postgresql": "postgresql+psycopg",
                "postgres": "postgresql+psycopg",
                "postgresql+psycopg": "postgresql+psycopg",
                "mysql": "mysql+pymysql",
                "MySQL": "mysql+pymysql",
                "mysql+pymysql": "mysql+pymysql",
                "mariadb": "mariadb+pymysql",
                "mariadb+pymysql": "mariadb+pymysql",
            }.items()
        ),
        pytest.param(
            f"mysql://user:{SECRET}@host:3307/name",
            SQLAlchemyTokenStore,
            "'mysql+pymysql://user:***@host:3307/name'",
            id="with a password",
        ),
        pytest.param(
            f"postgresql://user:{SECRET}%2F%40%3A@host/name",
            SQLAlchemyTokenStore,
            "'postgresql+psycopg://user:***@host/name'",
            id="with a quoted password",
        ),
        pytest.param(
            f"postgresql://host/name?user=me&password={SECRET}",
            SQLAlchemyTokenStore,
            "'postgresql+psycopg://host/name'",
            id="with a password in an option",
        ),
    ],
)
def test_a_text_names_a_store(tmp_path, monkeypatch, text, kind, name):
    monkeypatch.chdir(tmp_path)
    with open_store(text) as store:
        assert type(store) is kind
        if name is not None:
            assert repr(store) == f"{kind.__name__}({name.format(here=tmp_path)})"
        assert SECRET not in repr(vars(store))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        pytest.param("", ValueError, "path", id="empty"),
        pytest.param(None, TypeError, "str", id="None"),
        pytest.param(b"tokens.db", TypeError, "str", id="bytes"),
        pytest.param(Path("tokens.db"), TypeError, "str", id="path object"),
        pytest.param(":memory:", ValueError, "MemoryTokenStore", id="memory as SQLite has it"),
        pytest.param("sqlite://", ValueError, "sqlite:///PATH", id="sqlite without a path"),
        pytest.param("sqlite://tokens.db", ValueError, "sqlite:///PATH", id="sqlite with two slashes"),
        pytest.param("sqlite:///tokens.db?mode=ro", ValueError, "sqlite:///PATH", id="sqlite with options"),
        pytest.param("sqlite+aiosqlite:///tokens.db", ValueError, "sqlite:///PATH", id="sqlite, asynchronous"),
        pytest.param(f"oracle://me:{SECRET}@host/name", ValueError, "there is no store for oracle://", id="Oracle"),
        pytest.param(f"mssql://me:{SECRET}@host/name", ValueError, "there is no store for mssql://", id="SQL Server"),
        pytest.param(f"http://me:{SECRET}@host/name", ValueError, "there is no store for http://", id="no database"),
        pytest.param(f"postgresql+no://me:{SECRET}@host/name", ValueError, r"postgresql\+no", id="no driver"),
        pytest.param(
            f"postgresql+psycopg_async://me:{SECRET}@host/name", ValueError, "asynchronous", id="asynchronous driver"
        ),
        pytest.param(f"postgresql+pg8000://me:{SECRET}@host/name", ImportError, "pg8000", id="driver not installed"),
        pytest.param(f"postgresql://me:{SECRET}@host:port/name", ValueError, "form", id="port that is none"),
        pytest.param(f"://me:{SECRET}@host/name", ValueError, "form", id="no scheme"),
        # These would be paths of files, and shown.
        pytest.param(f"postgresql:/me:{SECRET}@host/name", ValueError, "form", id="one slash"),
        pytest.param(f"mysql+pymysql:me:{SECRET}@host/name", ValueError, "form", id="no slash"),
        # What stands behind the first @ would be taken for a host, and shown.
        pytest.param(f"postgresql://me:pass@{SECRET}@host/name", ValueError, "quote", id="password with @"),
        pytest.param(f"postgresql://me:pass@word/{SECRET}@host/name", ValueError, "quote", id="password with @ and /"),
        pytest.param(f"postgresql://me:pass@word:{SECRET}@host/name", ValueError, "form", id="password with @ and :"),
    ],
)
def test_a_text_that_names_none(text, error, says):
    with pytest.raises(error, match=says) as caught:
        open_store(text)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def url_of(drivername):
    return URL.create(drivername, "me", SECRET, "127.0.0.1", 1, "name")


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(url_of("postgresql+psycopg"), id="URL"),
        pytest.param(url_of("mysql"), id="URL without a driver"),
        pytest.param(create_engine(url_of("postgresql+psycopg")), id="engine"),
        pytest.param(create_engine(url_of("mariadb+pymysql")), id="engine of MariaDB"),
        pytest.param(
            create_engine(url_of("postgresql+psycopg")).execution_options(logging_token="x"), id="engine with options"
        ),
    ],
)
def test_sqlalchemys_own_objects_name_a_store(given):
    with SQLAlchemyTokenStore(given) as store:
        assert "***@127.0.0.1" in repr(store)
        assert SECRET not in repr(store)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        pytest.param(None, TypeError, "NoneType", id="None"),
        pytest.param(b"postgresql://host/name", TypeError, "bytes", id="bytes"),
        pytest.param(Path("tokens.db"), TypeError, "Path", id="path"),
        pytest.param("tokens.db", ValueError, "form", id="path as text"),
        pytest.param("sqlite:///tokens.db", ValueError, "sqlite is not one of .* SQLiteTokenStore", id="sqlite"),
        pytest.param(
            create_engine("sqlite://"), ValueError, "sqlite is not one of .* SQLiteTokenStore", id="engine of sqlite"
        ),
        pytest.param(URL.create("oracle"), ValueError, "oracle is not one of postgresql", id="URL of another database"),
        pytest.param(
            create_engine(url_of("postgresql+psycopg")).connect, TypeError, "method", id="something of an engine"
        ),
        pytest.param(
            create_engine(url_of("postgresql+psycopg_async")), ValueError, "asynchronous", id="asynchronous engine"
        ),
    ],
)
def test_something_else_does_not(given, error, says):
    with pytest.raises(error, match=says):
        SQLAlchemyTokenStore(given)


@pytest.mark.parametrize("scheme", ["postgresql", "mysql"])
def test_nothing_is_connected_before_the_first_use(scheme):
    before = psutil.Process().net_connections(), psutil.Process().num_fds(), threading.enumerate()
    with open_store(f"{scheme}://me:{SECRET}@{NOWHERE}/name") as store:
        assert (psutil.Process().net_connections(), psutil.Process().num_fds(), threading.enumerate()) == before
        with pytest.raises(
            StoreError, match=r"^(postgresql|mysql)\+\w+://me:\*\*\*@127.0.0.1:1/name failed: "
        ) as caught:
            store.get("key")
    shown = "".join(traceback.format_exception(caught.value))
    assert "refused" in shown
    assert SECRET not in shown


# --- What is loaded, and what need not be installed

# A finder of modules that has some not, whether they are installed or not.
WITHOUT = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, NotInstalled())
"""


def run(program, cwd):
    return subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True)


def test_what_is_not_used_is_not_loaded(tmp_path):
    program = (
        "import sys, usage_middleware as u\n"
        "u.open_store('tokens.db'), u.open_store('memory:')\n"
        "print('loaded:', *{'sqlalchemy', 'sqlite_utils', 'psycopg', 'pymysql'} & sys.modules.keys())"
    )
    assert run(program, tmp_path).stdout == "loaded:\n"


@pytest.mark.parametrize(
    ("missing", "use", "says"),
    [
        pytest.param(["sqlalchemy"], "u.open_store('postgresql://host/name')", "needs SQLAlchemy", id="open_store"),
        pytest.param(
            ["sqlalchemy"], "u.SQLAlchemyTokenStore('postgresql://host/name')", "needs SQLAlchemy", id="class"
        ),
        pytest.param(
            ["sqlalchemy"], "from usage_middleware import SQLAlchemyTokenStore", "needs SQLAlchemy", id="import"
        ),
        pytest.param(["psycopg"], "u.open_store('postgresql://host/name')", "needs the package psycopg", id="psycopg"),
        pytest.param(["pymysql"], "u.open_store('mysql://host/name')", "needs the package pymysql", id="PyMySQL"),
    ],
)
def test_what_is_not_installed_is_named_in_one_line(tmp_path, missing, use, says):
    done = run(f"{WITHOUT.format(missing=missing)}\nimport usage_middleware as u\n{use}", tmp_path)
    *trace, line = done.stderr.splitlines()
    assert line.startswith("ImportError: ")
    assert says in line
    assert "pip install sqlalchemy 'psycopg[binary]' 'pymysql[rsa]'" in line
    # Nothing about how the missing package was noticed.
    assert not any("another exception" in text or "direct cause" in text for text in trace)


def test_without_sqlalchemy_everything_else_works(tmp_path):
    program = (
        "import usage_middleware as u\n"
        "with u.open_store('tokens.db') as store: key, _ = store.create(total_available=2)\n"
        "with u.open_store('sqlite:///tokens.db') as store: print(store.charge(key[3:], 2).total_used)\n"
    )
    missing = ["sqlalchemy", "psycopg", "pymysql"]
    done = run(f"{WITHOUT.format(missing=missing)}\n{program}", tmp_path)
    assert (done.stdout, done.stderr) == ("2\n", "")
    assert os.listdir(tmp_path) == ["tokens.db"]


@pytest.mark.parametrize(
    ("option", "says"),
    [
        pytest.param("no_option=1", "no_option", id="unknown"),
        pytest.param("charset=no-charset", "option", id="impossible"),
        pytest.param("connect_timeout=-1", "option", id="out of range"),
        pytest.param("ssl_ca=no-file", "FileNotFoundError", id="no such file"),
        pytest.param("ssl_ca=/dev/null", "SSLError", id="no certificate"),
    ],
)
def test_an_option_of_a_url_that_the_driver_does_not_take(option, says):
    with (
        SQLAlchemyTokenStore(f"mysql://me:{SECRET}@127.0.0.1:1/name?{option}") as store,
        pytest.raises(StoreError, match=says) as caught,
    ):
        store.get("no-such-key")
    assert SECRET not in "".join(traceback.format_exception(caught.value))
