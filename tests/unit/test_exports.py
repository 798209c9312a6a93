"""Every format of a trained model, opened by the library it is for with the three lines of its card."""

import re
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from mae_core import pretrain
from mae_core.config import FinetuneSpec, PretrainSpec
from mae_core.errors import DataError, EncoderError
from mae_core.exports import write
from mae_core.exports.formats import FOLDERS, ExportFormat, ExportOutcome
from mae_core.exports.trained import Trained, sample_of
from mae_core.finetune import FinetuneRun
from mae_core.options import ARCH_SIZES, ModelConfig, NormalizeConfig
from mae_core.pretrain import PretrainRun
from mae_core.provenance import Provenance
from tests.torchvision_ops import import_torchvision
from tests.unit.core_fixtures import SHALLOW, PictureSource, finetune_spec, image_folder, opened, pretrain_spec

import_torchvision()
import transformers  # noqa: E402  (needs the line above)

MADE_BY = Provenance("j1", {"maestro-mae": "0", "torch": "0"}, "c0ffee")


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


SHAPES = [
    pytest.param({"arch": "vit_tiny_patch4", "image_size": [8, 12], "in_chans": 3}, {}, id="not-square"),
    pytest.param({"arch": "vit_tiny_patch5", "image_size": 15, "in_chans": 1}, {}, id="odd-patch-1-channel"),
    pytest.param({"arch": "vit_tiny_patch2", "image_size": 20, "in_chans": 4}, {"ratio": 0.8}, id="a-ratio-that-floats-truncate"),
]


