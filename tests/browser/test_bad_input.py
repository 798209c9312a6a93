"""What a page may meet: markup in names, a flood of lines, a form that is wrong, a service that goes away."""

import json
import re

from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import Live, Troubles
from tests.browser.scenes import PRETRAIN

MARKUP = '<img src=x onerror="document.title=1">"><script>alert(1)</script>&amp;'


def test_a_name_full_of_markup_is_text(page: Page, live: Live) -> None:
    job_id = live.scenes.submit(PRETRAIN, name=f"markup {MARKUP}", labels={"<b>team</b>": MARKUP})
    live.scenes.attempt(job_id, ago=0)
    live.scenes.log(job_id, f"{MARKUP}\n")
    page.get_by_label("Search by name or id").fill("markup")
    link = page.get_by_role("link", name=f"markup {MARKUP}", exact=True)
    expect(link).to_be_visible()
    link.click()
    expect(page.get_by_role("heading", name=f"markup {MARKUP}", exact=True)).to_be_visible()
    for part in ("Logs", "Events", "Spec", "Results"):
        page.get_by_role("navigation", name="Parts of the job").get_by_role("link", name=part).click()
        expect(page.get_by_role("navigation", name="Parts of the job").locator("[aria-current]")).to_have_text(part)
    page.goto(f"/#/compare?jobs={job_id}")
    expect(page.get_by_role("listitem").filter(has_text=MARKUP)).to_be_visible()
    assert page.locator("main img, main script").count() == 0
    assert page.title().startswith("Compare")


def test_ten_thousand_lines_a_second_leave_the_page_usable(page: Page, live: Live) -> None:
    job_id = live.scenes.submit(PRETRAIN, name="talks a lot")
    live.scenes.attempt(job_id, ago=0)
    page.goto(f"/#/jobs/{job_id}/logs")
    log = page.get_by_role("region", name="Log", exact=True)
    expect(page.get_by_text("Nothing is printed yet")).to_be_visible()
    offset = 0
    for second in range(5):
        text = "".join(f"second {second} line {number} of very many, with some words to fill it\n" for number in range(10_000))
        offset = live.scenes.log(job_id, text, offset=offset)
        page.get_by_label("Only lines with").fill("x")  # it answers meanwhile
        page.get_by_label("Only lines with").fill("")
    expect(log).to_contain_text("second 4 line 9999")
    expect(page.get_by_text("50\u202f000 lines")).to_be_visible()
    assert len(log.inner_text().splitlines()) < 200
    log.evaluate("(element) => element.scrollTo(0, 0)")
    expect(page.get_by_role("button", name="Follow")).to_have_attribute("aria-pressed", "false")
    expect(log).to_contain_text("second 0 line 0 ")
    page.get_by_role("button", name="Follow").click()
    expect(log).to_contain_text("second 4 line 9999")


def test_a_form_shows_each_error_at_its_field(page: Page, live: Live, troubles: Troubles) -> None:
    troubles.expect("status of 422")
    page.goto("/#/submit")
    page.get_by_role("button", name="Submit", exact=True).click()
    name = page.get_by_label("Name", exact=False).first
    expect(name).to_be_focused()
    expect(name).to_have_attribute("aria-invalid", "true")
    name.fill("from a form")
    page.get_by_label("Arch").fill("vit_enormous_patch16")
    page.get_by_label("Image size").fill("224")
    page.get_by_label("Source").first.fill("digits")
    expect(page.get_by_label("Arch")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("Arch")).to_have_accessible_description(re.compile("vit_"))
    page.get_by_label("Arch").fill("vit_tiny_patch2")
    page.get_by_label("Image size").fill("8")
    page.get_by_label("In chans").fill("1")
    page.get_by_label("Batch size", exact=True).fill("-3")
    expect(page.get_by_label("Batch size", exact=True)).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Batch size", exact=True).fill("64")
    estimate = page.get_by_role("complementary", name="Estimate")
    expect(estimate).to_contain_text("Parameters")
    expect(estimate).to_contain_text("It can start at once.")
    page.get_by_role("button", name="As JSON").click()
    text = page.get_by_label("Spec as JSON")
    expect(text).to_have_value(re.compile('"batch_size": 64'))
    text.fill("{")
    expect(page.get_by_role("alert")).to_contain_text("JSON")
    text.fill('{"kind": "pretrain", "name": "x", "wrong": 1}')
    expect(page.get_by_role("alert")).to_contain_text("wrong")


