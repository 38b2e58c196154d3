"""The page in a real browser: what the holder of a key sees for each token and each refusal, and where the key is."""

import csv
import json
import logging
import re
import threading
import time
from contextlib import ExitStack
from datetime import datetime, timezone
from importlib.resources import files
from io import StringIO

import pytest
from browser import Browser, served
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from usage_middleware import MemoryTokenStore, StoreError, UsageMiddleware
from usage_middleware.testing.fixtures import Clock

pytestmark = [pytest.mark.servers, pytest.mark.slow]

NOW = int(time.time())
DAY = 86_400


@pytest.fixture(scope="session")
def chromium():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium):
    chromium.new_tab()
    yield chromium
    assert chromium.messages() == []


@pytest.fixture
def clock():
    clock = Clock()
    clock.now = float(NOW)
    return clock


@pytest.fixture
def store(clock):
    return MemoryTokenStore(clock=clock)


@pytest.fixture
def serve():
    """Serve a middleware until the end of the test, and return the URL of its page."""
    with ExitStack() as stack:

        def start(store, **options):
            def application(environ, start_response):
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [b""]

            middleware = UsageMiddleware(application, store, page="/usage", **options)
            return stack.enter_context(served(middleware)) + "/usage"

        yield start


def show(browser, url, key, *, keep=False):
    """Open the page, enter a key, and wait for the answer."""
    browser.driver.get(url)
    browser.find("key").send_keys(key)
    if keep:
        browser.find("keep").click()
    browser.find("show").click()
    browser.until(lambda: is_answered(browser))


def is_answered(browser):
    return browser.find("show").is_enabled() and (browser.is_shown("result") or browser.text("message"))


def facts(browser):
    names = browser.driver.find_elements(By.CSS_SELECTOR, "#facts dt")
    values = browser.driver.find_elements(By.CSS_SELECTOR, "#facts dd")
    return {name.text: value.text for name, value in zip(names, values, strict=True)}


# --- Every state of a token


@pytest.mark.parametrize(
    ("fields", "used", "state", "left", "caption", "why"),
    [
        pytest.param({"total_available": 1000}, 0, "Active", "1,000 left", "0 used of 1,000 granted", "", id="new"),
        pytest.param(
            {"total_available": 4000}, 1500, "Active", "2,500 left", "1,500 used of 4,000 granted", "", id="in use"
        ),
        pytest.param(
            {"total_available": 50},
            50,
            "Used up",
            "0 left",
            "50 used of 50 granted",
            "stopped working because its quota is used up. Ask the operator",
            id="used up",
        ),
        pytest.param(
            {"total_available": 50, "renewal": "monthly"},
            50,
            "Used up",
            "0 left",
            "50 used of 50 granted",
            "is used up. Its quota renews on",
            id="used up, and renews",
        ),
        pytest.param(
            {"total_available": 50, "expires_at": NOW - DAY},
            0,
            "Expired",
            "50 left",
            "0 used of 50 granted",
            "This key stopped working on",
            id="expired",
        ),
        pytest.param({"unlimited_quota": True}, 77, "Active", "Unlimited", "77 used", "", id="unlimited"),
        pytest.param(
            {"total_available": 2**62 + 1},
            2**54 + 1,
            "Active",
            "4,593,671,619,917,905,920 left",
            "18,014,398,509,481,985 used of 4,611,686,018,427,387,905 granted",
            "",
            id="above 2**53",
        ),
    ],
)
def test_each_state_of_a_token_is_shown(browser, serve, store, fields, used, state, left, caption, why):
    key, _ = store.create(name="Laptop", **fields)
    if used:
        store.charge(key, used, model="gpt-4o")
    show(browser, serve(store), key)
    assert browser.text("name") == "Laptop"
    assert browser.text("state") == state
    assert browser.text("left") == left
    assert browser.text("caption") == caption
    assert why in browser.text("why")
    assert browser.is_shown("why") == bool(why)
    assert facts(browser)["Today"] == f"{used:,}"


def test_an_overdrawn_token_has_less_than_nothing_left(browser, serve, store):
    key, _ = store.create(total_available=500)
    store.settle(store.reserve(key, 500), 1234)
    show(browser, serve(store), key)
    assert (browser.text("name"), browser.text("state")) == ("Token without a name", "Overdrawn")
    assert browser.text("left") == "\N{MINUS SIGN}734 left"
    assert "More was used than was granted" in browser.text("why")


def test_what_running_requests_hold_is_shown(browser, serve, store):
    key, _ = store.create(total_available=500)
    store.reserve(key, 500)
    show(browser, serve(store), key)
    assert facts(browser)["Held by running requests"] == "500"
    assert "held by requests that are still running" in browser.text("why")


