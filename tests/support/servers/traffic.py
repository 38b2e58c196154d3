"""The traffic of test_soak.py: requests of every kind, by the clients of a server and by its operator."""

from __future__ import annotations

import dataclasses
import http.client
import random
import threading
import time
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import NamedTuple

from client import PATH

from usage_middleware import SQLiteTokenStore
from usage_middleware.keys import strip_prefix

START_WITHIN = 60  # seconds
ANSWERED_WITHIN = 20
stop = None  # the event that stops all processes


def start(event, all_are_there):
    """Start a process: wait for the others."""
    global stop
    stop = event
    all_are_there.wait(START_WITHIN)


class Request(NamedTuple):
    method: str
    path: str
    authorization: str | None
    status: int
    body: str  # a part of it


def usage(key, body):
    return Request("GET", PATH, f"Bearer {key}", 200, body)


def not_found(key):
    return Request("GET", PATH, f"Bearer {key}", 401, "token not found")


def mix(keys, disabled, seed):
    """Yield every kind of request, over and over.

    :param keys: the names of tokens, by key.
    :param disabled: the key of a disabled token.
    """
    numbers = random.Random(seed)
    tokens = list(keys.items())
    while True:
        key, name = numbers.choice(tokens)
        unknown = f"{numbers.getrandbits(192):048x}"  # another one each time
        yield usage(key, f'"name":"{name}"')
        yield Request("GET", f"{PATH}/", f"bearer  {strip_prefix(key)} ", 200, f'"name":"{name}"')
        yield Request("HEAD", PATH, f"Bearer {key}", 200, "")
        yield not_found(unknown)
        yield Request("HEAD", PATH, f"Bearer {unknown}", 401, "")
        yield not_found(disabled)
        yield Request("GET", PATH, f"Bearer {unknown}, {unknown}", 401, "Invalid Bearer token")
        yield Request("GET", PATH, f"Basic {unknown}", 401, "Invalid Bearer token")
        yield Request("GET", PATH, None, 401, "No Authorization header")
        yield Request("OPTIONS", PATH, None, 204, "")
        yield Request("DELETE", PATH, f"Bearer {key}", 405, "Method Not Allowed")
        yield Request("GET", f"/other/{unknown}", f"Bearer {key}", 200, f"GET [] /other/{unknown}")


