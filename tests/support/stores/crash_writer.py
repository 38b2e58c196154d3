"""A program for test_killed_writers.py, whose processes charge a token until they are killed, one after the other.

A *life* is a process of one or more threads that make one call after the other, and report each that has returned. The
processes are forked from this small one, which opens no database. There are many, and a new interpreter takes longer to
start than a life lasts.
"""

import itertools
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
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


def names(life, threads):
    """Return the name of each thread's own life."""
    return [f"{life}.{number}" for number in range(threads)]


def live(text, key, life, threads, reports, others):
    # Only the parent may have the reading end, so that a life whose parent has ended cannot report, and ends too.
    os.close(others)
    store = open_store(text)

    def live_on(number, name):
        for step in steps(name):
            take(step, store, key)
            os.write(reports, bytes([number]))

    for number, name in enumerate(names(life, threads)):
        threading.Thread(target=live_on, args=(number, name)).start()


def live_and_die(text, key, life, threads):
    """Return how many calls of each thread of a life have returned before it was killed."""
    reading, writing = os.pipe()
    process = PROCESSES.Process(target=live, args=(text, key, life, threads, writing, reading))
    process.start()
    os.close(writing)
    with open(reading, "rb", buffering=0) as reports:
        returned = reports.read(1)
        time.sleep(random.Random(life).uniform(0, LONGEST_LIFE))
        process.kill()
        process.join()
        returned += reports.readall()
    if process.exitcode != -signal.SIGKILL:
        sys.exit(f"life {life} ended by itself, with {process.exitcode}")
    counts = Counter(returned)
    return {name: counts[number] for number, name in enumerate(names(life, threads))}


def main(text, key, lane, lives, threads):
    open_store(text).close()  # connects to nothing, and loads what each life would have to load
    for number in range(int(lives)):
        life = f"{lane}-{number}"
        for name, returned in live_and_die(text, key, life, int(threads)).items():
            print(name, returned, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
