"""`python -m benchmarks.first_paint`: how long the dashboard's list takes to appear with 10,000 jobs, in Chromium, with nothing kept.

From the start of the navigation until the first rows of jobs are in the page (`value`), and until anything is painted; the median and the
longest of several loads, each in a fresh context. Prints one JSON line.
"""

import argparse
import json
import statistics

from playwright.sync_api import Browser, sync_playwright

from service.client import Json
from service.db import Database
from tests import many_jobs
from tests.browser.chromium import ARGUMENTS, program
from tests.stand_in.stage import Stage, own_servers, stage

GOAL_SECONDS = 1.0
_SIGNED_IN = "sessionStorage.setItem('maestro-token', {token})"
_ROWS_SEEN = """new MutationObserver((_, observer) => {
  if (document.querySelector('tr.job')) { performance.mark('rows'); observer.disconnect(); }
}).observe(document, { childList: true, subtree: true })"""
_TIMES = (
    """[performance.getEntriesByName('rows')[0].startTime, performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0]"""
)


def measure(made: Stage, browser: Browser, *, num_jobs: int, loads: int) -> Json:
    """The JSON line."""
    database = Database(made.database_url)
    many_jobs.fill(database, num_jobs)
    database.close()
    _load(made, browser)  # the service's own first time
    times = [_load(made, browser) for _ in range(loads)]
    rows, paints = [row for row, _ in times], [paint for _, paint in times]
    return {
        "name": "first_paint",
        "unit": "s",
        "value": round(statistics.median(rows), 3),
        "goal": GOAL_SECONDS,
        "max": round(max(rows), 3),
        "first_contentful_paint": round(statistics.median(paints), 3),
        "num_jobs": num_jobs,
        "loads": loads,
        "device": "cpu",
        "database": made.database,
    }


def _load(made: Stage, browser: Browser) -> tuple[float, float]:
    """Seconds until rows, and until anything is there."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, base_url=made.url)
    context.add_init_script(_SIGNED_IN.format(token=json.dumps(made.token)) + ";" + _ROWS_SEEN)
    page = context.new_page()
    page.goto("/")
    page.locator("tr.job").first.wait_for()
    page.wait_for_function("performance.getEntriesByName('rows').length > 0")
    rows, paint = page.evaluate(_TIMES)
    context.close()
    return rows / 1000, paint / 1000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_paint", description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--loads", type=int, default=7)
    given = parser.parse_args()
    if (found := program()) is None:
        raise SystemExit("There is no Chromium here: apt-get install --no-install-recommends chromium")
    with (
        own_servers(database="sqlite") as (folder, run, storage, _),
        stage(folder, storage=storage, postgres=None, run=run) as made,
        sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=found, headless=True, args=ARGUMENTS)
        print(json.dumps(measure(made, browser, num_jobs=given.jobs, loads=given.loads)))
        browser.close()


if __name__ == "__main__":
    main()
