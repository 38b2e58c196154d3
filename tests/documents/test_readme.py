"""The README's examples, executed. What a shell prints there is what it prints here, but for keys and ports."""

import importlib
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys

import pytest
from client import ask
from places import SCRIPTS

from usage_middleware import SQLiteTokenStore

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KEY = re.compile(r"sk-[0-9A-Za-z]{48}")


@pytest.fixture
def blocks(readme, tmp_path, monkeypatch):
    """The code blocks of the README; the test runs in an empty directory, with the installed scripts on its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("USAGE_MIDDLEWARE_DB", raising=False)
    monkeypatch.setenv("PATH", f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}")
    return BLOCK.findall(readme)


def block(blocks, language, part):
    (found,) = [text for kind, text in blocks if kind == language and part in text]
    return found


def commands(text):
    """The commands of a console block, each with the output that follows it."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def shell(command):
    return subprocess.run(shlex.split(command), check=True, capture_output=True, text=True).stdout


def test_every_block_is_covered_here(blocks):
    kinds = ["console", "console", "python", "console", "python", "python", "python", "console", "console"]
    assert [kind for kind, _ in blocks] == kinds


def test_the_demonstration(blocks):
    ((curl, output),) = commands(block(blocks, "console", "Demo Token"))
    demo = subprocess.Popen(["usage-middleware", "demo", "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        printed = next(line for line in demo.stdout if "curl" in line).strip()
        # The README prints the very line of the demonstration.
        assert re.sub(r":\d+/", ":8000/", KEY.sub("sk-…", printed)) == curl
        assert shell(printed + " --silent") == output.rstrip("\n")
    finally:
        demo.terminate()
        demo.communicate()
    assert demo.returncode == 0


def test_the_flask_application_and_its_token(blocks, tmp_path):
    # The view that charges goes on in the same application.
    parts = (block(blocks, "python", part) for part in ("Flask(__name__)", "store.reserve"))
    (tmp_path / "readme_flask.py").write_text("\n".join(parts))
    app = importlib.import_module("readme_flask").app
    app.get("/", endpoint="index")(lambda: "the application itself")

    (create, created), (listing, listed) = commands(block(blocks, "console", "usage-middleware create"))
    key = shell(create)
    assert KEY.sub("sk-…", key) == created
    # The hint under KEY is the only thing that differs.
    assert re.sub(r"…\w{4}", "…", shell(listing)) == listed

    assert app.test_client().get("/").text == "the application itself"
    answer = app.test_client().get("/api/usage/token", headers={"Authorization": f"Bearer {key.strip()}"})
    assert answer.json["data"]["total_available"] == 1_000_000

    headers = {"Authorization": f"Bearer {key.strip()}", "X-Request-Id": "mine"}
    for _ in range(2):
        assert app.test_client().post("/work", data="x" * 100, headers=headers).json == {"cost": 100}
    assert app.wsgi_app.store.get_by_id(1).total_used == 100
    app.wsgi_app.store.grant(1, -app.wsgi_app.store.get_by_id(1).total_available)
    assert app.test_client().post("/work", headers={**headers, "X-Request-Id": "next"}).status_code == 402
    app.wsgi_app.store.close()


def test_the_wrapped_legacy_service(readme, blocks, tmp_path):
    command = re.search(r"`(usage-middleware serve [^`]*)`", readme)[1]
    (tmp_path / "legacy.py").write_text(
        "def application(environ, start_response):\n"
        "    start_response('200 OK', [('Content-Type', 'text/plain')])\n"
        "    return [b'the application itself']\n"
    )
    key = shell("usage-middleware create --db tokens.db").strip()
    server = subprocess.Popen([*shlex.split(command), "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://[\d.:]+", next(server.stderr))[0]
        assert shell(f"curl --silent {url}/") == "the application itself"
        answer = shell(f"curl --silent -H 'Authorization: Bearer {key}' {url}/api/usage/token")
        assert json.loads(answer)["code"] is True
    finally:
        server.terminate()
        server.communicate()
    assert server.returncode == 0


@pytest.fixture
def customers(tmp_path):
    database = sqlite3.connect(tmp_path / "customers.db")
    database.execute("CREATE TABLE cust (apikey TEXT PRIMARY KEY, nm TEXT, credits INTEGER, spent INTEGER)")
    database.execute("INSERT INTO cust VALUES ('a-key-that-is-there', NULL, 75, 25)")
    database.commit()
    database.close()


def test_the_custom_store(blocks, customers):
    namespace = {}
    exec(block(blocks, "python", "class Customers"), namespace)
    application = namespace["application"]
    data = ask(application, authorization="Bearer sk-a-key-that-is-there").json["data"]
    assert (data["name"], data["total_granted"], data["total_available"]) == ("", 100, 75)
    assert ask(application, authorization="Bearer other").status == 401
    assert ask(application, path="/").body == b"the application itself"


def test_the_custom_store_passes_the_contract(blocks, customers, tmp_path):
    (tmp_path / "test_customers.py").write_text(
        block(blocks, "python", "class Customers") + block(blocks, "python", "class TestCustomers")
    )
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_customers.py"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert re.search(r"\d\d passed", result.stdout)


def test_tokens_move(blocks, tmp_path, postgresql):
    (rehearse, told), (move, moved) = commands(block(blocks, "console", "import"))
    (tmp_path / "customers.csv").write_text(
        "key,total_available\nthe-key-of-one-holder,5\nthe-key-of-another,\nthe-key-of-a-third,1e6\n"
    )
    done = subprocess.run(shlex.split(rehearse), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", told)
    assert not (tmp_path / "tokens.db").exists()

    with SQLiteTokenStore(tmp_path / "tokens.db") as store, postgresql.database() as url:
        for _ in range(1204):
            store.create()
        move = move.replace("postgresql://user:password@host/name", url)
        assert subprocess.run(shlex.split(move), check=True, capture_output=True, text=True).stderr == moved


def test_the_server_of_the_demonstration_is_not_needed(blocks):
    """The two commands of installation are run, as printed, by ``.ci/run``."""
    for command, output in (*commands(blocks[0][1]), *commands(blocks[-1][1])):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert output == ""