def percentile(latencies, percent):
    """Return a percentile in milliseconds, of latencies in nanoseconds."""
    return round(sorted(latencies)[len(latencies) * percent // 100] / 1e6, 2)


class Link:
    """A persistent connection to a server whose workers may be killed. A request without an answer is sent again."""

    def __init__(self, port):
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWERED_WITHIN)
        self.lost = 0

    def ask(self, request, **headers):
        """Return which process has answered ``request``, as it must be answered."""
        if request.authorization is not None:
            headers["Authorization"] = request.authorization
        while (answer := self._answer(request, headers)) is None:
            self._connection.close()
            self.lost += 1
        response, body = answer
        assert response.status == request.status, (request, response.status, body)
        assert request.body in body, (request, body)
        return int(response.headers["Served-By"])

    def _answer(self, request, headers):
        """Return the answer, or ``None`` if a worker has ended before or during it.

        A timeout is an error, and so is a port on which nothing listens.
        """
        try:
            self._connection.request(request.method, request.path, headers=headers)
            response = self._connection.getresponse()
            return response, response.read().decode()
        except (ConnectionResetError, BrokenPipeError, http.client.IncompleteRead):
            return None

    def close(self):
        """Close the connection. The next request opens it again."""
        self._connection.close()


@dataclasses.dataclass
class Seen:
    """What clients have seen."""

    answers: Counter = dataclasses.field(default_factory=Counter)  # by port and process
    statuses: Counter = dataclasses.field(default_factory=Counter)
    charged: Counter = dataclasses.field(default_factory=Counter)  # units by key, as acknowledged
    lost: Counter = dataclasses.field(default_factory=Counter)  # connections by port
    latencies: array = dataclasses.field(default_factory=lambda: array("Q"))  # nanoseconds

    def update(self, other):
        self.answers.update(other.answers)
        self.statuses.update(other.statuses)
        self.charged.update(other.charged)
        self.lost.update(other.lost)
        self.latencies.extend(other.latencies)


CONNECTIONS = 2  # of each client to each server
INTERVAL = 1 / 15  # seconds from one request of a connection to its next
REQUESTS_PER_CHARGE = 20
REQUESTS_PER_CONNECTION = 50  # otherwise all would stay with the worker that is never killed


def ask_all(ports, keys, disabled, seed):
    """Run a client's process: ask every server over several connections, at a constant rate."""
    seen = Seen()
    one_at_a_time = threading.Lock()

    def ask(port, name):
        numbers = random.Random(name)
        own = Seen()
        due = time.monotonic() + numbers.uniform(0, INTERVAL)
        with closing(Link(port)) as link:
            for count, request in enumerate(mix(keys, disabled, name)):
                time.sleep(max(0, due - time.monotonic()))
                if stop.is_set():
                    break
                due += INTERVAL
                begun = time.perf_counter_ns()
                own.answers[port, link.ask(request)] += 1
                own.latencies.append(time.perf_counter_ns() - begun)
                own.statuses[request.status] += 1
                if count % REQUESTS_PER_CHARGE == 0:
                    key = numbers.choice(list(keys))
                    charge = Request("POST", "/charge", f"Bearer {key}", 200, "charged")
                    own.answers[port, link.ask(charge, **{"X-Request-Id": f"{name}/{count}"})] += 1
                    own.statuses[charge.status] += 1
                    own.charged[key] += 1
                if count % REQUESTS_PER_CONNECTION == 0:
                    link.close()
            own.lost[port] += link.lost
        with one_at_a_time:
            seen.update(own)

    with ThreadPoolExecutor(len(ports) * CONNECTIONS) as pool:
        names = [(port, f"{seed}/{port}/{number}") for port in ports for number in range(CONNECTIONS)]
        for asked in [pool.submit(ask, port, name) for port, name in names]:
            asked.result()
    return seen


@dataclasses.dataclass
class Account:
    """The expected state of a token of the operator."""

    id: int
    key: str
    available: int
    used: int = 0

    def use(self, amount):
        self.used += amount
        self.available -= amount

    @property
    def usage(self):
        granted = self.used + self.available
        totals = f'"total_granted":{granted},"total_used":{self.used},"total_available":{self.available},'
        return usage(self.key, totals)


STEPS = ("create", "charge", "charge", "settle", "refund", "grant", "rotate", "delete")
OPERATOR_INTERVAL = 0.1  # seconds
STEPS_PER_PRUNE = 200
OLDER_THAN_ANY_RETRY = 3 * ANSWERED_WITHIN


@dataclasses.dataclass
class Books:
    """What an operator has at the end."""

    accounts: list[Account]
    archive: Counter  # units by token id, of the operations that were pruned
    steps: Counter
    lost: Counter  # connections by port


def operate(database, ports, seed):
    """Run the operator's process. Each worker must see at once what it has done."""
    numbers = random.Random(seed)
    books = Books([], Counter(), Counter(), Counter())
    accounts = books.accounts
    with SQLiteTokenStore(database) as store, ExitStack() as stack:
        links = {port: stack.enter_context(closing(Link(port))) for port in ports}
        while not stop.is_set():
            step = "create" if len(accounts) < 3 else "delete" if len(accounts) > 10 else numbers.choice(STEPS)
            books.steps[step] += 1
            if step == "create":
                key, token = store.create(total_available=10**6)
                accounts.append(Account(token.id, key, token.total_available))
            account = accounts[-1] if step == "create" else numbers.choice(accounts)
            old_key = account.key
            take_step(store, account, step, numbers.randint(1, 100), f"operator/{books.steps.total()}")
            if step == "delete":
                accounts.remove(account)
            for link in links.values():
                if step in ("rotate", "delete"):
                    link.ask(not_found(old_key))
                if step != "delete":
                    link.ask(account.usage)
            if books.steps.total() % STEPS_PER_PRUNE == 0:
                books.archive.update(prune(store, time.time() - OLDER_THAN_ANY_RETRY))
            time.sleep(OPERATOR_INTERVAL)
        books.lost.update({port: link.lost for port, link in links.items()})
    return books


def take_step(store, account, step, amount, name):
    key = account.key
    if step == "charge":
        store.charge(key, amount)
        account.use(amount)
    elif step == "settle":
        store.settle(store.reserve(key, 50), amount)
        account.use(amount)
    elif step == "refund":
        store.charge(key, 100, idempotency_key=name)
        store.refund(store.find_operation(key, name), amount)
        account.use(100 - amount)
    elif step == "grant":
        store.grant(account.id, amount)
        account.available += amount
    elif step == "rotate":
        account.key = store.rotate(account.id)
    elif step == "delete":
        store.delete(account.id)


def prune(store, before):
    """Prune, and return the units that the pruned operations held, by token id."""
    archive = Counter()
    for token in store.tokens():
        archive[token.id] += sum(o.held for o in store.history(token.id) if o.changed_at < before)
    store.prune(before)
    return archive
