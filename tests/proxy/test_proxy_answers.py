"""What a service may send, byte by byte, and what the client gets: the answer, a refusal, or a truncated answer."""

from __future__ import annotations

import pytest
from client import call, environ
from raw_service import answering, serving

from usage_middleware import Proxy, UpstreamError

HEAD = b"HTTP/1.1 200 OK\r\n"
VIA = ("Via", "1.1 usage-middleware")
TYPE = ("Content-Type", "text/plain")


def asked(sent, method="GET", **variables):
    """Return the proxy's answer if the service sends these bytes and closes the connection."""
    with serving(answering(sent)) as service:
        return call(Proxy(service.url), environ(method, "/", **variables))


@pytest.mark.parametrize(
    ("sent", "status", "body"),
    [
        pytest.param(HEAD + b"Content-Length: 3\r\n\r\nabc", "200 OK", b"abc", id="a length"),
        pytest.param(HEAD + b"Content-Length: 3\r\n\r\nabcdef", "200 OK", b"abc", id="more than its length"),
        pytest.param(HEAD + b"Content-Length: 0\r\n\r\n", "200 OK", b"", id="length 0"),
        pytest.param(HEAD + b"content-length:\t 003 \t\r\n\r\nabc", "200 OK", b"abc", id="white space around a length"),
        pytest.param(HEAD + b"Content-Length : 3\r\n\r\nabcdef", "200 OK", b"abc", id="white space before a colon"),
        pytest.param(HEAD + b"\r\nabc", "200 OK", b"abc", id="up to the end"),
        pytest.param(HEAD + b"\r\n", "200 OK", b"", id="up to the end, empty"),
        pytest.param(b"HTTP/1.0 200 OK\r\n\r\nabc", "200 OK", b"abc", id="HTTP/1.0"),
        pytest.param(b"HTTP/1.1 200 OK\n\nabc", "200 OK", b"abc", id="lines end in LF"),
        pytest.param(b"HTTP/1.1 201\r\n\r\nabc", "201 Created", b"abc", id="no reason"),
        pytest.param(b"HTTP/1.1 201 \r\n\r\nabc", "201 Created", b"abc", id="an empty reason"),
        pytest.param(b"HTTP/1.1 299 \r\n\r\nabc", "299 Unknown", b"abc", id="an unknown status"),
        pytest.param(b"HTTP/1.1 999 Gr\xfcn \r\n\r\nabc", "999 Gr\xfcn", b"abc", id="a reason in Latin-1"),
        pytest.param(b"HTTP/1.1 500 No\r\nContent-Length: 1\r\n\r\na", "500 No", b"a", id="an error"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "200 OK", b"abc", id="chunked"),
        pytest.param(
            HEAD + b"Transfer-Encoding: Chunked\r\n\r\nA ; a=b\r\n0123456789\r\n01\nx\n000\r\n\r\n",
            "200 OK",
            b"0123456789x",
            id="chunked, in unusual ways",
        ),
        pytest.param(
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX-Checksum: 1\r\nY: 2\r\n\r\n",
            "200 OK",
            b"a",
            id="trailers",
        ),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"\r\nabc", "200 OK", b"abc", id="100"),
        pytest.param(
            b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + HEAD + b"\r\nabc",
            "200 OK",
            b"abc",
            id="103 and 102",
        ),
    ],
)
def test_a_valid_answer_is_passed_on(sent, status, body):
    answer = asked(sent)

    assert (f"{answer.status} {answer.reason}", answer.body) == (status, body)


def test_headers_keep_their_order_and_repetitions():
    answer = asked(
        HEAD + b"Set-Cookie: a=1; Path=/\r\nx-empty:\r\nX-Latin: \xfc\t!\r\nset-cookie: b=2\r\n"
        b"Via: 1.0 inner\r\nX-Empty: \r\nContent-Length: 0\r\n\r\n"
    )

    assert answer.headers == [
        ("Set-Cookie", "a=1; Path=/"),
        ("x-empty", ""),
        ("X-Latin", "\xfc\t!"),
        ("set-cookie", "b=2"),
        ("Via", "1.0 inner"),
        ("X-Empty", ""),
        ("Content-Length", "0"),
        VIA,
    ]


