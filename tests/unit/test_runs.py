"""Whole runs of one process. Two processes are in test_two_workers.py."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mae_core.encoders import load_encoder
from mae_core.errors import DataError, EncoderError, SpecError
from mae_core.export import write_encoder
from mae_core.finetune import FinetuneRun
from mae_core.loop import Progress
from mae_core.options import ARCH_SIZES, ModelConfig, NormalizeConfig
from mae_core.pretrain import PretrainRun
from mae_core.run import Run
from mae_core.saved_config import WEIGHTS
from mae_core.vit import Encoder, initialise
from tests.unit.core_fixtures import (
    SHALLOW,
    Spec,
    corrupt,
    finetune_spec,
    image_folder,
    losses,
    opened,
    picture,
    pretrain_spec,
    probe_spec,
    spec_of,
)


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCH_SIZES, "tiny", SHALLOW)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images")  # 16 images; 12 to train on where a quarter is held back


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    model = ModelConfig(arch="vit_tiny_patch4", image_size=8)
    encoder = Encoder(model)
    initialise(encoder, torch.Generator().manual_seed(8))
    (tmp_path / "encoder").mkdir()
    write_encoder(encoder, tmp_path / "encoder", normalize=pretrain_spec("/x").data.normalize_for(3))
    return tmp_path / "encoder"


def told(run: Run) -> list[Progress]:
    return list(run.progress(lambda: False))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.training_state()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(kind: str, accumulation: int, folder: Path, tmp_path: Path) -> None:
    """Through a file; the steps lie at the start, the end and in the middle of an epoch."""
    changes: dict[str, Any] = {"optim": {"epochs": 3, "accumulation": accumulation, "warmup_epochs": 1}}
    if kind == "finetune":
        changes["evaluate_every_epochs"] = 1
    spec = spec_of(kind, folder, **changes)
    undisturbed = opened(spec)
    expected: dict[int, float] = {}
    for progress in undisturbed.progress(lambda: False):
        expected |= {step: values["loss"] for step, values in progress.points}
        if not progress.evaluated:
            save_file(undisturbed.training_state(), tmp_path / f"{progress.step}")
    num_steps = max(expected)
    assert num_steps == {"pretrain": 12, "finetune": 6}[kind]
    assert len(set(expected.values())) == num_steps
    for start in (1, num_steps // 2, num_steps - 1):
        resumed = opened(spec)
        resumed.load_training_state(load_file(tmp_path / f"{start}"))
        assert losses(resumed) == {step: loss for step, loss in expected.items() if step > start}
        assert_same(weights(resumed), weights(undisturbed))
        assert resumed.metrics == undisturbed.metrics


def test_the_same_spec_gives_the_same_run_and_another_seed_another(folder: Path) -> None:
    first, again, other = (losses(opened(pretrain_spec(folder, seed=seed))) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_accumulating_changes_nothing_but_rounding(kind: str, folder: Path) -> None:
    once, twice = (losses(opened(spec_of(kind, folder, optim={"base_lr": 1e-3, "accumulation": parts}))) for parts in (1, 2))
    assert list(once.values()) == pytest.approx(list(twice.values()), rel=1e-5)


def test_pretraining_learns_and_writes_its_encoder(tmp_path: Path) -> None:
    for number in range(8):  # plain colours: what is masked can be told from what is seen
        (tmp_path / "plain").mkdir(exist_ok=True)
        picture(number, width=1, height=1).resize((8, 8)).save(tmp_path / "plain" / f"{number}.png")
    run = opened(pretrain_spec(tmp_path / "plain", target={"norm_pix": False}, optim={"epochs": 25, "batch_size": 8, "base_lr": 0.05}))
    found = losses(run)
    assert run.metrics["loss"] == found[25]
    assert found[25] < 0.5 * found[1]
    (tmp_path / "result").mkdir()
    run.write_result(tmp_path / "result")
    encoder, normalize, _ = load_encoder(tmp_path / "result", wanted=run.model)
    state = weights(run)
    assert all(torch.equal(tensor, state[f"module.encoder.{name}"]) for name, tensor in encoder.state_dict().items())
    assert normalize == run.normalize


def test_masks_are_new_in_each_epoch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, dict[int, list[float]]] = {}
    from mae_core import pretrain

    def spying(**asked: Any) -> torch.Tensor:
        noise = original(**asked)
        seen.setdefault(asked["epoch"], {}).update(dict(zip(asked["samples"].tolist(), noise.tolist(), strict=True)))
        return noise

    original = pretrain.uniform
    monkeypatch.setattr(pretrain, "uniform", spying)
    told(opened(pretrain_spec(folder)))
    assert len(seen[0]) == len(seen[1]) == 16
    assert all(seen[0][sample] != seen[1][sample] for sample in seen[0])
    assert len({tuple(noise) for noise in seen[0].values()}) == 16


def test_finetuning_starts_from_the_encoder_and_evaluates(folder: Path, encoder_folder: Path, tmp_path: Path) -> None:
    spec = finetune_spec(folder, model=None, encoder={"file": str(encoder_folder)}, evaluate_every_epochs=1)
    run = opened(spec, encoder_folder=encoder_folder)
    saved, state = load_file(encoder_folder / WEIGHTS), weights(run)
    assert torch.equal(state["module.encoder.blocks.1.mlp.fc1.weight"], saved["blocks.1.mlp.fc1.weight"])
    evaluated = [(progress.step, progress.evaluated) for progress in told(run) if progress.evaluated]
    steps_per_epoch = evaluated[0][0]
    assert [step for step, _ in evaluated] == [steps_per_epoch, 2 * steps_per_epoch]
    assert all(0 <= metrics["val_accuracy"] <= 1 for _, metrics in evaluated)
    assert run.metrics["val_accuracy"] == evaluated[-1][1]["val_accuracy"]
    (tmp_path / "result").mkdir()
    run.write_result(tmp_path / "result")
    assert load_file(tmp_path / "result" / WEIGHTS)["head.weight"].shape == (2, 64)


def test_finetuning_learns(tmp_path: Path) -> None:
    for name, level in (("dark", 40), ("light", 215)):
        (tmp_path / name).mkdir()
        for number in range(16):
            picture(number).point(lambda value, level=level: (value + 3 * level) // 4).save(tmp_path / name / f"{number}.png")
    run = opened(finetune_spec(tmp_path, optim={"epochs": 4, "batch_size": 8, "base_lr": 0.02}))
    told(run)
    assert run.metrics["val_accuracy"] == 1.0


def test_a_stopped_finetuning_does_not_evaluate(folder: Path) -> None:
    """Its workers have agreed to end: one that went on into the evaluation would wait there for the others."""
    run = opened(finetune_spec(folder))
    progress = list(run.progress(lambda: True))
    assert [(each.step, each.stop_agreed, each.evaluated) for each in progress] == [(1, True, {})]


def test_a_finetuning_resumed_at_its_end_still_evaluates(folder: Path) -> None:
    spec = finetune_spec(folder)
    first = opened(spec)
    told(first)
    again = opened(spec)
    again.load_training_state(first.training_state())
    (*_, last) = told(again)
    assert last.evaluated == {"val_accuracy": first.metrics["val_accuracy"]}
    assert again.metrics["val_accuracy"] == first.metrics["val_accuracy"]


def test_unreadable_validation_images_are_told_once_and_limited(folder: Path, tmp_path: Path) -> None:
    validation = image_folder(tmp_path / "validation", per_class=4)
    bad = corrupt(validation / "cat" / "001.png")
    data: dict[str, Any] = {"validation": str(validation), "validation_fraction": 0}
    spec = finetune_spec(folder, data=data | {"max_corrupt_fraction": 0.2}, evaluate_every_epochs=1)
    assert [list(progress.skipped) for progress in told(opened(spec)) if progress.skipped] == [[bad]]
    with pytest.raises(DataError, match=r"1 of 8 images cannot be read, more than data\.max_corrupt_fraction 0\.1.*cat/001\.png"):
        told(opened(finetune_spec(folder, data=data | {"max_corrupt_fraction": 0.1})))


def test_unreadable_training_images_are_told_and_limited(folder: Path) -> None:
    bad = {corrupt(folder / "cat" / "002.png"), corrupt(folder / "dog" / "007.png")}
    skipped = [key for progress in told(opened(pretrain_spec(folder))) for key in progress.skipped]
    assert sorted(skipped) == sorted(bad)
    with pytest.raises(
        DataError, match=r"\d of 16 images cannot be read, more than data\.max_corrupt_fraction 0\.05.*images/(cat|dog)/00\d"
    ):
        told(opened(pretrain_spec(folder, data={"max_corrupt_fraction": 0.05})))


def test_saving_is_due_between_the_ends(folder: Path) -> None:
    run = opened(pretrain_spec(folder, checkpoint={"every_steps": 4}))
    assert [progress.step for progress in told(run) if progress.save_agreed] == [4]  # of eight: the last step needs no state
    assert not opened(probe_spec(folder)).resumes


def test_an_encoder_that_is_another_model(folder: Path, encoder_folder: Path) -> None:
    spec = probe_spec(folder, model={"arch": "vit_small_patch4"}, encoder={"file": str(encoder_folder)})
    with pytest.raises(EncoderError, match=r"arch 'vit_small_patch4' \(encoder: 'vit_tiny_patch4'\)"):
        opened(spec, encoder_folder=encoder_folder)


@pytest.mark.parametrize(
    "spec", [probe_spec("digits", model=None, encoder={"file": "/e"}), finetune_spec("digits", model=None, encoder={"file": "/e"})]
)
def test_an_encoder_that_does_not_fit_the_data(spec: Spec, encoder_folder: Path) -> None:
    with pytest.raises(SpecError, match=r"^model\.in_chans: the digits have 1 channel, not 3$"):
        opened(spec, encoder_folder=encoder_folder)


def test_the_recipe_follows_the_encoders_size(folder: Path, tmp_path: Path) -> None:
    """Nothing but the folder says that it is a ViT-B: pooling, layer decay and the like are then the paper's."""
    model = ModelConfig(arch="vit_base_patch4", image_size=8)
    (tmp_path / "base").mkdir()
    encoder = Encoder(model)
    initialise(encoder, torch.Generator().manual_seed(0))
    write_encoder(encoder, tmp_path / "base", normalize=NormalizeConfig(mean=(0.5,) * 3, std=(0.5,) * 3))
    spec = finetune_spec(folder, model=None, encoder={"file": str(tmp_path / "base")})
    run = opened(spec, encoder_folder=tmp_path / "base")
    assert isinstance(run, FinetuneRun)
    assert (spec.recipe, spec.mix.mixup) == ("small", 0.0)
    assert (run._spec.recipe, run._spec.mix.mixup, run._spec.optim.layer_decay) == ("paper", 0.8, 0.65)
    assert run._spec.optim.batch_size == 4  # what the user says stays


