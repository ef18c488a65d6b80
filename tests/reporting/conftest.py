"""Make the helpers of this folder importable from its tests; one browser for all of them."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent))

from chromium import start_chromium  # noqa: E402


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A headless Chromium, or a skip where there is none."""
    browser = start_chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.driver.quit()
