"""The README's examples are executed. A shell prints what the README shows, except for keys and ports."""

import importlib
import os
import re
import shlex
import subprocess

import pytest
from places import SCRIPTS

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KEY = re.compile(r"sk-[0-9A-Za-z]{48}")


@pytest.fixture
def blocks(readme, tmp_path, monkeypatch):
    """Return the README's code blocks. The test runs in an empty directory, with the installed scripts on its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("USAGE_MIDDLEWARE_DB", raising=False)
    monkeypatch.setenv("PATH", f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}")
    return BLOCK.findall(readme)


def block(blocks, language, part):
    (found,) = [text for kind, text in blocks if kind == language and part in text]
    return found


def commands(text):
    """Yield the commands of a console block, each with the output that follows it."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def shell(command):
    return subprocess.run(shlex.split(command), check=True, capture_output=True, text=True).stdout


def test_every_block_is_covered_here(blocks):
    kinds = ["text", "console", "console", "python", "console", "python", "console"]
    assert [kind for kind, _ in blocks] == kinds


def test_the_readme_has_at_most_900_words(readme):
    assert len(readme.split()) <= 900


def test_the_demonstration_prints_and_answers_what_is_shown(blocks):
    ((curl, output),) = commands(block(blocks, "console", "Demo Token"))
    demo = subprocess.Popen(["usage-middleware", "demo", "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        printed = next(line for line in demo.stdout if "curl" in line).strip()
        # The README shows the same line as the demonstration prints.
        assert re.sub(r":\d+/", ":8000/", KEY.sub("sk-…", printed)) == curl
        assert shell(printed + " --silent") == output.rstrip("\n")
    finally:
        demo.terminate()
        demo.communicate()
    assert demo.returncode == 0


def test_the_flask_examples_work_with_a_token_from_the_shell(blocks, tmp_path):
    (tmp_path / "readme_flask.py").write_text(block(blocks, "python", "Flask(__name__)"))
    app = importlib.import_module("readme_flask").app
    for path, text in (("/", "the application itself"), ("/health", "well")):
        app.add_url_rule(path, path, lambda text=text: text)

    (create, created), (listing, listed) = commands(block(blocks, "console", "usage-middleware create"))
    key = shell(create)
    assert KEY.sub("sk-…", key) == created
    # Only the hint in the column KEY differs.
    assert re.sub(r"…\w{4}", "…", shell(listing)) == listed

    client, headers = app.test_client(), {"Authorization": f"Bearer {key.strip()}"}
    assert client.get("/").text == "the application itself"
    assert client.get("/usage").text.startswith("<!doctype html>")
    assert client.get("/api/usage/token", headers=headers).json["data"]["total_available"] == 1_000_000

    # The meter goes between the two.
    app.wsgi_app.store.close()
    app.wsgi_app = app.wsgi_app.app
    exec(block(blocks, "python", "UsageMeter"), {"app": app})
    assert client.get("/").status_code == 401
    assert client.get("/health").text == "well"
    assert client.get("/", headers=headers).text == "the application itself"
    assert client.get("/api/usage/token", headers=headers).json["data"]["total_used"] == 1
    app.wsgi_app.store.close()


def test_the_other_commands_only_install(blocks):
    """``.ci/run`` runs them as they are printed."""
    for command, output in (*commands(blocks[0][1]), *commands(blocks[-1][1])):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert output == ""
