"""Making, checking, stripping and hashing keys.

A key is what its holder sends. Every ``sk-`` in front of it is decoration, and is stripped wherever a key enters. So a
key is the same with and without it. Stores keep :func:`key_digest` of a stripped key and never the key.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from typing import Final

KEY_PREFIX: Final = "sk-"
KEY_MAX_LENGTH: Final = 512
# Visible ASCII (RFC 9110 section 5.5, VCHAR) without the comma, which joins two headers of one name into one value.
KEY_PATTERN: Final = rf"[!-+\--~]{{1,{KEY_MAX_LENGTH}}}"

_KEY: Final = re.compile(KEY_PATTERN)
_KEY_ALPHABET: Final = string.ascii_letters + string.digits
_KEY_LENGTH: Final = 48  # what public clients expect after the prefix; 285 bits
HINT_LENGTH: Final = 4
HINT_MIN_KEY_LENGTH: Final = 24


def strip_prefix(key: str) -> str:
    """Return the key as stores see it: without any leading ``sk-``, however many there are."""
    while (stripped := key.removeprefix(KEY_PREFIX)) != key:
        key = stripped
    return key


def with_prefix(key: str) -> str:
    """Return ``key`` as its holder writes it: with one ``sk-``, unless that makes it longer than a key may be."""
    stripped = strip_prefix(key)
    written = KEY_PREFIX + stripped
    return written if len(written) <= KEY_MAX_LENGTH else stripped


def make_key() -> str:
    """Return a new key without its prefix: 48 letters and digits from :mod:`secrets`."""
    return "".join(secrets.choice(_KEY_ALPHABET) for _ in range(_KEY_LENGTH))


def check_key(key: object) -> str:
    """Check a key that an operator chose, and return it stripped.

    :raises TypeError: it is not a ``str``.
    :raises ValueError: a client could not send it. The messages do not show the key.
    """
    if not isinstance(key, str):
        raise TypeError(f"a key must be a str, got {type(key).__name__}")
    stripped = strip_prefix(key)
    if not stripped or not _KEY.fullmatch(key):
        raise ValueError(
            f"a key must be 1 to {KEY_MAX_LENGTH} visible ASCII characters without a comma or a space, "
            f"with or without {KEY_PREFIX!r} in front"
        )
    return stripped


def key_digest(key: str) -> bytes:
    """Return the SHA-256 digest of a key, with or without its prefix: all that a store keeps of it.

    A plain digest is right here, where a slow password hash would not be: a key has 285 random bits, which no
    dictionary holds, and the digest must be found by an index.
    """
    if not isinstance(key, str):
        raise TypeError(f"a key must be a str, got {type(key).__name__}")
    # Any text has a digest. So a request with a key that cannot exist gets an answer, and not an encoding error whose
    # traceback would show the key.
    return hashlib.sha256(strip_prefix(key).encode("utf-8", "surrogatepass")).digest()


def key_hint(key: str) -> str:
    """Return the last four characters of a key, to distinguish keys in lists. The hint of a short key is empty.

    A person who reads the database has the digest too, and can guess what the hint leaves of a short key: four unknown
    characters can be guessed, 20 cannot.
    """
    stripped = strip_prefix(key)
    return stripped[-HINT_LENGTH:] if len(stripped) >= HINT_MIN_KEY_LENGTH else ""
