"""States of a run without the service: whatever a kill leaves, a whole one is found, and a damaged one is not taken for it."""

import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from mae_core.errors import EncoderError
from mae_core.run import Run
from mae_core.state_folder import StateFolder

SPEC = '{"kind": "pretrain"}'


class Counting:
    """A run whose only weight is its step."""

    def __init__(self, step: int = 0) -> None:
        self.step = step

    def training_state(self) -> dict[str, Tensor]:
        return {"module.weight": torch.full((100,), float(self.step)), "step": torch.tensor(self.step)}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        assert state["module.weight"].eq(int(state["step"])).all()
        self.step = int(state["step"])


def save(folder: Path, *steps: int) -> None:
    states = StateFolder(folder, SPEC)
    for step in steps:
        states.save(step, Counting(step).training_state())
        states.wait()


def taken_up(folder: Path, spec: str = SPEC) -> int:
    run = Counting()
    step = StateFolder(folder, spec).take_up(cast(Run, run))
    assert run.step == step
    return step


def names(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.iterdir())


def killed_in_rmtree(folder: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A save of `step` that ends where it deletes an old state, of which the manifest is gone and all else there."""

    def die(place: Path, **_: Any) -> None:
        if (place / "manifest.json").exists():
            (place / "manifest.json").unlink()
            raise PermissionError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", die)
        save(folder, step)


@pytest.mark.parametrize("step", [30, 20])
def test_a_state_that_is_half_deleted_has_lost_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """An old one, or the one that a run which went back writes anew."""
    save(tmp_path, 10, 20)
    killed_in_rmtree(tmp_path, monkeypatch, step)
    assert any(name.endswith(".deleted") for name in names(tmp_path))
    assert taken_up(tmp_path) == {30: 30, 20: 10}[step]
    save(tmp_path, 40)
    assert [name for name in names(tmp_path) if "." in name] == [], "the next save clears up"


@pytest.mark.parametrize("damage", ["manifest missing", "manifest cut", "file missing", "one bit"])
def test_a_damaged_state_is_passed_over_and_never_taken_for_another_specs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    save(tmp_path, 10, 20)
    newest = tmp_path / "step=0000000020"
    manifest, file = newest / "manifest.json", newest / "state-00000.safetensors"
    content = file.read_bytes()
    if damage == "manifest missing":
        manifest.unlink()
    elif damage == "manifest cut":
        manifest.write_text(manifest.read_text()[:20])
    elif damage == "file missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert taken_up(tmp_path) == 10
    assert "is damaged or missing; going back to the one before" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "step=0000000010")
    with pytest.raises(EncoderError, match=rf"is damaged or missing; delete {tmp_path} to start over$"):
        taken_up(tmp_path)


def test_a_state_of_another_spec_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 10)
    with pytest.raises(EncoderError, match="is the training state of another spec; choose another --output"):
        taken_up(tmp_path, SPEC.replace("pretrain", "finetune"))


def test_a_run_that_has_ended_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path / "states", 10, 20, 30)
    assert names(tmp_path / "states") == ["step=0000000020", "step=0000000030"]
    StateFolder(tmp_path / "states", SPEC).remove()
    StateFolder(tmp_path / "states", SPEC).remove()
    assert names(tmp_path) == []
    assert taken_up(tmp_path / "states") == 0