def test_renewal_and_expiry_are_shown(browser, serve, store):
    key, token = store.create(renewal="weekly", renewal_quota=700, expires_at=NOW + 400 * DAY)
    show(browser, serve(store), key)
    shown = facts(browser)
    assert shown["Renews"].startswith("700 weekly, next on ")
    assert str(datetime.fromtimestamp(token.expires_at, timezone.utc).year) in shown["Expires"]


def test_without_usage_by_day_the_page_says_so(browser, serve):
    from usage_middleware import Token

    show(browser, serve({"one": Token(name="Plain", total_available=5, total_used=2)}), "sk-one")
    assert browser.text("left") == "5 left"
    assert not browser.is_shown("days")
    assert facts(browser) == {"Expires": "Never", "Usage by day": "This service does not count usage by day."}


# --- Usage by day


@pytest.fixture
def used(store, clock):
    """Return a key that was used on each of 366 days."""
    key, _ = store.create(name="Long", total_available=10**9)
    for day in range(365, -1, -1):
        clock.now = NOW - day * DAY
        store.charge(key, 100 + day, model="gpt-4o" if day % 2 else "gpt-4o-mini", input_tokens=7, output_tokens=3)
    return key


def press(browser, group, label):
    buttons = browser.driver.find_elements(By.CSS_SELECTOR, f"#{group} button")
    next(button for button in buttons if button.text == label).click()


def bars(browser):
    """Return how many days have a bar."""
    rectangles = browser.driver.find_elements(By.CSS_SELECTOR, "#svg rect:not(.day)")
    return len({rectangle.get_attribute("x") for rectangle in rectangles})


def test_the_chart_shows_30_90_or_365_days(browser, serve, store, used):
    show(browser, serve(store), used)
    assert facts(browser)["Last 7 days"] == f"{sum(100 + day for day in range(7)):,}"
    assert facts(browser)["Last 30 days"] == f"{sum(100 + day for day in range(30)):,}"
    for days in (30, 90, 365):
        press(browser, "range", f"{days} days")
        assert bars(browser) == days
        total = sum(100 + day for day in range(days))
        assert f"Units on {days} days: {total:,} in all" in browser.find("svg").get_attribute("aria-label")
    press(browser, "what", "Requests")
    assert "Requests on 365 days: 365 in all" in browser.find("svg").get_attribute("aria-label")
    models = [item.text.split() for item in browser.driver.find_elements(By.CSS_SELECTOR, "#models li")]
    assert models == [["gpt-4o-mini", "183"], ["gpt-4o", "182"]]


def test_one_day_of_use_has_one_bar(browser, serve, store):
    key, _ = store.create(total_available=1000)
    store.charge(key, 40)
    show(browser, serve(store), key)
    assert bars(browser) == 1
    assert browser.text("models").split("\n") == ["without a model", "40"]


def test_without_use_the_page_says_so(browser, serve, store):
    key, _ = store.create(total_available=1000)
    show(browser, serve(store), key)
    assert not browser.is_shown("chart")
    assert browser.text("empty").startswith("Nothing was used in these days.")
    assert facts(browser)["What is left lasts"] == "nothing was used recently"


def test_the_table_and_the_file_have_the_same_figures(browser, serve, store, used):
    show(browser, serve(store), used)
    browser.driver.find_element(By.TAG_NAME, "summary").click()
    rows = [
        [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
        for row in browser.driver.find_elements(By.CSS_SELECTOR, "#table tbody tr")
    ]
    assert len(rows) == 30
    assert rows[0] == [datetime.now(timezone.utc).date().isoformat(), "gpt-4o-mini", "100", "1", "7", "3"]
    # Read what a click downloads in the page itself.
    text = browser.driver.execute_async_script(
        """
        const done = arguments[0], make = URL.createObjectURL;
        URL.createObjectURL = blob => { blob.text().then(done); return make(blob); };
        document.getElementById("csv").click();
        """
    )
    lines = list(csv.reader(StringIO(text.lstrip("\ufeff"))))
    assert lines[0] == ["date", "model", "used", "requests", "input_tokens", "output_tokens"]
    assert lines[1:] == rows[::-1]


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "__proto__",
    "constructor",
    "$",
    "=1+1",
    "a" * 255,
    "\u202eevil",
]


