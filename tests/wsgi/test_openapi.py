"""The description of the endpoint: it is valid OpenAPI, and what the middleware answers is what it says."""

import configparser
import contextlib
import copy
import json
import re
import subprocess
import threading
from pathlib import Path

import description
import processes
import pytest
from client import PATH, call, environ, wrapped
from description import DESCRIPTION, FILE, resolve
from jsonschema import ValidationError
from openapi_spec_validator import OpenAPIV31SpecValidator
from places import SCRIPTS
from waiting import until_logged
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import WSGIRequestHandler, make_server

import usage_middleware
from usage_middleware import SQLiteTokenStore, StoreError, Token, UsageMiddleware

PACKAGE = Path(usage_middleware.__file__).parent

SETTINGS = Path(description.__file__).with_name("schemathesis.toml")

ORIGIN = "https://app.example"
TOKENS = {
    "empty": Token(),
    "limited": Token(name="Default Token", total_available=987655, total_used=12345, model_limits={"gpt-4o-mini": 500}),
    "unlimited": Token(name="caf\u00e9", unlimited_quota=True, total_used=2**63 - 1),
    "exhausted": Token(total_used=10),
    "overdrawn": Token(total_used=1200, total_available=-200),
    "expired": Token(expires_at=1),
    "never": Token(expires_at=-1),
    "models": Token(model_limits={"gpt-4o": True, "gpt-4o-mini": 500, "none": 0}, model_limits_enabled=True),
    "disabled": Token(enabled=False),
}


class Store:
    def get(self, key):
        if key == "broken":
            raise StoreError("broken")
        return TOKENS.get(key)


# --- As a document


def test_it_is_valid_openapi():
    OpenAPIV31SpecValidator(DESCRIPTION).validate()


def test_it_is_installed_with_the_package():
    settings = configparser.ConfigParser()
    settings.read(PACKAGE.parent / "setup.cfg")
    if not settings.sections():
        pytest.skip("the package is not tested from its source tree")
    data = settings["options.package_data"]["usage_middleware"].split(", ")
    assert sorted(data) == sorted(path.name for path in PACKAGE.iterdir() if path.is_file() and path.suffix != ".py")


def test_the_two_paths_are_described_alike():
    with_slash = copy.deepcopy(DESCRIPTION["paths"][PATH + "/"])
    for operation in ("get", "head", "options"):
        with_slash[operation]["operationId"] = with_slash[operation]["operationId"].removesuffix("WithSlash")
    assert with_slash == DESCRIPTION["paths"][PATH]


@pytest.mark.parametrize("path", DESCRIPTION["paths"])
def test_head_is_described_as_get_without_its_body(path):
    operations = DESCRIPTION["paths"][path]
    assert operations["head"]["responses"].keys() == operations["get"]["responses"].keys()
    for status, response in operations["get"]["responses"].items():
        head = resolve(operations["head"]["responses"][status])
        assert head["headers"] == resolve(response)["headers"]
        assert "content" not in head


def test_nothing_is_described_that_is_not_referred_to():
    text = json.dumps(DESCRIPTION)
    for kind, components in DESCRIPTION["components"].items():
        for name in components:
            # Of another method, no operation can speak; security schemes are named.
            if kind != "securitySchemes" and not name.endswith("MethodNotAllowed"):
                assert f'"#/components/{kind}/{name}"' in text


# --- The middleware's own answers


def check_answer(answer, method="GET", path=PATH):
    description.check_answer(answer, method, path)