def test_what_is_pasted_stays_when_another_kind_is_chosen(page: Page, troubles: Troubles) -> None:
    troubles.expect("status of 422")
    page.goto("/#/submit")
    page.get_by_role("button", name="As JSON").click()
    text = page.get_by_label("Spec as JSON")
    text.fill('{"kind": "probe", "name": "pasted", "data": {"source": "digits"}, "encoder": {"job": "x"}}')
    page.get_by_role("button", name="finetune").click()
    expect(text).to_have_value(re.compile('"name": "pasted"'))
    assert json.loads(text.input_value()) == {
        "kind": "finetune",
        "name": "pasted",
        "data": {"source": "digits"},
        "encoder": {"job": "x"},
    }


def test_another_spec_is_sent_with_another_key(page: Page, troubles: Troubles) -> None:
    """Each is held back, as where no answer came: the same again must not be a second job, another one must not be the first."""
    troubles.expect("status of 400", "ERR_FAILED")
    keys: list[str] = []

    def hold(route: Route) -> None:
        keys.append(route.request.headers["idempotency-key"])
        route.fulfill(status=400, json={"title": "Held back"})

    page.route(re.compile(r"/v1/jobs(\?|$)"), lambda route: hold(route) if route.request.method == "POST" else route.continue_())
    page.route(re.compile("/v1/estimates"), lambda route: route.abort())
    page.goto("/#/submit")
    page.get_by_role("button", name="As JSON").click()
    text = page.get_by_label("Spec as JSON")
    submit = page.get_by_role("button", name="Submit", exact=True)

    def send() -> None:
        before = len(keys)
        submit.click()
        expect(page.get_by_role("alert")).to_contain_text("Not submitted")
        expect(submit).to_be_enabled()
        assert len(keys) == before + 1

    text.fill('{"kind": "pretrain", "name": "one"}')
    send()
    send()
    text.fill('{"kind": "pretrain", "name": "two"}')
    send()
    page.get_by_label("Project").fill("cells")
    send()
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_the_usual_choice_is_not_told_to_be_what_was_chosen(page: Page) -> None:
    page.goto("/#/submit")
    page.get_by_label("Arch").fill("vit_tiny_patch2")
    page.get_by_label("Image size").fill("8")
    page.get_by_label("In chans").fill("1")
    page.get_by_label("Source").first.fill("digits")
    page.get_by_role("complementary", name="Estimate").get_by_text("Parameters").wait_for()
    page.get_by_text("Masking", exact=True).click()
    strategy = page.get_by_label("Strategy").first
    expect(strategy.locator("option").first).to_have_text("random, by the recipe")
    with page.expect_response(re.compile("/v1/estimates")):
        strategy.select_option("block")
    page.wait_for_timeout(300)
    expect(strategy.locator("option").first).to_have_text("random, by the recipe")


def test_the_service_is_away_and_comes_back_while_one_watches(page: Page, live: Live, troubles: Troubles) -> None:
    troubles.expect("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_EMPTY_RESPONSE", "ERR_CONNECTION_RESET")
    job_id = live.scenes.submit(PRETRAIN, name="outlasts the service")
    live.scenes.attempt(job_id, ago=0.1)
    live.scenes.train(job_id, upto=0.1, num_steps=1000)
    page.goto(f"/#/jobs/{job_id}")
    progress = page.get_by_role("progressbar", name="Progress")
    expect(progress).to_have_attribute("aria-valuenow", "10")
    live.stage.api.stop()
    try:
        expect(page.get_by_text("The service does not answer. Trying again…")).to_be_visible()
        expect(page.get_by_role("heading", name="outlasts the service")).to_be_visible()
        live.scenes.train(job_id, upto=0.3, num_steps=1000)
    finally:
        live.stage.start_api()
    expect(page.get_by_text("The service does not answer. Trying again…")).to_be_hidden(timeout=60_000)
    expect(progress).to_have_attribute("aria-valuenow", "30", timeout=60_000)
    live.scenes.train(job_id, upto=0.4, num_steps=1000)
    expect(progress).to_have_attribute("aria-valuenow", "40", timeout=60_000)
