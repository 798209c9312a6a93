"""One job: its curves, its time, what it prints and leaves, and what can be done with it."""

import re
from urllib.parse import parse_qs, urlsplit

from playwright.sync_api import Page, expect

from tests.browser.conftest import Live, Troubles
from tests.browser.scenes import PRETRAIN, PROBE
from workers.contract import EventType, JobStatus, Reason

RANDOM = {"encoder": {"init": "random"}, "model": PRETRAIN["model"]}


def started(live: Live, name: str, **changes: object) -> str:
    job_id = live.scenes.submit(PRETRAIN, name=name, ago=2, **changes)
    live.scenes.attempt(job_id, ago=1.9)
    return job_id


def chart(page: Page, title: str):  # type: ignore[no-untyped-def]
    return page.locator("figure", has=page.get_by_role("heading", name=title, exact=True))


def test_curves_grow_and_a_zoom_shows_the_spike_inside(page: Page, live: Live) -> None:
    job_id = started(live, "zoomed")
    live.scenes.train(job_id, upto=0.5, num_steps=20_000)
    live.scenes.points(job_id, [9_500], {"loss": [77.0]})
    page.goto(f"/#/jobs/{job_id}")
    loss = chart(page, "Loss").get_by_role("img")
    expect(loss).to_have_attribute("aria-label", re.compile("highest 77"))
    for title in ("Learning rate", "Gradient norm", "Images per second", "Waiting for images"):
        expect(chart(page, title).locator("canvas")).to_be_visible()
    live.scenes.points(job_id, [10_001], {"loss": [99.0]})
    expect(loss).to_have_attribute("aria-label", re.compile("highest 99"))
    chart(page, "Loss").scroll_into_view_if_needed()
    box = chart(page, "Loss").locator(".u-over").bounding_box()
    assert box is not None
    with page.expect_response(re.compile(r"/metrics\?.*from_step=")) as zoomed:
        page.mouse.move(box["x"] + box["width"] * 0.90, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.93, box["y"] + 60)
        page.mouse.move(box["x"] + box["width"] * 0.97, box["y"] + 60)
        page.mouse.up()
    query = parse_qs(urlsplit(zoomed.value.url).query)
    assert 8900 < int(query["from_step"][0]) < 9100
    expect(page.get_by_label("From step")).to_have_value(query["from_step"][0])
    expect(loss).to_have_attribute("aria-label", re.compile("highest 77"))
    page.get_by_label("From step").fill("9500")
    page.get_by_label("To step").fill("9501")
    page.get_by_label("To step").press("Enter")
    expect(loss).to_have_attribute("aria-label", re.compile("last 0[^,]*, lowest 0[^,]*, highest 77"))
    page.get_by_role("button", name="Whole run").click()
    expect(page.get_by_label("From step")).to_have_value("0")
    page.get_by_label("Curves over").select_option("epoch")
    page.get_by_role("button", name="Log scale").click()
    expect(loss).to_be_visible()


def test_gaps_and_what_is_not_finite_are_told(page: Page, live: Live) -> None:
    job_id = started(live, "not finite")
    nan, inf = float("nan"), float("inf")
    live.scenes.points(job_id, [1, 2, 3, 4, 900], {"loss": [1.0, nan, inf, 0.5, 0.25], "grad_norm": [nan] * 5})
    page.goto(f"/#/jobs/{job_id}")
    expect(chart(page, "Loss")).to_contain_text("✕ 2 not finite")
    expect(chart(page, "Loss").get_by_role("img")).to_have_attribute("aria-label", re.compile("last 0.25.*2 values not finite"))
    expect(chart(page, "Gradient norm")).to_contain_text("✕ 5 not finite")


def test_a_failure_says_why_and_what_to_do(page: Page, live: Live) -> None:
    job_id = started(live, "diverges")
    live.scenes.end_attempt(job_id, ago=1, reason=Reason.DIVERGED, message="step 7")
    live.scenes.move(job_id, JobStatus.FAILED, ago=1, reason=Reason.DIVERGED, detail="step 7 (loss nan)")
    page.goto(f"/#/jobs/{job_id}")
    alert = page.get_by_role("alert").filter(has_text="Failed: diverged")
    expect(alert).to_contain_text("lower optim.base_lr")
    expect(alert).to_contain_text("step 7 (loss nan)")
    page.get_by_role("link", name="Events").click()
    expect(page.get_by_role("row").filter(has_text="attempt ended: diverged")).to_contain_text("step 7")
    page.get_by_role("link", name="Spec").click()
    expect(page.get_by_role("row", name="optim.batch_size 1024")).to_be_visible()


