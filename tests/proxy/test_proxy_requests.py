"""What Proxy forwards of a request and of its answer: target, headers, framing, and its own errors."""

from __future__ import annotations

import io
import json
import logging

import pytest
from client import ask, call, environ
from raw_service import answering, serving

from usage_middleware import Proxy

OK = b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Length: 2\r\n\r\nok"


def forwarded(options=None, base="", answer=OK, **variables):
    """Return the request that reaches the service: its start line, headers and body."""
    with serving(answering(answer)) as service:
        result = call(Proxy(service.url + base, **(options or {})), environ(**variables))
        assert (result.status, result.body) == (200, b"ok")
        return service.result()


def test_a_small_request_and_its_answer_in_full():
    with serving(answering(OK)) as service:
        answer = ask(Proxy(service.url), path="/v1/items", QUERY_STRING="a=1", REMOTE_ADDR="192.0.2.7")

        assert service.result() == (
            "GET /v1/items?a=1 HTTP/1.1",
            [
                ("Host", f"127.0.0.1:{service.port}"),
                ("Connection", "close"),
                ("Via", "1.1 usage-middleware"),
                ("X-Forwarded-For", "192.0.2.7"),
                ("X-Forwarded-Host", "127.0.0.1"),
                ("X-Forwarded-Proto", "http"),
            ],
            b"",
        )
    headers = [("Content-Type", "a/b"), ("Content-Length", "2"), ("Via", "1.1 usage-middleware")]
    assert answer == (200, "OK", headers, b"ok")


# The meter has decided by PATH_INFO. The forwarded path decodes to it, and has the client's own escapes if the server
# passes them on.
@pytest.mark.parametrize(
    ("variables", "target"),
    [
        pytest.param({"path": "/a b"}, "/a%20b", id="quoted from PATH_INFO"),
        pytest.param({"path": "/\xc3\xbc"}, "/%C3%BC", id="bytes of UTF-8"),
        pytest.param({"path": "/\xa3"}, "/%A3", id="bytes that are not UTF-8"),
        pytest.param({"path": "/50%?#"}, "/50%25%3F%23", id="what would end a path"),
        pytest.param({"path": "/!$&'()*+,;=:@-._~"}, "/!$&'()*+,;=:@-._~", id="what a path may hold"),
        pytest.param({"path": ""}, "/", id="no path"),
        pytest.param({"path": "//v1"}, "//v1", id="two slashes"),
        pytest.param({"path": "/a/../b/./c"}, "/a/../b/./c", id="dot segments"),
        pytest.param({"path": "/a\\b\x00"}, "/a%5Cb%00", id="backslash and NUL"),
        pytest.param({"path": "/a/b", "RAW_URI": "/a%2fb?x"}, "/a%2fb", id="RAW_URI"),
        pytest.param({"path": "/a/b", "REQUEST_URI": "/%61%2Fb"}, "/%61%2Fb", id="REQUEST_URI"),
        pytest.param({"path": "/a/b", "REQUEST_URI": "http://h/a%2Fb"}, "/a%2Fb", id="absolute form"),
        pytest.param({"path": "/a/b", "SCRIPT_NAME": "/pre", "RAW_URI": "/pr%65/a%2Fb"}, "/a%2Fb", id="below a prefix"),
        pytest.param({"path": "", "SCRIPT_NAME": "/pre", "RAW_URI": "/pre"}, "/", id="the prefix alone"),
        pytest.param({"path": "/a/b", "RAW_URI": "/a%2Fc"}, "/a/b", id="RAW_URI of another path"),
        pytest.param({"path": "/b", "RAW_URI": "/a/../b"}, "/b", id="a server that normalises"),
        pytest.param({"path": "/a%2Fb", "RAW_URI": "/a%252Fb"}, "/a%252Fb", id="an escaped escape"),
        pytest.param({"path": "/a%41", "RAW_URI": "/a%41"}, "/a%2541", id="a server that does not decode"),
        pytest.param({"path": "/a%2Fb/c", "REQUEST_URI": "/a%2fb/%63"}, "/a%2fb/%63", id="a server that keeps %2F"),
        pytest.param(
            {"path": "/a%2Fb", "SCRIPT_NAME": "/p%2Fq", "REQUEST_URI": "/p%2Fq/a%2Fb"},
            "/a%2Fb",
            id="below such a prefix",
        ),
        pytest.param(
            {"path": "/a/..%2Fb", "REQUEST_URI": "/a/..%2Fb"}, "/a/..%252Fb", id="a dot segment that it hides"
        ),
        pytest.param({"path": "/a/%2Fb", "REQUEST_URI": "/a/%2Fb"}, "/a/%252Fb", id="an empty segment that it hides"),
        pytest.param({"path": "/a%zz", "RAW_URI": "/a%zz"}, "/a%25zz", id="half an escape"),
        pytest.param({"path": "/a/b|c", "RAW_URI": "/a%2Fb|c"}, "/a%2Fb%7Cc", id="a character that is not allowed"),
        pytest.param({"path": "/a#b", "RAW_URI": "/a#b"}, "/a%23b", id="a fragment that the server keeps"),
        pytest.param({"path": "/\xfc", "RAW_URI": "/\xfc"}, "/%FC", id="a byte as it is"),
        pytest.param({"path": "/a", "QUERY_STRING": "b=%7e+c&&?;\"'"}, "/a?b=%7e+c&&?;\"'", id="query string"),
        pytest.param({"path": "/a", "QUERY_STRING": "\xfc #\r\n"}, "/a?%FC%20%23%0D%0A", id="query, not allowed"),
        pytest.param({"path": "*", "method": "OPTIONS"}, "*", id="asterisk"),
        pytest.param({"base": "/api/", "path": "/a"}, "/api/a", id="base path"),
        pytest.param({"base": "/api", "path": ""}, "/api", id="base path alone"),
        pytest.param({"base": "/api", "path": "/..a/b.."}, "/api/..a/b..", id="base path, dots in names"),
    ],
)
def test_the_target_decodes_to_path_info(variables, target):
    (start, _, _) = forwarded(**variables)

    assert start == f"{variables.get('method', 'GET')} {target} HTTP/1.1"


