"""A headless Chromium that shows report pages, and records their console messages and requests."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


__all__ = ["Browser", "start_chromium"]

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
SIZE = "Emulation.setDeviceMetricsOverride"


@dataclass(frozen=True)
class Browser:
    """A running Chromium with one page."""

    driver: Any

    def open(self, page: Path, width: int = 1280, dark: bool = False) -> None:
        """Show a file at a width, with the light or the dark theme; clears the log."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd(SIZE, metrics)
        self.messages(), self.requests()
        self.driver.get(page.as_uri())

    def messages(self) -> list[str]:
        """Return the console messages since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses that pages have requested since the last call, without those of the browser itself."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [entry["params"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
        return [request["request"]["url"] for request in sent if request["documentURL"].startswith("file:")]

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script and return the value of its `return`."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        """Find the first element that matches a CSS selector."""
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """Return the text of the first element that matches a CSS selector, with plain spaces."""
        return self.find(selector).text.replace("\u00a0", " ")

    def press(self, *keys: str) -> None:
        """Press keys, such as "ArrowDown", in the focused element."""
        from selenium.webdriver import ActionChains, Keys

        names = {"ArrowDown": Keys.ARROW_DOWN, "ArrowRight": Keys.ARROW_RIGHT, "End": Keys.END}
        names |= {"Enter": Keys.ENTER, "Tab": Keys.TAB, "Space": Keys.SPACE}
        ActionChains(self.driver, duration=0).send_keys(*(names[key] for key in keys)).perform()


def start_chromium(profile: Path) -> Browser:
    """Start Chromium with a profile of its own, or skip the test where the browser or its driver is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return Browser(webdriver.Chrome(options, webdriver.ChromeService(programs[1])))
