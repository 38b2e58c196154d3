"""How to install what an optional part of the package needs. All messages about that come from here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: The packages of each extra in ``setup.cfg``. They are listed one by one because no package named
#: ``usage-middleware`` is published: ``pip install 'usage-middleware[sql]'`` would not find it.
PACKAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "metrics": ("prometheus_client",),
    "sql": ("sqlalchemy", "psycopg[binary]", "pymysql[rsa]"),
    "throttle": ("limits",),
}


def how_to_install(extra: str) -> str:
    """Return the command that installs the packages of an extra, as a shell takes it."""
    # A shell takes brackets for a pattern of file names.
    packages = (f"'{name}'" if "[" in name else name for name in PACKAGES[extra])
    return f"pip install {' '.join(packages)}"
