"""The benchmarks run. Only a person judges what they measure: no test depends on a time."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).with_name("benchmarks")
HAS_WRK = shutil.which("wrk") is not None
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])  # where Debian has servers
HAS_NGINX = shutil.which("nginx", path=_PATH) is not None
HAS_MARIADB = shutil.which("mariadbd", path=_PATH) is not None
BY_HAND = "by hand: one look-up, one json.dumps"
BARE = "a bare WSGI function, by hand"
OURS = "UsageMiddleware, SQLiteTokenStore"
IN_MEMORY = "UsageMiddleware, MemoryTokenStore"
ORM = "Flask view with SQLAlchemy's ORM"
DJANGO = "Django view with its ORM"
FASTAPI = "FastAPI with SQLAlchemy's ORM"
MIDDLEWARES = [
    "WhiteNoise, no files",
    "UsageMiddleware",
    "werkzeug DispatcherMiddleware, no mounts",
    "werkzeug ProxyFix",
    "a comparison in a closure",
]
PROXIES = [
    "nginx",
    "Proxy, on gunicorn",
    "werkzeug ProxyMiddleware, on gunicorn",
    "a bare WSGI function, on gunicorn, no service",
    "the service itself",
]
EVENTS = [
    "OpenAI's, without usage",
    "OpenAI's, asked for their usage",
    "OpenAI's, and the usage is removed",
    "OpenAI's, each in two chunks",
    "OpenAI's, each in two chunks, and the usage is removed",
    "Anthropic's",
]
TOKENS = ["1,000 tokens", "2,000 tokens"]
BUSY_KEYS = ["one key, 1 thread", "one key, 8 threads", "1,000 keys, 8 threads"]
SIZE = {
    "--rounds": 1,
    "--long-rounds": 1,
    "--tokens": 1_000,
    "--tokens-most": 2_000,
    "--at-once": 1,
    "--server": "gunicorn",
    "--charging-threads": 2,
    "--writers": 3,
    "--charges": 5,
    "--import-tokens": 100,
    "--operations": 500,
}


def _busy_keys(most, least, *, engines):
    calls = ["look-up", "charge", "reserve and settle"]
    charges = ["queries, one after the other", *BUSY_KEYS]
    return [
        (["a query", *calls], dict(zip(calls, most, strict=True))),
        *[(["a query", *calls], {})] * engines,
        (charges, {}),
        (charges, {BUSY_KEYS[1]: least}),
        (charges, {}),
    ]


# The rows of each table, and the budgets of those that have one.
TABLES = [
    (MIDDLEWARES, {"UsageMiddleware": 0.4}),
    ([BY_HAND, OURS], {OURS: 1.3}),
    (["Flask view", OURS], {OURS: 0.25}),
    (["Flask view, bare", OURS], {}),
    ([OURS, "Flask view", ORM, DJANGO, f"{FASTAPI}, def", f"{FASTAPI}, async def"], {}),
    ([BY_HAND, IN_MEMORY, "UsageMiddleware, dict"], {}),
    ([BY_HAND, OURS, "Flask view", ORM], {}),
    ([BY_HAND, OURS, "Flask view", ORM], {}),
    (TOKENS, {}),
    (TOKENS, {TOKENS[1]: 1.5}),
    (TOKENS, {}),
    (TOKENS, {}),
    (
        ["the page cache that SQLite has by default", *(f"UsageMiddleware, {count}" for count in TOKENS)],
        {f"UsageMiddleware, {TOKENS[1]}": 1.5},
    ),
    ([BARE, OURS, "Flask view", ORM, IN_MEMORY], {}),
    *[(["1 thread"], {})] * 5,
    *[([BARE, OURS, "Flask view", ORM, DJANGO, f"{OURS}, 2 workers"], {})] * (2 * HAS_WRK),
    *[*[(PROXIES, {})] * 4, ([*PROXIES[:3], PROXIES[4]], {})] * (HAS_WRK and HAS_NGINX),
    (["by hand", "SQLiteTokenStore.charge"], {"SQLiteTokenStore.charge": 1.5}),
    (["by hand", "SQLiteTokenStore.charge"], {"SQLiteTokenStore.charge": 1.5}),
    (
        ["1 thread", "2 threads, one key", "2 threads, a key each"],
        dict.fromkeys(("2 threads, one key", "2 threads, a key each"), 2.5),
    ),
    (
        [
            "the mean of its threads",
            *(f"2 threads, {keys}: the {which}" for keys in ("one key", "a key each") for which in ("fewest", "most")),
        ],
        {},
    ),
    (
        ["a third of the store's timeout", "2 threads, one key", "2 threads, a key each"],
        dict.fromkeys(("2 threads, one key", "2 threads, a key each"), 1.0),
    ),
    (
        ["a third of the store's timeout", "SQLiteTokenStore.charge, the slowest"],
        {"SQLiteTokenStore.charge, the slowest": 1.0},
    ),
    (["reserve and settle by hand", "UsageMeter"], {"UsageMeter": 1.2}),
    (["reserve and settle by hand", "UsageMeter"], {}),
    (["5 microseconds", *EVENTS], dict.fromkeys(EVENTS, 1.0)),
    (["by hand: one query, one json.dumps", OURS], {}),
    ([*(f"page {number} of 100 rows" for number in (1, 500, 999)), "no page: 1,000 rows"], {}),
    *[
        *[(["by hand: one look-up", "SQLAlchemyTokenStore.get", "UsageMiddleware, SQLAlchemyTokenStore"], {})] * 2,
        *[(["by hand", "SQLAlchemyTokenStore.charge"], {})] * 2,
    ]
    * (1 + HAS_MARIADB),
    *_busy_keys([1, 3, 6], 0.25, engines=1),
    *_busy_keys([1, 5, 10], 0.15, engines=2) * HAS_MARIADB,
    *[(["by hand: read, hash, executemany", "usage-middleware import"], {"usage-middleware import": 2.0})] * 2,
]
LEFT_OUT = [
    *["HTTP: left out, wrk is not installed"] * (not HAS_WRK),
    *["Proxies: left out, nginx is not installed"] * (not HAS_NGINX),
    *["Proxies: left out, wrk is not installed"] * (HAS_NGINX and not HAS_WRK),
    *["MariaDB: left out, needs mariadbd: install Debian's package mariadb-server-core"] * 2 * (not HAS_MARIADB),
]


@pytest.fixture
def temporary():
    # Like /tmp: if root runs the tests, database servers run as another user, who cannot enter pytest's directory.
    with tempfile.TemporaryDirectory(prefix="usage-middleware-") as directory:
        os.chmod(directory, 0o1777)
        yield Path(directory)


@pytest.fixture
def run_benchmarks(temporary, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(temporary))

    def run(*options, missing=()):
        # A module that is None in sys.modules cannot be imported.
        code = (
            f"import runpy, sys; sys.modules.update(dict.fromkeys({missing}));"
            f" runpy.run_path({str(BENCHMARKS)!r}, run_name='__main__')"
        )
        size = [str(word) for option in SIZE.items() for word in option]
        command = [sys.executable, "-W", "error", "-c", code, *size, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        # The directories of databases and servers have been removed. A connection that was left open would have been a
        # ResourceWarning, which is an error here.
        assert list(temporary.iterdir()) == []
        return done

    return run


def test_every_measurement_is_made(run_benchmarks, full):
    if not full:
        pytest.skip("run with --full: it starts every server that is measured")
    done = run_benchmarks("--json")

    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert [_names_and_budgets(table) for table in report["tables"]] == TABLES
    assert report["left_out"] == LEFT_OUT
    for table in report["tables"]:
        for row in table["rows"]:
            assert row["lowest"] <= row["ratio"] <= row["highest"]
            assert len(row["latencies"]) == (4 if table["unit"].endswith("per second") else 0)
            assert sorted(row["latencies"]) == row["latencies"]
            if row["budget"]:
                over = row["ratio"] - row["budget"]
                assert row["verdict"] == ("met" if (over >= 0 if row["is_least"] else over <= 0) else "missed")


@pytest.mark.slow
def test_tables_are_printed_with_a_line_for_what_is_left_out(run_benchmarks, monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)  # so that wrk is not found
    missing = ["whitenoise", "flask", "django", "fastapi"]
    done = run_benchmarks("--only", "http", "--only", "usage", "--only", "pass-through", missing=missing)

    assert (done.returncode, done.stderr) == (0, "")
    assert "rounds 1, long_rounds 1, tokens 1000" in done.stdout
    for name in (*missing, "wrk"):
        assert re.search(f"^.*: left out, .*{name} is not installed", done.stdout, re.MULTILINE)
    rows = [*MIDDLEWARES[2:], "UsageMiddleware", BY_HAND, OURS, OURS, BY_HAND, IN_MEMORY, "UsageMiddleware, dict"]
    assert re.findall(r"^  (\S.*?) +[\d.]+ us", done.stdout, re.MULTILINE) == rows


def test_plots_are_drawn_or_the_remedy_is_named(run_benchmarks, tmp_path_factory):
    directory = tmp_path_factory.mktemp("plots")
    done = run_benchmarks("--only", "tokens", "--plots", str(directory))

    if importlib.util.find_spec("matplotlib") is None:
        assert done.returncode == 2
        assert "pip install -e '.[benchmarks]'" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert ElementTree.parse(directory / "tokens.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def _names_and_budgets(table):
    names = [row["name"] for row in table["rows"]]
    return names, {row["name"]: row["budget"] for row in table["rows"] if row["budget"]}
