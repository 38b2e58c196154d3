"""The whole contract of a :class:`~usage_middleware.QuotaStore`, composed of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ..errors import StoreError
from ..keys import key_digest, strip_prefix
from ..stores.base import QuotaStore
from ..tokens import Token, TokenRecord
from .charge_contract import ChargeContract, ModelLimitContract
from .day_contract import DayContract
from .field_contract import FieldContract
from .fixtures import TODAY, Holder
from .held_contract import HeldContract
from .history_contract import HistoryContract, LogContract, PruneContract
from .key_contract import KeyContract
from .lapse_contract import LapseContract
from .record_contract import RecordContract
from .refund_contract import GrantContract, RefundContract
from .renewal_contract import RenewalContract
from .repeat_contract import RepeatContract
from .reservation_contract import ReservationContract
from .token_contract import TokenContract
from .token_store import TokenStoreContract
from .transaction_contract import TransactionContract

_USES: dict[str, Callable[[Holder], Any]] = {
    "get": lambda holder: holder.store.get(holder.key),
    "charge": lambda holder: holder.charge(1),
    "reserve": lambda holder: holder.reserve(1),
    "settle": lambda holder: holder.store.settle("operation", 1),
    "refund": lambda holder: holder.store.refund("operation"),
    "operation": lambda holder: holder.store.operation("operation"),
    "find_operation": lambda holder: holder.store.find_operation(holder.key, "work"),
    "create": lambda holder: holder.store.create(),
    "get_by_id": lambda holder: holder.store.get_by_id(holder.id),
    "tokens": lambda holder: list(holder.store.tokens()),
    "count": lambda holder: holder.store.count(),
    "update": lambda holder: holder.store.update(holder.id, name="x"),
    "charge_by_id": lambda holder: holder.store.charge_by_id(holder.id, 1),
    "grant": lambda holder: holder.store.grant(holder.id, 1),
    "rotate": lambda holder: holder.store.rotate(holder.id),
    "delete": lambda holder: holder.store.delete(holder.id),
    "history": lambda holder: list(holder.store.history(holder.id)),
    "model_usage": lambda holder: holder.store.model_usage(holder.id),
    "log": lambda holder: holder.store.log(holder.id),
    "count_requests": lambda holder: holder.store.count_requests(holder.id),
    "usage_by_day": lambda holder: holder.store.usage_by_day(holder.id, TODAY, TODAY),
    "open_reservations": lambda holder: list(holder.store.open_reservations()),
    "prune": lambda holder: holder.store.prune(0),
    "count_finished": lambda holder: holder.store.count_finished(0),
    "records": lambda holder: list(holder.store.records()),
    "restore": lambda holder: holder.store.restore([TokenRecord(token=Token(), digest=key_digest("new"))]),
    "taken": lambda holder: holder.store.taken([key_digest("key")]),
}


class QuotaStoreContract(
    TokenContract,
    KeyContract,
    ChargeContract,
    ModelLimitContract,
    RepeatContract,
    ReservationContract,
    LapseContract,
    RefundContract,
    GrantContract,
    DayContract,
    RenewalContract,
    HeldContract,
    TransactionContract,
    HistoryContract,
    LogContract,
    PruneContract,
    RecordContract,
    FieldContract,
    TokenStoreContract,
):
    """What hosts and operators rely on in a :class:`QuotaStore`. The store that is made must be empty."""

    def known_key(self, store: QuotaStore) -> str:
        key, _ = store.create(name="Known", total_available=1000, model_limits={"gpt-4o": 500})
        return strip_prefix(key)

    @pytest.mark.parametrize("use", _USES)
    def test_a_closed_store_says_so(self, store: QuotaStore, use: str) -> None:
        with store:
            holder = Holder(store)
        store.close()
        with pytest.raises(StoreError, match="closed"):
            _USES[use](holder)

    def test_the_contract_closes_every_method(self) -> None:
        methods = {name for name in dir(QuotaStore) if not name.startswith("_")}
        assert methods == {*_USES, "close", "health", "tables_state", "today"}
