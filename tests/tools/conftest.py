"""The browser that the tests of pages share."""

import tempfile

import pytest
from chromium import IS_INSTALLED, Browser


@pytest.fixture(scope="package")
def browser():
    if not IS_INSTALLED:
        pytest.skip("needs chromium and chromedriver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            yield browser
        finally:
            browser.close()