def test_hostile_names_are_shown_as_text(browser, serve, store):
    limits = dict.fromkeys(HOSTILE, 1000)
    key, _ = store.create(name="<b>bold</b>", total_available=10**6, model_limits=limits, model_limits_enabled=False)
    for number, model in enumerate([*HOSTILE, *(f"model {n}" for n in range(42))]):
        store.charge(key, 1000 - number, model=model)
    show(browser, serve(store), key)
    assert browser.text("name") == "<b>bold</b>"
    listed = browser.driver.find_elements(By.CSS_SELECTOR, "#models li")
    names = [item.find_element(By.CLASS_NAME, "name").text for item in listed]
    assert names == [*HOSTILE, "42 more models"]
    limited = browser.driver.find_elements(By.CSS_SELECTOR, "#limit-list .name")
    assert {item.text for item in limited} == set(HOSTILE)
    assert browser.text("limits-title") == "Model limits (not enabled)"
    assert browser.script("return document.images.length + document.querySelectorAll('script').length") == 1
    assert browser.script("return document.documentElement.scrollWidth <= innerWidth")


def test_model_limits_have_bars(browser, serve, store):
    key, _ = store.create(total_available=1000, model_limits={"gpt-4o": 400, "free": True})
    store.charge(key, 100, model="gpt-4o")
    show(browser, serve(store), key)
    items = [item.text.split("\n") for item in browser.driver.find_elements(By.CSS_SELECTOR, "#limit-list li")]
    assert items == [["gpt-4o", "100 of 400"], ["free", "allowed, without a limit of its own"]]
    bar = browser.driver.find_element(By.CSS_SELECTOR, "#limit-list .bar i")
    assert bar.get_attribute("style") == "width: 25%;"


# --- Every refusal


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("sk-unknown", "This key is not known here."),
        ("a,b", "This is not a key: it is too long, or contains characters that a key cannot have."),
    ],
)
def test_a_refused_key_is_explained_and_removed(browser, serve, store, key, message):
    show(browser, serve(store), key)
    assert browser.text("message").startswith(message)
    assert not browser.is_shown("result")
    assert browser.is_shown("form")
    assert browser.find("key").get_attribute("value") == ""
    assert browser.driver.switch_to.active_element == browser.find("key")


def test_a_wrong_key_removes_what_was_shown_and_kept(browser, serve, store):
    key, token = store.create(name="Right", total_available=5)
    url = serve(store)
    show(browser, url, key, keep=True)
    assert browser.script("return sessionStorage.length") == 1
    browser.find("other").click()
    assert browser.script("return sessionStorage.length") == 0
    browser.find("key").send_keys("sk-wrong", Keys.ENTER)
    browser.until(lambda: browser.text("message"))
    assert not browser.is_shown("result")
    assert "Right" not in browser.driver.find_element(By.TAG_NAME, "body").text
    # A kept key that stops working is removed.
    show(browser, url, key, keep=True)
    store.delete(token.id)
    browser.driver.refresh()
    browser.until(lambda: browser.text("message"))
    assert browser.script("return sessionStorage.length") == 0


def test_too_many_failures_say_when_to_try_again(browser, serve, store):
    url = serve(store, throttle="2 per hour")
    for _ in range(3):
        show(browser, url, "sk-unknown")
    assert re.search(r"^Too many wrong keys .* try again at \d", browser.text("message"))
    assert browser.is_shown("retry")


class Failing:
    """A store that fails until ``fails`` is false."""

    def __init__(self, store):
        self.store = store
        self.fails = True

    def get(self, key):
        if self.fails:
            raise StoreError("down")
        return self.store.get(key)


def test_retry_works_after_the_store_was_down(browser, serve, store):
    key, _ = store.create(name="Back", total_available=5)
    failing = Failing(store)
    show(browser, serve(failing), key)
    assert re.search(r"cannot look up keys at the moment. Try again at \d", browser.text("message"))
    failing.fails = False
    browser.find("retry").click()
    browser.until(lambda: browser.is_shown("result"))
    assert browser.text("message") == ""
    assert browser.text("name") == "Back"


def test_retry_works_after_the_network_was_lost(browser, serve, store):
    key, _ = store.create(total_available=5)
    browser.driver.get(serve(store))
    browser.driver.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    try:
        browser.find("key").send_keys(key, Keys.ENTER)
        browser.until(lambda: browser.text("message"))
        assert browser.text("message").startswith("The service cannot be reached.")
    finally:
        browser.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {**offline, "offline": False})
    browser.find("retry").click()
    browser.until(lambda: browser.is_shown("result"))


class Slow:
    """A store whose answer waits for an event."""

    def __init__(self, store):
        self.store = store
        self.may_answer = threading.Event()

    def get(self, key):
        assert self.may_answer.wait(30)
        return self.store.get(key)


def test_the_button_is_disabled_while_it_loads(browser, serve, store):
    key, _ = store.create(total_available=5)
    slow = Slow(store)
    browser.driver.get(serve(slow))
    browser.find("key").send_keys(key, Keys.ENTER)
    browser.until(lambda: browser.text("show") == "Loading\N{HORIZONTAL ELLIPSIS}")
    assert not browser.find("show").is_enabled()
    height = browser.script("return document.getElementById('form').offsetHeight")
    slow.may_answer.set()
    browser.until(lambda: browser.is_shown("result"))
    browser.find("other").click()
    assert browser.script("return document.getElementById('form').offsetHeight") == height