def test_pictures_are_turned_over_the_time_of_training(page: Page, live: Live) -> None:
    job_id = started(live, "pictured")
    live.scenes.train(job_id, upto=0.5, num_steps=400)
    page.goto(f"/#/jobs/{job_id}/reconstructions")
    expect(page.get_by_text("No pictures yet")).to_be_visible()
    live.scenes.pictures(job_id, steps=[50, 100, 150], ago=1)
    slider = page.get_by_label("Time of training")
    expect(slider).to_have_attribute("aria-valuetext", re.compile("step 150"))
    picture = page.get_by_role("img", name=re.compile("step 150"))
    expect(picture).to_be_visible()
    assert picture.evaluate("(image) => image.naturalWidth") > 100
    slider.press("ArrowLeft")
    expect(page.get_by_role("img", name=re.compile("step 100"))).to_be_visible()
    slider.press("Home")
    expect(page.get_by_role("img", name=re.compile("step 50"))).to_be_visible()


def test_a_log_is_followed_process_by_process(page: Page, live: Live) -> None:
    job_id = started(live, "prints")
    end = live.scenes.log(job_id, "first line\nsecond \x1b[32mgreen\x1b[0m line\n")
    live.scenes.log(job_id, "rank one speaks\n", worker="1")
    page.goto(f"/#/jobs/{job_id}/logs")
    log = page.get_by_role("region", name="Log", exact=True)
    expect(log).to_contain_text("second green line")
    live.scenes.log(job_id, "third line\n", offset=end)
    expect(log).to_contain_text("third line")
    page.get_by_label("Only lines with").fill("third")
    expect(log).not_to_contain_text("second")
    page.get_by_label("Only lines with").fill("")
    page.get_by_label("Process").select_option("1")
    expect(log).to_contain_text("rank one speaks")
    expect(log).not_to_contain_text("first line")


def test_a_log_goes_on_with_the_next_attempt(page: Page, live: Live) -> None:
    job_id = started(live, "prints again")
    live.scenes.log(job_id, "the first attempt speaks\n")
    page.goto(f"/#/jobs/{job_id}/logs")
    log = page.get_by_role("region", name="Log", exact=True)
    expect(log).to_contain_text("the first attempt speaks")
    begin_again(live, job_id, 2)
    live.scenes.log(job_id, "the second attempt speaks\n", number=2)
    expect(log).to_contain_text("the second attempt speaks")
    expect(page.get_by_label("Attempt")).to_have_value("2")
    page.get_by_label("Attempt").select_option("1")
    expect(log).to_contain_text("the first attempt speaks")
    begin_again(live, job_id, 3)
    expect(page.get_by_label("Attempt").locator("option")).to_have_count(3)
    expect(page.get_by_label("Attempt")).to_have_value("1")
    expect(log).to_contain_text("the first attempt speaks")


def begin_again(live: Live, job_id: str, number: int) -> None:
    live.scenes.end_attempt(job_id, number - 1, ago=0, reason=Reason.WORKER_DIED)
    live.scenes.move(job_id, JobStatus.RECOVERING, ago=0)
    live.scenes.attempt(job_id, number, ago=0)


def test_results_are_taken_away_by_a_command(page: Page, live: Live) -> None:
    job_id = started(live, "has a result", export={"formats": ["hf", "onnx"]})
    live.scenes.train(job_id, num_steps=100)
    live.scenes.succeed(job_id, ago=0.1, metrics={"loss": 0.25, "probe_accuracy": 0.71})
    page.goto(f"/#/jobs/{job_id}/results")
    expect(page.get_by_text(f"maestro fetch {job_id} --to encoder", exact=True)).to_be_visible()
    expect(page.get_by_text(f"maestro fetch {job_id} --format onnx --to encoder-onnx")).to_be_visible()
    expect(page.get_by_text("71.00 %")).to_be_visible()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name=f"Copy: maestro fetch {job_id} --to encoder", exact=True).click()
    assert page.evaluate("navigator.clipboard.readText()") == f"maestro fetch {job_id} --to encoder"


def test_a_family_of_jobs_is_a_tree(page: Page, live: Live) -> None:
    parent = started(live, "mother of all")
    live.scenes.succeed(parent, ago=1)
    probe = live.scenes.submit(PROBE, name="her probe", **RANDOM)
    live.scenes.adopt(probe, parent)
    page.goto(f"/#/jobs/{probe}")
    lineage = page.get_by_role("region", name="Lineage", exact=True)
    expect(lineage).to_contain_text("her probe")
    lineage.get_by_role("link", name=re.compile("mother of all")).click()
    expect(page.get_by_role("heading", name="mother of all")).to_be_visible()
    expect(lineage.get_by_role("link", name=re.compile("her probe"))).to_be_visible()


