"""Costs that are fixed, and costs that the service states in a header."""

import logging

import pytest
from client import environ

from usage_middleware import FromHeader, PerRequest, Usage

NAME = "X-Usage-Cost"


@pytest.mark.parametrize("units", [0, 1, 2**63 - 1])
def test_a_fixed_amount_is_charged_unless_the_request_fails(units):
    cost = PerRequest(units)
    assert cost.most(environ()) == cost.least(environ()) == units
    reader = cost.reader(200, [])
    assert not reader.complete
    reader.feed(b"anything")
    assert reader.result(ended=True) == Usage(units)
    # The cost of a request that fails is not known, so it is free.
    assert reader.result(ended=False) is None


@pytest.mark.parametrize("units", [True, 1.0, "1", None])
def test_an_amount_must_be_an_integer(units):
    with pytest.raises(TypeError):
        PerRequest(units)


@pytest.mark.parametrize("units", [-1, 2**63])
def test_an_amount_out_of_range_is_refused(units):
    with pytest.raises(ValueError, match="must be"):
        PerRequest(units)


@pytest.mark.parametrize("field", ["units", "input_tokens", "output_tokens"])
def test_usage_is_checked(field):
    for value, error in ((-1, ValueError), (2**63, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error):
            Usage(**{"units": 0, field: value})


@pytest.mark.parametrize("name", [NAME, "x-usage-cost", "X_Usage_Cost", "X-USAGE_COST"])
@pytest.mark.parametrize("value", ["7", " 7\t", "007"])
def test_the_cost_is_read_from_the_header_and_the_header_removed(name, value):
    headers = [("Content-Type", "text/plain"), (name, value), ("X-Usage-Cost-Unit", "a")]
    reader = FromHeader(NAME, most=500).reader(200, headers)
    assert reader.complete
    assert reader.result(ended=True) == reader.result(ended=False) == Usage(7)
    # The client does not get it.
    assert reader.answer_headers == [headers[0], headers[2]]


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(["5", "6"], id="twice"),
        pytest.param(["5", "5"], id="twice the same"),
        pytest.param(["-1"], id="negative"),
        pytest.param(["+1"], id="a sign"),
        pytest.param(["1e9"], id="an exponent"),
        pytest.param(["5, 6"], id="a list"),
        pytest.param(["1.0"], id="a float"),
        pytest.param(["1_000"], id="an underscore"),
        pytest.param(["0x10"], id="hexadecimal"),
        pytest.param(["\xb2"], id="a superscript"),
        pytest.param([""], id="empty"),
        pytest.param(["5\n"], id="a line feed"),
        pytest.param(["\xa05"], id="a no-break space"),
        pytest.param([str(2**63)], id="more than a database holds"),
        pytest.param(["9" * 5000], id="too long"),
    ],
)
def test_a_header_that_is_not_a_cost_is_logged(values, caplog):
    headers = [(NAME, value) for value in values]
    with caplog.at_level(logging.ERROR, "usage_middleware"):
        reader = FromHeader(NAME, most=500).reader(200, [("Server", "old"), *headers])
    assert not reader.complete
    assert reader.result(ended=True) is None
    assert reader.answer_headers == [("Server", "old")]
    (record,) = caplog.records
    assert NAME in record.getMessage()
    assert "\n" not in record.getMessage()
    assert len(record.getMessage()) < 250


def test_without_the_header_the_cost_is_unknown(caplog):
    reader = FromHeader(NAME, most=500).reader(200, [("Server", "old")])
    assert not reader.complete
    assert reader.result(ended=True) is None
    assert not caplog.records


def test_a_client_cannot_send_the_header():
    request = environ(HTTP_X_USAGE_COST="0", HTTP_X_USAGE_COSTS="0")
    cost = FromHeader(NAME, most=500)
    assert cost.prepare(request) is cost
    assert "HTTP_X_USAGE_COST" not in request
    assert request["HTTP_X_USAGE_COSTS"] == "0"


def test_most_is_reserved_and_at_least_least():
    cost = FromHeader(NAME, most=500)
    assert (cost.most(environ()), cost.least(environ())) == (500, 500)
    cost = FromHeader(NAME, most=500, least=0)
    assert (cost.most(environ()), cost.least(environ())) == (500, 0)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"name": "X Usage", "most": 1}, ValueError),
        ({"name": "", "most": 1}, ValueError),
        ({"name": "X-Usage\n", "most": 1}, ValueError),
        ({"name": b"X-Usage", "most": 1}, TypeError),
        ({"name": NAME, "most": 1.5}, TypeError),
        ({"name": NAME, "most": -1}, ValueError),
        ({"name": NAME, "most": 1, "least": 2}, ValueError),
        ({"name": NAME, "most": 1, "least": "0"}, TypeError),
    ],
)
def test_bad_arguments_are_refused(arguments, error):
    with pytest.raises(error):
        FromHeader(arguments.pop("name"), **arguments)
