"""The command, called in this process."""

import pytest
from transferring import DIGEST

from usage_middleware.cli import main


@pytest.fixture
def run(db, capsysbinary):
    """Run the command in this process, and return its standard output (bytes) and its standard error (text)."""

    def run(*args, status=0):
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        out, err = capsysbinary.readouterr()
        assert end.value.code == status, err
        assert b"canary" not in err
        assert DIGEST.encode() not in err
        return out, err.decode()

    return run
