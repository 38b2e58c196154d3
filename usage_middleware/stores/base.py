"""What a store is: :class:`TokenStore` is all that the middleware needs, :class:`QuotaStore` what a host manages.

What a :class:`QuotaStore` does is written once, here and in its :class:`~.ledger.Ledger` and
:class:`~.history.History`. A store brings the :class:`~.hooks.StoreHooks` and a
:class:`~.transaction.Transaction`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final, Protocol, TypeVar

from ..accounts import Changes, Lookup
from ..checks import can_exist, check_amount
from ..keys import check_key, key_digest, key_hint, make_key, with_prefix
from ..operations import bring_up_to_date
from ..renewal import first_renewal, renewed
from ..tokens import Token, TokenRecord, id_of
from .history import History
from .hooks import MOST_LAPSED, new_id, pages
from .ledger import Ledger, token_not_found
from .storable import check_record, check_storable
from .transaction import Transaction

_PAGE_SIZE: Final = 1000
_QuotaStore = TypeVar("_QuotaStore", bound="QuotaStore")


class _Unchanged:
    """Mark an argument of :meth:`QuotaStore.update` as left out. ``None`` may become a value one day."""

    def __repr__(self) -> str:
        return "..."


_UNCHANGED: Final[Any] = _Unchanged()


class TokenStore(Protocol):
    """All that the middleware needs of a store. A plain ``dict[str, Token]`` is one."""

    def get(self, key: str, /) -> Token | None:
        """Return the token of ``key``, or ``None`` if there is none. Change nothing.

        :param key: as :func:`~usage_middleware.bearer_key` returns it, every leading ``sk-`` stripped. The match is
            exact, case included.
        :raises Exception: anything raised here becomes a 503.
        """


class QuotaStore(Ledger, History):
    """A token store with the operations that hosts and operators need.

    A host asks by key, with or without its prefix ``sk-``. An operator works by token id. Every method may raise
    :class:`StoreError` if the database fails. What a method returned is committed.

    Safe to use from several threads; a store over a database also from several processes, forked ones included.
    """

    # --- What the host application calls, by key.

    def get(self, key: str, /) -> Token | None:
        """Return the token of ``key``, or ``None``. One that is disabled is returned too, with ``enabled`` false.

        A quota that renews is shown as it is now. Nothing is written: the next change of the token records the renewal.
        """
        return self._as_of_now(self._get(key_digest(key)))

    def _as_of_now(self, token: Token | None) -> Token | None:
        return token if token is None or not token.renews_at else renewed(token, self._now())

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
        renewal: str = "",
        renewal_quota: int | None = None,
    ) -> tuple[str, Token]:
        """Add a token.

        :param total_available: the quota to grant, 0 to 2**63 - 1 units.
        :param model_limits_enabled: left out, they are enabled if ``model_limits`` is given.
        :param expires_at: Unix time in whole seconds; 0: never.
        :param key: a key that its holder already has; left out, the store makes one.
        :param renewal: ``"daily"``, ``"weekly"`` or ``"monthly"``: how often the quota renews, in UTC; ``""``: never.
        :param renewal_quota: the units that each period begins with; left out, ``total_available``. The first period
            begins at once, with ``total_available`` if that is given too.
        :return: the key as its holder writes it (``sk-`` in front), and the token. The key is not kept and cannot
            be shown again.
        :raises TypeError: an argument has the wrong type.
        :raises ValueError: an argument is out of range, or the key is in use or was before.
        """
        stripped = make_key() if key is None else check_key(key)
        now = self._now()
        check_amount(total_available, "total_available")
        if renewal_quota is None:
            renewal_quota = total_available if renewal else 0
        check_amount(renewal_quota, "renewal_quota")
        token = Token(
            name=name,
            total_available=total_available or (renewal_quota if renewal else 0),
            unlimited_quota=unlimited_quota,
            model_limits={} if model_limits is None else model_limits,
            model_limits_enabled=bool(model_limits) if model_limits_enabled is None else model_limits_enabled,
            expires_at=expires_at,
            hint=key_hint(stripped),
            created_at=int(now),
            renewal=renewal,
            renewal_quota=renewal_quota,
        )
        token = dataclasses.replace(token, renews_at=first_renewal(renewal, now))
        check_storable(token)
        record = TokenRecord(token=token, digest=key_digest(stripped))
        (token_id,) = self._transact(lambda transaction: transaction.insert([record]))
        if token_id is None:
            raise ValueError("this key is in use or was before; a key never returns, so choose another")
        return with_prefix(stripped), dataclasses.replace(token, id=token_id)

    def get_by_id(self, token_id: int) -> Token | None:
        """Return the token of that id, or ``None``."""
        return self._as_of_now(self._get_by_id(token_id)) if can_exist(token_id) else None

    def tokens(self) -> Iterator[Token]:
        """Yield every token, by id. They are read page by page: memory does not grow, and no lock is held."""
        for token in pages(lambda after: self._page(after, _PAGE_SIZE), id_of, 0):
            yield self._as_of_now(token) or token

    def count(self) -> int:
        """Return how many tokens there are."""
        return sum(1 for _ in self.tokens())

    def records(self) -> Iterator[TokenRecord]:
        """Yield every token by id, with all that :meth:`restore` needs of it. They are read as :meth:`tokens` reads
        them. The figures of each are of one moment: they agree even while the token is charged.

        What open reservations hold counts as used. Before a move, settle them, or let them lapse and then charge or
        prune.
        """
        return pages(lambda after: self._records(after, _PAGE_SIZE), lambda record: id_of(record.token), 0)

    def restore(self, records: Iterable[TokenRecord]) -> list[int | None]:
        """Add tokens as another store kept them, all in one transaction.

        Their operations are not copied, so the new tokens have no units ``held``.

        :return: for each the id of the new token, or ``None`` if its key is in use here, or was before.
        :raises TypeError, ValueError: a record cannot be stored. Then no record is.
        """
        now = self._now()
        checked = [check_record(_as_restored(record, now)) for record in records]
        return list(self._transact(lambda transaction: transaction.insert(checked))) if checked else []

    def update(
        self,
        token_id: int,
        *,
        name: str = _UNCHANGED,
        unlimited_quota: bool = _UNCHANGED,
        model_limits: Mapping[str, int | bool] = _UNCHANGED,
        model_limits_enabled: bool = _UNCHANGED,
        expires_at: int = _UNCHANGED,
        enabled: bool = _UNCHANGED,
        renewal: str = _UNCHANGED,
        renewal_quota: int = _UNCHANGED,
    ) -> Token:
        """Change the fields of a token that are given. Its totals change only by charges and grants.

        :param renewal: how often the quota renews: the next period begins when the next day, week or month does.
            ``""``: never, and the quota stays as it is.
        :param renewal_quota: what the next period begins with.
        :return: the token after the change.
        :raises TokenNotFound: there is no such token.
        :raises TypeError: a value has the wrong type.
        :raises ValueError: a value is out of range.
        """
        named = {
            "name": name,
            "unlimited_quota": unlimited_quota,
            "model_limits": model_limits,
            "model_limits_enabled": model_limits_enabled,
            "expires_at": expires_at,
            "enabled": enabled,
            "renewal": renewal,
            "renewal_quota": renewal_quota,
        }
        changes: dict[str, Any] = {field: value for field, value in named.items() if value is not _UNCHANGED}
        if changes.get("renewal") == "":
            changes.setdefault("renewal_quota", 0)

        def edit(_: Transaction, before: Token, now: float) -> Token:
            token = dataclasses.replace(before, **changes)
            if token.renewal != before.renewal:
                token = dataclasses.replace(token, renews_at=first_renewal(token.renewal, now))
            check_storable(token)
            return token

        return self._edit(token_id, edit)

    def rotate(self, token_id: int) -> str:
        """Give the token a new key. The old one stops at once and never returns.

        :return: the new key as its holder writes it. It is not kept and cannot be shown again.
        :raises TokenNotFound: there is no such token.
        """
        key = make_key()

        def edit(transaction: Transaction, token: Token, _: float) -> Token:
            transaction.rekey(token_id, key_digest(key))
            return dataclasses.replace(token, hint=key_hint(key))

        self._edit(token_id, edit)
        return with_prefix(key)

    def delete(self, token_id: int) -> None:
        """Remove the token. Its key stops at once and never returns.

        :raises TokenNotFound: there is no such token.
        """

        if not can_exist(token_id):
            raise token_not_found(token_id)

        def work(transaction: Transaction) -> None:
            if transaction.load(Lookup(token_id=token_id, now=self._now(), most_lapsed=0)) is None:
                raise token_not_found(token_id)
            transaction.delete(token_id)

        self._transact(work)

    def _edit(self, token_id: int, edit: Callable[[Transaction, Token, float], Token]) -> Token:
        """Save what ``edit`` makes of a token that is up to date and locked, and return it."""
        if not can_exist(token_id):
            raise token_not_found(token_id)
        renewal_id = new_id()

        def work(transaction: Transaction) -> Token:
            now = self._now()
            account = transaction.load(Lookup(token_id=token_id, now=now, most_lapsed=MOST_LAPSED))
            if account is None:
                raise token_not_found(token_id)
            current, due = bring_up_to_date(account, now, renewal_id=renewal_id)
            token = edit(transaction, current.token, now)
            changes = Changes(before=current.token, token=token)
            transaction.save(changes if due is None else due.then(changes))
            return token

        return self._transact(work)

    def __enter__(self: _QuotaStore) -> _QuotaStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_restored(record: TokenRecord, now: float) -> TokenRecord:
    token = record.token
    if not token.held and bool(token.renews_at) == bool(token.renewal):
        return record
    renews_at = token.renews_at if token.renewal and token.renews_at else first_renewal(token.renewal, now)
    return dataclasses.replace(record, token=dataclasses.replace(token, held=0, renews_at=renews_at))
