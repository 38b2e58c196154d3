"""The application behind the endpoints if there is none to wrap."""

import pytest
from client import ask, call, environ

from usage_middleware.wsgi.endpoints.not_found import NotFound

ORIGIN = "https://app.example"
BODY = b'{"success":false,"message":"Not Found"}'


@pytest.mark.parametrize("path", ["", "/", "/v1/models", "/\xa3"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS", "BREW"])
def test_every_path_and_method_is_a_404(path, method):
    answer = call(NotFound(), environ(method, path))
    assert (answer.status, answer.reason, answer.body) == (404, "Not Found", BODY)
    assert dict(answer.headers) == {
        "Content-Type": "application/json; charset=utf-8",
        "Content-Length": str(len(BODY)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Access-Control-Allow-Origin": "*",
    }


def test_head_is_get_without_its_body():
    get = ask(NotFound(), path="/x")
    assert ask(NotFound(), "HEAD", path="/x") == get._replace(body=b"")


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [("*", None, "*"), ([ORIGIN], ORIGIN, ORIGIN), ([ORIGIN], "https://other.example", None), ((), ORIGIN, None)],
)
@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
def test_cors(origins, origin, allowed, method):
    variables = {} if origin is None else {"HTTP_ORIGIN": origin}
    assert ask(NotFound(origins), method, **variables).header("Access-Control-Allow-Origin") == allowed


def test_a_preflight_is_answered_so_that_the_request_comes_to_its_404():
    """A browser asks first, as the request has a header that it must be allowed; and reads a 404 then as a no."""
    answer = ask(
        NotFound(),
        "OPTIONS",
        "/v1/usage",
        HTTP_ORIGIN=ORIGIN,
        HTTP_ACCESS_CONTROL_REQUEST_METHOD="GET",
        HTTP_ACCESS_CONTROL_REQUEST_HEADERS="authorization",
    )
    assert (answer.status, answer.body) == (204, b"")
    assert answer.header("Access-Control-Allow-Origin") == "*"
    assert "Authorization" in answer.header("Access-Control-Allow-Headers")
