"""The list of jobs, by clicking and by keyboard."""

from playwright.sync_api import Page, expect

from tests.browser.conftest import Live
from tests.browser.scenes import PRETRAIN


def test_a_job_is_found_and_its_curve_shown(page: Page, live: Live) -> None:
    job_id = live.scenes.submit(PRETRAIN, name="first curve", ago=2)
    live.scenes.attempt(job_id, ago=1.9)
    live.scenes.train(job_id, upto=0.4)
    page.get_by_role("link", name="first curve").click()
    expect(page.get_by_role("heading", name="first curve")).to_be_visible()
    loss = page.get_by_role("figure", name="Loss")
    expect(loss.locator("canvas")).to_be_visible()
