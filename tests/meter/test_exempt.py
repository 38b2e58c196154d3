"""Which paths are free."""

import pytest
from client import environ

from usage_middleware.wsgi.meter.exempt import exemption

PREFIXES = ("/static/", "/health", "/grün/")


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static/app.js",
        "/static/a/b/c.css",
        "/static/a/",
        "/static/..a",
        "/static/.hidden",
        "/static/a..b",
        "/static/a;b=c",
        "/static/a b",
        "/static/\xc3\xa9",
        "/health",
        "/health/",
        "/health/deep",
        "/grün/x".encode().decode("latin-1"),
    ],
)
def test_paths_below_a_prefix_are_free(path):
    assert exemption(PREFIXES)(environ(path=path))


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/v1/chat",
        "/static",
        "/statics",
        "/Static/app.js",
        "//static/app.js",
        "/v1/static/app.js",
        "/healthz",
        "/health.txt",
        "/health-admin/x",
        "/static/../v1/chat",
        "/static/..",
        "/static/./x",
        "/static/.",
        "/static/a/../../v1",
        "/static/...",
        "/static/.. /v1",
        "/static/..;/v1",
        "/static/..;a=b/v1",
        "/static/.;/v1",
        "/static//v1",
        "/static//",
        "/static/a//",
        "/static/;/v1",
        "/static/ /v1",
        "/static/..\\v1",
        "/static/a\\b",
        "/static/%2e%2e/v1",
        "/static/a%2fb",
        "/static/..\0/v1",
        "/static/a\n",
        "/static/\x7f",
        "/health/..",
        "/health//x",
        "/health\\x",
        "/gr\xfcn/x",
    ],
)
def test_all_other_paths_are_metered(path):
    assert not exemption(PREFIXES)(environ(path=path))


def test_nothing_is_exempt_by_default():
    assert not exemption(())(environ(path="/"))
    request = environ()
    del request["PATH_INFO"]
    assert not exemption(PREFIXES)(request)


def test_prefixes_are_relative_to_script_name():
    assert exemption(PREFIXES)(environ(path="/static/x", SCRIPT_NAME="/mounted"))
    assert not exemption(PREFIXES)(environ(path="/x", SCRIPT_NAME="/static"))


def test_a_function_is_used_as_it_is():
    def is_get(environ):
        return environ["REQUEST_METHOD"] == "GET"

    assert exemption(is_get) is is_get


@pytest.mark.parametrize(
    ("exempt", "error"),
    [
        ("/static/", TypeError),
        (b"/static/", TypeError),
        ([b"/static/"], TypeError),
        (5, TypeError),
        (None, TypeError),
        (["static/"], ValueError),
        (["/"], ValueError),
        ([""], ValueError),
    ],
)
def test_bad_arguments_are_refused(exempt, error):
    with pytest.raises(error, match="exempt must"):
        exemption(exempt)
