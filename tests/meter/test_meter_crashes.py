"""Workers that are stopped or killed in the middle of a stream, and many clients at once."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from metered_front import COMMANDS, Front, request
from metered_rows import CHAT, FIXED, MOST
from raw_service import WAIT

from usage_middleware import SQLiteTokenStore

pytestmark = [pytest.mark.servers, pytest.mark.slow]

EXPIRES_IN = 5
TWO_WORKERS = [*COMMANDS["gunicorn-gthread"], "--workers=2"]
IMPATIENT = [*COMMANDS["gunicorn-sync"], "--timeout=1"]


def client_of_streams(front, path, key, until, bodies):
    """Ask for one stream after the other, whatever happens to it."""
    while not until.is_set():
        received = b""
        with suppress(OSError), socket.create_connection(("127.0.0.1", front.port), timeout=WAIT) as client:
            client.sendall(request(path, key, b"GET", b"Connection: close"))
            while piece := client.recv(65_536):
                received += piece
        bodies.append(received)


def test_killed_workers_charge_nothing_twice_and_their_reservations_lapse(tmp_path, full):
    """What was never settled is released when it lapses."""
    kills = 60 if full else 6
    random_ = random.Random(1)
    with Front("gunicorn", tmp_path, TWO_WORKERS, EXPIRES_IN=str(EXPIRES_IN)).running() as front:
        key, token_id = front.token(10**6)
        until, bodies = threading.Event(), []
        clients = [
            threading.Thread(target=client_of_streams, args=(front, "/direct/llm/slow", key, until, bodies))
            for _ in range(8)
        ]
        for client in clients:
            client.start()
        for _ in range(kills):
            time.sleep(random_.uniform(0.2, 0.8))  # somewhere in a stream of half a second
            workers = front.process.children()
            if workers:
                os.kill(random_.choice(workers).pid, signal.SIGKILL)
        until.set()
        for client in clients:
            client.join()
    # The reservations of the last worker that was killed have not lapsed yet. An operator sees them.
    with SQLiteTokenStore(front.database) as store:
        operations = list(store.history(token_id))
        settled = [o for o in operations if not o.is_open]
        assert {o.final_amount for o in settled} <= {CHAT, MOST, 0}
        # Each client that read a stream to its end has been charged for it, once.
        whole = sum(b"[DONE]" in body for body in bodies)
        assert whole <= sum(o.final_amount == CHAT for o in settled) <= len(bodies)
        assert len(settled) < len(operations)
        assert {o.id for o in store.open_reservations()} <= {o.id for o in operations if o.is_open}
    with SQLiteTokenStore(front.database, clock=lambda: time.time() + EXPIRES_IN + 1) as store:
        # A later request releases all of them.
        token = store.charge(key, 1)
        assert token.held == 0
        assert token.total_used == sum(o.final_amount for o in settled) + 1
        assert token.total_granted == 10**6
        assert not list(store.open_reservations())


def test_a_worker_that_times_out_charges_nothing(tmp_path):
    """gunicorn stops a worker that does not answer in time. The holder of the key does not pay for that."""
    with Front("gunicorn", tmp_path, IMPATIENT).running() as front:
        key, token_id = front.token()
        with socket.create_connection(("127.0.0.1", front.port), timeout=WAIT) as client, suppress(OSError):
            client.sendall(request("/direct/llm/hang", key))
            while client.recv(65_536):
                pass
        (operation,) = front.settled(token_id)
        assert operation.final_amount == 0


@pytest.mark.parametrize("name", ["gunicorn-gthread", "gunicorn-gevent"])
def test_a_stream_that_runs_during_a_shutdown_is_charged(tmp_path, name):
    """After SIGTERM, the server lets a stream that is running come to its end."""
    with Front(name, tmp_path).running() as front:
        key, token_id = front.token()
        client = socket.create_connection(("127.0.0.1", front.port), timeout=WAIT)
        client.sendall(request("/direct/llm/slow", key))
        assert client.recv(1)
    client.close()
    with SQLiteTokenStore(front.database) as store:
        (operation,) = store.history(token_id)
        assert operation.final_amount == CHAT


@pytest.mark.parametrize("name", ["gunicorn-gthread", "gunicorn-gevent", "waitress", "granian"])
@pytest.mark.parametrize(
    ("path", "total", "each"),
    [
        pytest.param("/direct/one/chunks", 32, 1, id="a fixed amount"),
        pytest.param("/direct/fixed/list", 32 * FIXED, FIXED, id="a list"),
        pytest.param("/direct/llm/events", 4 * MOST, CHAT, id="measured"),
    ],
)
def test_many_clients_at_once_never_overdraw_a_token(tmp_path, name, path, total, each):
    """The token allows half of 64 clients, or more of them if they cost less than they reserve."""
    with Front(name, tmp_path).running() as front:
        key, token_id = front.token(total)
        barrier = threading.Barrier(64)

        def ask(_):
            barrier.wait()
            return front.ask(path, key).status

        with ThreadPoolExecutor(64) as pool:
            statuses = Counter(pool.map(ask, range(64)))
        assert set(statuses) <= {200, 402, 429}
        operations = front.settled(token_id, statuses[200])
        assert all(o.final_amount == each for o in operations)
        token = front.store.get_by_id(token_id)
        assert token.total_available >= 0
        if each == CHAT:
            assert statuses[200] >= 4
        else:
            assert statuses[200] == 32
            assert token.total_available == 0


def test_overdrawn_by_no_more_than_the_costs_above_the_reservations(tmp_path):
    with Front("gunicorn", tmp_path, TWO_WORKERS).running() as front:
        key, token_id = front.token(10 * MOST)
        with ThreadPoolExecutor(64) as pool:
            statuses = Counter(pool.map(lambda _: front.ask("/direct/header/much", key).status, range(64)))
        operations = front.settled(token_id, statuses[200])
        assert {o.final_amount for o in operations} == {900}
        assert front.store.get_by_id(token_id).total_available >= -10 * (900 - MOST)
