"""Which store a text names: the same one for ``open_store`` and for every command, third-party stores included."""

from __future__ import annotations

import ast
import subprocess
import sys
from configparser import ConfigParser
from contextlib import closing
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from places import ROOT

import usage_middleware
from usage_middleware import NewAPITokenStore, SQLAlchemyTokenStore, SQLiteTokenStore, open_store
from usage_middleware.extras import PACKAGES

# A store over a file of SQLite under a name of its own: small, and what it did is seen from outside.
STORE = """
from pathlib import Path
from usage_middleware import SQLiteTokenStore

opened = []

def open_store(url, *, read_only=False):
    opened.append((url, read_only))
    path = url.partition("://")[2]
    if not path:
        raise ValueError("the URL of a shelf has the form shelf://PATH")
    return SQLiteTokenStore(Path(path), read_only=read_only)

def open_nothing(url, *, read_only=False):
    return {}

NO_CALLABLE = 5
"""
METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
ENTRY_POINTS = """[usage_middleware.stores]
shelf = shelf_stores:open_store
nothing = shelf_stores:open_nothing
broken = shelf_stores:no_such_name
number = shelf_stores:NO_CALLABLE
oracle = shelf_stores:open_store
postgresql = shelf_stores:open_nothing
"""


@pytest.fixture
def site(tmp_path):
    """Return a folder of installed packages with one that brings stores, as an installer leaves it there."""
    site = tmp_path / "site"
    installed = site / "shelf_stores-1.0.dist-info"
    installed.mkdir(parents=True)
    (site / "shelf_stores.py").write_text(STORE)
    (installed / "METADATA").write_text(METADATA.format(name="shelf-stores"))
    (installed / "entry_points.txt").write_text(ENTRY_POINTS)
    return site


