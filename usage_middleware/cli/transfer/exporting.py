"""The command that writes tokens to a file."""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

import click

from ...stores.base import QuotaStore
from ...tokens import TokenRecord
from ..db_option import database_option, open_store
from ..printing import say
from .progress import Progress
from .records import LINE_LIMIT, too_long, write_csv, write_json_lines
from .sources import FORMATS, format_of

_WRITERS: Final[Mapping[str, Callable[[Iterable[TokenRecord]], Iterator[str]]]] = {
    "csv": write_csv,
    "jsonl": write_json_lines,
}
_STEP: Final = 1000  # tokens between two moves of the bar


@click.command()
@database_option
@click.option(
    "--format",
    "format_name",
    type=click.Choice(list(FORMATS)),
    help="The format to write.  [default: that of the file extension of --output, or jsonl]",
)
@click.option("--output", metavar="FILE", help="The file to write, which must not exist.  [default: standard output]")
def export(format_name: str | None, output: str | None) -> None:
    """Export all tokens in a format that 'import' reads.

    An export contains digests and no keys. In the store that imports it, the holders' keys work as before. Usage by day
    and by model is exported too, the history is not. What open reservations hold is exported as used.
    """
    format_name = format_name or (format_of(output) if output else "jsonl")
    if format_name is None:
        raise click.UsageError(
            f"the name {output} does not say which format to write; add --format csv or --format jsonl"
        )
    try:
        with open_store(read_only=True) as store:
            if output:
                with _new_file(Path(output)) as file, Progress("Exporting", store.count) as progress:
                    count = _write(store, format_name, file, progress)
            else:
                # No bar: at a terminal, the tokens themselves show the progress.
                with Progress("", lambda: None) as progress:
                    count = _write(store, format_name, sys.stdout.buffer, progress)
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader has closed the pipe: click exits quietly
            raise
        raise click.ClickException(f"cannot write {output or 'to standard output'}: {_text_of(error)}") from None
    say(f"{count:,} exported{f' to {output}' if output else ''}.")


def _write(store: QuotaStore, format_name: str, file: BinaryIO, progress: Progress) -> int:
    """Write all tokens, and return how many there were."""
    count = 0
    token_id = None

    def position() -> int:
        return count

    def counted() -> Iterator[TokenRecord]:
        nonlocal count, token_id
        for record in store.records():
            token_id = record.token.id
            yield record
            count += 1
            if count % _STEP == 0:
                progress.move(position)

    for line in _WRITERS[format_name](counted()):
        if too_long(line):
            raise click.UsageError(
                f"the usage by day of token {token_id} takes more than {LINE_LIMIT:,} characters, the most that a line "
                "may have; 'usage-middleware import' copies it from database to database, without a file"
            )
        # Write UTF-8 whatever the encoding of the terminal is, so that no character is lost.
        file.write(line.encode())
    file.flush()
    progress.move(position)
    return count


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that only its owner can read. It gets its name once it is complete.

    An existing file is never replaced: it may be an only copy.
    """
    if path.exists():
        raise click.UsageError(f"{path} exists already; remove it, or name another file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # The name is known before the file is created, so it is removed whenever a signal arrives.
    try:
        with open(temporary, "xb", opener=_open_for_owner) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _open_for_owner(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def _text_of(error: OSError) -> str:
    return error.strerror or str(error)


COMMANDS = (export,)
