"""A program for test_killed_writers.py, whose processes charge a token until they are killed, one after the other.

A *life* is a process that makes one call after the other, and reports each that has returned. The processes are forked
from this small one, which opens no database. There are many, and a new interpreter takes longer to start than a life
lasts.
"""

import itertools
import multiprocessing
import os
import random
import signal
import sys
import time
from typing import NamedTuple

from usage_middleware import open_store

MODELS = ("gpt-4o", "gpt-4o-mini", None)
LONGEST_LIFE = 0.05  # seconds after its first call: some dozen calls
A_DAY = 86_400  # longer than any test: no reservation lapses
PROCESSES = multiprocessing.get_context("fork")


class Step(NamedTuple):
    """One call. Its arguments distinguish it from every other."""

    method: str
    name: str  # its idempotency key; of a settle, that of the reservation
    amount: int
    model: str | None = None
    refund_of: str | None = None  # the name of the charge


def steps(life):
    """Yield the calls of a life, without an end. Each call changes something."""
    numbers = random.Random(life)
    for number in itertools.count():
        name = f"{life}/{number}"
        amount = numbers.randint(1, 100)
        model = numbers.choice(MODELS)
        method = numbers.choice(("charge", "charge", "reserve", "refund"))
        if method == "reserve":
            yield Step("reserve", name, amount, model)
            yield Step("settle", name, numbers.randint(0, 100))
        else:
            yield Step("charge", name, amount, model)
        if method == "refund":
            yield Step("refund", f"{name}/refund", numbers.randint(1, amount), refund_of=name)


def take(step, store, key):
    if step.method == "settle":
        store.settle(store.find_operation(key, step.name), step.amount)
    elif step.method == "refund":
        store.refund(store.find_operation(key, step.refund_of), step.amount, idempotency_key=step.name)
    elif step.method == "reserve":
        store.reserve(key, step.amount, model=step.model, idempotency_key=step.name, expires_in=A_DAY)
    else:
        store.charge(key, step.amount, model=step.model, idempotency_key=step.name)


def live(text, key, life, reports, others):
    # Only the parent may have the reading end, so that a life whose parent has ended cannot report, and ends too.
    os.close(others)
    store = open_store(text)
    for step in steps(life):
        take(step, store, key)
        os.write(reports, b".")


def live_and_die(text, key, life):
    """Return how many calls of a life have returned before it was killed."""
    reading, writing = os.pipe()
    process = PROCESSES.Process(target=live, args=(text, key, life, writing, reading))
    process.start()
    os.close(writing)
    with open(reading, "rb", buffering=0) as reports:
        returned = len(reports.read(1))
        time.sleep(random.Random(life).uniform(0, LONGEST_LIFE))
        process.kill()
        process.join()
        returned += len(reports.readall())
    if process.exitcode != -signal.SIGKILL:
        sys.exit(f"life {life} ended by itself, with {process.exitcode}")
    return returned


def main(text, key, lane, lives):
    open_store(text).close()  # connects to nothing, and loads what each life would have to load
    for number in range(int(lives)):
        life = f"{lane}-{number}"
        print(life, live_and_die(text, key, life), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