def python(site, program, *args):
    """Run a program with that folder on its path, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{program}", *args],
        cwd=site.parent,
        capture_output=True,
        text=True,
    )
    return done.stdout, done.stderr, done.returncode


def command(site, *args, status=0):
    out, err, found = python(site, "from usage_middleware.cli import main; main(sys.argv[1:])", *map(str, args))
    assert found == status, err
    assert "Traceback" not in err
    return out, err


def test_a_package_adds_a_scheme(site):
    out, err, _ = python(
        site,
        "from usage_middleware import open_store\n"
        "with open_store('shelf://some.db') as store: print(type(store).__name__)\n"
        "open_store('SHELF://some.db', read_only=True)\n"
        "open_store('shelf+other://some.db')\n"
        "import shelf_stores; print(shelf_stores.opened)",
    )
    assert err == ""
    assert out == (
        "SQLiteTokenStore\n[('shelf://some.db', False), ('SHELF://some.db', True), ('shelf+other://some.db', False)]\n"
    )


@pytest.mark.slow
def test_every_command_takes_the_scheme_of_a_package(site):
    key = command(site, "create", "--db", "shelf://some.db", "--name", "Alice", "--quota", 10)[0].strip()
    assert "Alice" in command(site, "list", "--db", "shelf://some.db")[0]
    assert '"total_used": 4' in command(site, "charge", "--db", "shelf://some.db", 1, 4, "--json")[0]
    # What it wrote is what the path of the file names, and another store takes it from there.
    assert "1 imported" in command(site, "import", "--db", "other.db", "shelf://some.db")[1]
    assert "1 imported" in command(site, "import", "--db", "shelf://third.db", "other.db")[1]
    with SQLiteTokenStore(site.parent / "third.db", read_only=True) as store:
        assert store.get(key.removeprefix("sk-")).name == "Alice"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("missing://user:canary@host", "there is no store for missing://; a store is named by the path of a file, "),
        ("missing://user:canary@host", "memory:, broken://, "),
        ("broken://user:canary@host", "the store for broken:// (shelf_stores:no_such_name) cannot be loaded"),
        ("number://user:canary@host", "(shelf_stores:NO_CALLABLE) is not a callable"),
        ("nothing://user:canary@host", "shelf_stores:open_nothing must return a QuotaStore for nothing://, got dict"),
        ("shelf://", "the URL of a shelf has the form shelf://PATH"),
    ],
)
@pytest.mark.slow
def test_what_a_package_gets_wrong_is_one_line(site, url, message):
    for args in (["list", "--db", url], ["serve", "--db", url], ["import", "--db", "x.db", url]):
        out, err = command(site, *args, status=2)
        assert out == ""
        assert message in err
        assert err.count("\n") == 1
        assert "canary" not in err


def test_two_packages_with_one_scheme_are_refused(site):
    other = site / "other-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text(METADATA.format(name="other"))
    (other / "entry_points.txt").write_text("[usage_middleware.stores]\nshelf = other:open_store\n")
    _, err = command(site, "list", "--db", "shelf://some.db", status=2)
    assert err == (
        "Error: several packages have a store for shelf://: other:open_store, shelf_stores:open_store; "
        "uninstall all but one\n"
    )


def test_a_package_cannot_take_a_scheme_of_ours(site):
    out, _, _ = python(site, "import usage_middleware as u; print(type(u.open_store('postgresql://h/n')).__name__)")
    assert out == "SQLAlchemyTokenStore\n"


@pytest.fixture
def gateway(tmp_path):
    """Return the path of an SQLite file as new-api keeps it, with only what identifies it."""
    import sqlite3

    path = tmp_path / "one-api.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE tokens (id INTEGER PRIMARY KEY, key TEXT, name TEXT, remain_quota INTEGER)")
        connection.execute(f"INSERT INTO tokens VALUES (1, '{'k' * 48}', 'Alice', 5)")
        connection.commit()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("form", ["{}", "sqlite:///{}", "new-api+sqlite:///{}", "NEW-API+sqlite:///{}"])
def test_a_file_of_new_api_is_one_for_everyone(gateway, site, form):
    text = form.format(gateway)
    before = gateway.read_bytes()
    with open_store(text) as store:
        assert type(store) is NewAPITokenStore
        assert store.get("k" * 48).name == "Alice"
    refused = "this is a database of new-api, which is only read"
    assert refused in command(site, "list", "--db", text, status=2)[1]
    assert refused in command(site, "grant", "--db", text, 1, 5, status=2)[1]
    assert "1 imported" in command(site, "import", "--db", "ours.db", text)[1]
    assert gateway.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("new-api+postgresql://me@127.0.0.1:1/name", NewAPITokenStore),
        ("new-api+mysql://me@127.0.0.1:1/name", NewAPITokenStore),
        ("postgresql://me@127.0.0.1:1/name", SQLAlchemyTokenStore),
        ("PostgreSQL://me@127.0.0.1:1/name", SQLAlchemyTokenStore),
    ],
)
def test_a_server_is_what_its_url_says(text, kind):
    with open_store(text) as store:
        assert type(store) is kind


def test_a_store_in_memory_is_refused_by_every_command(site):
    for args in (["list", "--db", "memory:"], ["create", "--db", "memory:"], ["import", "--db", "x.db", "memory:"]):
        assert "a store in memory" in command(site, *args, status=2)[1]


def test_how_to_install_names_the_packages_of_the_extras():
    settings = ConfigParser(inline_comment_prefixes=("#",))
    settings.read(ROOT / "setup.cfg")
    for extra, packages in PACKAGES.items():
        wanted = map(Requirement, settings["options.extras_require"][extra].split("\n")[1:])
        assert {str(package).replace(str(package.specifier), "") for package in wanted} == set(packages)


def test_no_store_imports_the_registry():
    """The registry knows the stores, never the other way round: no cycle, and a store loads without the others."""
    stores = Path(usage_middleware.__file__).parent / "stores"
    for path in stores.rglob("*.py"):
        depth = len(path.relative_to(stores).parts)  # dots that lead from it to the folder of the stores
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and path != stores / "__init__.py":
                assert not (node.level == depth and node.module is None), path
                assert node.module not in ("usage_middleware.stores", "usage_middleware"), path
