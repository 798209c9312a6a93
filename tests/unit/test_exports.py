"""Every format of a trained model, opened by the library it is for with the three lines of its card."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_core.config import FinetuneSpec, PretrainSpec
from mae_core.exports.formats import FOLDERS, ExportFormat, ExportOutcome
from mae_core.finetune import FinetuneRun
from mae_core.options import ARCH_SIZES, ModelConfig
from mae_core.pretrain import PretrainRun
from mae_core.provenance import Provenance
from tests.torchvision_ops import import_torchvision
from tests.unit.core_fixtures import SHALLOW, finetune_spec, image_folder, opened, pretrain_spec

import_torchvision()
import transformers  # noqa: E402  (needs the line above)

MADE_BY = Provenance("j1", {"maestro-mae": "0", "torch": "0"}, "c0ffee")
ALL: list[ExportFormat] = [*FOLDERS]


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ARCH_SIZES, "tiny", SHALLOW)
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images") / "of two classes")


def stirred(run: PretrainRun | FinetuneRun) -> None:
    """Stands for training: every parameter leaves its initial value, so that an exchange of two would show."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in run.training.module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def exported(spec: PretrainSpec | FinetuneSpec, folder: Path) -> tuple[Any, dict[ExportFormat, ExportOutcome]]:
    run: Any = opened(spec)
    stirred(run)
    run.metrics = {"loss": 0.25, "val_accuracy_seeds": [0.5]}
    folder.mkdir(exist_ok=True)
    run.write_result(folder)
    return run, dict(run.write_exports(folder, MADE_BY))


def run_card(folder: Path, images_BCHW: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs the three lines of a folder's card in that folder, as a user would; what they leave behind."""
    [code] = re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) == 3
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {"images": images_BCHW}
    with torch.no_grad():
        exec(code, found)
    return found


def left_out(outcomes: dict[ExportFormat, ExportOutcome]) -> dict[str, str]:
    return {name: outcome.left_out for name, outcome in outcomes.items() if outcome.left_out is not None}


def some_images(model: ModelConfig, number: int = 5) -> Tensor:
    """As many as no graph was traced with."""
    return torch.randn(number, model.in_chans, *model.image_size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_every_library_gives_the_features_of_a_pretrained_encoder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, outcomes = exported(pretrain_spec(images, export={"formats": None, "license": "apache-2.0"}), tmp_path)
    assert left_out(outcomes) == {}
    assert all(outcome.difference is not None and outcome.difference < 1e-5 for outcome in outcomes.values())
    model, batch = run.model, some_images(run.model)
    expected = run._whole.encoder.eval()(batch)
    assert expected.std() > 0.1
    found = {name: run_card(tmp_path / folder, batch, monkeypatch) for name, folder in FOLDERS.items()}
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(found["timm"]["features"], expected, **close)
    torch.testing.assert_close(found["hf"]["features"], expected, **close)
    torch.testing.assert_close(found["torch"]["model"].eval().forward_features(batch), expected, **close)
    torch.testing.assert_close(torch.from_numpy(found["onnx"]["output"]), expected, **close)
    torch.testing.assert_close(found["torch-export"]["features"], expected, **close)
    noise = torch.rand(len(batch), model.num_patches, generator=torch.Generator().manual_seed(1))
    theirs = found["hf-mae"]["model"](batch, noise=noise)
    ours = run._whole.eval()(batch, noise, predict_all=True)
    torch.testing.assert_close(theirs.logits, ours.prediction_VQP, **close)
    torch.testing.assert_close(theirs.loss, ours.loss, **close)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@torch.no_grad()
def test_every_library_gives_the_logits_of_a_fine_tuned_model(
    pooling: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, outcomes = exported(finetune_spec(images, pooling=pooling, export={"formats": None}), tmp_path)
    assert left_out(outcomes).keys() == ({"hf", "hf-mae"} if pooling == "mean" else {"hf-mae"})
    batch = some_images(run.model)
    expected, tokens = run._whole.eval()(batch), run._whole.encoder(batch)
    assert expected.std() > 0.01
    written = [name for name in FOLDERS if name not in left_out(outcomes)]
    found = {name: run_card(tmp_path / FOLDERS[name], batch, monkeypatch) for name in written}
    logits = {
        "timm": found["timm"]["logits"],
        "torch": found["torch"]["model"].eval()(batch),
        "onnx": torch.from_numpy(found["onnx"]["output"]),
        "torch-export": found["torch-export"]["logits"],
    }
    if pooling == "cls":
        logits["hf"] = found["hf"]["logits"]
        assert found["hf"]["model"].config.id2label == {0: "cat", 1: "dog"}
    for theirs in logits.values():
        torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["torch-export"]["model"](batch)["features"], tokens, rtol=0, atol=1e-5)
    names = [output.name for output in found["onnx"]["session"].get_outputs()]
    assert names == ["features", "logits"]
