"""A real training, on Ray and SeaweedFS as `maestro up` starts them: submitted, paused, resumed and watched in the browser to its end.

Meanwhile the API is killed and comes back. What each view shows of the run is what its workers told.
"""

import json
import re
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, expect

from tests.browser.chromium import sign_in
from tests.browser.conftest import Troubles, watch
from tests.conftest import LiveService

SPEC = {
    "kind": "pretrain",
    "name": "a real one",
    "model": {"arch": "vit_tiny_patch4", "image_size": 8, "in_chans": 1},
    "data": {"source": "digits", "transform": {"crop_scale": [1.0, 1.0], "flip": False}},
    "decoder": {"depth": 1, "width": 64},
    "optim": {"epochs": 24, "batch_size": 128, "base_lr": 1e-3, "warmup_epochs": 2},
    "checkpoint": {"every_steps": 60},
    "resources": {"num_workers": 2},
    "export": {"formats": []},
}
PATIENCE_MS = 120_000


def test_a_training_is_watched_from_its_submission_to_its_result(chromium: Browser, live_service: LiveService, troubles: Troubles) -> None:
    storage = live_service.installation.storage.endpoint
    troubles.allowed_hosts |= {urlsplit(live_service.url).netloc, urlsplit(storage).netloc}
    troubles.expect("net::ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE")
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, base_url=live_service.url)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    watch(page, troubles)
    sign_in(page, live_service.home.secrets().api_token)
    submit(page)
    state = page.locator(".head .badge")
    expect(state).to_have_text("running", timeout=PATIENCE_MS)
    loss = page.get_by_role("img", name=re.compile("^Loss"))
    expect(loss).to_be_visible(timeout=PATIENCE_MS)

    act(page, "Pause")
    expect(state).to_have_text("paused", timeout=PATIENCE_MS)
    act(page, "Resume")
    expect(state).to_have_text("running", timeout=PATIENCE_MS)

    live_service.kill_api()
    expect(page.get_by_text("The service does not answer. Trying again…")).to_be_visible()
    live_service.start_api()
    expect(page.get_by_text("The service does not answer. Trying again…")).to_be_hidden(timeout=PATIENCE_MS)
    expect(state).to_have_text("succeeded", timeout=PATIENCE_MS)

    expect(loss).to_have_attribute("aria-label", re.compile(r"last 0\.\d+"))
    page.get_by_role("link", name="Reconstructions").click()
    slider = page.get_by_label("Time of training")
    last = slider.get_attribute("aria-valuetext")
    expect(page.locator(".pictures img").first).to_be_visible()
    slider.press("Home")
    assert slider.get_attribute("aria-valuetext") != last
    page.get_by_role("link", name="Logs").click()
    expect(page.locator(".lines")).to_contain_text("step")
    page.get_by_role("link", name="Results").click()
    expect(page.get_by_text(re.compile("^maestro fetch .* --to encoder$"))).to_be_visible()
    page.get_by_role("link", name="Events").click()
    for told in ("training state committed", "run stopped", "result committed"):
        expect(page.get_by_text(re.compile(told)).first).to_be_visible()
    context.close()


def submit(page: Page) -> None:
    """By the form, as JSON."""
    page.get_by_role("link", name="New job").click()
    page.get_by_role("button", name="As JSON").click()
    page.get_by_label("Spec as JSON").fill(json.dumps(SPEC))
    expect(page.get_by_role("complementary", name="Estimate")).to_contain_text("Parameters")
    page.get_by_role("button", name="Submit", exact=True).click()
    expect(page.get_by_role("heading", name="a real one")).to_be_visible()


def act(page: Page, name: str) -> None:
    """A button, and the same in the question that follows."""
    page.get_by_role("button", name=name, exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name=name, exact=True).click()
    expect(page.get_by_role("dialog")).to_have_count(0)
