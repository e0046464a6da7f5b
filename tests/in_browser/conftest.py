"""Tests in a real browser, Chromium (`make test-browser`); where there is no Playwright they are not collected."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("playwright") else ["test_*.py"]

# It starts as root too, needs no screen, and asks for nothing outside.
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser():
    """Chromium, by HEADWISE_CHROMIUM or as the system has it."""
    from playwright.sync_api import sync_playwright

    program = os.environ.get("HEADWISE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert program, "there is no Chromium; install it, as by apt-get install chromium, or set HEADWISE_CHROMIUM"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Opens a file; whatever its page complains of, or asks a network for, is an error at the end."""
    complaints, contexts = [], []

    def open_file(path, **options):
        context = browser.new_context(viewport={"width": 1300, "height": 900}, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: complaints.append(request.url) if request.url[:5] not in ("file:", "data:") else None,
        )
        page.goto(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert not complaints
