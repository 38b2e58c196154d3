"""The command that reads tokens from a file or from another database."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final

import click

from ...errors import StoreError
from ...stores.base import QuotaStore
from ...stores.sqlite.sqlite_store import SQLiteTokenStore
from ...tokens import TokenRecord
from ..db_option import database_option, open_store
from ..printing import say
from .fields import FROM_TEXT, KEY_MIN_LENGTH, BadRow
from .progress import Progress
from .records import Row, UnreadableSource
from .sources import FORMATS, Source, open_source

# Rows per transaction. With a thousand, a large database would write each page of its index several times as often.
# This many take a fraction of a second, and a charge that arrives meanwhile waits as long.
BATCH: Final = 10_000
# Days and models per transaction: one token may have as many of them as ten thousand other tokens have fields.
BATCH_USAGE: Final = 100_000

_Restore = Callable[[Sequence[TokenRecord]], list[int | None]]


@click.command("import", epilog=f"Fields: {', '.join(FROM_TEXT)}.")
@database_option
@click.option(
    "--format",
    "format_name",
    type=click.Choice(list(FORMATS)),
    help="The format of SOURCE, if its file extension does not show it.",
)
@click.option("--dry-run", is_flag=True, help="Read and check everything, print what would be done, and write nothing.")
@click.argument("source")
@click.pass_context
def import_tokens(ctx: click.Context, source: str, format_name: str | None, dry_run: bool) -> None:
    """Import tokens from a file or from another database.

    SOURCE is a CSV file (.csv), JSON lines (.jsonl, .ndjson, .json), '-' for standard input, or a database by its file
    or URL. A row has a 'key', or a 'digest': SHA-256 of the key without sk-, in hexadecimal. Every other field may be
    left out.

    A token that is already there is left as it is, so the same command continues an import that was stopped. Bad rows
    are reported and the others are imported; the exit status is 1 then.
    """
    tally = _Tally(dry_run=dry_run)
    try:
        with (
            open_source(source, format_name) as opened,
            open_store(create=True, dry_run=dry_run) as store,
            _dry_run(store) if dry_run else nullcontext(store.restore) as restore,
            _reported(tally),
        ):
            _copy(opened, restore, tally)
    except UnreadableSource as error:
        # A URL may have a password.
        shown = f"from {source.partition('://')[0]}://…" if "://" in source else source
        raise click.UsageError(f"cannot import {shown}: {error}") from None
    ctx.exit(1 if tally.bad else 0)


class _Tally:
    """How many rows were imported, already there, or bad so far."""

    def __init__(self, *, dry_run: bool) -> None:
        self._dry_run = dry_run
        self.added = 0
        self.there = 0
        self.bad = 0
        #: Rows of the batch whose transaction is under way.
        self.uncertain = 0
        self.short_keys = 0
        self.first_short_key = ""

    @property
    def rows(self) -> int:
        return self.added + self.there + self.bad

    def note(self, unit: str, row: Row) -> None:
        """Count a row that came with a short key."""
        if row.has_short_key:
            self.short_keys += 1
            self.first_short_key = self.first_short_key or f"{unit} {row.number}"

    def stopped(self) -> click.UsageError:
        # The interrupt may have come before the COMMIT or after it.
        unsure = f"; {self.uncertain:,} more may have been imported" if self.uncertain and not self._dry_run else ""
        return click.UsageError(f"stopped{unsure}; run the same command again to continue")

    def report(self) -> None:
        imported = "would be imported" if self._dry_run else "imported"
        say(f"{self.added:,} {imported}, {self.there:,} already there, {self.bad:,} bad.")
        if self.short_keys:
            noun = "key has" if self.short_keys == 1 else "keys have"
            say(
                f"Warning: {self.short_keys:,} {noun} fewer than {KEY_MIN_LENGTH} characters (the first on "
                f"{self.first_short_key}). Anyone who reads the database can find such a key by trying all of them; "
                "'usage-middleware rotate' gives a token a long one."
            )


def _copy(source: Source, restore: _Restore, tally: _Tally) -> None:
    with Progress("Importing", source.length) as progress:
        for records in _batches(source, tally, progress):
            tally.uncertain = len(records)
            ids = restore(records)
            there = ids.count(None)
            tally.there += there
            tally.added += len(ids) - there
            tally.uncertain = 0
            progress.move(source.position)


def _batches(source: Source, tally: _Tally, progress: Progress) -> Iterator[list[TokenRecord]]:
    """Yield the tokens in batches of bounded size, and print what is wrong with each bad row."""
    records: list[TokenRecord] = []
    rows = usage = 0
    for row in source.rows:
        if isinstance(row.content, BadRow):
            progress.say(f"{source.unit} {row.number}: {row.content}")
            tally.bad += 1
        else:
            tally.note(source.unit, row)
            records.append(row.content)
            usage += len(row.content.days) + len(row.content.model_usage)
        rows += 1
        if rows >= BATCH or usage >= BATCH_USAGE:
            yield records
            records, rows, usage = [], 0, 0
    if records:
        yield records


@contextmanager
def _reported(tally: _Tally) -> Iterator[None]:
    """Print what was done, even if the import is stopped or fails."""
    try:
        yield
    except KeyboardInterrupt:
        tally.report()
        raise tally.stopped() from None
    except (StoreError, UnreadableSource):
        if tally.rows:
            tally.report()
        raise
    tally.report()


@contextmanager
def _dry_run(store: QuotaStore) -> Iterator[_Restore]:
    """Yield a function that returns what ``restore`` would return, except for the ids.

    The store is only read. Restoring and rolling back would make the charges of a live service wait, and would need a
    database that exists and may be written. What has been read goes to a second store, which finds a key that occurs
    twice. It is a temporary file and not in memory, as there may be millions of tokens.
    """
    with (
        tempfile.TemporaryDirectory(prefix="usage-middleware-") as directory,
        SQLiteTokenStore(Path(directory, "tokens.db"), synchronous="OFF") as seen,
    ):

        def restore(records: Sequence[TokenRecord]) -> list[int | None]:
            taken = store.taken([record.digest for record in records])
            new = [record for record in records if record.digest not in taken]
            return [None] * (len(records) - len(new)) + seen.restore(new)

        yield restore


COMMANDS = (import_tokens,)
