"""The contract that every store must pass, as pytest classes, for the stores of this package and for yours.

For a store that only looks tokens up, name a key that it holds and whose token is enabled:

.. code-block:: python

    class TestMyStore(TokenStoreContract):
        key = "a-key-that-is-there"
        def make_store(self, tmp_path): return MyStore("keys.db")

A :class:`QuotaStore` starts empty, and the contract fills it:

.. code-block:: python

    class TestMyStore(QuotaStoreContract):
        def make_store(self, tmp_path): return MyStore(tmp_path / "tokens.db")

``tmp_path`` is an empty directory for each test. To see what a store keeps, the contract calls ``make_store`` again
with the same ``tmp_path``. If a store's data are elsewhere, override ``reopen``. If it keeps nothing, set
``is_shared = False``. Tests that need a certain time set ``store._clock``, from which :class:`QuotaStore` takes the
time.

A class inherits the fixtures ``store``, ``holder`` and ``clock``, and may add tests to them.
With ``pytest.register_assert_rewrite("usage_middleware.testing")`` in ``conftest.py``, failures show the values.
"""

from .quota_store import QuotaStoreContract as QuotaStoreContract
from .token_store import TokenStoreContract as TokenStoreContract
