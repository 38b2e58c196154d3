"""Write docs/api.md from the docstrings, and docs/command.md from the help of the commands.

    python docs/generate.py [--check]

With --check it writes nothing, and fails if one of them is out of date.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import click

import usage_middleware
from usage_middleware import QuotaStore
from usage_middleware.cli import commands
from usage_middleware.testing import QuotaStoreContract, TokenStoreContract

FOLDER = Path(__file__).parent
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc|file):`[~.!]*([^`<]+?)(?: <[^`]*>)?`")
SECTIONS = (
    ("The middleware", ("UsageMiddleware", "NewAPI", "bearer_key")),
    (
        "The meter",
        (
            "UsageMeter",
            "PerRequest",
            "FromHeader",
            "LLMUsage",
            "Prices",
            "per_million",
            "Proxy",
            "requested_model",
            "llm_key",
            "Settlement",
            "Cost",
            "CostReader",
            "Usage",
        ),
    ),
    (
        "Stores",
        (
            "open_store",
            "MemoryTokenStore",
            "SQLiteTokenStore",
            "SQLAlchemyTokenStore",
            "NewAPITokenStore",
            "TokenStore",
            "QuotaStore",
        ),
    ),
    ("What they hold", ("Token", "Operation", "DayUsage", "TokenRecord", "Finding")),
    ("For authors of stores", ("Transaction", "Lookup", "Account", "Changes", "Step", "LogEntry")),
    (
        "Exceptions",
        (
            "UsageMiddlewareError",
            "StoreError",
            "DamagedToken",
            "QuotaError",
            "TokenNotFound",
            "TokenDisabled",
            "TokenExpired",
            "QuotaExceeded",
            "ModelNotAllowed",
            "OperationNotFound",
            "OperationConflict",
            "UpstreamError",
            "UpstreamTimeout",
        ),
    ),
)


def api() -> str:
    lines = [
        "# API",
        "",
        "Everything that can be imported from `usage_middleware`.",
        "",
        "This page is generated from the docstrings by `python docs/generate.py`.",
        "",
    ]
    listed = {name for _, names in SECTIONS for name in names}
    missing = sorted(set(usage_middleware.__all__) ^ listed)
    if missing:
        raise SystemExit(f"docs/generate.py has to put these in a section, or leave them out: {', '.join(missing)}")
    for title, names in SECTIONS:
        lines += [f"## {title}", ""]
        for name in names:
            lines += describe(name, getattr(usage_middleware, name), level=3)
    lines += ["## Tests for a store", "", "From `usage_middleware.testing`.", ""]
    for contract in (TokenStoreContract, QuotaStoreContract):
        lines += [f"### `{contract.__name__}`", "", *text(contract), ""]
    return "\n".join(lines).rstrip() + "\n"


def describe(name: str, thing: Any, level: int) -> list[str]:
    lines = [f"{'#' * level} `{name}{signature(thing)}`", "", *text(thing), ""]
    if dataclasses.is_dataclass(thing):
        lines += fields(thing)
    if inspect.isclass(thing) and not issubclass(thing, (Exception, enum.Enum)):
        for member, value in public_members(thing):
            lines += describe(member, value, level + 1)
    return lines


def public_members(kind: type) -> list[tuple[str, Any]]:
    """Return the public methods and properties that have a docstring of their own, in the order of their definition."""
    # What every store has is listed once, with QuotaStore.
    listed = () if kind is QuotaStore or not issubclass(kind, QuotaStore) else QuotaStore.__mro__
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("usage_middleware") and base not in listed:
            found |= {name: value for name, value in vars(base).items() if not name.startswith("_")}
    return [
        (name, value)
        for name, value in found.items()
        if not any(name in vars(base) for base in listed)
        if (inspect.isfunction(value) or isinstance(value, property)) and inspect.getdoc(value)
    ]


def signature(thing: Any) -> str:
    if isinstance(thing, property) or (inspect.isclass(thing) and issubclass(thing, Exception)):
        return ""
    if getattr(thing, "_is_protocol", False):
        return ""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in found.parameters.items()
        if name != "self"
    ]
    shown = str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    shown = re.sub(r"<(?:built-in )?function (\w+)[^>]*>", r"\1", shown)
    return re.sub(r"=<factory>", "={}", shown)


def fields(kind: type) -> list[str]:
    """Return a table of a dataclass' fields, with the comments that stand above them."""
    source = inspect.getsource(kind)
    lines = ["| field | type | |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        found = re.search(rf"((?:^    #: .*\n)*)^    {field.name}: ", source, re.MULTILINE)
        comment = " ".join(line.strip().removeprefix("#: ") for line in (found[1] if found else "").splitlines())
        kind_name = str(field.type).replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{kind_name}` | {marked(comment)} |")
    return [*lines, ""]


def marked(doc: str) -> str:
    """Return reStructuredText with the marks that Markdown has for code."""
    return ROLE.sub(r"`\1`", doc).replace("``", "`")


def text(thing: Any) -> list[str]:
    """Return a docstring as Markdown."""
    doc = inspect.getdoc(thing) or ""
    # Before marked() makes the columns narrower.
    doc = re.sub(r"^(=+(?: +=+)+)\n(.*)\n\1\n((?:.*\n)*?)\1$", table, doc, flags=re.MULTILINE)
    doc = marked(doc)
    doc = re.sub(r"^\.\. code-block:: \w+\n", "", doc, flags=re.MULTILINE)
    # Fields become a list.
    doc = re.sub(r"^:param ([^:]+):", r"- `\1`:", doc, flags=re.MULTILINE)
    doc = re.sub(r"^:returns?:", "- returns", doc, flags=re.MULTILINE)
    doc = re.sub(r"^:raises ([^:]+):", r"- raises `\1`:", doc, flags=re.MULTILINE)
    doc = re.sub(r"^:raises:", "- raises", doc, flags=re.MULTILINE)
    doc = re.sub(r"^(>>> (?:.+\n?)+)", r"```pycon\n\1\n```", doc, flags=re.MULTILINE)
    return doc.splitlines()


def table(match: re.Match[str]) -> str:
    """Return a simple table of reStructuredText as one of Markdown. The rows of equals signs show its columns."""
    border, heading, rows = match.groups()
    starts = [column.start() for column in re.finditer("=+", border)]
    columns = [slice(start, end) for start, end in zip(starts, [*starts[1:], None])]  # noqa: B905 - the same length
    lines = [[line[column].strip() for column in columns] for line in (heading, *rows.splitlines())]
    lines.insert(1, ["---"] * len(columns))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def command() -> str:
    lines = [
        "# The command",
        "",
        "`usage-middleware` manages tokens and serves the endpoint.",
        "",
        "This page is generated from the help of the commands by `python docs/generate.py`.",
        "",
        "An error is one line on standard error, and the exit status is 2.",
        "",
        *block(commands, "usage-middleware"),
    ]
    for name in commands.list_commands(click.Context(commands)):
        subcommand = commands.get_command(click.Context(commands), name)
        assert subcommand is not None
        lines += [f"## `{name}`", "", *block(subcommand, f"usage-middleware {name}")]
    return "\n".join(lines).rstrip() + "\n"


def block(subcommand: click.Command, name: str) -> list[str]:
    context = click.Context(subcommand, info_name=name, terminal_width=100, max_content_width=100)
    return ["```text", *(line.rstrip() for line in subcommand.get_help(context).splitlines()), "```", ""]


def main() -> None:
    stale = []
    for name, content in (("api.md", api()), ("command.md", command())):
        path = FOLDER / name
        if path.is_file() and path.read_text(encoding="utf-8") == content:
            continue
        stale.append(name)
        if "--check" not in sys.argv:
            path.write_text(content, encoding="utf-8")
    if stale and "--check" in sys.argv:
        raise SystemExit(f"out of date: {', '.join(stale)}; run python docs/generate.py")


if __name__ == "__main__":
    main()
