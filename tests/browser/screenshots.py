"""`python -m tests.browser.screenshots` (`make screenshots`): every view, light and dark, into docs/screenshots."""

import contextlib
import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from tests.browser import gallery
from tests.browser.chromium import ARGUMENTS, program, sign_in
from tests.browser.scenes import Scenes
from tests.stand_in.stage import own_servers, stage

FOLDER = Path(__file__).parent.parent.parent / "docs" / "screenshots"
_VIEWS = {  # where, and what is to be there before the picture is taken
    "jobs": ("jobs", "tr.job .off"),
    "job": ("jobs/{running}", ".chart canvas"),
    "reference": ("jobs/{departed}", ".banner:has-text('reference')"),
    "failed": ("jobs/{failed}", ".chart canvas"),
    "reconstructions": ("jobs/{reference}/reconstructions", ".pictures img"),
    "logs": ("jobs/{running}/logs", ".lines:has-text('step')"),
    "results": ("jobs/{reference}/results", ".copy"),
    "spec": ("jobs/{running}/spec", "table.spec"),
    "events": ("jobs/{running}/events", "tbody tr"),
    "compare": ("compare?jobs={reference},{running},{departed}", "table.spec"),
    "cluster": ("cluster", "tbody tr"),
    "submit": ("submit?like={paused}", ".figures-list"),
}
_ON_A_PHONE = ("jobs", "job", "reconstructions", "submit")
_COLOURS = 256  # of a palette: a third of the bytes, and nobody sees it
_PATIENCE_MS = 120_000


def main() -> None:
    found = program()
    if found is None:
        sys.exit("There is no Chromium here: apt-get install --no-install-recommends chromium")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder, run, storage, _ = stack.enter_context(own_servers(database="sqlite"))
        made = stack.enter_context(stage(folder, storage=storage, postgres=None, run=run))
        scenes = Scenes(made)
        ids = gallery.hang(scenes)
        driver = stack.enter_context(sync_playwright())
        browser = driver.chromium.launch(executable_path=found, headless=True, args=ARGUMENTS)
        for theme, width in (("light", 1280), ("dark", 1280), ("light", 360), ("dark", 360)):
            size = {"width": width, "height": 860 if width > 500 else 740}
            context = browser.new_context(viewport=size, base_url=made.url, color_scheme=theme, reduced_motion="reduce")
            context.set_default_timeout(_PATIENCE_MS)
            page = context.new_page()
            names = list(_VIEWS) if width > 500 else _ON_A_PHONE
            page.goto("/")
            sign_in(page, made.token)
            for name in names:
                for job, number in (("running", 2), ("departed", 1)):
                    scenes.beat(ids[job], number)
                view, wanted = _VIEWS[name]
                take(page, view.format(**ids), wanted, f"{name}-{theme}" if width > 500 else f"{name}-phone-{theme}")
            context.close()
        browser.close()
        scenes.close()
    print(f"{sum(file.stat().st_size for file in FOLDER.glob('*.png')) / 2**20:.1f} MiB in {FOLDER}")


def take(page: Page, view: str, wanted: str, name: str) -> None:
    page.goto("about:blank")  # so that nothing of the view before is left
    page.goto(f"/#/{view}")
    page.locator(wanted).first.wait_for(timeout=_PATIENCE_MS)
    page.wait_for_timeout(1500)  # pictures and curves are drawn
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
