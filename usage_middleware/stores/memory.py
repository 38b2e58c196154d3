"""Tokens in the memory of one process: for tests, demonstrations, and hosts that make their tokens at start."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..errors import StoreError
from ..tokens import Token
from .base import QuotaStore


class MemoryTokenStore(QuotaStore):
    """Keeps tokens in memory; they are gone with the process, and each process has its own.

    Even here only digests of keys are kept, so a dump of the memory shows no key that was not just in use.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._content: _Content | None = _Content()

    def __repr__(self) -> str:
        return "MemoryTokenStore()"

    @contextmanager
    def _transaction(self) -> Iterator[_Content]:
        with self._lock:
            yield self._open()

    def _get(self, digest: bytes) -> Token | None:
        content = self._open()
        # Two steps without the lock: a token that is deleted between them is simply not there any more.
        return content.tokens.get(content.ids.get(digest, 0))

    def _find(self, token_id: int) -> Token | None:
        return self._open().tokens.get(token_id)

    def _page(self, after: int, size: int) -> Sequence[Token]:
        content = self._open()
        page: list[Token] = []
        for token_id in range(after + 1, content.last_id + 1):
            token = content.tokens.get(token_id)
            if token is not None:
                page.append(token)
                if len(page) == size:
                    break
        return page

    def close(self) -> None:
        self._content = None

    def _open(self) -> _Content:
        if self._content is None:
            raise StoreError("MemoryTokenStore is closed")
        return self._content


class _Content:
    """What a memory store holds, as the transaction that changes it under the store's lock.

    No method fails half-way, and the caller checks before its first change, so nothing needs to be undone.
    """

    def __init__(self) -> None:
        self.tokens: dict[int, Token] = {}
        self.ids: dict[bytes, int] = {}
        self.last_id = 0
        self._digests: dict[int, bytes] = {}
        self._retired: set[bytes] = set()

    def load(self, token_id: int) -> Token | None:
        return self.tokens.get(token_id)

    def save(self, token: Token) -> None:
        assert token.id is not None
        self.tokens[token.id] = token

    def insert(self, token: Token, digest: bytes) -> int:
        self.last_id += 1
        self.tokens[self.last_id] = dataclasses.replace(token, id=self.last_id)
        self._digests[self.last_id] = digest
        self.ids[digest] = self.last_id
        return self.last_id

    def rekey(self, token: Token, digest: bytes) -> None:
        assert token.id is not None
        self._retire(token.id)
        self.tokens[token.id] = token
        self._digests[token.id] = digest
        self.ids[digest] = token.id

    def delete(self, token_id: int) -> None:
        self._retire(token_id)
        del self.tokens[token_id]

    def is_taken(self, digest: bytes) -> bool:
        return digest in self.ids or digest in self._retired

    def _retire(self, token_id: int) -> None:
        digest = self._digests.pop(token_id)
        self._retired.add(digest)
        del self.ids[digest]
