"""The contract that every store must pass, as pytest classes: for the stores of this package, and for yours.

A store that only looks tokens up names a key that it holds, of a token that is enabled:

.. code-block:: python

    class TestMyStore(TokenStoreContract):
        key = "a-key-that-is-there"
        def make_store(self, tmp_path): return MyStore("keys.db")

A :class:`QuotaStore` starts empty, and the contract fills it:

.. code-block:: python

    class TestMyStore(QuotaStoreContract):
        def make_store(self, tmp_path): return MyStore(tmp_path / "tokens.db")

``tmp_path`` is an empty directory of the test's own. To see what a store keeps, the contract calls ``make_store`` again
with the same ``tmp_path``; a store whose data are elsewhere overrides ``reopen``, and one that keeps nothing sets
``is_shared = False``. Tests that need a certain time set ``store._clock``, which :class:`QuotaStore` asks for it.

A class inherits the fixtures ``store``, ``holder`` and ``clock``, and may add tests to them.
With ``pytest.register_assert_rewrite("usage_middleware.testing")`` in ``conftest.py``, failures show the values.
"""

from .quota_store import QuotaStoreContract as QuotaStoreContract
from .token_store import TokenStoreContract as TokenStoreContract
