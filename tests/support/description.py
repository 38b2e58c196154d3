"""The OpenAPI description of the endpoints, and checks of answers against it."""

from __future__ import annotations

import importlib.resources
import json
import re

from jsonschema import Draft202012Validator

import usage_middleware

FILE = importlib.resources.files(usage_middleware) / "openapi.json"
DESCRIPTION = json.loads(FILE.read_text(encoding="utf-8"))


def resolve(node):
    while "$ref" in node:
        found = DESCRIPTION
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        node = found
    return node


def check_schema(value, schema):
    Draft202012Validator({**schema, "components": DESCRIPTION["components"]}).validate(value)


def described(method, path, status):
    """Return the description of an answer to a method and a path with a status."""
    operation = DESCRIPTION["paths"][path].get(method.lower() if method.isupper() else "")
    if operation is None:
        assert status == 405
        (name,) = re.findall(r"`(\w*MethodNotAllowed)`", DESCRIPTION["paths"][path]["description"])
        return DESCRIPTION["components"]["responses"][name]
    return resolve(operation["responses"][str(status)])


def check_answer(answer, method, path):
    """Check an answer against the description. Anything that is not described is wrong."""
    response = described(method, path, answer.status)
    for name, header in response["headers"].items():
        header, value = resolve(header), answer.header(name)
        if value is None:
            assert not header.get("required"), f"{name} is missing"
        else:
            integer = header["schema"].get("type") == "integer"
            check_schema(int(value) if integer and re.fullmatch("[0-9]+", value) else value, header["schema"])
    # OpenAPI does not describe Content-Type as a header, only as the name of the content.
    undescribed = {name for name, _ in answer.headers} - response["headers"].keys() - {"Content-Type"}
    assert not undescribed
    if "Content-Length" in response["headers"]:
        assert answer.header("Content-Type") == "application/json; charset=utf-8"
    else:
        assert answer.header("Content-Type") is None
    if "content" in response:
        assert int(answer.header("Content-Length")) == len(answer.body)
        parse_float = _fraction if "/billing/" in path else _refuse
        body = json.loads(answer.body, parse_float=parse_float, parse_constant=_refuse)
        check_schema(body, response["content"]["application/json"]["schema"])
    else:
        assert answer.body == b""


def _refuse(text):
    raise AssertionError(f"{text} is not an integer")


def _fraction(text):
    assert not float(text).is_integer(), f"{text} is a whole number"
    return float(text)
