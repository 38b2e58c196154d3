"""The benchmarks still run. What they measure is for a person to read: no test depends on a time."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).with_name("benchmarks")
ROWS = [
    ("WhiteNoise, no files", None),
    ("UsageMiddleware", 0.5),
    ("werkzeug DispatcherMiddleware, no mounts", None),
    ("werkzeug ProxyFix", None),
    ("a comparison in a closure", None),
    ("by hand: one look-up, one json.dumps", None),
    ("UsageMiddleware, SQLiteTokenStore", 1.5),
    ("Flask view", None),
    ("UsageMiddleware, SQLiteTokenStore", 0.25),
    ("Flask view, bare", None),
    ("UsageMiddleware, SQLiteTokenStore", None),
    ("by hand: one look-up, one json.dumps", None),
    ("UsageMiddleware, MemoryTokenStore", None),
    ("UsageMiddleware, dict", None),
    ("by hand", None),
    ("SQLiteTokenStore.charge", 1.5),
    ("by hand", None),
    ("SQLiteTokenStore.charge", 1.5),
    ("a third of the store's timeout", None),
    ("SQLiteTokenStore.charge, the slowest", 1.0),
]
SIZE = ["--rounds", "2", "--tokens", "1000", "--writers", "3", "--charges", "5"]


@pytest.fixture
def run_benchmarks(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def run(*options):
        command = [sys.executable, "-W", "error", BENCHMARKS, *SIZE, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        # A connection that was left open is a ResourceWarning here.
        assert (done.returncode, done.stderr) == (0, "")
        assert list(tmp_path.iterdir()) == []
        return done.stdout

    return run


def test_every_measurement_is_made(run_benchmarks):
    report = json.loads(run_benchmarks("--json"))

    rows = [row for table in report["tables"] for row in table["rows"]]
    assert [(row["name"], row["budget"]) for row in rows] == ROWS
    assert all(row["lowest"] <= row["ratio"] <= row["highest"] for row in rows)
    for row in rows:
        if row["budget"]:
            assert row["verdict"] == ("met" if row["ratio"] <= row["budget"] else "missed")


def test_a_person_gets_a_table(run_benchmarks):
    report = run_benchmarks()

    assert "rounds 2, tokens 1000, writers 3, charges 5" in report
    assert re.findall(r"^  (\S.*?) +[\d.]+ us", report, re.MULTILINE) == [name for name, _ in ROWS]
