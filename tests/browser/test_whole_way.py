"""From the form to the end of a run, on the stand-in of Ray; the comparison; the cluster; and what keeps nobody out."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from service.local import Seaweedfs
from service.processes import sweep
from tests.browser.chromium import sign_in
from tests.browser.conftest import Live, Troubles, watch
from tests.browser.scenes import PRETRAIN, PROBE
from tests.stand_in.stage import Stage, stage
from workers.contract import JobStatus, Reason

VIEWS = (
    "jobs",
    "jobs/{job}",
    "jobs/{job}/reconstructions",
    "jobs/{job}/logs",
    "jobs/{job}/results",
    "jobs/{job}/spec",
    "jobs/{job}/events",
)
OTHERS = ("jobs/{failed}", "compare?jobs={job},{failed}", "cluster", "submit", "nowhere")


@pytest.fixture
def working(tmp_path: Path, seaweedfs: Seaweedfs, run_mark: str) -> Iterator[Stage]:
    """A service of its own, with a dispatcher: `live` has thousands of jobs that nobody runs."""
    own = f"{run_mark}-working"  # else its end would be that of `live`'s processes too
    try:
        with stage(tmp_path, storage=seaweedfs, postgres=None, run=own) as made:
            made.dispatchers[0].start()
            yield made
    finally:
        sweep(own)


def test_a_job_is_submitted_and_watched_to_its_end(chromium: Browser, working: Stage, troubles: Troubles) -> None:
    troubles.allowed_hosts.add(urlsplit(working.url).netloc)
    context = chromium.new_context(base_url=working.url)
    page = context.new_page()
    watch(page, troubles)
    sign_in(page, working.token)
    page.get_by_role("link", name="New job").click()
    page.get_by_label("Name", exact=False).first.fill("by hand")
    page.get_by_label("Arch").fill("vit_tiny_patch2")
    page.get_by_label("Image size").fill("8")
    page.get_by_label("In chans").fill("1")
    page.get_by_label("Source").first.fill("digits")
    page.get_by_role("button", name="Submit", exact=True).click()
    expect(page.get_by_role("heading", name="by hand")).to_be_visible()
    expect(page.locator(".head .badge")).to_have_text("succeeded", timeout=60_000)
    expect(page.get_by_role("img", name=re.compile("Loss"))).to_be_visible()
    page.get_by_role("link", name="Results").click()
    expect(page.get_by_text(re.compile("^maestro fetch .* --to encoder$"))).to_be_visible()
    context.close()


@pytest.fixture(scope="module")
def shown(live: Live) -> dict[str, str]:
    """Jobs of which each view has something to show."""
    job = live.scenes.submit(PRETRAIN, name="seen from all sides", ago=2, labels={"team": "moss"})
    live.scenes.attempt(job, ago=1.9)
    live.scenes.train(job, num_steps=600)
    live.scenes.evaluate(job, steps=[200, 400, 600], ago=1.5)
    live.scenes.pictures(job, steps=[200, 400], ago=1.5)
    live.scenes.log(job, "a line\n" * 50)
    live.scenes.succeed(job, ago=1)
    failed = live.scenes.submit(PROBE, name="seen failing", ago=1, encoder={"init": "random"}, model=PRETRAIN["model"])
    live.scenes.adopt(failed, job)
    live.scenes.attempt(failed, ago=0.9)
    live.scenes.points(failed, [1, 2], {"loss": [1.0, float("nan")]})
    live.scenes.move(failed, JobStatus.FAILED, ago=0.5, reason=Reason.DATA_ERROR, detail="none of the 12 files is an image")
    return {"job": job, "failed": failed}


def test_jobs_are_compared(page: Page, shown: dict[str, str]) -> None:
    page.goto(f"/#/compare?jobs={shown['job']}")
    page.get_by_label("Add a job by name or id").fill("seen failing")
    expect(page.locator(f'#found-jobs option[value="{shown["failed"]}"]')).to_have_count(1)
    page.get_by_label("Add a job by name or id").fill(shown["failed"])
    page.get_by_label("Add a job by name or id").press("Enter")
    expect(page.get_by_role("list", name="Jobs that are compared").get_by_role("listitem")).to_have_count(2)
    expect(page.get_by_role("region", name="Differences", exact=True)).to_contain_text("optim.base_lr")
    loss = page.get_by_role("img", name=re.compile("^Loss"))
    expect(loss).to_have_attribute("aria-label", re.compile("seen from all sides: last .*seen failing: last 1, 1 not finite"))
    for axis in ("time", "step", "epoch"):
        page.get_by_label("Curves over").select_option(axis)
    page.get_by_role("button", name="Leave out seen failing").click()
    expect(page.get_by_role("list", name="Jobs that are compared").get_by_role("listitem")).to_have_count(1)
    assert shown["failed"] not in page.url


def test_the_cluster_says_who_holds_it(page: Page, live: Live) -> None:
    job_id = live.scenes.submit(PRETRAIN, name="holds devices")
    live.scenes.attempt(job_id, ago=0)
    page.goto("/#/cluster")
    expect(page.get_by_role("region", name="CPUs")).to_contain_text("of 64 in use")
    expect(page.get_by_role("region", name="Who holds it").get_by_role("link", name="holds devices")).to_be_visible()
    live.scenes.end_attempt(job_id, ago=0)


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 360)])
def test_no_view_keeps_anybody_out(
    chromium: Browser, live: Live, troubles: Troubles, shown: dict[str, str], axe: str, theme: Any, width: int
) -> None:
    """No violation that axe calls serious or critical; nothing wider than the screen."""
    context = chromium.new_context(viewport={"width": width, "height": 760}, base_url=live.url, color_scheme=theme, reduced_motion="reduce")
    page = context.new_page()
    watch(page, troubles)
    found = []
    page.goto("/")
    found += violations(page, axe, "login")
    sign_in(page, live.stage.token)
    for view in (*VIEWS, *OTHERS):
        page.goto(f"/#/{view.format(**shown)}")
        page.get_by_role("heading", level=1).first.wait_for(state="attached")
        expect(page.locator("main .card, main .empty").first).to_be_attached()
        found += violations(page, axe, view)
        room = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert room[0] <= room[1], f"{view} is {room[0]} px wide on {room[1]}"
    context.close()
    assert found == []


def violations(page: Page, axe: str, view: str) -> list[str]:
    page.evaluate(axe)
    result = page.evaluate("axe.run({resultTypes: ['violations']})")
    return [
        f"{view}: {item['id']} ({item['impact']}): {node['html'][:200]} {node.get('failureSummary', '')[:300]}"
        for item in result["violations"]
        if item["impact"] in ("serious", "critical")
        for node in item["nodes"]
    ]
