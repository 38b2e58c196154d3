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

FOUND_BY = {
    LocksItsThreads: {"test_another_process_waits_for_a_transaction"},
    RepeatsCommits: {"test_an_operation_is_never_made_twice"},
    RaisesWhatItsDriverRaises: {
        "test_an_operation_is_never_made_twice",
        "test_a_folder_that_is_missing_is_a_store_error",
    },
    TrustsItsRows: {"test_a_row_that_is_not_a_token_is_a_store_error[model_limits-value0]"},
    SkipsItsRows: {"test_a_row_that_is_not_a_token_is_a_store_error[model_limits-value0]"},
}

MODULE = """
from usage_middleware import SQLiteTokenStore
from usage_middleware.testing import QuotaStoreContract
from wrong_stores import *
"""
CLASS = """
class Test{store}(QuotaStoreContract):
    def make_store(self, tmp_path):
        return {store}(tmp_path / "tokens.db")
"""

CHOSEN = "every_field or made_twice or store_error or another_process"


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """The names of the tests of the contract that each store fails, of those that are chosen."""
    folder = tmp_path_factory.mktemp("contract")
    stores = [store.__name__ for store in (SQLiteTokenStore, *FOUND_BY)]
    (folder / "test_it.py").write_text(MODULE + "".join(CLASS.format(store=store) for store in stores))
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-n0", "-c", ROOT / "setup.cfg", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--rootdir={folder}", folder / "test_it.py", "-k", CHOSEN],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout
    assert re.search(r"^\d+ failed, \d+ passed", done.stdout, re.MULTILINE), done.stdout
    found = re.findall(r"^(?:FAILED|ERROR) test_it\.py::Test(\w+)::(\S+)", done.stdout, re.MULTILINE)
    return {store: {test for failing, test in found if failing == store} for store in stores}


@pytest.mark.slow
def test_a_store_that_is_right_passes(failures):
    assert failures["SQLiteTokenStore"] == set()


@pytest.mark.slow
@pytest.mark.parametrize("store", FOUND_BY)
def test_a_wrong_store_is_found(failures, store):
    assert FOUND_BY[store] <= failures[store.__name__]


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
