"""A token with its key, and the status that the holder of a key gets."""

from client import ask, wrapped

from usage_middleware import UsageMiddleware
from usage_middleware.keys import strip_prefix


def create(store, **fields):
    """Add a token. Return its key as stores see it, and the token."""
    key, token = store.create(**{"total_available": 1000, **fields})
    return strip_prefix(key), token


def status(store, key):
    """Return the status with which the endpoint answers a key."""
    return ask(UsageMiddleware(wrapped, store), authorization=f"Bearer {key}").status
