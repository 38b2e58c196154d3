"""Schemas that evolve by numbered steps: one runner for SQLite and for database servers.

A database records the number of the last step that was applied to it. A step that a released version may have applied
is never edited, only followed by another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar

from ..errors import StoreError

_Connection = TypeVar("_Connection")

TablesState: TypeAlias = Literal["none", "earlier", "current"]
"""Whether a database has no tables of ours, those of an earlier version, or those of this one."""


class WrongTables(StoreError):
    """The database cannot be used as it is. The message follows the database's name."""


@dataclass(frozen=True)
class Schema(Generic[_Connection]):
    """How a database is upgraded.

    :param steps: step ``n`` brings a database of version ``n - 1`` to version ``n``; a database without tables has
        version 0.
    :param version: returns the version of a database, and only reads. It raises :class:`WrongTables` if the database
        has tables with our names that we did not make.
    :param record: records a version, in the transaction of its step.
    """

    steps: Sequence[Callable[[_Connection], None]]
    version: Callable[[_Connection], int]
    record: Callable[[_Connection, int], None]

    def state(self, connection: _Connection) -> TablesState:
        """Return whether a database has tables of ours, and whether they have the newest version. Only read.

        :raises WrongTables: it was made by a newer version, or by something else.
        """
        version = self._checked_version(connection)
        return "none" if version == 0 else "current" if version == len(self.steps) else "earlier"

    def is_current(self, connection: _Connection) -> bool:
        """Return whether a database has the newest version. Only read.

        :raises WrongTables: as :meth:`state`.
        """
        return self.state(connection) == "current"

    def upgrade(self, connection: _Connection) -> None:
        """Apply the steps that are missing. The caller keeps other processes from doing so at the same time.

        :raises WrongTables: as :meth:`is_current`.
        """
        for number in range(self._checked_version(connection) + 1, len(self.steps) + 1):
            self.steps[number - 1](connection)
            self.record(connection, number)

    def _checked_version(self, connection: _Connection) -> int:
        version = self.version(connection)
        if version > len(self.steps):
            raise WrongTables(
                f"was made by a newer usage-middleware (its tables have version {version}, this one knows "
                f"{len(self.steps)}); upgrade usage-middleware"
            )
        return version