ASKED = [
    pytest.param("GET", 401, {}, id="no header"),
    pytest.param("GET", 401, {"HTTP_AUTHORIZATION": "Basic x"}, id="malformed"),
    pytest.param("GET", 401, {"HTTP_AUTHORIZATION": "Bearer unknown"}, id="unknown"),
    *(
        pytest.param("GET", 200 if token.enabled else 401, {"HTTP_AUTHORIZATION": f"Bearer {key}"}, id=key)
        for key, token in TOKENS.items()
    ),
    pytest.param("GET", 503, {"HTTP_AUTHORIZATION": "Bearer broken"}, id="broken"),
    pytest.param("HEAD", 200, {"HTTP_AUTHORIZATION": "Bearer limited"}, id="HEAD 200"),
    pytest.param("HEAD", 401, {}, id="HEAD 401"),
    pytest.param("HEAD", 503, {"HTTP_AUTHORIZATION": "Bearer broken"}, id="HEAD 503"),
    pytest.param("OPTIONS", 204, {}, id="OPTIONS"),
    pytest.param("OPTIONS", 204, {"HTTP_ACCESS_CONTROL_REQUEST_HEADERS": "x-a, b!#$%&'*+.^_`|~-9"}, id="preflight"),
    *(pytest.param(method, 405, {}, id=method) for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE", "get", "")),
]


@pytest.mark.parametrize("path", [PATH, PATH + "/"])
@pytest.mark.parametrize("allow_origins", ["*", (ORIGIN,), ()], ids=["any origin", "listed origins", "no CORS"])
@pytest.mark.parametrize("origin", [{}, {"HTTP_ORIGIN": ORIGIN}, {"HTTP_ORIGIN": "null"}], ids=["", ORIGIN, "null"])
@pytest.mark.parametrize(("method", "status", "headers"), ASKED)
def test_every_answer_is_described(method, status, headers, origin, allow_origins, path):
    app = UsageMiddleware(wrapped, Store(), allow_origins=allow_origins)
    answer = call(app, environ(method, path, **headers, **origin))
    assert answer.status == status
    check_answer(answer, method, path)


def throttled(method="GET", path=PATH, **options):
    """Return the answer to a client that has sent a wrong key too often."""
    app = UsageMiddleware(wrapped, Store(), throttle="1 per hour", **options)
    asked = environ(method, path, HTTP_AUTHORIZATION="Bearer unknown", HTTP_ORIGIN=ORIGIN, REMOTE_ADDR="127.0.0.1")
    # From the second on in an hour; the hour may end in between.
    answers = (call(app, dict(asked)) for _ in range(4))
    return next(answer for answer in answers if answer.status == 429)


@pytest.mark.parametrize("path", [PATH, PATH + "/"])
@pytest.mark.parametrize("allow_origins", ["*", (ORIGIN,), ()], ids=["any origin", "listed origins", "no CORS"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_answer_to_a_guesser_is_described(method, allow_origins, path):
    check_answer(throttled(method, path, allow_origins=allow_origins), method, path)


def test_every_described_answer_is_among_them():
    asked = {(case.values[0].lower(), str(case.values[1])) for case in ASKED} | {("get", "429"), ("head", "429")}
    operations = DESCRIPTION["paths"][PATH]
    for method in ("get", "head", "options"):
        for status in operations[method]["responses"]:
            assert (method, status) in asked


EXAMPLES = {
    "limited": Token(
        name="Default Token", total_available=987655, total_used=12345, model_limits={"gpt-4o-mini": 500000}
    ),
    "unlimited": Token(
        name="Default Token", total_used=12345, unlimited_quota=True, model_limits={"gpt-4o-mini": 500000}
    ),
    "modelLimits": Token(
        name="Default Token",
        total_available=987655,
        total_used=12345,
        model_limits={"gpt-4o": True, "gpt-4o-mini": 500000},
        model_limits_enabled=True,
    ),
    "expired": Token(name="Default Token", total_available=987655, total_used=12345, expires_at=1893456000),
    "overdrawn": Token(name="Default Token", total_available=-200, total_used=1200),
    "empty": Token(),
}


def test_the_examples_are_real_answers():
    examples = {}
    operations = DESCRIPTION["paths"][PATH]
    names = [response["$ref"].rpartition("/")[2] for response in operations["get"]["responses"].values()]
    for name in [*names, "MethodNotAllowed"]:
        response = DESCRIPTION["components"]["responses"][name]
        for content in response.get("content", {}).values():
            for example, shown in content["examples"].items():
                examples[name, example] = json.dumps(shown["value"], ensure_ascii=False, separators=(",", ":")).encode()

    def body(store, method="GET", **headers):
        return call(UsageMiddleware(wrapped, store), environ(method, **headers)).body

    def key(key):
        return {"HTTP_AUTHORIZATION": f"Bearer {key}"}

    assert examples == {
        **{("Usage", name): body({"key": token}, **key("key")) for name, token in EXAMPLES.items()},
        ("Unauthorized", "absent"): body({}),
        ("Unauthorized", "malformed"): body({}, **key("")),
        ("Unauthorized", "unknown"): body({}, **key("key")),
        ("MethodNotAllowed", "refused"): body({}, "POST"),
        ("TooManyRequests", "refused"): throttled().body,
        ("ServiceUnavailable", "refused"): body(Store(), **key("broken")),
    }


# --- That it is not too lax

USAGE_KEYS = DESCRIPTION["components"]["schemas"]["TokenUsage"]["required"]


def body_mutant(change, key="limited"):
    """Change the body's JSON, and keep its headers correct."""

    def mutate(answer):
        value = answer.json
        change(value)
        body = json.dumps(value, separators=(",", ":")).encode()
        headers = [(name, str(len(body)) if name == "Content-Length" else text) for name, text in answer.headers]
        return answer._replace(headers=headers, body=body)

    return key, mutate


def usage_mutant(**fields):
    return body_mutant(lambda value: value["data"].update(fields))


def header_mutant(name, value=None, key="limited"):
    """Change the value of a header. Without a value, remove the header."""

    def mutate(answer):
        headers = [(other, text) for other, text in answer.headers if other != name]
        return answer._replace(headers=headers if value is None else [*headers, (name, value)])

    return key, mutate


MUTANTS = {
    **{f"no {name}": body_mutant(lambda value, name=name: value["data"].pop(name)) for name in USAGE_KEYS},
    **{f"no {name}": body_mutant(lambda value, name=name: value.pop(name)) for name in ("code", "message", "data")},
    **{f"{name} null": usage_mutant(**{name: None}) for name in USAGE_KEYS},
    "an extra key": usage_mutant(remaining=987655),
    "a success key": body_mutant(lambda value: value.update(success=True)),
    "code 1": body_mutant(lambda value: value.update(code=1)),
    "code false": body_mutant(lambda value: value.update(code=False)),
    "another message": body_mutant(lambda value: value.update(message="")),
    "another object": usage_mutant(object="token"),
    "a float total": usage_mutant(total_used=12345.5),
    "a whole float total": usage_mutant(total_used=12345.0),
    "a total as a str": usage_mutant(total_available="987655"),
    "a total as a bool": usage_mutant(total_available=True),
    "unlimited_quota 0": usage_mutant(unlimited_quota=0),
    "model_limits_enabled 1": usage_mutant(model_limits_enabled=1),
    "model_limits a list": usage_mutant(model_limits=[]),
    "a model limit false": usage_mutant(model_limits={"gpt-4o": False}),
    "a model limit negative": usage_mutant(model_limits={"gpt-4o": -1}),
    "a model limit null": usage_mutant(model_limits={"gpt-4o": None}),
    "a model limit a float": usage_mutant(model_limits={"gpt-4o": 0.5}),
    "expires_at -1": usage_mutant(expires_at=-1),
    "expires_at a float": usage_mutant(expires_at=1893456000.0),
    "expires_at a date": usage_mutant(expires_at="2030-01-01"),
    "an error with code": body_mutant(lambda value: value.update(code=401), key="unknown"),
    "an error with another text": body_mutant(lambda value: value.update(message="no such token"), key="unknown"),
    "an error without success": body_mutant(lambda value: value.pop("success"), key="unknown"),
    "an error with success true": body_mutant(lambda value: value.update(success=True), key="broken"),
    "no Content-Length": header_mutant("Content-Length"),
    "no Content-Type": header_mutant("Content-Type"),
    "no Cache-Control": header_mutant("Cache-Control"),
    "Cache-Control no-cache": header_mutant("Cache-Control", "no-cache"),
    "no X-Content-Type-Options": header_mutant("X-Content-Type-Options"),
    "no WWW-Authenticate": header_mutant("WWW-Authenticate", key="unknown"),
    "another challenge": header_mutant("WWW-Authenticate", "Basic", key="unknown"),
    "no Retry-After": header_mutant("Retry-After", key="broken"),
    "Retry-After 0": header_mutant("Retry-After", "0", key="broken"),
    "Retry-After a date": header_mutant("Retry-After", "Fri, 31 Dec 2027 23:59:59 GMT", key="broken"),
    "an undescribed header": header_mutant("Set-Cookie", "a=b"),
    "a page": header_mutant("Content-Type", "text/html; charset=utf-8"),
    "403": ("unknown", lambda answer: answer._replace(status=403, reason="Forbidden")),
    "a redirect": ("limited", lambda answer: answer._replace(status=301, reason="Moved Permanently")),
}


def ask(key):
    return call(UsageMiddleware(wrapped, Store()), environ(HTTP_AUTHORIZATION=f"Bearer {key}"))


@pytest.mark.parametrize(("key", "mutate"), [pytest.param(*mutant, id=name) for name, mutant in MUTANTS.items()])
def test_it_does_not_describe_a_wrong_answer(key, mutate):
    answer = ask(key)
    check_answer(answer)
    mutant = mutate(answer)
    assert mutant != answer
    with pytest.raises((AssertionError, ValidationError, KeyError)):
        check_answer(mutant)


# --- A served endpoint, and a tool that reads the description


def schemathesis(folder, url, keys, *options):
    """Have schemathesis ask a server whatever the description lets it ask; what it notes goes to ``folder``."""
    return subprocess.run(
        [
            *(SCRIPTS / "schemathesis", "--no-color", "--config-file", SETTINGS),
            *("run", FILE, "--url", url, "--checks", "all"),
            *("--generation-database", "none", "--seed", "1", "--suppress-health-check", "all", *options),
        ],
        cwd=folder,
        env=processes.environment(SCHEMATHESIS_HOOKS="schemathesis_hooks", KEYS=" ".join(keys)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


@pytest.fixture
def keys(tmp_path):
    """Return keys of tokens of every kind, in a database."""
    with SQLiteTokenStore(tmp_path / "tokens.db") as store:
        made = [
            store.create(name="caf\u00e9 \u4ee4\u724c", total_available=1000)[0],
            store.create(unlimited_quota=True, total_available=1000)[0],
            store.create(total_available=1000, expires_at=1)[0],
            store.create()[0],
            store.create(total_available=1000, model_limits={"gpt-4o": True, "gpt-4o-mini": 500})[0],
        ]
        overdrawn, _ = store.create(total_available=1000)
        store.settle(store.reserve(overdrawn.removeprefix("sk-"), 1000), 1200)
        disabled, token = store.create(total_available=1000)
        store.update(token.id, enabled=False)
        deleted, token = store.create()
        store.delete(token.id)
    return [*made, overdrawn, made[0].removeprefix("sk-"), disabled, deleted, "unknown", "two,keys"]


@pytest.fixture
def served(keys, tmp_path):
    """Yield the URL of a server over that database, and its log of requests."""
    log = tmp_path / "log"
    with log.open("w") as stderr:
        command = [SCRIPTS / "usage-middleware", "serve", "--db", tmp_path / "tokens.db", "--port", "0"]
        process = subprocess.Popen(command, stderr=stderr)
        try:
            yield until_logged(r"Serving (http://\S+?:\d+)", log, process)[1], log
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.slow
def test_a_served_endpoint_is_what_it_describes(served, keys, full, tmp_path):
    url, log = served
    done = schemathesis(tmp_path, url, keys, "--max-examples", "5000" if full else "20")
    assert done.returncode == 0, done.stdout
    answered = {}
    for line in re.findall(r'"(\S+) (.*)" ([0-9]{3})', log.read_text()):
        answered[line] = answered.get(line, 0) + 1
    # It has met every answer but that of a broken store, which its checks would not take.
    for path, operations in DESCRIPTION["paths"].items():
        for method in ("GET", "HEAD"):
            for status in operations[method.lower()]["responses"].keys() - {"429", "503"}:
                assert answered[method, path, status]
        assert answered["OPTIONS", path, "204"]
        assert answered["POST", path, "405"]
    # 404 is for what it tries beyond the endpoints.
    assert {status for _, _, status in answered} <= {"200", "204", "400", "401", "405", "404"}
    if full:
        print(done.stdout.partition("SUMMARY")[2], sum(answered.values()), "requests")


class _SilentHandler(WSGIRequestHandler):
    def log(self, *_):
        pass


FOUND_BY_TOOLS = ["no total_granted", "a whole float total", "an extra key", "no WWW-Authenticate", "no Cache-Control"]


def mutated(mutate):
    """Return the endpoint as an application whose answers of one status are wrong."""
    key, change = mutate
    status = ask(key).status

    def app(environ, start_response):
        answer = call(UsageMiddleware(wrapped, Store()), environ)
        if answer.status == status and environ["REQUEST_METHOD"] == "GET":
            answer = change(answer)
        start_response(f"{answer.status} {answer.reason}", answer.headers)
        return [answer.body]

    return app


@pytest.fixture(scope="module")
def mutants_url():
    """Yield a server with a mutant below each prefix, and below ``/right`` none."""
    mounts = {f"/{number}": mutated(MUTANTS[name]) for number, name in enumerate(FOUND_BY_TOOLS)}
    mounts["/right"] = UsageMiddleware(wrapped, Store())
    server = make_server(
        "127.0.0.1", 0, DispatcherMiddleware(wrapped, mounts), threaded=True, request_handler=_SilentHandler
    )
    with contextlib.closing(server.socket):
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.port}"
        finally:
            server.shutdown()
            thread.join(30)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["right", *FOUND_BY_TOOLS])
def test_a_tool_that_reads_it_finds_a_wrong_answer(mutants_url, name, tmp_path):
    prefix = "right" if name == "right" else FOUND_BY_TOOLS.index(name)
    options = ("--phases", "coverage", "--no-shrink", "--warnings", "off")
    # The store of the mutants has neither days nor a log.
    options += ("--include-path-regex", f"^{PATH}/?$", "--exclude-method", "HEAD", "--exclude-method", "OPTIONS")
    done = schemathesis(tmp_path, f"{mutants_url}/{prefix}", ["limited", "unknown"], *options)
    assert done.returncode == (0 if name == "right" else 1), done.stdout