@pytest.mark.parametrize(
    ("variables", "sent"),
    [
        pytest.param({"HTTP_X_API_KEY": "a"}, [("X-Api-Key", "a")], id="a header"),
        pytest.param({"HTTP_X": "\xfc \t!"}, [("X", "\xfc \t!")], id="Latin-1"),
        pytest.param({"HTTP_X": ""}, [("X", "")], id="an empty one"),
        pytest.param({"HTTP_EXPECT": "100-continue"}, [], id="Expect is the server's"),
        pytest.param({"HTTP_CONNECTION": "keep-alive", "HTTP_KEEP_ALIVE": "1"}, [], id="hop by hop"),
        pytest.param({"HTTP_TE": "trailers", "HTTP_TRAILER": "X"}, [], id="trailers"),
        pytest.param({"HTTP_PROXY_AUTHORIZATION": "x", "HTTP_PROXY_CONNECTION": "x"}, [], id="a proxy's"),
        pytest.param({"HTTP_PROXY": "http://evil"}, [], id="httpoxy"),
        pytest.param(
            {"HTTP_CONNECTION": "X-A , x-b", "HTTP_X_A": "1", "HTTP_X_B": "1", "HTTP_X_C": "1"}, [("X-C", "1")]
        ),
        pytest.param({"HTTP_CONNECTION": "host, via, x-forwarded-for"}, [], id="Connection removes none of ours"),
        pytest.param({"HTTP_CONTENT_LENGTH": "7", "HTTP_CONTENT_TYPE": "a"}, [], id="twins with an underscore"),
        pytest.param({"HTTP_UPGRADE": "h2c", "HTTP_CONNECTION": "Upgrade"}, [], id="h2c is ignored"),
        pytest.param({"HTTP_X_FORWARDED_PREFIX": "/x", "HTTP_X_FORWARDED_PROTO": "https"}, [], id="spoofed"),
        pytest.param({"CONTENT_TYPE": "a/b"}, [("Content-Type", "a/b")], id="Content-Type"),
        pytest.param({"CONTENT_TYPE": ""}, [], id="no Content-Type"),
    ],
)
def test_only_end_to_end_headers_are_forwarded(variables, sent):
    (_, headers, _) = forwarded(**variables)

    ours = ("Host", "Connection", "Via", "X-Forwarded-Host", "X-Forwarded-Proto")
    assert [name for name, _ in headers if name in ours] == list(ours)
    assert [header for header in headers if header[0] not in ours] == sent


