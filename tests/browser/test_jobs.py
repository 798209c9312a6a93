"""The list of jobs, by clicking and by keyboard, while it changes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect
from sqlalchemy import delete, select

from benchmarks import first_paint
from service import events
from service.db import utc_now
from service.models import EventRow, JobLabelRow, JobRow, JobWordRow
from tests import many_jobs
from tests.browser.conftest import Live, Troubles
from tests.browser.scenes import PRETRAIN, PROBE
from workers.contract import EventType, JobStatus, Reason

RANDOM = {"encoder": {"init": "random"}, "model": PRETRAIN["model"]}


def names(page: Page) -> list[str]:
    return page.locator("tr.job .name a").all_inner_texts()


def row(page: Page, name: str) -> Locator:
    return page.locator("tr.job", has=page.get_by_role("link", name=name, exact=True))


def search(page: Page, text: str) -> None:
    page.get_by_label("Search by name or id").fill(text)
    page.wait_for_url(re.compile(r"text="))


def test_jobs_are_filtered_by_what_is_written_in_the_address_too(page: Page, live: Live, troubles: Troubles) -> None:
    live.scenes.submit(PRETRAIN, name="filtered alpha", labels={"team": "moss"})
    beta = live.scenes.submit(PROBE, name="filtered beta", labels={"team": "fern"}, **RANDOM)
    live.scenes.move(beta, JobStatus.FAILED, ago=0, reason=Reason.DATA_ERROR)
    search(page, "filtered")
    expect(page.locator("tr.job")).to_have_count(2)
    assert names(page) == ["filtered beta", "filtered alpha"]
    page.get_by_role("button", name="Failed").click()
    expect(page.locator("tr.job")).to_have_count(1)
    expect(row(page, "filtered beta")).to_contain_text("failed")
    page.get_by_role("button", name="All", exact=True).click()
    page.get_by_label("Kind").select_option("pretrain")
    expect(page.locator("tr.job")).to_have_count(1)
    assert names(page) == ["filtered alpha"]
    page.get_by_label("Kind").select_option("")
    page.get_by_label("Label").fill("team:fern")
    expect(page.locator("tr.job")).to_have_count(1)
    assert names(page) == ["filtered beta"]
    page.reload()
    expect(page.locator("tr.job")).to_have_count(1)
    page.get_by_label("Label").fill("team:nobody")
    expect(page.get_by_text("No job is like that")).to_be_visible()
    troubles.expect("status of 422")
    page.get_by_label("Search by name or id").fill("!!!")
    expect(page.get_by_text("This filter cannot be used")).to_be_visible()


def test_a_list_follows_its_jobs(page: Page, live: Live) -> None:
    """A new one, its progress, its end, and that it is deleted."""
    live.scenes.submit(PRETRAIN, name="followed first")
    search(page, "followed")
    expect(page.locator("tr.job")).to_have_count(1)
    job_id = live.scenes.submit(PRETRAIN, name="followed second")
    expect(row(page, "followed second")).to_contain_text("queued")
    live.scenes.attempt(job_id, ago=0)
    live.scenes.train(job_id, upto=0.25, num_steps=400)
    expect(row(page, "followed second")).to_contain_text("running")
    expect(row(page, "followed second").get_by_role("progressbar")).to_have_attribute("aria-valuetext", "100 of 400 steps")
    live.scenes.move(job_id, JobStatus.FAILED, ago=0, reason=Reason.OUT_OF_MEMORY)
    expect(row(page, "followed second")).to_contain_text("failed")
    live.scenes.delete(job_id)
    expect(row(page, "followed second")).to_have_count(0)


def test_the_list_is_walked_by_keyboard(page: Page, live: Live) -> None:
    for number in range(3):
        live.scenes.submit(PRETRAIN, name=f"walked {number}")
    page.get_by_role("link", name="Skip to the content").press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    page.keyboard.press("/")
    expect(page.get_by_label("Search by name or id")).to_be_focused()
    page.keyboard.type("walked")
    page.wait_for_url(re.compile(r"text=walked"))
    expect(page.locator("tr.job")).to_have_count(3)
    page.get_by_role("region", name="List of jobs").focus()
    page.keyboard.press("j")
    expect(page.get_by_role("link", name="walked 2", exact=True)).to_be_focused()
    page.keyboard.press("j")
    page.keyboard.press("x")
    expect(page.get_by_label("Compare walked 1")).to_be_checked()
    expect(page.get_by_role("link", name="Compare 1 job")).to_be_visible()
    page.keyboard.press("k")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="walked 2")).to_be_focused()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.keyboard.press("j")
    expect(page.get_by_label("Search by name or id")).to_be_visible()


@pytest.fixture
def ten_thousand(live: Live) -> Iterator[int]:
    """Before `page`, which is closed before they go: it would ask for jobs that are no more."""
    number = 10_000
    with filled(live, number):
        yield number


@pytest.fixture
def six_hundred(live: Live) -> Iterator[list[str]]:
    """The ids of a few pages of jobs that have ended, newest first. Before `page`, too."""
    with filled(live, 600) as made:
        yield [job["id"] for job in reversed(made)]


@contextmanager
def filled(live: Live, number: int) -> Iterator[list[dict[str, Any]]]:
    made = many_jobs.fill(live.scenes.database, number)
    yield made
    with live.scenes.database.write() as session:
        upto = made[-1]["created_at"] + timedelta(seconds=1)
        ours = JobRow.created_at <= upto
        session.execute(delete(JobWordRow).where(JobWordRow.created_at <= upto))
        session.execute(delete(JobLabelRow).where(JobLabelRow.created_at <= upto))
        session.execute(delete(EventRow).where(EventRow.job_id.in_(select(JobRow.id).where(ours))))
        session.execute(delete(JobRow).where(ours))


def to_the_end(page: Page) -> None:
    page.get_by_role("region", name="List of jobs").evaluate("(list) => list.scrollTo(0, list.scrollHeight)")


def test_ten_thousand_jobs_are_a_few_rows_at_a_time(ten_thousand: int, page: Page) -> None:
    page.get_by_label("Kind").select_option("pretrain")
    page.get_by_label("Label").fill("team:cells")
    page.wait_for_url(re.compile(r"label=team"))
    expect(page.get_by_role("status").filter(has_text="jobs loaded")).to_be_visible()
    expect(page.locator("tr.job").nth(5)).to_be_visible()
    assert page.locator("tr.job").count() < 60
    page.get_by_role("button", name="Loss").click()
    page.get_by_role("button", name="Load all").click()
    expect(page.get_by_role("button", name="Load all")).to_be_hidden(timeout=60_000)
    loaded = int(page.get_by_role("table", name="Jobs").get_attribute("aria-rowcount") or 0)
    assert 1000 < loaded < ten_thousand
    to_the_end(page)
    expect(page.locator(f'tr.job[aria-rowindex="{loaded}"]')).to_be_visible()
    assert page.locator("tr.job").count() < 60


def test_a_page_that_does_not_come_is_asked_for_once(six_hundred: list[str], page: Page, live: Live, troubles: Troubles) -> None:
    troubles.expect("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_EMPTY_RESPONSE", "ERR_CONNECTION_RESET")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "cursor=" in request.url else None)
    expect(page.locator("tr.job").nth(5)).to_be_visible()
    page.get_by_role("button", name="Loss").click()
    expect(page.get_by_role("button", name="Load all")).to_be_visible()
    live.stage.api.stop()
    try:
        expect(page.get_by_text("The service does not answer. Trying again…")).to_be_visible()
        to_the_end(page)
        page.wait_for_timeout(3000)
        assert len(asked) == 1
        page.get_by_role("button", name="Load all").click()
        expect(page.get_by_role("button", name="Load all")).to_be_enabled()
    finally:
        live.stage.start_api()
    expect(page.get_by_text("The service does not answer. Trying again…")).to_be_hidden(timeout=60_000)
    to_the_end(page)
    expect(page.get_by_role("status").filter(has_text=re.compile(r"[3-9]\d\d jobs"))).to_be_visible()
    assert len(asked) < 8


def test_all_are_loaded_while_a_page_is_on_its_way(six_hundred: list[str], page: Page) -> None:
    held: list[Route] = []
    page.route(re.compile("cursor="), lambda route: held.append(route), times=1)
    expect(page.locator("tr.job").nth(5)).to_be_visible()
    page.get_by_role("button", name="Loss").click()
    expect(page.get_by_role("button", name="Load all")).to_be_visible()
    to_the_end(page)
    page.wait_for_timeout(500)
    (route,) = held
    page.get_by_role("button", name="Load all").click()
    assert page.evaluate("1 + 1") == 2, "the tab answers"
    route.continue_()
    expect(page.get_by_role("button", name="Load all")).to_be_hidden()


def test_more_news_than_one_round_looks_at_are_not_lost(six_hundred: list[str], page: Page, live: Live) -> None:
    looked: set[str] = set()
    page.on("request", lambda request: looked.add(request.url.split("/")[-1]))
    expect(page.locator("tr.job").nth(5)).to_be_visible()
    page.get_by_role("button", name="Loss").click()
    page.get_by_role("button", name="Load all").click()
    expect(page.get_by_role("button", name="Load all")).to_be_hidden()
    told = set(six_hundred[300:350])
    with live.scenes.database.write() as session:
        for job_id in told:
            events.append(session, job_id, EventType.IMAGES_SKIPPED, {"count": 1}, at=utc_now(), attempt=1)
    for _ in range(20):
        page.wait_for_timeout(1000)
        if told <= looked:
            break
    assert told <= looked


def test_first_paint(chromium: Browser, live: Live) -> None:
    """The benchmark runs."""
    live.scenes.submit(PRETRAIN, name="painted first")
    line = first_paint.measure(live.stage, chromium, num_jobs=0, loads=1)
    assert (line["num_jobs"], line["loads"]) == (0, 1)
    assert 0 < line["value"] == line["max"]
