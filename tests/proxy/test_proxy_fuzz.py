"""An answer is read the same however it is cut into pieces, and a bad one raises nothing but UpstreamError."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from usage_middleware import UpstreamError
from usage_middleware.wsgi.proxy.answers import AnswerReader

HEADS = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.0 404\n\n",
        b"HTTP/1.1 204 No Content\r\nX: 1\r\n",
        b"",
    ]
)
WORDS = st.sampled_from(
    [
        b"\r\n",
        b"\n",
        b"\r",
        b"0",
        b"3",
        b"a\r\n",
        b"abc",
        b"X: 1\r\n",
        b"0\r\n\r\n",
        b";",
        b"\x00",
        b"HTTP/1.1 200 OK\r\n",
    ]
)
ANSWERS = st.builds(lambda head, words: head + b"".join(words), HEADS, st.lists(WORDS | st.binary(max_size=4)))


def read(pieces, method="GET"):
    """Return the head, the whole body, and the error that ended it."""
    reader = AnswerReader(method)
    pieces = iter(pieces)
    parts = []
    fed = False
    try:
        for part in reader.parts:
            if part is None:
                # Fed with nothing, the reader asks again.
                if fed := not fed:
                    reader.feed(next(pieces, b""))
            else:
                assert part, "an empty piece would look like the end"
                parts.append(part)
    except UpstreamError as error:
        return parts[:1], b"".join(parts[1:]), str(error)
    return parts[:1], b"".join(parts[1:]), None


@given(answer=ANSWERS, method=st.sampled_from(["GET", "HEAD"]), data=st.data())
def test_an_answer_is_read_the_same_however_it_is_cut(answer, method, data):
    borders = sorted(data.draw(st.lists(st.integers(0, len(answer)))))
    pieces = [answer[begin:end] for begin, end in zip([0, *borders], [*borders, len(answer)], strict=True)]

    whole = read([answer] if answer else [], method)
    assert read([piece for piece in pieces if piece], method) == whole
    assert read([bytes([byte]) for byte in answer], method) == whole


@given(answer=st.binary() | ANSWERS)
@example(b"HTTP/1.1 200 OK\r\nX" + b" " * 65_000 + b"\r\n\r\n")
@example(b"HTTP/1.1 200 OK\r\nX:" + b" \t" * 32_000 + b"\x00\r\n\r\n")
@example(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1" + b" " * 65_000 + b"\x00\r\n")
def test_whatever_a_service_sends_is_read_or_an_upstream_error(answer):
    head, body, error = read([answer] if answer else [])

    assert head or error
    assert len(body) <= len(answer)


def test_a_line_without_end_is_not_kept():
    sent = 0

    def pieces():
        nonlocal sent
        while True:
            sent += 1000
            yield b"x" * 1000

    assert read(pieces())[2]
    assert sent < 70_000
