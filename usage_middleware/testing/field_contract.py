"""The contract of what a store keeps: every field of a token and of an operation, and nothing that is not a token."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from ..accounts import Changes, Step
from ..errors import QuotaError, StoreError
from ..keys import key_digest
from ..operations import Operation
from ..stores.base import QuotaStore
from ..stores.hooks import new_id
from ..tokens import Token, TokenRecord, id_of
from .fixtures import NOW, Clock, Holder, QuotaStoreFixtures

# Of each field a value that is not its default.
_TOKEN: Final = Token(
    name="Saved \u4ee4\u724c",
    total_available=987,
    total_used=13,
    unlimited_quota=True,
    model_limits={"a": True, "b": 5},
    model_limits_enabled=True,
    expires_at=1_900_000_000,
    enabled=False,
    id=1,
    hint="wxyz",
    created_at=1_700_000_000,
    renewal="weekly",
    renewal_quota=70,
    renews_at=1_900_000_001,
    held=7,
)
_OPERATION: Final = Operation(
    id="saved",
    token_id=1,
    kind="reserve",
    amount=9,
    idempotency_key="saved \u4ee4\u724c",
    model="a",
    held=7,
    unlimited=True,
    at_least=3,
    expires_in=60.5,
    expires_at=NOW + 60.5,
    final_amount=8,
    input_tokens=5,
    output_tokens=6,
    refund_of="another",
    created_at=NOW + 0.25,
    changed_at=NOW + 0.5,
)
# The token's id is the store's own, as is an operation's place in its order.
_FIELDS_OF_TOKEN: Final = [field.name for field in dataclasses.fields(Token) if field.name != "id"]
_FIELDS_OF_OPERATION: Final = [field.name for field in dataclasses.fields(Operation) if field.compare]


class FieldContract(QuotaStoreFixtures):
    """A transaction saves every field that it is given, and a row that is not a token is not taken for one."""

    # --- Every field

    @pytest.mark.parametrize("field", [field for field in _FIELDS_OF_TOKEN if field != "created_at"])
    def test_every_field_of_a_token_is_saved(self, store: QuotaStore, clock: Clock, field: str) -> None:
        key, token = store.create()
        # A database may hold what belongs together to be together.
        names = ("renewal", "renewal_quota", "renews_at") if field.startswith("renew") else (field,)
        changed = dataclasses.replace(token, **{name: getattr(_TOKEN, name) for name in names})
        assert getattr(changed, field) != getattr(token, field)
        for before, after in ((token, changed), (changed, token)):
            _save(store, Changes(before=before, token=after))
            assert store.get(key) == store.get_by_id(id_of(token)) == after

    @pytest.mark.parametrize("field", _FIELDS_OF_TOKEN)
    def test_every_field_of_a_token_is_inserted(self, store: QuotaStore, clock: Clock, field: str) -> None:
        expected = getattr(_TOKEN, field)
        assert expected != getattr(Token(), field)
        record = TokenRecord(token=_TOKEN, digest=key_digest("inserted"))
        (token_id,) = store._transact(lambda transaction: transaction.insert([record]))
        assert token_id is not None
        assert getattr(store.get_by_id(token_id), field) == expected
        assert [getattr(moved.token, field) for moved in store.records()] == [expected]

    @pytest.mark.parametrize("field", _FIELDS_OF_OPERATION)
    def test_every_field_of_an_operation_is_saved(self, holder: Holder, clock: Clock, field: str) -> None:
        store, token = holder.store, holder.token
        full = dataclasses.replace(_OPERATION, token_id=holder.id)
        blank = Operation(id=new_id(), token_id=holder.id, kind="charge", amount=None)
        assert field == "token_id" or getattr(full, field) != getattr(blank, field)
        for made in (full, blank):
            _save(store, Changes(before=token, token=token, steps=(Step(None, made),)))
            found = store.operation(made.id)
            assert found is not None
            for read in (found, next(store.history(holder.id))):
                assert getattr(read, field) == getattr(made, field)

    # --- What fails

    @pytest.mark.parametrize(("field", "value"), [("model_limits", {"a": -1}), ("renewal", "hourly")])
    def test_a_row_that_is_not_a_token_is_a_store_error(
        self, holder: Holder, clock: Clock, field: str, value: object
    ) -> None:
        """What another program wrote, or a disk has damaged, is neither taken for a token nor in the way of another."""
        if not self.is_shared:
            pytest.skip("this store keeps tokens and no rows")
        store, token, other = holder.store, holder.token, Holder(holder.store)
        # A token that could not be made: its fields are not checked.
        broken = dataclasses.replace(token)
        object.__setattr__(broken, field, value)
        try:
            _save(store, Changes(before=token, token=broken))
        except StoreError:  # The database itself refuses it.
            assert holder.token == token
            return
        for use in (
            lambda: store.get(holder.key),
            lambda: store.get_by_id(holder.id),
            lambda: list(store.tokens()),
            lambda: holder.charge(1),
        ):
            with pytest.raises(StoreError):
                use()
        assert other.charge(1).total_used == 1

    def test_a_folder_that_is_missing_is_a_store_error(self, tmp_path: Path) -> None:
        """A store that keeps a file says so in its own words; another finds what it needs elsewhere."""
        store = None
        try:
            with suppress(StoreError):
                store = self.make_store(tmp_path / "no" / "such" / "folder")
        except NotImplementedError:
            pytest.skip("a fixture makes this store")
        if store is None:
            return
        with store:
            for use in (lambda: store.get("key"), store.create, lambda: store.charge("key", 1), store.count):
                with suppress(StoreError, QuotaError):
                    use()


def _save(store: QuotaStore, changes: Changes) -> None:
    store._transact(lambda transaction: transaction.save(changes))
