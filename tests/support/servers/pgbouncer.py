"""PgBouncer, from Debian's package, between a store and the PostgreSQL server of the tests."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from databases import APPLICATION, PASSWORD
from ports import free_port
from programs import find_program
from sqlalchemy import make_url

_STARTS_WITHIN = 30  # seconds


@contextmanager
def pooled(url, *, pool_mode="transaction", size=3):
    """Yield the URL of the same database through PgBouncer, with a few server connections for all clients."""
    program = find_program("pgbouncer", "pgbouncer")
    target = make_url(url)
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="usage-middleware-") as name:
        directory = Path(name)
        (directory / "users").write_text(f'"{APPLICATION}" "{PASSWORD}"\n')
        (directory / "pgbouncer.ini").write_text(
            "[databases]\n"
            f"{target.database} = host=127.0.0.1 port={target.port}\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = scram-sha-256\nauth_file = {directory / 'users'}\n"
            f"pool_mode = {pool_mode}\ndefault_pool_size = {size}\nmax_client_conn = 100\n"
        )
        user = {}
        if os.geteuid() == 0:
            # It does not run as root.
            nobody = pwd.getpwnam("nobody")
            user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            for path in (directory, *directory.iterdir()):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
        log = directory / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [program, directory / "pgbouncer.ini"], stdout=output, stderr=output, stdin=subprocess.DEVNULL, **user
            )
        try:
            deadline = time.monotonic() + _STARTS_WITHIN
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(log.read_text(errors="replace"))
                time.sleep(0.02)
            yield target.set(port=port).render_as_string(hide_password=False)
        finally:
            process.kill()
            process.wait()


def _listens(port):
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
