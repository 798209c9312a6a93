"""The tutorial, followed word by word: from images in a folder to a fine-tuned model in timm."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.home import Home
from service.processes import sweep
from tests.blocks import PROJECT, run_page


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A reader's home. What is still up in it is stopped."""
    yield tmp_path
    if (run := Home(tmp_path / ".maestro").read_run()) is not None:
        if run.is_alive():
            os.kill(run.pid, signal.SIGKILL)
        sweep(run.run)


def test_the_tutorial_ends_with_a_model_that_knows_digits(folder: Path) -> None:
    told = run_page(PROJECT / "docs" / "tutorial.md", folder, {}, timeout_seconds=600)
    [line] = [line for line in told.splitlines() if "test images are classified right" in line]
    assert float(line.rpartition(" ")[2].rstrip("%")) > 60  # 10 by chance
    assert list((folder / "pictures").glob("*.png"))
    assert Home(folder / ".maestro").read_run() is None, "it ends with everything stopped"