def test_nothing_left_to_train_on(folder: Path) -> None:
    with pytest.raises(DataError, match=r"data\.validation_fraction 0\.9999 leaves no image to train on; lower it"):
        opened(pretrain_spec(folder, data={"validation_fraction": 0.9999}))


def test_a_batch_larger_than_the_data(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"each step takes 32 images .*, but the data has only 16 training images; lower"):
        opened(pretrain_spec(folder, optim={"batch_size": 32}))


def test_an_encoder_is_taken_at_another_image_size(folder: Path, encoder_folder: Path) -> None:
    run = opened(finetune_spec(folder, model={"image_size": [12, 8]}, encoder={"file": str(encoder_folder)}), encoder_folder=encoder_folder)
    assert run.model.image_size == (12, 8)
    progress = told(run)
    assert math.isfinite(progress[-1].evaluated["val_accuracy"])


def test_evaluations_come_on_their_schedule(folder: Path) -> None:
    labelled = {"source": str(folder), "validation_fraction": 0.5}
    run = opened(
        pretrain_spec(folder, optim={"epochs": 3}, evaluation={"every_epochs": 2, "labelled": labelled, "knn": 3, "probe_epochs": 2})
    )
    evaluated = [(each.step, list(each.evaluated)) for each in told(run) if each.evaluated]
    assert evaluated == [(8, ["knn_accuracy", "probe_accuracy"]), (12, ["knn_accuracy", "probe_accuracy"])]
    assert run.metrics.keys() == {"loss", "knn_accuracy", "probe_accuracy"}