def test_a_job_is_paused_resumed_cancelled_retried_and_deleted(page: Page, live: Live) -> None:
    job_id = live.scenes.submit(PRETRAIN, name="acted upon")
    page.goto(f"/#/jobs/{job_id}")

    def act(button: str, confirm: str) -> None:
        page.get_by_role("main").get_by_role("button", name=button, exact=True).click()
        page.get_by_role("dialog").get_by_role("button", name=confirm, exact=True).click()
        expect(page.get_by_role("dialog")).to_have_count(0)

    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_role("button", name="Not now").click()
    expect(page.locator(".head .badge")).to_have_text("queued")
    act("Pause", "Pause")
    expect(page.get_by_text("Paused on request")).to_be_visible()
    act("Resume", "Resume")
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    act("Cancel", "Cancel the job")
    expect(page.get_by_text("Cancelled on request")).to_be_visible()
    act("Retry", "Retry")
    expect(page.get_by_role("link", name="a retry of another job")).to_be_visible()
    page.get_by_role("link", name="a retry of another job").click()
    expect(page.get_by_role("button", name="Delete")).to_be_visible()
    act("Delete", "Delete for good")
    expect(page.get_by_text("acted upon is deleted.")).to_be_visible()
    expect(page.get_by_role("region", name="List of jobs")).to_be_visible()


def test_a_run_that_leaves_the_band_of_a_pinned_job_is_marked(page: Page, live: Live) -> None:
    reference = started(live, "held against", labels={"team": "moss"})
    live.scenes.train(reference, num_steps=400)
    live.scenes.succeed(reference, ago=1)
    page.goto(f"/#/jobs/{reference}")
    page.get_by_role("button", name="Use as reference").click()
    page.get_by_label("Name").fill("good run")
    page.get_by_role("button", name="Use it").click()
    expect(page.get_by_role("button", name="Reference good run")).to_be_visible()
    astray = started(live, "goes astray")
    live.scenes.train(astray, upto=0.8, num_steps=400, drift=1.5)
    page.goto(f"/#/jobs/{astray}")
    expect(page.get_by_text("The loss is above its reference")).to_be_visible()
    expect(page.get_by_text("left the band of “good run”")).to_be_visible()
    page.get_by_role("link", name="Jobs", exact=True).first.click()
    expect(page.locator("tr.job", has_text="goes astray")).to_contain_text("above its reference")
    page.go_back()
    page.get_by_label("Reference").select_option("none")
    expect(page.get_by_text("The loss is above its reference")).to_have_count(0)
    faithful = started(live, "keeps to it")
    live.scenes.train(faithful, upto=0.8, num_steps=400, seed=2)
    page.goto(f"/#/jobs/{faithful}")
    expect(chart(page, "Loss")).to_contain_text("good run")
    expect(page.get_by_text("its reference")).to_have_count(0)
    page.goto(f"/#/jobs/{reference}")
    page.get_by_role("button", name="Reference good run").click()
    page.get_by_role("button", name="Take it away").click()
    expect(page.get_by_role("button", name="Use as reference")).to_be_visible()


def test_a_job_that_is_deleted_while_it_is_watched(page: Page, live: Live, troubles: Troubles) -> None:
    troubles.expect("status of 404")
    job_id = started(live, "vanishes")
    page.goto(f"/#/jobs/{job_id}")
    expect(page.get_by_role("heading", name="vanishes")).to_be_visible()
    live.scenes.delete(job_id)
    expect(page.get_by_role("alert")).to_contain_text("This job was deleted.")
    page.goto("/#/jobs/none")
    expect(page.get_by_role("heading", name="There is no such job")).to_be_visible()


def test_events_come_as_they_happen(page: Page, live: Live) -> None:
    job_id = started(live, "eventful")
    page.goto(f"/#/jobs/{job_id}/events")
    expect(page.get_by_text("queued → starting")).to_be_visible()
    live.scenes.tell(job_id, 1, EventType.IMAGES_SKIPPED, ago=0, count=3, images=["a.png: cut short"])
    expect(page.get_by_role("row").filter(has_text="images skipped: 3")).to_contain_text("a.png: cut short")


def test_training_states_say_why_they_stay_and_are_pinned(page: Page, live: Live) -> None:
    job_id = started(live, "saves states")
    for step in (100, 200):
        key = f"jobs/{job_id}/training_state/step={step:010d}-a1-1/"
        live.scenes.tell(job_id, 1, EventType.TRAINING_STATE_COMMITTED, ago=0, step=step, key=key, bytes=2**20)
    page.goto(f"/#/jobs/{job_id}/results")
    row = page.get_by_role("region", name="Training states", exact=True).get_by_role("row").filter(has_text="200")
    expect(row).to_contain_text("last")
    row.get_by_role("button", name="Pin the state of step 200").click()
    expect(row).to_contain_text("pinned")
    row.get_by_role("button", name="Pin the state of step 200").click()
    expect(row).not_to_contain_text("pinned")
