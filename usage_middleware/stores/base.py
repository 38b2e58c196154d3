"""What a store is: :class:`TokenStore` is all that the middleware needs, :class:`QuotaStore` what a host manages.

What a :class:`QuotaStore` does is written once, here and in its :class:`~.ledger.Ledger`. A store brings a
:class:`~.transaction.Transaction` and a few reads: it locks, loads, saves and commits, and knows no rule.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Protocol, TypeVar

from ..keys import HINT_LENGTH, check_key, key_digest, key_hint, make_key, with_prefix
from ..operations import MAX_INTEGER, check_amount, check_text
from ..tokens import Token, TokenRecord
from .findings import Finding
from .ledger import Ledger
from .transaction import Transaction, can_exist, find_token, id_of

_PAGE_SIZE: Final = 1000
_CHANGEABLE: Final = frozenset(
    ("name", "unlimited_quota", "model_limits", "model_limits_enabled", "expires_at", "enabled")
)
_TOTALS: Final = frozenset(("total_available", "total_used", "total_granted"))

_INTEGERS: Final = {
    "total_available": "quota units",
    "total_used": "quota units",
    "total_granted": "quota units",
    "expires_at": "Unix seconds",
    "created_at": "Unix seconds",
}
_DIGEST_SIZE: Final = 32

_QuotaStore = TypeVar("_QuotaStore", bound="QuotaStore")


class TokenStore(Protocol):
    """All that the middleware needs of a store. A plain ``dict[str, Token]`` is one."""

    def get(self, key: str, /) -> Token | None:
        """The token of ``key``, or ``None`` where there is none. Changes nothing.

        :param key: as :func:`bearer_key` gives it, one leading ``sk-`` stripped. The match is exact, case included.
        :raises Exception: anything raised here becomes a 503.
        """


class QuotaStore(Ledger):
    """A token store with the operations that hosts and operators need.

    A host asks by key, in the form that :func:`bearer_key` gives (no ``sk-`` in front). An operator works by token
    id. Every method may raise :class:`StoreError` where the database fails. What a method returned is committed.

    Safe to use from several threads; a store over a database also from several processes, forked ones included.
    """

    # --- What a store brings, with what the ledger asks of it.

    @abstractmethod
    def _get(self, digest: bytes) -> Token | None:
        """The token of that digest: the request path, one look-up by index."""

    @abstractmethod
    def _find(self, token_id: int) -> Token | None:
        """The token of that id."""

    @abstractmethod
    def _page(self, after: int, size: int) -> Sequence[tuple[Token, bytes]]:
        """Up to ``size`` tokens with an id greater than ``after``, by id, each with its digest."""

    @abstractmethod
    def taken(self, digests: Sequence[bytes]) -> set[bytes]:
        """Those of ``digests`` (:func:`key_digest` of keys) that a token has here, or had: what :meth:`restore` leaves
        alone. Reads only."""

    @abstractmethod
    def close(self) -> None:
        """Gives up what the store holds. Closing twice is fine, using a closed store is a :class:`StoreError`."""

    # --- What the host application calls, by key.

    def get(self, key: str, /) -> Token | None:
        """The token of ``key``, or ``None``. One that is disabled is returned too, with ``enabled`` false."""
        return self._get(key_digest(key))

    # --- What an operator calls, by token id.

    def create(
        self,
        *,
        name: str = "",
        total_available: int = 0,
        unlimited_quota: bool = False,
        model_limits: Mapping[str, int | bool] | None = None,
        model_limits_enabled: bool | None = None,
        expires_at: int = 0,
        key: str | None = None,
    ) -> tuple[str, Token]:
        """Adds a token.

        :param total_available: the quota to grant, 0 to 2**63 - 1 units.
        :param model_limits_enabled: left out, limits that are given are enabled.
        :param expires_at: Unix time in whole seconds; 0: never.
        :param key: a key that its holder has already; left out, one is made.
        :return: the key as its holder writes it (``sk-`` in front), and the token. The key is not kept and cannot
            be shown again.
        :raises TypeError: an argument has the wrong type.
        :raises ValueError: an argument is out of range, or the key is in use or was before.
        """
        stripped = make_key() if key is None else check_key(key)
        token = Token(
            name=name,
            total_available=total_available,
            unlimited_quota=unlimited_quota,
            model_limits={} if model_limits is None else model_limits,
            model_limits_enabled=bool(model_limits) if model_limits_enabled is None else model_limits_enabled,
            expires_at=expires_at,
            hint=key_hint(stripped),
            created_at=int(self._now()),
        )
        _check_storable(token)
        if not 0 <= total_available <= MAX_INTEGER:
            raise ValueError(f"total_available must be 0 to 2**63 - 1 quota units, got {total_available}")
        record = TokenRecord(token=token, digest=key_digest(stripped))
        (token_id,) = self._transact(lambda transaction: transaction.insert([record]))
        if token_id is None:
            raise ValueError("this key is in use or was before; a key never returns, so choose another")
        return with_prefix(stripped), dataclasses.replace(token, id=token_id)

    def find(self, token_id: int) -> Token | None:
        """The token of that id, or ``None``."""
        return self._find(token_id) if can_exist(token_id) else None

    def tokens(self) -> Iterator[Token]:
        """Every token, by id. They are read page by page: memory does not grow, and no lock is held in between."""
        for page in self._pages():
            for token, _ in page:
                yield token

    def count(self) -> int:
        """How many tokens there are."""
        return sum(1 for _ in self.tokens())

    def records(self) -> Iterator[TokenRecord]:
        """Every token with all that :meth:`restore` needs of it, by id, read as :meth:`tokens` reads them.

        What open reservations hold counts as used: settle them, or let them lapse and charge or prune, before a move.
        """
        for page in self._pages():
            usage: dict[int, dict[str, int]] = {}
            for token_id, model, used in self._model_usage(id_of(page[0][0]), id_of(page[-1][0])):
                usage.setdefault(token_id, {})[model] = used
            for token, digest in page:
                yield TokenRecord(token=token, digest=digest, model_usage=usage.get(id_of(token), {}))

    def restore(self, records: Iterable[TokenRecord]) -> list[int | None]:
        """Adds tokens as another store kept them, all of them in one transaction.

        :return: for each the id of the new token, or ``None`` where its key is in use here, or was before.
        :raises TypeError, ValueError: a record cannot be stored; no other is then.
        """
        checked = [check_record(record) for record in records]

        def work(transaction: Transaction) -> list[int | None]:
            ids = list(transaction.insert(checked))
            for record, token_id in zip(checked, ids, strict=True):
                for model, used in record.model_usage.items():
                    if token_id is not None:
                        transaction.add_model_used(token_id, model, used)
            return ids

        return self._transact(work) if checked else []

    def update(self, token_id: int, **changes: Any) -> Token:
        """Changes ``name``, ``unlimited_quota``, ``model_limits``, ``model_limits_enabled``, ``expires_at`` or
        ``enabled``; the others stay.

        :raises TokenNotFound: there is no such token.
        :raises TypeError: another field is named (the totals change only by charges and grants), or a value has
            the wrong type.
        :raises ValueError: a value is out of range.
        """
        for field in changes.keys() - _CHANGEABLE:
            remedy = "the totals change only by charges and grants" if field in _TOTALS else ""
            raise TypeError(
                f"update() cannot change {field!r}: {remedy or 'it takes ' + ', '.join(sorted(_CHANGEABLE))}"
            )

        def work(transaction: Transaction) -> Token:
            token = dataclasses.replace(find_token(transaction, token_id), **changes)
            _check_storable(token)
            transaction.save(token)
            return token

        return self._transact(work)

    def rotate(self, token_id: int) -> str:
        """Gives the token a new key. The old one stops at once and never returns.

        :return: the new key as its holder writes it. It is not kept and cannot be shown again.
        :raises TokenNotFound: there is no such token.
        """
        key = make_key()

        def work(transaction: Transaction) -> str:
            token = find_token(transaction, token_id)
            transaction.rekey(dataclasses.replace(token, hint=key_hint(key)), key_digest(key))
            return with_prefix(key)

        return self._transact(work)

    def delete(self, token_id: int) -> None:
        """Removes the token. Its key stops at once and never returns.

        :raises TokenNotFound: there is no such token.
        """

        def work(transaction: Transaction) -> None:
            find_token(transaction, token_id)
            transaction.delete(token_id)

        self._transact(work)

    def health(self) -> Iterator[Finding]:
        """What is well with the database, and what is not. Changes nothing."""
        return iter(())

    def _pages(self) -> Iterator[Sequence[tuple[Token, bytes]]]:
        after = 0
        while page := self._page(after, _PAGE_SIZE):
            yield page
            after = id_of(page[-1][0])

    def __enter__(self: _QuotaStore) -> _QuotaStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_record(record: TokenRecord) -> TokenRecord:
    """The record itself, if every store can hold it.

    :raises TypeError, ValueError: it cannot; the message names the field.
    """
    token = record.token
    _check_storable(token)
    if token.total_used < 0:
        raise ValueError(f"total_used must not be negative, got {token.total_used}")
    if len(token.hint) > HINT_LENGTH or "\0" in token.hint:
        raise ValueError(f"hint must be the last {HINT_LENGTH} characters of a key")
    if not isinstance(record.digest, bytes) or len(record.digest) != _DIGEST_SIZE:
        raise ValueError(f"a digest must be the {_DIGEST_SIZE} bytes of SHA-256")
    for model, used in record.model_usage.items():
        check_text("a model in model_usage", model)
        check_amount(used)
    return record


def _check_storable(token: Token) -> None:
    """What every database holds: 64-bit integers, and text without NUL (which PostgreSQL refuses)."""
    # A token that is restored is one of many: the one expression is all that an ordinary one costs.
    if not (
        -MAX_INTEGER <= token.total_available <= MAX_INTEGER
        and -MAX_INTEGER <= token.total_used <= MAX_INTEGER
        and -MAX_INTEGER <= token.total_used + token.total_available <= MAX_INTEGER
        and -MAX_INTEGER <= token.expires_at <= MAX_INTEGER
        and -MAX_INTEGER <= token.created_at <= MAX_INTEGER
    ):
        for field, unit in _INTEGERS.items():
            if abs(getattr(token, field)) > MAX_INTEGER:
                raise ValueError(f"{field} must be 0 to 2**63 - 1 {unit}, got {getattr(token, field)}")
    if "\0" in token.name:
        raise ValueError("name must not contain NUL characters")
    for model, limit in token.model_limits.items():
        if not model or "\0" in model:
            raise ValueError(f"a model in model_limits must be a name without NUL characters, got {model!r}")
        if limit > MAX_INTEGER:
            raise ValueError(f"model_limits[{model!r}] must be 0 to 2**63 - 1 quota units or True, got {limit}")