def test_without_labels_an_evaluation_is_a_picture(folder: Path) -> None:
    progress = told(opened(pretrain_spec(folder, optim={"epochs": 20})))
    assert [each.step for each in progress if each.reconstructions] == list(range(8, 81, 8))  # ten times in the run
    assert not any(each.evaluated for each in progress)


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_an_evaluation_lost_with_its_run_is_made_again(folder: Path, kind: str) -> None:
    if kind == "pretrain":
        spec: Spec = pretrain_spec(folder, evaluation={"every_epochs": 1}, checkpoint={"every_steps": 4})
    else:
        spec = finetune_spec(folder, evaluate_every_epochs=1, checkpoint={"every_steps": 2})
    run = opened(spec)
    steps = run.progress(lambda: False)
    saved = next(each for each in steps if each.save_agreed)
    state = {name: tensor.clone() for name, tensor in run.training_state().items()}
    expected = next(steps)
    resumed = opened(spec)
    resumed.load_training_state(state)
    again = next(resumed.progress(lambda: False))
    assert again.step == expected.step == saved.step
    assert again.evaluated == expected.evaluated
    if expected.reconstructions is not None:
        assert again.reconstructions is not None
        assert torch.equal(again.reconstructions.prediction, expected.reconstructions.prediction)


def test_several_masks_decode_each_image_once_an_epoch(folder: Path) -> None:
    run = opened(pretrain_spec(folder, masking={"ratio": 0.5, "num_masks": 2}))
    assert isinstance(run, PretrainRun)
    assert run.training.loader.steps_per_epoch == 8  # two images, each masked twice, make a batch of four
    points = [values for each in told(run) for _, values in each.points]
    assert len(points) == 16


