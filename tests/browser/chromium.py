"""The Chromium of this machine, and the way into the dashboard."""

import shutil

from playwright.sync_api import Page

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
]


def program() -> str | None:
    """The machine's Chromium."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


def sign_in(page: Page, token: str) -> None:
    page.goto("/")
    page.get_by_label("Your token").fill(token)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("navigation", name="Views").wait_for()
