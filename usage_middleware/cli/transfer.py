"""The commands that move tokens between stores."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final

import click

from ..errors import StoreError
from ..stores.base import QuotaStore
from ..stores.sqlite.sqlite_store import SQLiteTokenStore
from ..tokens import TokenRecord
from .common import database_option, open_store
from .fields import BadRow
from .records import UnreadableSource, write_csv, write_json_lines
from .sources import FORMATS, Source, format_of, open_source

# Rows in a transaction. With a thousand, a large database would write each page of its index several times as often;
# this many take a fraction of a second, for which a charge that comes in between waits.
BATCH: Final = 10_000
_WRITERS: Final[Mapping[str, Callable[[Iterable[TokenRecord]], Iterator[str]]]] = {
    "csv": write_csv,
    "jsonl": write_json_lines,
}

_Restore = Callable[[Sequence[TokenRecord]], list[int | None]]
_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _format_option(help_text: str) -> _Decorator:
    return click.option("--format", "format_name", type=click.Choice(list(FORMATS)), help=help_text)


@click.command("import")
@database_option
@_format_option("What SOURCE is, where its name does not tell.")
@click.option("--dry-run", is_flag=True, help="Read and check all of it, tell what would be done, and write nothing.")
@click.argument("source")
@click.pass_context
def import_tokens(ctx: click.Context, source: str, format_name: str | None, dry_run: bool) -> None:
    """Import tokens from a file or from another database.

    SOURCE is a CSV file (.csv), JSON lines (.jsonl, .ndjson, .json), '-' for standard input, or a database by its file
    or URL. A row has a 'key', or a 'digest': SHA-256 of the key without sk-, in hexadecimal. It may have name,
    total_available, total_used, total_granted, unlimited_quota, model_limits, model_limits_enabled, expires_at,
    enabled, created_at, hint and model_usage.

    A token that is there already is left alone, so the same command goes on where one was stopped. Bad rows are told,
    the others imported; the exit status is 1 then.
    """
    tally = _Tally("would be imported" if dry_run else "imported")
    try:
        with (
            open_source(source, format_name) as opened,
            open_store(create=True, read_only=dry_run) as store,
            _rehearsal(store) if dry_run else nullcontext(store.restore) as restore,
            _told(tally),
        ):
            _copy(opened, restore, tally)
    except UnreadableSource as error:
        # A URL may have a password.
        shown = f"from {source.partition('://')[0]}://…" if "://" in source else source
        raise click.UsageError(f"cannot import {shown}: {error}") from None
    ctx.exit(1 if tally.bad else 0)


@click.command()
@database_option
@_format_option("What to write.  [default: what the name of --output tells, or jsonl]")
@click.option("--output", metavar="FILE", help="Where to write to, a new file.  [default: standard output]")
def export(format_name: str | None, output: str | None) -> None:
    """Export all tokens, as 'import' takes them.

    An export holds digests and no keys: in the store that imports it, the holders' keys work as before. What open
    reservations hold counts as used, and the history stays behind.
    """
    format_name = format_name or (format_of(output) if output else "jsonl")
    if format_name is None:
        raise click.UsageError(f"nothing tells the format of {output}; name it with --format csv or --format jsonl")
    try:
        with open_store() as store:
            if output:
                with _new_file(Path(output)) as file, _Progress("Exporting", store.count) as progress:
                    count = _write(store, format_name, file, progress)
            else:
                # No bar: at a terminal the tokens themselves show how it goes.
                with _Progress("", lambda: None) as progress:
                    count = _write(store, format_name, sys.stdout.buffer, progress)
    except OSError as error:
        if error.errno == errno.EPIPE:  # click ends quietly where nobody reads on
            raise
        raise click.UsageError(f"cannot write {output or 'to standard output'}: {error.strerror or error}") from None
    click.echo(f"{count:,} exported{f' to {output}' if output else ''}.", err=True)


class _Tally:
    """What became of the rows so far."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self.added = 0
        self.there = 0
        self.bad = 0

    @property
    def rows(self) -> int:
        return self.added + self.there + self.bad

    def __str__(self) -> str:
        return f"{self.added:,} {self._verb}, {self.there:,} already there, {self.bad:,} bad."


class _Progress:
    """A bar on standard error, where that is a terminal and the length is known."""

    def __init__(self, label: str, length: Callable[[], int | None]) -> None:
        known = length() if sys.stderr.isatty() else None
        self._bar = None if known is None else click.progressbar(length=known, label=label, file=sys.stderr)

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)

    def move(self, position: Callable[[], int]) -> None:
        if self._bar is not None:
            self._bar.update(position() - self._bar.pos)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._bar is None:
            click.echo(line, err=True)
        else:
            click.echo(f"\r\x1b[K{line}", err=True)
            self._bar.render_progress()


def _copy(source: Source, restore: _Restore, tally: _Tally) -> None:
    with _Progress("Importing", source.length) as progress:
        while True:
            count = 0
            records = []
            for count, (number, row) in enumerate(islice(source.rows, BATCH), 1):  # noqa: B007 - used below
                if isinstance(row, BadRow):
                    progress.say(f"{source.unit} {number}: {row}")
                    tally.bad += 1
                else:
                    records.append(row)
            if not count:
                return
            ids = restore(records)
            there = ids.count(None)
            tally.there += there
            tally.added += len(ids) - there
            progress.move(source.position)


@contextmanager
def _told(tally: _Tally) -> Iterator[None]:
    """Tells what was done, whether all of it was or not."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(tally, err=True)
        raise click.UsageError("stopped; the same command goes on from there") from None
    except (StoreError, UnreadableSource):
        if tally.rows:
            click.echo(tally, err=True)
        raise
    click.echo(tally, err=True)


@contextmanager
def _rehearsal(store: QuotaStore) -> Iterator[_Restore]:
    """What ``restore`` would return, but for the ids.

    The store is only read: to restore and roll back would make the charges of a live service wait, and needs a database
    that exists and may be written. A key that comes twice is found by a store of what has come, in a temporary file
    and not in memory, as there may be millions.
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


def _write(store: QuotaStore, format_name: str, file: BinaryIO, progress: _Progress) -> int:
    """Writes all tokens; returns how many there were."""
    count = 0

    def position() -> int:
        return count

    def counted() -> Iterator[TokenRecord]:
        nonlocal count
        for record in store.records():
            yield record
            count += 1
            if count % BATCH == 0:
                progress.move(position)

    for line in _WRITERS[format_name](counted()):
        # UTF-8 whatever the terminal has: what it does not have would be lost.
        file.write(line.encode())
    file.flush()
    progress.move(position)
    return count


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that only its owner can read, and that has its name when it is whole.

    One that is there is never replaced: it may be the only copy of what it holds.
    """
    if path.exists():
        raise click.UsageError(f"{path} is there already; remove it, or name another")
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


COMMANDS = (import_tokens, export)
