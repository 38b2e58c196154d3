from usage_middleware import SQLiteTokenStore
from usage_middleware.testing import QuotaStoreContract


class TestSQLiteTokenStore(QuotaStoreContract):
    def make_store(self, tmp_path):
        return SQLiteTokenStore(tmp_path / "tokens.db")