def test_hop_by_hop_headers_are_removed():
    answer = asked(
        HEAD
        + b"Connection: close, X-A\r\nConnection: x-b\r\nKeep-Alive: 1\r\nProxy-Authenticate: Basic\r\nTrailer: X\r\n"
        b"Trailers: X\r\nUpgrade: h2c\r\nTE: x\r\nProxy-Connection: x\r\nX-A: 1\r\nX-B: 2\r\nX-C: 3\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    )

    assert answer.headers == [("X-C", "3"), VIA]


def test_the_version_in_via_is_that_of_the_service():
    assert asked(b"HTTP/1.0 200 OK\r\n\r\n").headers == [("Via", "1.0 usage-middleware")]


# RFC 9110 sections 9.3.2, 15.3.5 and 15.4.5. The service keeps the connection open, so waiting for a body would take
# forever.
@pytest.mark.parametrize(
    ("method", "head", "headers"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", [("Content-Length", "7"), VIA]),
        ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", [VIA]),
        ("HEAD", b"HTTP/1.1 200 OK\r\n\r\n", [VIA]),
        ("GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 7\r\nX: 1\r\n\r\n", [("X", "1"), VIA]),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", [("Content-Length", "7"), VIA]),
    ],
)
def test_an_answer_without_a_body_is_not_waited_for(method, head, headers):
    def handle(connection):
        connection.head()
        connection.send(head)
        return connection.is_closed_by_peer()

    with serving(handle) as service:
        answer = call(Proxy(service.url), environ(method))
        assert service.result()

    assert (answer.headers, answer.body) == (headers, b"")


LONG = b"x" * 65_536


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"HTTP/1.1 200 OK", id="part of a status line"),
        pytest.param(b"HTTP/1.1 200 OK\r\n", id="a status line"),
        pytest.param(HEAD + b"X: 1\r\n", id="part of a head"),
        pytest.param(HEAD + b"X: 1", id="part of a header"),
        pytest.param(b"\r\n" + HEAD + b"\r\n", id="an empty line first"),
        pytest.param(b"abc", id="HTTP/0.9"),
        pytest.param(b"ICY 200 OK\r\n\r\n", id="another protocol"),
        pytest.param(b"HTTP/2 200 OK\r\n\r\n", id="HTTP/2"),
        pytest.param(b"HTTP/2.0 200 OK\r\n\r\n", id="HTTP/2.0"),
        pytest.param(b"http/1.1 200 OK\r\n\r\n", id="lower case"),
        pytest.param(b"HTTP/1.1  200 OK\r\n\r\n", id="two spaces"),
        pytest.param(b"HTTP/1.1 20 OK\r\n\r\n", id="a short status"),
        pytest.param(b"HTTP/1.1 2000 OK\r\n\r\n", id="a long status"),
        pytest.param(b"HTTP/1.1 099 OK\r\n\r\n", id="a status below 100"),
        pytest.param(b"HTTP/1.1 +20 OK\r\n\r\n", id="a status with a sign"),
        pytest.param(b"HTTP/1.1 200 OK\rX: 1\r\n\r\n", id="CR in the reason"),
        pytest.param(b"HTTP/1.1 200 O\x00K\r\n\r\n", id="NUL in the reason"),
        pytest.param(b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + HEAD + b"\r\n", id="101 unasked"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000 + HEAD + b"\r\n", id="interim answers without end"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n", id="100 alone"),
        pytest.param(HEAD + b"X\r\nContent-Length: 0\r\n\r\n", id="a header without a colon"),
        pytest.param(HEAD + b": 1\r\n\r\n", id="a header without a name"),
        pytest.param(HEAD + b"X Y: 1\r\n\r\n", id="a space in a name"),
        pytest.param(HEAD + b"X\xfc: 1\r\n\r\n", id="Latin-1 in a name"),
        pytest.param(HEAD + b"X: 1\r\n folded\r\n\r\n", id="folded"),
        pytest.param(HEAD + b" X: 1\r\n\r\n", id="folded, the first"),
        pytest.param(HEAD + b"From me\r\nX: 1\r\n\r\n", id="a mailbox"),
        pytest.param(HEAD + b"X: 1\rSet-Cookie: a=1\r\n\r\n", id="CR in a value"),
        pytest.param(HEAD + b"X: 1\x00\r\n\r\n", id="NUL in a value"),
        pytest.param(HEAD + b"X: \x1b[2J\r\n\r\n", id="an escape in a value"),
        pytest.param(HEAD + b"X: \x7f\r\n\r\n", id="DEL in a value"),
        pytest.param(HEAD + b"X: " + LONG + b"\r\n\r\n", id="a long header"),
        pytest.param(b"HTTP/1.1 200 " + LONG + b"\r\n\r\n", id="a long status line"),
        pytest.param(HEAD + b"X: 1\r\n" * 101 + b"\r\n", id="many headers"),
        pytest.param(HEAD + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", id="two lengths"),
        pytest.param(HEAD + b"Content-Length: 3, 3\r\n\r\nabc", id="two lengths in one"),
        pytest.param(HEAD + b"Content-Length: 3\r\ncontent-length: 4\r\n\r\nabc", id="two different lengths"),
        pytest.param(HEAD + b"Content-Length: -3\r\n\r\nabc", id="a negative length"),
        pytest.param(HEAD + b"Content-Length: +3\r\n\r\nabc", id="a length with a sign"),
        pytest.param(HEAD + b"Content-Length: 1_0\r\n\r\nabc", id="a length as Python writes it"),
        pytest.param(HEAD + b"Content-Length: 0x3\r\n\r\nabc", id="a length that is not decimal"),
        pytest.param(HEAD + b"Content-Length: \xb2\r\n\r\nabc", id="a length with another digit"),
        pytest.param(HEAD + b"Content-Length:\r\n\r\nabc", id="an empty length"),
        pytest.param(HEAD + b"Content-Length: " + b"9" * 19 + b"\r\n\r\nabc", id="a length beyond any body"),
        pytest.param(
            HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", id="framed in two ways"
        ),
        pytest.param(HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", id="gzip, chunked"),
        pytest.param(HEAD + b"Transfer-Encoding: identity\r\n\r\nabc", id="identity"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", id="chunked twice"),
        pytest.param(
            HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", id="two headers of it"
        ),
        pytest.param(HEAD + b"Transfer-Encoding:\r\n\r\nabc", id="an empty transfer coding"),
        pytest.param(b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", id="chunked, of HTTP/1.0"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_invalid_head_is_a_502(method, sent, caplog):
    answer = asked(sent, method)

    assert (answer.status, answer.reason) == (502, "Bad Gateway")
    assert answer.header("Content-Type") == "application/json; charset=utf-8"
    assert method == "HEAD" or answer.json["error"]["code"] == "bad_gateway"
    assert len(caplog.records) == 1


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "body"),
    [
        pytest.param(HEAD + b"Content-Length: 3\r\n\r\n", b"", id="none of a body"),
        pytest.param(HEAD + b"Content-Length: 3\r\n\r\nab", b"ab", id="less than its length"),
        pytest.param(CHUNKED, b"", id="no chunk"),
        pytest.param(CHUNKED + b"3\r\nab", b"ab", id="part of a chunk"),
        pytest.param(CHUNKED + b"3\r\nabc", b"abc", id="no line end"),
        pytest.param(CHUNKED + b"3\r\nabc\r", b"abc", id="part of a line end"),
        pytest.param(CHUNKED + b"3\r\nabc\r\n", b"abc", id="no last chunk"),
        pytest.param(CHUNKED + b"3\r\nabc\r\n0", b"abc", id="part of the last chunk"),
        pytest.param(CHUNKED + b"3\r\nabc\r\n0\r\n", b"abc", id="no end of trailers"),
        pytest.param(CHUNKED + b"3\r\nabc\r\n0\r\nX: 1\r\n", b"abc", id="part of trailers"),
        pytest.param(CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n", b"abc", id="a chunk that is longer"),
        pytest.param(CHUNKED + b"3\r\nabc0\r\n\r\n", b"abc", id="a missing line end"),
        pytest.param(CHUNKED + b"\r\nabc\r\n", b"", id="no size"),
        pytest.param(CHUNKED + b"x\r\nabc\r\n", b"", id="a size that is not a number"),
        pytest.param(CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n", b"", id="a negative size"),
        pytest.param(CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n", b"", id="a size with a prefix"),
        pytest.param(CHUNKED + b" 3\r\nabc\r\n0\r\n\r\n", b"", id="a space before a size"),
        pytest.param(CHUNKED + b"1_0\r\n" + b"a" * 16 + b"\r\n0\r\n\r\n", b"", id="a size as Python writes it"),
        pytest.param(CHUNKED + b"F" * 16 + b"\r\nabc", b"", id="a size beyond any chunk"),
        pytest.param(CHUNKED + b"3;" + LONG + b"\r\nabc\r\n0\r\n\r\n", b"", id="a long extension"),
        pytest.param(CHUNKED + b"3;\x00\r\nabc\r\n0\r\n\r\n", b"", id="NUL in an extension"),
        pytest.param(CHUNKED + b"0\r\nX\r\n\r\n", b"", id="a malformed trailer"),
        pytest.param(CHUNKED + b"0\r\n" + b"X: 1\r\n" * 101 + b"\r\n", b"", id="many trailers"),
    ],
)
def test_an_incomplete_body_raises_upstream_error(sent, body):
    seen = []
    with serving(answering(sent)) as service:
        result = Proxy(service.url)(environ(), lambda *_: lambda _: None)
        with pytest.raises(UpstreamError):
            seen.extend(result)
        # It is closed already, and can be closed again.
        assert list(result) == []
        result.close()
        result.close()

    assert b"".join(seen) == body
