"""What the arguments of a throttle may be, and what is not loaded or opened for them."""

import socket
import subprocess
import sys
import textwrap
import threading

import pytest
from client import ask, wrapped
from processes import python
from storage_servers import CLIENTS
from throttling import BEARER, LIMIT, guess, make_app

from usage_middleware import UsageMiddleware

# --- What the constructor takes, and leaves alone


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param({"throttle": 20}, TypeError, id="limit int"),
        pytest.param({"throttle": b"20 per minute"}, TypeError, id="limit bytes"),
        pytest.param({"throttle": True}, TypeError, id="limit bool"),
        pytest.param({"throttle": ""}, ValueError, id="limit empty"),
        pytest.param({"throttle": "often"}, ValueError, id="limit no limit"),
        pytest.param({"throttle": "20"}, ValueError, id="limit without a time"),
        pytest.param({"throttle": "20 per fortnight"}, ValueError, id="limit with no such unit"),
        pytest.param({"throttle": "-1 per minute"}, ValueError, id="limit negative"),
        pytest.param({"throttle": "0 per minute"}, ValueError, id="limit 0"),
        pytest.param({"throttle": "1.5 per minute"}, ValueError, id="limit no integer"),
        pytest.param({"throttle": "5 per minute; 20 per hour"}, ValueError, id="two limits"),
        pytest.param({"throttle": "1 per 31 days"}, ValueError, id="limit longer than Memcached can"),
        pytest.param({"throttle": "9" * 10_000 + " per day"}, ValueError, id="limit too long to read"),
        pytest.param({"throttle_storage": None}, TypeError, id="storage None"),
        pytest.param({"throttle_storage": b"memory://"}, TypeError, id="storage bytes"),
        pytest.param({"throttle_storage": ""}, ValueError, id="storage empty"),
        pytest.param({"throttle_storage": "redis"}, ValueError, id="storage without a scheme"),
        pytest.param({"throttle_storage": "canary://canary:canary@host"}, ValueError, id="storage of no such scheme"),
        pytest.param({"throttle_storage": "async+memory://host"}, ValueError, id="storage for asyncio"),
        pytest.param({"throttle_storage": "memcached://"}, ValueError, id="storage without a host"),
        pytest.param({"throttle_storage": "memcached://canary@host"}, ValueError, id="storage without its port"),
        pytest.param({"throttle_storage": "redis://:canary@host:canary"}, ValueError, id="storage with no such port"),
        pytest.param({"throttle_storage": "redis://:canary/@host:1"}, ValueError, id="password that is not quoted"),
        pytest.param({"throttle_storage": "redis://:canary@[::1"}, ValueError, id="storage that is not a URI"),
        pytest.param({"throttle_storage": "redis://:canary\u2100@host"}, ValueError, id="storage that NFKC changes"),
    ],
)
def test_an_impossible_argument_is_named_and_shows_no_password(arguments, error):
    (name,) = arguments
    given = {"throttle": LIMIT, **arguments}
    with pytest.raises(error, match=rf"^{name} must ") as caught:
        UsageMiddleware(wrapped, {}, **given)
    assert "\n" not in str(caught.value)
    # Nor do the exceptions that caused it, which a traceback shows.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("limit", ["1/second", "20 per 20 minutes", "5 PER hour", "1 per 30 days", "1 per month"])
def test_possible_limits(limit):
    make_app(limit)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "limits", None)
    with pytest.raises(ImportError, match=r"^throttle needs the package limits: pip install limits$"):
        make_app()
    UsageMiddleware(wrapped, {})


@pytest.mark.parametrize("scheme", ["redis", "memcached"])
def test_without_its_client_a_storage_is_refused(monkeypatch, scheme):
    monkeypatch.setitem(sys.modules, CLIENTS[scheme], None)
    monkeypatch.setitem(sys.modules, f"{CLIENTS[scheme]}.client", None)
    with pytest.raises(ValueError, match=r"client \(redis, pymemcache, \.\.\.\) is installed"):
        make_app(storage=f"{scheme}://127.0.0.1:1")


def test_the_package_is_not_loaded_without_a_limit():
    code = """
    import sys
    from usage_middleware import UsageMiddleware
    UsageMiddleware(print, {})
    assert "limits" not in sys.modules
    """
    process = python("-c", textwrap.dedent(code), stderr=subprocess.PIPE)
    assert process.communicate(timeout=20)[1] == ""


@pytest.mark.parametrize("scheme", ["memory", "redis", "memcached"])
def test_nothing_is_opened_or_asked_before_a_failure(scheme):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        threads = threading.active_count()
        app = make_app(storage=f"{scheme}://127.0.0.1:{listener.getsockname()[1]}")
        assert guess(app, BEARER).status == 200
        assert guess(app, None).status == 401
        assert ask(app, "OPTIONS").status == 204
        assert ask(app, path="/other").status == 404
        with pytest.raises(BlockingIOError):
            listener.accept()
        assert threading.active_count() == threads