# --- The key is nowhere else


def test_the_key_is_in_session_storage_at_most(browser, serve, store, caplog):
    caplog.set_level(logging.INFO)
    key, _ = store.create(total_available=5)
    url = serve(store)
    show(browser, url, key)
    bare = key.removeprefix("sk-")
    places = [
        browser.driver.page_source,
        browser.driver.current_url,
        browser.script(
            "return JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie, history.state])"
        ),
        browser.script("return document.getElementById('key').value"),
        caplog.text,
        *browser.requests(),
    ]
    assert "GET /api/usage/token" in caplog.text
    assert [place for place in places if bare in place and place is not places[3]] == []
    show(browser, url, key, keep=True)
    assert bare in browser.script("return sessionStorage.getItem('usage-key')")
    assert bare not in browser.script("return JSON.stringify({...localStorage})")
    browser.driver.refresh()
    browser.until(lambda: browser.is_shown("result"))


def test_the_page_requests_nothing_but_the_endpoint(browser, serve, store):
    key, _ = store.create(total_available=5)
    url = serve(store)
    show(browser, url, key)
    origin = url.removesuffix("/usage")
    asked = {address for address in browser.requests() if not address.startswith("data:")}
    assert asked == {url, f"{origin}/api/usage/token", f"{origin}/api/usage/token/days?days=366"}


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_page_works_below_a_prefix(browser, store, slash):
    key, _ = store.create(name="Below", total_available=5)
    middleware = UsageMiddleware(lambda environ, start_response: [], store, page="/usage")

    def stripping(environ, start_response):
        """Strip a prefix like a proxy. To a browser, an application that is mounted under it looks the same."""
        assert environ["PATH_INFO"].startswith("/prefix/")
        return middleware({**environ, "PATH_INFO": environ["PATH_INFO"].removeprefix("/prefix")}, start_response)

    with served(stripping) as origin:
        show(browser, f"{origin}/prefix/usage{slash}", key)
        assert browser.text("name") == "Below"
        browser.driver.get("about:blank")


# --- Accessibility and languages


def test_the_page_works_with_the_keyboard_alone(browser, serve, store, used):
    browser.driver.get(serve(store))
    active = lambda: browser.driver.switch_to.active_element  # noqa: E731
    assert active() == browser.find("key")
    active().send_keys(used, Keys.ENTER)
    browser.until(lambda: browser.is_shown("result"))
    assert active() == browser.find("title")
    seen = []
    for _ in range(12):
        active().send_keys(Keys.TAB)
        seen.append(active().get_attribute("id") or active().text)
        if seen[-1] == "svg":
            break
    assert seen == ["other", "Units", "Requests", "30 days", "90 days", "365 days", "svg"]
    active().send_keys(Keys.ARROW_LEFT)
    assert browser.text("tip").split("\n")[1:] == ["100", "gpt-4o-mini", "100"]
    active().send_keys(Keys.HOME)
    assert browser.text("tip").split("\n")[1:] == ["129", "gpt-4o", "129"]
    active().send_keys(Keys.ESCAPE)
    assert not browser.is_shown("tip")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1000])
@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_the_page_is_accessible_and_fits_in_both_languages(chromium, serve, store, used, language, dark, width):
    chromium.new_tab(language=language, dark=dark, width=width)
    axe = files("axe_core_python").joinpath("axe.min.js").read_text()
    limited, _ = store.create(total_available=100, model_limits={"gpt-4o": 50})
    store.charge(limited, 100)
    url = serve(store)
    chromium.driver.get(url)
    for key in ("", "sk-wrong", used, limited):
        if key:
            show(chromium, url, key)
        if key == used:
            chromium.driver.find_element(By.TAG_NAME, "summary").click()
        assert chromium.script("return document.documentElement.scrollWidth") == width
        chromium.script(axe)
        found = chromium.driver.execute_async_script(
            "const done = arguments[0];"
            "axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice']}).then(done)"
        )
        assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in found["violations"]] == [], key
    assert chromium.script("return document.documentElement.lang") == language
    assert chromium.text("other") == ("Another key" if language == "en-US" else "\u6362\u4e00\u4e2a\u5bc6\u94a5")
    background = chromium.script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 300) is dark


def test_both_languages_have_the_same_texts(browser, serve, store):
    browser.driver.get(serve(store))
    names = json.loads(browser.script("return JSON.stringify(Object.values(TEXTS).map(t => Object.keys(t)))"))
    assert names[0] == names[1]
