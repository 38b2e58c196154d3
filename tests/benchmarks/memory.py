"""Print by how many bytes this process grows while it asks for random tokens.

Its arguments are the database, how many tokens that has, and how many requests to make. It is a program of its own,
because a process that did other things before has free memory, which would hide what is taken.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from calling import answer_of, usage_environ
from peers import OURS
from tokens_database import random_keys

_WARM_UP = 10  # requests: few, so that they do not fill SQLite's page cache


def main() -> None:
    path, tokens, requests = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    make_key = random_keys(tokens)
    with OURS.make(path) as app:
        for _ in range(_WARM_UP):
            answer_of(app, usage_environ(make_key()))
        before = _resident()
        for _ in range(requests):
            answer_of(app, usage_environ(make_key()))
        print(_resident() - before)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
