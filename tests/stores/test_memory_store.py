from usage_middleware import MemoryTokenStore
from usage_middleware.testing import QuotaStoreContract


class TestMemoryTokenStore(QuotaStoreContract):
    is_shared = False

    def make_store(self, tmp_path):
        return MemoryTokenStore()