def test_normalize_auto_measures_and_keeps_the_statistics(folder: Path, tmp_path: Path) -> None:
    spec = pretrain_spec(folder, data={"normalize": "auto"}, checkpoint={"every_steps": 4})
    run = opened(spec)
    steps = run.progress(lambda: False)
    next(each for each in steps if each.save_agreed)
    state = {name: tensor.clone() for name, tensor in run.training_state().items()}
    pixels = np.concatenate([np.asarray(Image.open(path)).reshape(-1, 3) for path in sorted(folder.rglob("*.png"))]) / 255
    assert run.normalize.mean == pytest.approx(tuple(pixels.mean(axis=0)), rel=1e-5)
    assert run.normalize.std == pytest.approx(tuple(pixels.std(axis=0)), rel=1e-5)

    resumed = opened(spec)
    resumed.load_training_state(state)
    assert resumed.normalize == run.normalize
    expected = {step: values["loss"] for each in steps for step, values in each.points}
    assert {step: values["loss"] for each in told(resumed) for step, values in each.points} == expected
    resumed.write_result(tmp_path)
    assert load_encoder(tmp_path, wanted=None).normalize == run.normalize


def test_a_fine_tune_of_random_weights_measures_its_own_statistics(folder: Path) -> None:
    run = opened(finetune_spec(folder, data={"normalize": "auto"}))
    told(run)
    assert run.normalize.mean != (0.485, 0.456, 0.406)


@pytest.mark.parametrize("blocks", [0, 0.5, 2])
def test_a_partial_fine_tune_changes_its_last_blocks_alone(folder: Path, blocks: float) -> None:
    run = opened(finetune_spec(folder, trainable_blocks=blocks, optim={"layer_decay": 1.0}))
    before = {name: tensor.clone() for name, tensor in run.training_state().items() if name.startswith("module.")}
    told(run)
    after = run.training_state()
    changed = {name.removeprefix("module.") for name in before if not torch.equal(before[name], after[name])}
    parts = {0: ("fc_norm", "head"), 0.5: ("encoder.blocks.1.norm2", "encoder.blocks.1.mlp", "fc_norm", "head")}
    allowed = parts.get(blocks, ("encoder.blocks.", "fc_norm", "head"))
    assert changed
    assert all(name.startswith(allowed) for name in changed)
    assert {name.partition(".")[0] for name in changed} >= {"fc_norm", "head"}


@pytest.mark.parametrize("make", [pretrain_spec, finetune_spec])
def test_float_images_need_their_statistics(make: Any, tmp_path: Path) -> None:
    for place, name in enumerate(["cat", "dog"]):
        (tmp_path / name).mkdir()
        for number in range(8):
            np.save(tmp_path / name / f"{number}.npy", np.random.default_rng(number).normal(273 + place, 5, (10, 10, 2)).astype(np.float32))
    with pytest.raises(DataError, match=r"data\.normalize: cat/0\.npy has float pixels, in units of its own; set it to auto"):
        opened(make(tmp_path, model={"in_chans": 2}))
    run = opened(make(tmp_path, model={"in_chans": 2}, data={"normalize": "auto"}))
    assert all(math.isfinite(values["loss"]) for each in told(run) for _, values in each.points)
    assert all(270 < mean < 277 for mean in run.normalize.mean)


def test_too_many_unreadable_labelled_images_are_told_by_their_section(folder: Path, tmp_path: Path) -> None:
    labelled = image_folder(tmp_path / "labelled")
    for number in range(3):
        corrupt(labelled / "cat" / f"00{number}.png")
    evaluation = {"labelled": {"source": str(labelled), "validation_fraction": 0.5}}
    with pytest.raises(DataError, match=r"more than evaluation\.labelled\.max_corrupt_fraction 0\.01 allows"):
        told(opened(pretrain_spec(folder, evaluation=evaluation)))


def test_a_run_that_was_paused_behind_its_last_step_is_still_evaluated(tmp_path: Path) -> None:
    """Its interval does not divide the run, so that step is due only as the last one."""
    spec = finetune_spec(image_folder(tmp_path / "images"), optim={"epochs": 3}, evaluate_every_epochs=2)
    first: Any = opened(spec)
    *_, last = first.training.steps(lambda: False)
    again: Any = opened(spec)
    again.load_training_state(first.training_state())
    assert again.training.step == last.step == last.num_steps
    assert [bool(progress.evaluated) for progress in again.progress(lambda: False)].count(True) == 1
    assert "val_accuracy" in again.metrics
