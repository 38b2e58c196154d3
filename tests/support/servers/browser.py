"""A real browser, Debian's Chromium, and a service on the loopback interface that it can open."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from programs import find_program
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from werkzeug.serving import make_server

WAIT = 20  # seconds, enough for a busy machine
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # which root needs
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1000,1400",
    "--hide-scrollbars",
)


class Browser:
    """Chromium, and what the tests ask it."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        for argument in ARGUMENTS:
            options.add_argument(argument)
        options.binary_location = find_program("chromium", "chromium")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        # Chromium leaves something in the folder of temporary files.
        self._folder = tempfile.TemporaryDirectory(prefix="usage-middleware-", ignore_cleanup_errors=True)
        driver = Service(
            find_program("chromedriver", "chromium-driver"), env={**os.environ, "TMPDIR": self._folder.name}
        )
        self.driver = webdriver.Chrome(options=options, service=driver)

    def close(self) -> None:
        self.driver.quit()
        self._folder.cleanup()

    def new_tab(self, *, language: str = "en-US", dark: bool = False, width: int = 1000) -> None:
        """Open a new tab without stored data, in a window of that width, and close the old tab."""
        command = self.driver.execute_cdp_cmd
        old = self.driver.current_window_handle
        self.driver.switch_to.new_window("tab")
        new = self.driver.current_window_handle
        self.driver.switch_to.window(old)
        self.driver.close()
        self.driver.switch_to.window(new)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        command("Emulation.setEmulatedMedia", {"features": [scheme]})
        agent = self.driver.execute_script("return navigator.userAgent")
        command("Emulation.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": language})
        # The time zone of the machine must not matter.
        command("Emulation.setTimezoneOverride", {"timezoneId": "Pacific/Kiritimati"})
        metrics = {"width": width, "height": 1400, "deviceScaleFactor": 1, "mobile": width < 500}
        command("Emulation.setDeviceMetricsOverride", metrics)
        self.messages()
        self.requests()

    def find(self, element_id: str) -> WebElement:
        return self.driver.find_element(By.ID, element_id)

    def text(self, element_id: str) -> str:
        return self.find(element_id).text

    def is_shown(self, element_id: str) -> bool:
        return self.find(element_id).is_displayed()

    def until(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, WAIT, poll_frequency=0.02).until(lambda _: condition())

    def script(self, source: str, *arguments: Any) -> Any:
        return self.driver.execute_script(source, *arguments)

    def messages(self) -> list[str]:
        """Return what was logged to the console since the last call.

        Leave out what the browser itself logs for each status of 400 and above.
        """
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if "Failed to load resource" not in entry["message"]]

    def requests(self) -> list[str]:
        """Return the URLs that were requested since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


@contextmanager
def served(application: Any) -> Iterator[str]:
    """Serve an application by threads of this process, and yield its URL."""
    logging.getLogger("werkzeug").setLevel(logging.INFO)
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