def test_headers_say_where_the_request_came_from():
    (_, headers, _) = forwarded(
        SCRIPT_NAME="/pre fix",
        SERVER_PROTOCOL="HTTP/1.0",
        REMOTE_ADDR="2001:db8::1",
        HTTP_HOST="public.example",
        HTTP_VIA="1.1 outer",
        HTTP_X_FORWARDED_FOR="198.51.100.1",
        HTTP_X_FORWARDED_HOST="spoofed",
        **{"wsgi.url_scheme": "https"},
    )

    assert headers[2:] == [
        ("Via", "1.1 outer, 1.0 usage-middleware"),
        ("X-Forwarded-For", "198.51.100.1, 2001:db8::1"),
        ("X-Forwarded-Host", "public.example"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Prefix", "/pre%20fix"),
    ]


def test_added_headers_replace_those_of_the_client_and_ours():
    options = {"headers": {"authorization": " Bearer secret", "Host": "llm.internal", "Via": "x"}}
    (_, headers, _) = forwarded(
        options, HTTP_AUTHORIZATION="Bearer sk-client", HTTP_CONNECTION="authorization", HTTP_X="1"
    )

    assert headers == [
        ("Connection", "close"),
        ("X-Forwarded-Host", "127.0.0.1"),
        ("X-Forwarded-Proto", "http"),
        ("X", "1"),
        ("authorization", "Bearer secret"),
        ("Host", "llm.internal"),
        ("Via", "x"),
    ]


def test_variables_of_the_process_are_not_headers(monkeypatch):
    # wsgiref and granian put them into every environ.
    monkeypatch.setenv("HTTP_X_SECRET", "of the process")
    (_, headers, _) = forwarded(HTTP_X_SECRET="of the process", HTTP_X_OTHER="1")
    assert ("X-Other", "1") in headers
    assert "X-Secret" not in dict(headers)

    (_, headers, _) = forwarded(HTTP_X_SECRET="of the client")
    assert ("X-Secret", "of the client") in headers


@pytest.mark.parametrize(
    ("method", "variables", "framing", "body"),
    [
        pytest.param("GET", {}, [], b"", id="none"),
        pytest.param("POST", {}, [("Content-Length", "0")], b"", id="none, of a POST"),
        pytest.param("GET", {"CONTENT_LENGTH": ""}, [], b"", id="an empty length"),
        pytest.param("DELETE", {"CONTENT_LENGTH": "0"}, [("Content-Length", "0")], b"", id="0"),
        pytest.param("POST", {"CONTENT_LENGTH": "3"}, [("Content-Length", "3")], b"abc", id="no further than its end"),
        pytest.param("POST", {"CONTENT_LENGTH": "003"}, [("Content-Length", "3")], b"abc", id="leading zeros"),
        pytest.param(
            "POST",
            {"CONTENT_LENGTH": "3", "wsgi.input_terminated": True},
            [("Content-Length", "3")],
            b"abc",
            id="a length, and an input that ends",
        ),
        pytest.param(
            "POST",
            {"HTTP_TRANSFER_ENCODING": "Chunked", "wsgi.input_terminated": True},
            [("Transfer-Encoding", "chunked")],
            b"abcdef",
            id="chunked",
        ),
        pytest.param("GET", {"wsgi.input_terminated": True}, [], b"", id="HTTP/1.1 without a length has none"),
        pytest.param(
            "POST",
            {"SERVER_PROTOCOL": "HTTP/2", "wsgi.input_terminated": True},
            [("Transfer-Encoding", "chunked")],
            b"abcdef",
            id="HTTP/2",
        ),
        pytest.param(
            "GET",
            {"SERVER_PROTOCOL": "HTTP/2", "wsgi.input_terminated": True, "wsgi.input": io.BytesIO()},
            [],
            b"",
            id="HTTP/2 without one",
        ),
    ],
)
def test_the_body_is_framed_as_it_came(method, variables, framing, body):
    variables = {"wsgi.input": io.BytesIO(b"abcdef"), **variables}
    (_, headers, sent) = forwarded(method=method, **variables)

    assert [header for header in headers if header[0] in ("Content-Length", "Transfer-Encoding")] == framing
    assert sent == body


@pytest.mark.parametrize("framing", [{"CONTENT_LENGTH": "1000000"}, {"HTTP_TRANSFER_ENCODING": "chunked"}])
def test_a_body_of_many_blocks_is_forwarded(framing):
    body = bytes(range(250)) * 4000
    (_, _, sent) = forwarded(method="PUT", **{"wsgi.input": io.BytesIO(body), "wsgi.input_terminated": True, **framing})

    assert sent == body


BAD_REQUEST = "400 Bad Request", "invalid_request_error", "bad_request"
NOT_IMPLEMENTED = "501 Not Implemented", "invalid_request_error", "not_implemented"
LENGTH_REQUIRED = "411 Length Required", "invalid_request_error", "length_required"
CHUNKED = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}


