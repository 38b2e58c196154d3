"""Take the screenshots of the page that the documentation shows.

    python docs/screenshots.py

It needs Chromium with its driver, and the package selenium.
"""

from __future__ import annotations

import base64
import shutil
import threading
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from werkzeug.exceptions import NotFound
from werkzeug.serving import make_server

from usage_middleware import MemoryTokenStore, UsageMiddleware
from usage_middleware.cli.sample_use import PastClock, use

FOLDER = Path(__file__).parent
#: The name of each picture, and the width of its window. The pictures have twice as many pixels.
PICTURES = {"page.png": 860, "page-phone.png": 390}
ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-background-networking", "--hide-scrollbars", "--lang=en-US")


def main() -> None:
    clock = PastClock()
    store = MemoryTokenStore(clock=clock)
    limits = {"gpt-4o": 500_000, "gpt-4o-mini": 200_000, "gemini-pro": True}
    key, _ = store.create(name="Laptop", total_available=1_000_000, model_limits=limits)
    use(store, clock, key, 412_345)
    server = make_server("127.0.0.1", 0, UsageMiddleware(NotFound(), store, page="/"), threaded=True)
    threading.Thread(target=server.serve_forever).start()
    try:
        options = webdriver.ChromeOptions()
        for argument in ARGUMENTS:
            options.add_argument(argument)
        # Named, so that selenium does not look for one on the internet.
        options.binary_location = found("chromium", "google-chrome", "chrome")
        with webdriver.Chrome(options=options, service=Service(found("chromedriver"))) as driver:
            for name, width in PICTURES.items():
                (FOLDER / name).write_bytes(picture(driver, f"http://127.0.0.1:{server.port}/", key, width))
    finally:
        server.shutdown()


def found(*programs: str) -> str:
    """Return the path of the first of some programs that is installed."""
    for program in programs:
        if path := shutil.which(program):
            return path
    raise SystemExit(f"install {programs[0]} first")


def picture(driver: webdriver.Chrome, url: str, key: str, width: int) -> bytes:
    metrics = {"width": width, "height": 700, "deviceScaleFactor": 2, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(url)
    driver.find_element(By.ID, "key").send_keys(key)
    driver.find_element(By.ID, "show").click()
    WebDriverWait(driver, 30).until(lambda _: driver.find_element(By.ID, "result").is_displayed())
    driver.execute_script("document.activeElement.blur()")
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    return base64.b64decode(shot["data"])


if __name__ == "__main__":
    main()
