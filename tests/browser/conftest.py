"""A real browser (Debian's Chromium) before a live service. What goes wrong in the page fails the test, whatever it looks at.

`live`: the API with a database, object storage and the stand-in of Ray, and no dispatcher: jobs stay as `scenes` writes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from service.local import Seaweedfs
from tests.browser.chromium import ARGUMENTS, program, sign_in
from tests.browser.scenes import Scenes
from tests.stand_in.stage import Stage, stage

PATIENCE_MS = 20_000
expect.set_options(timeout=PATIENCE_MS)


@dataclass
class Live:
    """A service, and what writes into it."""

    stage: Stage
    scenes: Scenes

    @property
    def url(self) -> str:
        return self.stage.url


@dataclass
class Troubles:
    """What a page did that it must not: errors in its console, requests that failed or went to another host, breaches of the policy."""

    allowed_hosts: set[str]
    expected: tuple[str, ...] = ()
    found: list[str] = field(default_factory=list)

    def expect(self, *parts: str) -> None:
        """These may come: texts that a trouble has in it."""
        self.expected += parts

    def note(self, text: str) -> None:
        self.found.append(text)

    def unexpected(self) -> list[str]:
        return [text for text in self.found if not any(part in text for part in self.expected)]


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory, seaweedfs: Seaweedfs, run_mark: str) -> Iterator[Live]:
    with stage(tmp_path_factory.mktemp("browser"), storage=seaweedfs, postgres=None, run=run_mark) as made:
        scenes = Scenes(made)
        yield Live(made, scenes)
        scenes.close()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    found = program()
    if found is None:
        pytest.skip("NO BROWSER TESTS: this machine has no Chromium; apt-get install --no-install-recommends chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, headless=True, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def troubles(live: Live) -> Iterator[Troubles]:
    noted = Troubles({urlsplit(live.url).netloc, urlsplit(live.stage.storage.endpoint).netloc})
    yield noted
    assert noted.unexpected() == []


@pytest.fixture
def fresh_page(chromium: Browser, live: Live, troubles: Troubles) -> Iterator[Page]:
    """A page that is not signed in."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, base_url=live.url)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    watch(page, troubles)
    yield page
    context.close()


@pytest.fixture
def page(fresh_page: Page, live: Live) -> Page:
    """A page that is signed in with the installation's own token."""
    sign_in(fresh_page, live.stage.token)
    return fresh_page


def watch(page: Page, troubles: Troubles) -> None:
    def on_request(request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https") and parts.netloc not in troubles.allowed_hosts:
            troubles.note(f"another host: {request.url}")
        if "mst_" in request.url:
            troubles.note(f"a token in an address: {request.url}")

    def on_failed(request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the page itself has given it up
            troubles.note(f"failed: {request.url} {request.failure}")

    page.on("console", lambda message: troubles.note(f"{message.type}: {message.text}") if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.note(f"exception: {error}"))
    page.on("request", on_request)
    page.on("requestfailed", on_failed)


@pytest.fixture(scope="session")
def axe() -> str:
    """axe-core (MPL-2.0), which finds what keeps people out."""
    return (Path(__file__).parent / "vendor" / "axe.min.js").read_text()
