"""The documentation: its examples run, its links have targets, and its reference is up to date."""

import inspect
import os
import re
import shlex
import sqlite3
import subprocess
import sys

import pytest
from places import ROOT, SCRIPTS

import usage_middleware
from usage_middleware import NewAPI, Proxy, SQLAlchemyTokenStore, SQLiteTokenStore, UsageMeter, UsageMiddleware
from usage_middleware.cli import commands

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

EXAMPLES = [
    pytest.param(text, id=f"{page.stem}-{number}")
    for page in DOCS
    if page.stem != "api"
    for number, text in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1)
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Yield an empty folder with the database that the examples of own-table.md use."""
    monkeypatch.chdir(tmp_path)
    database = sqlite3.connect("customers.db")
    database.execute("CREATE TABLE cust (apikey TEXT PRIMARY KEY, nm TEXT, credits INTEGER, spent INTEGER)")
    database.execute("INSERT INTO cust VALUES ('a-key-that-is-there', NULL, 75, 25)")
    database.commit()
    database.close()
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("text", EXAMPLES)
def test_an_example_runs(text):
    if "Contract)" not in text:
        exec(text, {"__name__": "example"})
        return
    # This one is a test module, which needs the class of the example before it.
    before = next(other.values[0] for other in EXAMPLES if "class Customers:" in other.values[0])
    with open("test_example.py", "w") as file:
        file.write(before + "\n\n" + text)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "test_example.py"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert re.search(r"\d\d passed", result.stdout)


def anchors(page):
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_have_targets(page):
    text = re.sub(r"```.*?^```|`[^`]*`", "code", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in LINK.findall(text):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.slow
def test_the_reference_is_up_to_date():
    result = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr


def defaults():
    """Yield every keyword argument of the classes that a host constructs, with its default."""
    for thing in (UsageMiddleware, UsageMeter, Proxy, NewAPI, SQLiteTokenStore, SQLAlchemyTokenStore):
        for name, parameter in inspect.signature(thing).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and name != "clock":
                yield thing.__name__, name, parameter.default


@pytest.mark.parametrize(("thing", "name", "default"), [*defaults()])
def test_every_setting_is_documented_with_its_default(thing, name, default):
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    section = text.partition(f"## `{thing}`")[2].partition("\n## ")[0]
    row = re.search(rf"^\| `{name}` \| (.*?) \|", section, re.MULTILINE)
    assert row, f"{thing} takes {name}"
    shown = default.__name__ if callable(default) else repr(default).replace("'", '"')
    assert row[1].replace(",", "").replace("_", "") == f"`{shown}`".replace(",", "").replace("_", "")


def test_every_option_of_serve_is_documented():
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    options = {option for parameter in commands.commands["serve"].params for option in parameter.opts}
    assert {option for option in options if f"`{option}" not in text} == set()


def test_every_public_name_can_be_imported_and_is_described():
    for name in usage_middleware.__all__:
        assert getattr(usage_middleware, name).__doc__, name
    assert set(usage_middleware.__all__) <= set(dir(usage_middleware))


def test_the_commands_for_moving_tokens_print_what_the_page_shows(tmp_path, postgresql, monkeypatch):
    monkeypatch.setenv("PATH", f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}")
    text = (ROOT / "docs" / "moving-tokens.md").read_text(encoding="utf-8")
    console = re.search(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1]
    parts = (part.partition("\n") for part in re.split(r"^\$ ", console, flags=re.MULTILINE)[1:])
    (rehearse, _, told), (move, _, moved) = parts
    (tmp_path / "customers.csv").write_text(
        "key,total_available\none-key-of-24-characters,5\nanother-key-of-24-letters,\na-bad-key,1e6\n"
    )
    done = subprocess.run(shlex.split(rehearse), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", told)
    assert not (tmp_path / "tokens.db").exists()

    with SQLiteTokenStore(tmp_path / "tokens.db", synchronous="OFF") as store, postgresql.database() as url:
        for _ in range(1204):
            store.create()
        move = move.replace("postgresql://user:password@host/name", url)
        assert subprocess.run(shlex.split(move), check=True, capture_output=True, text=True).stderr == moved
