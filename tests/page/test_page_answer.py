"""What the server answers at the page's path: one static document that requests nothing but the endpoint."""

import base64
import hashlib
import re

import pytest
from client import ask, wrapped

from usage_middleware import MemoryTokenStore, NewAPI, UsageMiddleware

POLICY = re.compile(r"([a-z-]+) ([^;]+)(?:; |$)")


def application(**options):
    return UsageMiddleware(wrapped, MemoryTokenStore(), **{"page": "/usage", **options})


def document(**options):
    return ask(application(**options), path=options.get("page", "/usage")).body.decode()


@pytest.mark.parametrize("path", ["/usage", "/usage/"])
def test_one_document_with_and_without_a_slash(path):
    answer = ask(application(), path=path)
    assert answer.status == 200
    assert answer.header("Content-Type") == "text/html; charset=utf-8"
    assert answer.header("Content-Length") == str(len(answer.body))
    assert answer.header("Cache-Control") == "no-cache"
    assert answer.header("Referrer-Policy") == "no-referrer"
    assert answer.header("X-Content-Type-Options") == "nosniff"
    assert answer.header("Cross-Origin-Opener-Policy") == "same-origin"
    assert not [name for name, _ in answer.headers if name.startswith("Access-Control")]
    assert answer.body == ask(application(), path="/usage").body
    assert len(answer.body) <= 40_000


def test_the_page_leaves_other_paths_as_they_were():
    assert ask(application(), path="/usage/more").body == ask(wrapped, path="/usage/more").body
    assert ask(application()).status == 401
    assert ask(application(page=None), path="/usage").body == ask(wrapped, path="/usage").body


@pytest.mark.parametrize("path", ["", "/"])
def test_a_page_at_the_root_needs_no_slash(path):
    assert ask(application(page="/"), path=path).body.startswith(b"<!doctype html>")


def test_the_page_answers_head_and_options_and_refuses_post():
    head = ask(application(), path="/usage", method="HEAD")
    assert (head.status, head.body) == (200, b"")
    assert head.header("Content-Length") == str(len(ask(application(), path="/usage").body))
    post = ask(application(), path="/usage", method="POST")
    assert (post.status, post.header("Allow")) == (405, "GET, HEAD, OPTIONS")
    options = ask(application(), path="/usage", method="OPTIONS")
    assert (options.status, options.body) == (204, b"")
    assert options.header("Access-Control-Allow-Origin") is None


def test_a_browser_that_has_it_gets_304():
    etag = ask(application(), path="/usage").header("ETag")
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        answer = ask(application(), path="/usage", HTTP_IF_NONE_MATCH=known)
        assert (answer.status, answer.body, answer.header("ETag")) == (304, b"", etag)
    assert ask(application(), path="/usage", HTTP_IF_NONE_MATCH='"other"').status == 200
    # With another path of the endpoint, it is another document.
    assert ask(application(path="/quota"), path="/usage").header("ETag") != etag


def test_the_policy_lets_its_own_script_and_style_run_and_nothing_else():
    answer = ask(application(), path="/usage")
    policy = dict(POLICY.findall(answer.header("Content-Security-Policy")))
    text = answer.body.decode()
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
        assert len(re.findall(f"<{tag}", text)) == 1
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }


def test_the_page_loads_nothing_else_and_makes_no_markup():
    text = document()
    assert not re.search(r"""(?:src|href|action)=["'](?!data:)""", text)
    assert not re.search(
        r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|localStorage|cookie)\b", text
    )
    assert not re.search(r"\son\w+=", text)
    assert re.findall(r"https?://[^\s\"'`]+", text) == ["http://www.w3.org/2000/svg"]


@pytest.mark.parametrize(
    ("page", "path", "place"),
    [
        pytest.param("/usage", "/api/usage/token", "../api/usage/token", id="usual"),
        pytest.param("/", "/api/usage/token", "api/usage/token", id="page at the root"),
        pytest.param("/my/keys/", "/quota", "../../quota", id="page in a folder"),
        pytest.param("/usage", "/api/größe", "../api/gr%C3%B6%C3%9Fe", id="not ASCII"),
        pytest.param("/usage", '/a"b&c', "../a%22b%26c", id="markup"),
    ],
)
def test_the_page_has_the_relative_path_of_the_endpoint(page, path, place):
    assert f'<meta name="usage-endpoint" content="{place}">' in document(page=page, path=path)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"page": 1}, TypeError),
        ({"page": "usage"}, ValueError),
        ({"page": "/usage?x"}, ValueError),
        ({"page": "/api/usage/token"}, ValueError),
        ({"page": "/api/usage/token/days"}, ValueError),
        ({"page": "/api/status", "new_api": NewAPI()}, ValueError),
    ],
)
def test_a_bad_path_of_the_page_is_refused(options, error):
    with pytest.raises(error, match=r"^page must "):
        application(**options)
