"""The contract of stores finds stores that are wrong, each in one way that no ordinary call shows."""

import dataclasses
import re
import subprocess
import sys

import pytest
import wrong_stores
from places import ROOT
from processes import environment
from wrong_stores import LocksItsThreads, RaisesWhatItsDriverRaises, RepeatsCommits, SkipsItsRows, TrustsItsRows

from usage_middleware import Operation, SQLiteTokenStore, StoreError, Token
from usage_middleware.testing.field_contract import FieldContract
from usage_middleware.testing.fixtures import Clock, Holder

MODULE = """
import wrong_stores
from usage_middleware import SQLiteTokenStore
from usage_middleware.testing import QuotaStoreContract

Store = {store}

class TestStore(QuotaStoreContract):
    def make_store(self, tmp_path):
        return Store(tmp_path / "tokens.db")
"""


def failures(tmp_path, store, tests):
    """The names of the tests of the contract that a store fails, of those that are chosen."""
    (tmp_path / "test_it.py").write_text(MODULE.format(store=store))
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-n0", "-c", ROOT / "setup.cfg", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--rootdir={tmp_path}", tmp_path / "test_it.py", "-k", tests],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout
    assert re.search(r"^\d+ (passed|failed)", done.stdout, re.MULTILINE), done.stdout
    return set(re.findall(r"^(?:FAILED|ERROR) test_it\.py::TestStore::(\S+)", done.stdout, re.MULTILINE))


CHOSEN = "every_field or made_twice or store_error or another_process"


@pytest.mark.slow
def test_a_store_that_is_right_passes(tmp_path):
    assert failures(tmp_path, "SQLiteTokenStore", CHOSEN) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("store", "found_by"),
    [
        (LocksItsThreads, {"test_another_process_waits_for_a_transaction"}),
        (RepeatsCommits, {"test_an_operation_is_never_made_twice"}),
        (
            RaisesWhatItsDriverRaises,
            {"test_an_operation_is_never_made_twice", "test_a_folder_that_is_missing_is_a_store_error"},
        ),
        (TrustsItsRows, {"test_a_row_that_is_not_a_token_is_a_store_error[model_limits-value0]"}),
        (SkipsItsRows, {"test_a_row_that_is_not_a_token_is_a_store_error[model_limits-value0]"}),
    ],
)
def test_a_wrong_store_is_found(tmp_path, store, found_by):
    assert found_by <= failures(tmp_path, f"wrong_stores.{store.__name__}", CHOSEN)


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "inserted"])
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Token) if field.name != "id"])
def test_a_store_that_forgets_a_field_of_a_token_is_found(tmp_path, field, saved):
    if saved and field == "created_at":
        pytest.skip("it never changes")
    test = (
        FieldContract.test_every_field_of_a_token_is_saved
        if saved
        else FieldContract.test_every_field_of_a_token_is_inserted
    )
    store = wrong_stores.forgets_of_a_token(field, saved=saved)
    with store(tmp_path / "tokens.db", clock=Clock()) as store, pytest.raises((AssertionError, StoreError)):
        test(FieldContract(), store, None, field)
    with SQLiteTokenStore(tmp_path / "right.db", clock=Clock()) as store:
        test(FieldContract(), store, None, field)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Operation) if field.compare])
def test_a_store_that_forgets_a_field_of_an_operation_is_found(tmp_path, field):
    with (
        wrong_stores.forgets_of_an_operation(field)(tmp_path / "tokens.db") as store,
        pytest.raises((AssertionError, StopIteration)),
    ):
        FieldContract().test_every_field_of_an_operation_is_saved(Holder(store), None, field)
