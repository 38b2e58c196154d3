"""The service of ``demo``, in which a newcomer sees a request charged."""

import json
import re
import shlex
import urllib.error
import urllib.request

import pytest
from command import URL, get


def post(url, text, **headers):
    request = urllib.request.Request(url, text.encode(), headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


@pytest.mark.servers
def test_the_printed_request_costs_a_unit_per_character(start):
    _, match, log = start("demo", "--port", "0", ready=rf"{URL}/shout\n")
    command = shlex.split(re.search(r"curl .*/shout", log.read_text())[0])
    name, _, value = command[command.index("-H") + 1].partition(": ")
    text, url = command[command.index("-d") + 1], command[-1]

    def used():
        return json.loads(get(match[1], **{name: value})[2])["data"]["total_used"]

    before = used()
    assert post(url, text, **{name: value}) == f"{text.upper()}\n"
    assert used() == before + len(text)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        post(url, text)
    assert post(url, "", **{name: value}) == "\n"
    assert len(post(url, "x" * 2000, **{name: value})) == 1001
    assert used() == before + len(text) + 1000
