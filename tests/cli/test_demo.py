"""``demo``: the commands that it prints work as printed, and it leaves no files behind."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import SCRIPT

STOPPED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

# A module that Python imports at its start. It sends the process a signal at an audit event (docs.python.org,
# sys.addaudithook).
AT_ONCE = """
import os, signal, sys

def stop(event, _):
    global sent
    if event == {event!r} and not sent:
        sent = True
        os.kill(os.getpid(), {number})

sent = False
sys.addaudithook(stop)
"""


@pytest.mark.slow
@pytest.mark.parametrize("event", ["tempfile.mkdtemp", "os.mkdir", "sqlite3.connect", "socket.bind"])
@pytest.mark.parametrize("number", STOPPED, ids=lambda number: number.name)
def test_a_signal_at_any_time_leaves_no_folder(tmp_path, event, number):
    hook, temporary = tmp_path / "hook", tmp_path / "temporary"
    hook.mkdir()
    temporary.mkdir()
    (hook / "sitecustomize.py").write_text(AT_ONCE.format(event=event, number=int(number)))
    done = subprocess.run(
        [SCRIPT, "demo", "--port", "0"],
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(hook)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("number", STOPPED, ids=lambda number: number.name)
def test_a_signal_while_it_serves_leaves_no_folder(start, tmp_path, number):
    process, _, log = start("demo", "--port", "0", ready="Open the page")
    process.send_signal(number)
    assert process.wait(10) == 0
    assert not list(tmp_path.glob("usage-middleware-*"))
    assert "Traceback" not in log.read_text()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the ignored signals are read from /proc")
def test_nohup_keeps_the_demo_running():
    program = "import os, sys, signal as s; s.signal(s.SIGHUP, s.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", program, SCRIPT, "demo", "--port", "0"], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            while "Press Ctrl-C" not in process.stdout.readline():
                assert process.poll() is None
            (ignored,) = re.findall(r"^SigIgn:\s+([0-9a-f]+)$", Path(f"/proc/{process.pid}/status").read_text(), re.M)
            assert int(ignored, 16) >> (signal.SIGHUP - 1) & 1
            process.terminate()
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_a_closed_pipe_leaves_no_folder(tmp_path):
    with subprocess.Popen(
        [SCRIPT, "demo", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(30) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["plain", "with a blank and 'quotes'"])
@pytest.mark.parametrize("is_relative", [False, True])
def test_the_commands_that_it_prints_work_as_they_are_printed(tmp_path, folder, is_relative):
    """Run them from another directory, without the program on PATH, and with paths that a shell would split."""
    script = tmp_path / folder / "bin" / "usage-middleware"
    script.parent.mkdir(parents=True)
    script.symlink_to(SCRIPT)
    with subprocess.Popen(
        [f"./{script.relative_to(tmp_path)}" if is_relative else str(script), "demo", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(script.parent)},
    ) as process:
        try:
            printed = ""
            while "Ctrl-C" not in printed:
                printed += process.stdout.readline()
            charge, listing = re.findall("^  (.*usage-middleware.*)$", printed, re.MULTILINE)
            for line, expected in ((charge, "13,345 of 1,000,000"), (listing, "Demo Token")):
                done = subprocess.run(
                    line, shell=True, cwd="/", env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
                )
                assert done.returncode == 0, done.stderr
                assert expected in done.stdout
        finally:
            process.terminate()
            process.wait(10)
    assert [path.name for path in Path(script.parent).iterdir()] == ["usage-middleware"]