@pytest.mark.parametrize(("model", "masking"), SHAPES)
@torch.no_grad()
def test_hugging_face_takes_every_shape_that_it_can(
    model: dict[str, Any], masking: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = image_folder(tmp_path / "images", mode={1: "L", 3: "RGB", 4: "RGBA"}[model["in_chans"]])
    square = isinstance(model["image_size"], int)
    spec = pretrain_spec(source, model=model, masking=masking, export={"formats": ["hf", *(["hf-mae"] if square else [])]})
    run, outcomes = exported(spec, tmp_path / "result")
    assert outcomes["hf"].difference == 0
    batch = some_images(run.model)
    features = run_card(tmp_path / "result/hf", batch, monkeypatch)["features"]
    torch.testing.assert_close(features, run._whole.encoder.eval()(batch), rtol=0, atol=1e-5)
    if square:
        noise = torch.rand(len(batch), run.model.num_patches, generator=torch.Generator().manual_seed(1))
        theirs = run_card(tmp_path / "result/hf-mae", batch, monkeypatch)["model"](batch, noise=noise)
        assert torch.equal(theirs.mask.sum(dim=1), torch.full((len(batch),), run.model.num_patches - run._whole.num_keep).float())
        torch.testing.assert_close(theirs.loss, run._whole.eval()(batch, noise).loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "formats", "says"),
    [
        (
            pretrain_spec,
            {"decoder": {"attention": "cross"}, "export": {"formats": ["hf-mae"]}},
            "hf-mae cannot .* by cross attention; use hf",
        ),
        (
            pretrain_spec,
            {"masking": {"encoder_mask_tokens": True}, "export": {"formats": ["hf-mae"]}},
            "hf-mae cannot .* no mask tokens, this run does; use hf for the encoder alone, or masking.encoder_mask_tokens: false",
        ),
        (
            pretrain_spec,
            {"model": {"image_size": [8, 12]}, "export": {"formats": ["hf-mae"]}},
            "hf-mae cannot .* square images alone, not 8 x 12; use hf",
        ),
        (
            finetune_spec,
            {"pooling": "mean", "export": {"formats": ["onnx", "hf"]}},
            "hf cannot .* mean of the patch tokens .*; use timm, onnx or torch-export, or fine-tune with pooling: cls",
        ),
        (finetune_spec, {"pooling": "cls", "export": {"formats": ["hf-mae"]}}, "hf-mae cannot .* has no decoder; use hf"),
        (pretrain_spec, {"export": {"formats": ["keras"]}}, r"export\.formats\.0"),
    ],
)
def test_a_format_asked_for_that_cannot_be_faithful_is_an_error(spec: Any, formats: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        spec("/data", **formats)


def test_a_decoder_that_others_do_not_have_is_left_out(images: Path, tmp_path: Path) -> None:
    spec = pretrain_spec(images, decoder={"attention": "cross", "predict_fraction": 0.5}, export={"formats": ["torch"]})
    _, outcomes = exported(spec, tmp_path)
    assert "decodes by self-attention" in left_out(outcomes)["hf-mae"]
    state = torch.load(tmp_path / "torch/model.pth", weights_only=True)["model"]
    assert {name for name in state if "decoder" in name or name == "mask_token"} == set()
    card = (tmp_path / "README.md").read_text()
    assert "| hf-mae | `hf-mae/` | left out: ViTMAEForPreTraining decodes" in card
    assert "| onnx | `onnx/` | left out: it is not among export.formats of the spec |" in card
    assert not (tmp_path / "onnx").exists()


def shifted(*_: object) -> dict[str, Tensor]:
    return {"features": torch.zeros(3, 5, 64)}


@pytest.mark.parametrize(
    ("broken", "name", "says"),
    [
        ("write_onnx", None, r"^writing it failed: ZeroDivisionError: division by zero$"),
        ("run_onnx", shifted, r"^its outputs differ by [1-9]\.\d+ from the trained model's$"),
    ],
)
def test_a_format_that_fails_costs_no_other(
    broken: str, name: Any, says: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, broken, name or (lambda *_, **__: 1 / 0))
    _, outcomes = exported(pretrain_spec(images, export={"formats": ["onnx", "torch"]}), tmp_path)
    assert re.search(says, left_out(outcomes)["onnx"])
    assert not (tmp_path / "onnx").exists()
    assert outcomes["torch"].difference == 0
    assert "| onnx | `onnx/` | left out: " in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("damage", ["other", "nan"])
def test_a_result_that_is_not_the_trained_model_is_an_error(damage: str, images: Path, tmp_path: Path) -> None:
    run: Any = opened(pretrain_spec(images))
    if damage == "nan":
        run._whole.encoder.cls_token.data.fill_(torch.nan)
    run.write_result(tmp_path)
    stirred(run)
    with pytest.raises(EncoderError, match=r"differ by (nan|\d[\d.]*) from those of the trained model"):
        run.write_exports(tmp_path, MADE_BY)


def test_graphs_say_nothing_of_this_machine_and_hold_no_image(images: Path, tmp_path: Path) -> None:
    exported(pretrain_spec(images, export={"formats": ["onnx", "torch-export"]}), tmp_path)
    with zipfile.ZipFile(tmp_path / "torch_export/model.pt2") as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    example = next(content for content, name in zip(contents, archive.namelist(), strict=True) if "sample_inputs" in name)
    (images_in_file,), _ = torch.load(BytesIO(example), weights_only=True)
    assert not images_in_file.any()
    here = str(Path(write.__file__).parents[2]).encode()
    assert not any(here in content for content in [*contents, (tmp_path / "onnx/model.onnx").read_bytes()])


@torch.no_grad()
def test_weights_that_one_onnx_file_cannot_hold_lie_beside_it(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    run, outcomes = exported(pretrain_spec(images, export={"formats": ["onnx"]}), tmp_path)
    assert left_out(outcomes).keys() == {"hf", "hf-mae", "torch", "torch-export"}
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"model.onnx", "model.onnx.data", "README.md"}
    batch = some_images(run.model)
    found = run_card(tmp_path / "onnx", batch, monkeypatch)["output"]
    torch.testing.assert_close(torch.from_numpy(found), run._whole.encoder.eval()(batch), rtol=0, atol=1e-5)


def test_the_sample_leaves_unreadable_images_out() -> None:
    model, normalize = ModelConfig(arch="vit_tiny_patch4", image_size=8), NormalizeConfig(mean=(0.5,) * 3, std=(0.5,) * 3)
    source = PictureSource(6, broken=(0, 2), size=8)
    sample = sample_of(source, range(6), model=model, normalize=normalize)
    assert sample.images_BCHW.shape == (3, 3, 8, 8)
    assert not sample.resized
    first = torch.from_numpy(np.array(source.read(1))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(sample.images_BCHW[0], first, rtol=0, atol=1e-6)
    assert sample_of(PictureSource(1), range(1), model=model, normalize=normalize).resized
    with pytest.raises(DataError, match="none of the images can be read any more"):
        sample_of(PictureSource(2, broken=(0, 1)), range(2), model=model, normalize=normalize)


def test_the_card_says_what_made_the_model(images: Path, tmp_path: Path) -> None:
    spec = finetune_spec(images, name="a | b\nc", pooling="cls", export={"formats": ["hf"], "license": "cc-by-4.0"})
    run, _ = exported(spec, tmp_path)
    for folder in ("", "hf"):
        card = (tmp_path / folder / "README.md").read_text()
        _, head, body = card.split("---\n", 2)
        assert yaml.safe_load(head)["license"] == "cc-by-4.0"
        for said in (
            "# a | b c\n",
            "job `j1`, commit c0ffee",
            "torch 0",
            "finetune, 2 epochs",
            f"`{images}`, {len(run._data.train)} images",
            "loss 0.25",
            "`cat`, `dog`",
        ):
            assert said in body, said
        assert "val_accuracy_seeds" not in body


def test_formats_are_compared_on_the_cpu_wherever_the_model_was_trained(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over: list[Trained] = []
    monkeypatch.setattr(pretrain, "write_exports", lambda trained, *_, **__: handed_over.append(trained) or {})
    exported(pretrain_spec(images), tmp_path)
    exporter = write._Exporter(handed_over[0], tmp_path)
    assert exporter._with_decoder
    assert handed_over[0].mae is not None
    handed_over[0].mae.to("meta")  # stands for a device: whoever computes with its tensors fails
    assert exporter.compare_native()[0] == 0
    for name in ("hf", "hf-mae", "torch"):
        (tmp_path / name).mkdir()
        assert exporter.write(name, tmp_path / name)[0] == 0


def test_hugging_face_norms_have_the_epsilon_of_ours(images: Path, tmp_path: Path) -> None:
    exported(pretrain_spec(images, export={"formats": ["hf", "hf-mae"]}), tmp_path)
    assert transformers.ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).layernorm.eps == 1e-6
    assert transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hf-mae").decoder.decoder_norm.eps == 1e-6
