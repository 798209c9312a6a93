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
_VIEWS = {
    "jobs": "jobs",
    "job": "jobs/{running}",
    "reference": "jobs/{departed}",
    "failed": "jobs/{failed}",
    "reconstructions": "jobs/{reference}/reconstructions",
    "logs": "jobs/{running}/logs",
    "results": "jobs/{reference}/results",
    "spec": "jobs/{running}/spec",
    "events": "jobs/{running}/events",
    "compare": "compare?jobs={reference},{running},{departed}",
    "cluster": "cluster",
    "submit": "submit?like={paused}",
}
_ON_A_PHONE = ("jobs", "job", "reconstructions", "submit")
_COLOURS = 128  # of a palette: a third of the bytes, and nobody sees it


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
            page = context.new_page()
            names = list(_VIEWS) if width > 500 else _ON_A_PHONE
            page.goto("/")
            sign_in(page, made.token)
            for name in names:
                take(page, _VIEWS[name].format(**ids), f"{name}-{theme}" if width > 500 else f"{name}-phone-{theme}")
            context.close()
        browser.close()
        scenes.close()
    print(f"{sum(file.stat().st_size for file in FOLDER.glob('*.png')) / 2**20:.1f} MiB in {FOLDER}")


def take(page: Page, view: str, name: str) -> None:
    page.goto(f"/#/{view}")
    page.wait_for_load_state("networkidle") if "submit" in view or "cluster" in view else page.wait_for_timeout(1500)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
