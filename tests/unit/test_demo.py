import io
from pathlib import Path

import pytest
from rich.console import Console

from service.demo import MARKER, median_points, probe_specs, wipe
from service.home import Home, HomeError

CONSOLE = Console(file=io.StringIO())


def test_the_gain_is_the_median_of_paired_differences() -> None:
    assert median_points([0.95, 0.90, 0.99], [0.80, 0.89, 0.80]) == pytest.approx(15.0)


def test_both_probes_differ_in_their_encoder_only() -> None:
    model = {"arch": "vit_tiny_patch2", "image_size": 8, "in_chans": 1}
    ours, random = probe_specs({"kind": "probe", "name": "x", "encoder": {"job": "y"}, "seed": 7}, job="j1", model=model)
    assert (ours["encoder"], random["encoder"], random["model"]) == ({"job": "j1"}, {"init": "random"}, model)
    assert {name for name in random if random.get(name) != ours.get(name)} == {"name", "encoder", "model"}
    assert ours["num_seeds"] == 3


def test_only_the_demos_own_folder_is_wiped(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    wipe(home, console=CONSOLE)
    assert (home.path / MARKER).exists()
    (home.path / "maestro.db").touch()
    wipe(home, console=CONSOLE)
    assert not (home.path / "maestro.db").exists()
    (home.path / MARKER).unlink()
    (home.path / "precious").touch()
    with pytest.raises(HomeError, match="not a folder that the demo made"):
        wipe(home, console=CONSOLE)
    assert (home.path / "precious").exists()


def test_a_home_in_use_is_not_wiped(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.prepare()
    (home.path / MARKER).touch()
    home.lock()
    with pytest.raises(HomeError, match="already up"):
        wipe(Home(tmp_path), console=CONSOLE)
    home.unlock()