@pytest.mark.parametrize(
    ("variables", "refusal"),
    [
        pytest.param({"CONTENT_LENGTH": "5", **CHUNKED}, BAD_REQUEST, id="framed in two ways"),
        pytest.param({"CONTENT_LENGTH": "5, 5"}, BAD_REQUEST, id="two lengths"),
        pytest.param({"CONTENT_LENGTH": "5,6"}, BAD_REQUEST, id="two different lengths"),
        pytest.param({"CONTENT_LENGTH": "-1"}, BAD_REQUEST, id="a negative length"),
        pytest.param({"CONTENT_LENGTH": "+5"}, BAD_REQUEST, id="a sign"),
        pytest.param({"CONTENT_LENGTH": "0x5"}, BAD_REQUEST, id="not decimal"),
        pytest.param({"CONTENT_LENGTH": "\xb2"}, BAD_REQUEST, id="a digit that is not ASCII"),
        pytest.param({"CONTENT_LENGTH": "5\n"}, BAD_REQUEST, id="a length and a line end"),
        pytest.param({"CONTENT_LENGTH": "9" * 19}, BAD_REQUEST, id="a length beyond any body"),
        pytest.param({**CHUNKED, "wsgi.input_terminated": False}, LENGTH_REQUIRED, id="the server does not decode it"),
        pytest.param({**CHUNKED, "HTTP_TRANSFER_ENCODING": "gzip, chunked"}, NOT_IMPLEMENTED, id="gzip, chunked"),
        pytest.param({**CHUNKED, "HTTP_TRANSFER_ENCODING": "chunked, chunked"}, NOT_IMPLEMENTED, id="chunked twice"),
        pytest.param({**CHUNKED, "HTTP_TRANSFER_ENCODING": "\x0bchunked"}, NOT_IMPLEMENTED, id="not quite chunked"),
        pytest.param({"HTTP_UPGRADE": "websocket", "HTTP_CONNECTION": "Upgrade"}, NOT_IMPLEMENTED, id="Upgrade"),
        pytest.param({"HTTP_UPGRADE": "h2c, websocket"}, NOT_IMPLEMENTED, id="Upgrade to one of two"),
        pytest.param({"method": "CONNECT"}, NOT_IMPLEMENTED, id="CONNECT"),
        pytest.param({"method": "TRACE"}, NOT_IMPLEMENTED, id="TRACE"),
        pytest.param({"method": "GET /x HTTP/1.1\r\nX:"}, NOT_IMPLEMENTED, id="a method that is not one"),
        pytest.param({"HTTP_X": "a\r\nInjected: 1"}, BAD_REQUEST, id="injected header"),
        pytest.param({"HTTP_X": "a\nInjected: 1"}, BAD_REQUEST, id="injected header, LF"),
        pytest.param({"HTTP_X": "a\r\n folded"}, BAD_REQUEST, id="folded"),
        pytest.param({"HTTP_X": "a\x00b"}, BAD_REQUEST, id="NUL"),
        pytest.param({"HTTP_X": "\x7f"}, BAD_REQUEST, id="DEL"),
        pytest.param({"HTTP_X": "\u20ac"}, BAD_REQUEST, id="not Latin-1"),
        pytest.param({"HTTP_X: Y\r\nZ": "a"}, BAD_REQUEST, id="injected in a name"),
        pytest.param({"HTTP_": "a"}, BAD_REQUEST, id="no name"),
        pytest.param({"HTTP_HOST": "a\r\nX: 1"}, BAD_REQUEST, id="injected in Host"),
        pytest.param({"HTTP_VIA": "\n"}, BAD_REQUEST, id="injected in Via"),
        pytest.param({"HTTP_X_FORWARDED_FOR": "\n"}, BAD_REQUEST, id="injected in X-Forwarded-For"),
        pytest.param({"CONTENT_TYPE": "a\r\nX: 1"}, BAD_REQUEST, id="injected in Content-Type"),
        pytest.param({"path": "\u20ac"}, BAD_REQUEST, id="a path that is not Latin-1"),
        pytest.param({"path": "/\u20ac"}, BAD_REQUEST, id="a path with characters that are not bytes"),
        pytest.param({"path": "v1"}, BAD_REQUEST, id="a path without a slash"),
        pytest.param({"path": "*"}, BAD_REQUEST, id="an asterisk for GET"),
    ],
)
def test_an_invalid_request_is_refused_without_asking_the_service(variables, refusal):
    with serving(lambda connection: connection.head()[0]) as service:
        answer = call(
            Proxy(service.url), environ(**{"method": "POST", "wsgi.input": io.BytesIO(b"abcdef"), **variables})
        )

    status, error_type, code = refusal
    assert f"{answer.status} {answer.reason}" == status
    assert answer.header("Content-Type") == "application/json; charset=utf-8"
    assert answer.header("Content-Length") == str(len(answer.body))
    assert answer.json["type"] == "error"
    error = answer.json["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert (error["type"], error["param"], error["code"]) == (error_type, None, code)
    assert service.returned.empty()


def test_a_body_that_ends_early_is_refused():
    with serving(lambda connection: (connection.head(), connection.rest())) as service:
        answer = call(Proxy(service.url), environ("POST", CONTENT_LENGTH="7", **{"wsgi.input": io.BytesIO(b"abcdef")}))
        assert (answer.status, answer.json["error"]["code"]) == (400, "bad_request")
        assert service.result()[1] == b"abcdef"  # and the connection is closed


@pytest.mark.parametrize("path", ["/..", "/../x", "/a/../../x", "/a\\..\\x", "/..;/x", "/..\\x"])
def test_a_base_path_cannot_be_left(path):
    with serving(answering(OK)) as service:
        assert call(Proxy(f"{service.url}/public"), environ(path=path)).status == 400
        assert service.returned.empty()


def redirection(location):
    head = ("HTTP/1.1 302 Found", "Content-Type: a/b", f"LOCATION: {location}", "Content-Length: 0", "", "")
    return "\r\n".join(head).encode()


# The client may not be able to reach the service itself, so locations of the service become paths.
@pytest.mark.parametrize(
    ("location", "seen"),
    [
        ("{url}/login?next=%2F", "/pre/login?next=%2F"),
        ("{url}", "/pre"),
        ("{url}?a", "/pre?a"),
        ("HTTP://127.0.0.1:{port}/x", "/pre/x"),
        ("{url}//evil.example", "/pre//evil.example"),
        ("/login", "/login"),
        ("http://other.example/{url}", "http://other.example/{url}"),
        ("{url}0/x", "{url}0/x"),
        ("http://127.0.0.1/x", "http://127.0.0.1/x"),
        ("https://127.0.0.1:{port}/x", "https://127.0.0.1:{port}/x"),
    ],
)
def test_locations_of_the_service_become_paths(location, seen):
    def handle(connection):
        connection.request()
        connection.send(redirection(filled(location)))

    def filled(text):
        return text.format(url=service.url, port=service.port)

    with serving(handle) as service:
        answer = ask(Proxy(service.url), SCRIPT_NAME="/pre", path="/x")

    assert (answer.status, answer.header("Location")) == (302, filled(seen))


@pytest.mark.parametrize(
    ("url", "location", "seen"),
    [
        ("{url}/base", "{url}/base/x", "/x"),
        ("{url}/base", "{url}/base", "/"),
        ("{url}/base", "{url}/basement", "{url}/basement"),
        ("{url}/base", "{url}/x", "{url}/x"),
        ("{url}", "{url}//evil.example", "{url}//evil.example"),
        ("{url}", "http://legacy.example/x", "/x"),
    ],
)
def test_only_locations_below_the_base_path_become_paths(url, location, seen):
    with serving(lambda connection: connection.send(answer)) as service:
        url, location, seen = (text.format(url=service.url) for text in (url, location, seen))
        answer = (
            f"HTTP/1.1 302 Found\r\nContent-Type: a/b\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
        )
        got = ask(Proxy(url, headers={"Host": "legacy.example"}), path="/x")

    assert got.header("Location") == seen


def test_a_service_that_does_not_listen_is_a_502(caplog):
    with serving(answering(OK)) as service:
        url = service.url
    with caplog.at_level(logging.ERROR):
        answer = ask(
            Proxy(url, headers={"X-Secret": "hidden"}), "POST", CONTENT_LENGTH="3", **{"wsgi.input": io.BytesIO(b"abc")}
        )

    assert (answer.status, answer.reason, answer.json["error"]["code"]) == (502, "Bad Gateway", "bad_gateway")
    ((_, level, text),) = caplog.record_tuples
    assert level == logging.ERROR
    assert url in text
    assert "hidden" not in caplog.text
    assert url not in answer.body.decode()


def test_a_host_that_does_not_exist_is_a_502():
    assert ask(Proxy("http://host.invalid")).status == 502


def test_a_service_may_have_an_ipv6_address():
    def handle(connection):
        connection.send(OK)
        return connection.head()[1][0]

    with serving(handle, host="::1") as service:
        assert ask(Proxy(f"http://[::1]:{service.port}")).body == b"ok"
        assert service.result() == ("Host", f"[::1]:{service.port}")


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://a.example", "a.example"),
        ("http://a.example:80/", "a.example"),
        ("http://a.example:443", "a.example:443"),
        ("https://a.example:443", "a.example"),
        ("https://A.example:8443/x", "a.example:8443"),
        ("http://b\u00fccher.example", "xn--bcher-kva.example"),
    ],
)
def test_the_host_header_is_that_of_the_url(url, host):
    assert Proxy(url)._host == host


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((b"http://h",), TypeError),
        (("h:80",), ValueError),
        (("ftp://h",), ValueError),
        (("http://",), ValueError),
        (("http:///x",), ValueError),
        (("http://h:99999",), ValueError),
        (("http://[::1",), ValueError),
        (("http://h/?q",), ValueError),
        (("http://h/#f",), ValueError),
        (("http://h/a b",), ValueError),
        (("http://h/\r\nX: 1",), ValueError),
        (("http://h/%zz",), ValueError),
        (("http://h ost",), ValueError),
        (("http://a..b",), ValueError),
        (("http://user:hidden@h",), ValueError),
        (("http://h", [("A", "hidden")]), TypeError),
        (("http://h", {"A": b"hidden"}), TypeError),
        (("http://h", {"A": "hidden\r\nB: 1"}), ValueError),
        (("http://h", {"A": "hidden\u20ac"}), ValueError),
        (("http://h", {"A B": "hidden"}), ValueError),
        (("http://h", {"": "hidden"}), ValueError),
        (("http://h", {"Content-Length": "1"}), ValueError),
        (("http://h", {"transfer-encoding": "chunked"}), ValueError),
        (("http://h", {"Connection": "x"}), ValueError),
    ],
)
def test_bad_arguments_are_refused_and_not_shown(arguments, error):
    url, *headers = arguments
    with pytest.raises(error) as raised:
        Proxy(url, headers=headers[0] if headers else None)
    assert "hidden" not in str(raised.value)
    assert raised.value.__context__ is None or "hidden" not in str(raised.value.__context__)


@pytest.mark.parametrize("name", ["connect_timeout", "read_timeout"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), None, "5", True])
def test_bad_timeouts_are_refused(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        Proxy("http://h", **{name: value})


def test_repr_has_no_headers():
    proxy = Proxy("http://h/base", headers={"Authorization": "Bearer hidden"})

    assert repr(proxy) == "Proxy('http://h/base')"
    with pytest.raises(TypeError):
        json.dumps(proxy)
