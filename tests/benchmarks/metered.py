"""What the meter adds to a request, compared with reserving and settling by hand, and to each event of a stream."""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from calling import SERVE, environ, start_response
from comparing import Contender, Table, compare, measure, table_of

from usage_middleware import LLMUsage, MemoryTokenStore, SQLiteTokenStore, UsageMeter, bearer_key

_PATH = "/v1/work"
_BODY = b"x" * 100
_EVENTS = 1000  # in a stream: enough for the request itself to hardly count
_BUDGET_OF_AN_EVENT = 5e-6  # seconds
_REQUEST = json.dumps({"model": "gpt-4o", "stream": True, "messages": []}).encode()


def metered_request(rounds: int) -> Iterator[Table]:
    """Compare a request that the meter reserves and settles with one for which the application does so itself."""
    title = "A metered request, against the same application with reserve and settle called by hand"
    with tempfile.TemporaryDirectory(prefix="usage-middleware-") as directory:
        with SQLiteTokenStore(Path(directory, "durable.db")) as store:
            # One call per turn: each waits for the disk, and other work of the disk then disturbs a single call.
            waiting = {"clock": time.perf_counter, "calls": 1, "budget": 1.2}
            yield compare(f"{title}: durable, on the clock", *_requests(store, **waiting), rounds=rounds)
        with SQLiteTokenStore(Path(directory, "other.db"), synchronous="OFF") as store:
            yield compare(f"{title}: processor time, without waiting for the disk", *_requests(store), rounds=rounds)


def metered_events(rounds: int) -> Iterator[Table]:
    """Measure the meter's own time for an event: that of a stream with the meter, less that of the stream without."""
    with MemoryTokenStore() as store:
        rows = [("5 microseconds", [_BUDGET_OF_AN_EVENT] * rounds, None)]
        for name, chunks, cost in _streams():
            bare, metered = _stream_contenders(store, name, chunks, cost)
            costs = measure([bare, metered], rounds=rounds)
            added = [(ours - theirs) / _EVENTS for ours, theirs in zip(costs[metered], costs[bare], strict=True)]
            rows.append((name, added, 1.0))
    yield table_of("An event of a stream: the meter's own time", rows)


def _requests(store: SQLiteTokenStore, *, budget: float | None = None, **settings: Any) -> tuple[Contender, Contender]:
    key, _ = store.create(total_available=2**62)

    def by_hand(environ: Any, start_response: Any) -> Any:
        key = bearer_key(environ)
        assert key is not None
        operation = store.reserve(key, 1, expires_in=3600)
        units = 0
        try:
            answer = _application(environ, start_response)
            units = 1
        finally:
            store.settle(operation, units)
        return answer

    def make_environ() -> dict[str, Any]:
        return environ(_PATH, f"Bearer {key}")

    def contender(name: str, app: Any, budget: float | None = None) -> Contender:
        return Contender(name, SERVE, make_environ, app=app, start_response=start_response, budget=budget, **settings)

    meter = UsageMeter(_application, store)
    return contender("reserve and settle by hand", by_hand), contender("UsageMeter", meter, budget)


def _application(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "100")])
    return [_BODY]


def _streams() -> Iterator[tuple[str, list[bytes], LLMUsage]]:
    plain, ask = LLMUsage(most=1000), LLMUsage(most=1000, ask=True)
    openai, asked = _chat_event(), _chat_event(usage=None)
    middle = len(openai) // 2
    halves = [openai[:middle], openai[middle:]]
    yield "OpenAI's, without usage", [openai], plain
    yield "OpenAI's, asked for their usage", [asked], plain
    yield "OpenAI's, and the usage is removed", [asked], ask
    yield "OpenAI's, each in two chunks", halves, plain
    yield "OpenAI's, each in two chunks, and the usage is removed", halves, ask
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": " word"}}
    yield "Anthropic's", [b"event: content_block_delta\ndata: " + json.dumps(delta).encode() + b"\n\n"], plain


def _chat_event(**more: Any) -> bytes:
    chunk = {
        "id": "chatcmpl-0123456789abcdefghijklmnopqrs",
        "object": "chat.completion.chunk",
        "created": 1_750_000_000,
        "model": "gpt-4o-2024-08-06",
        "service_tier": "default",
        "system_fingerprint": "fp_0123456789",
        "choices": [{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}],
        **more,
    }
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def _stream_contenders(
    store: MemoryTokenStore, name: str, chunks: list[bytes], cost: LLMUsage
) -> tuple[Contender, Contender]:
    key, _ = store.create(total_available=2**62)

    def service(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        for _ in range(_EVENTS):
            yield from chunks

    def make_environ() -> dict[str, Any]:
        request = environ(_PATH, f"Bearer {key}")
        return request | {"wsgi.input": io.BytesIO(_REQUEST), "CONTENT_LENGTH": str(len(_REQUEST))}

    def contender(name: str, app: Callable[..., Any]) -> Contender:
        return Contender(name, SERVE, make_environ, calls=1, app=app, start_response=start_response)

    return contender("bare", service), contender(name, UsageMeter(service, store, cost=cost))
