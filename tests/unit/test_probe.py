from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mae_core.data.source import LabelledData
from mae_core.errors import DataError, DivergedError, SpecError
from mae_core.features import Features
from mae_core.head import ProbeHead, head_accuracy, train_head
from mae_core.options import ARCH_SIZES, ModelConfig, ProbeOptim
from mae_core.probe import Probe, ProbeRun
from mae_core.saved_config import WEIGHTS
from mae_core.vit import Encoder, initialise
from mae_core.world import World
from tests.unit.core_fixtures import SHALLOW, corrupt, image_folder, opened, picture, probe_spec

OPTIM = {"epochs": 3, "batch_size": 8, "base_lr": 3.0}


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCH_SIZES, "tiny", SHALLOW)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 pictures, half of them darker: frozen random features tell them apart."""
    image_folder(tmp_path, classes=("dark", "light"), per_class=20)
    for path in sorted((tmp_path / "dark").iterdir()):
        picture(int(path.stem)).point(lambda value: value // 3).save(path)
    return tmp_path


def probe_of(folder: Path) -> Probe:
    spec = probe_spec(folder, optim=OPTIM)
    assert spec.model is not None
    encoder = Encoder(spec.model)
    initialise(encoder, torch.Generator().manual_seed(0))
    return Probe(spec, encoder, LabelledData(spec.data, in_chans=3), normalize=spec.data.normalize_for(3), world=World())


def trained(probe: Probe, *, seed: int = 5) -> Probe:
    for _ in probe.train_head(seed, 0, lambda: False):
        pass
    return probe


def run_of(folder: Path, **changes: Any) -> ProbeRun:
    run = opened(probe_spec(folder, **({"optim": OPTIM} | changes)))
    assert isinstance(run, ProbeRun)
    return run


def test_the_head_is_batch_norm_without_parameters_and_a_linear_layer() -> None:
    norm, linear = ProbeHead(192, 7, torch.Generator().manual_seed(0))
    assert isinstance(norm, nn.BatchNorm1d)
    assert (norm.affine, norm.eps, list(norm.parameters())) == (False, 1e-6, [])
    assert isinstance(linear, nn.Linear)
    assert 0.009 < linear.weight.std() < 0.011
    assert not linear.bias.any()
    random = torch.get_rng_state()
    again = ProbeHead(192, 7, torch.Generator().manual_seed(0))[1]
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(again.weight, linear.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(("optimizer", "base_lr"), [("sgd", 8.0), ("lars", 2000.0)])  # LARS takes steps of a thousandth of the weights
def test_a_head_learns(optimizer: str, base_lr: float) -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(3, (90,), generator=generator)
    features = Features(torch.randn(90, 8, generator=generator) + 4 * torch.eye(8)[labels], labels)
    optim = ProbeOptim.model_validate({"optimizer": optimizer, "epochs": 20, "batch_size": 32, "base_lr": base_lr, "warmup_epochs": 2})
    head = ProbeHead(8, 3, torch.Generator().manual_seed(0))
    epochs = list(train_head(head, features, optim=optim, seed=1))
    assert [epoch.step for epoch in epochs] == [2 * number for number in range(1, 21)]
    assert epochs[-1].loss < 0.2 * epochs[0].loss
    assert head_accuracy(head, features) > 0.95


def test_the_encoder_stays_as_it_is(folder: Path) -> None:
    probe = probe_of(folder)
    before = {name: tensor.clone() for name, tensor in probe._encoder.state_dict().items()}
    head_before = ProbeHead(64, 2, torch.Generator().manual_seed(5))[1].weight
    trained(probe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in probe._encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in probe._encoder.parameters())
    assert not probe._encoder.training
    assert not torch.equal(probe.heads[0][1].weight, head_before)  # type: ignore[arg-type]


def test_a_probe_tells_dark_from_light(folder: Path) -> None:
    run = run_of(folder)
    progress = list(run.progress(lambda: False))
    assert run.metrics == {"val_accuracy": 1.0, "val_accuracy_seeds": [1.0]}
    assert progress[-1].evaluated == {"val_accuracy": 1.0}
    points = [point for each in progress for point in each.points]
    assert [step for step, values in points if "loss" in values] == [3, 6, 9]
    waits = [values["data_wait"] for step, values in points if step == 0]
    assert len(waits) >= 2  # rounds of the images to train on and of those held back
    assert all(0 < wait < 1 for wait in waits)
    assert progress[-1].step == progress[-1].num_steps == 9


def test_the_median_of_seeds_is_reported_and_every_head_written(folder: Path, tmp_path: Path) -> None:
    for path in sorted((folder / "dark").iterdir()):
        picture(500 + int(path.stem)).save(path)  # nothing to be told apart: the accuracies differ
    run = run_of(folder, num_seeds=3)
    progress = list(run.progress(lambda: False))
    accuracies = run.metrics["val_accuracy_seeds"]
    assert isinstance(accuracies, list)
    assert len(set(accuracies)) > 1
    assert run.metrics["val_accuracy"] == sorted(accuracies)[1]
    assert [each.evaluated["val_accuracy"] for each in progress if each.evaluated] == accuracies
    assert [each.step for each in progress] == sorted(each.step for each in progress)
    assert progress[-1].step == progress[-1].num_steps
    (tmp_path / "result").mkdir()
    run.write_result(tmp_path / "result")
    assert (tmp_path / "result" / WEIGHTS).exists()
    assert len({tuple(head[1].bias.tolist()) for head in run._probe.heads}) == 3  # type: ignore[operator, union-attr]


def test_random_weights_are_others_for_each_seed(folder: Path) -> None:
    run = run_of(folder, num_seeds=2)
    first, second = [run._probe._encoder.cls_token.clone() for progress in run.progress(lambda: False) if progress.evaluated]
    assert not torch.equal(first, second)


def test_a_probe_gives_the_same_again(folder: Path) -> None:
    first, again, other = (trained(probe_of(folder), seed=seed).heads[0][1].weight for seed in (5, 5, 6))
    assert torch.equal(first, again)  # type: ignore[arg-type]
    assert not torch.equal(first, other)  # type: ignore[arg-type]


def test_unreadable_images_are_left_out_and_told_once(folder: Path) -> None:
    probe = probe_of(folder)
    chosen = [probe._data.train[0], probe._data.train[5], probe._data.validation[0]]
    bad = {corrupt(folder / probe._data.train_source.keys[index]) for index in chosen}
    progress = list(probe.train_head(5, 0, lambda: False))
    assert {key for each in progress for key in each.skipped} == bad
    assert sum(len(each.skipped) for each in progress) == 3
    assert probe._features is not None
    assert [len(part.labels_N) for part in probe._features] == [len(probe._data.train) - 2, len(probe._data.validation) - 1]


def test_an_epoch_counts_the_readable_images(folder: Path) -> None:
    """Else its last batches have one image, which BatchNorm refuses, or none, whose loss is not a number."""
    probe = probe_of(folder)
    data = probe._data
    for index in data.train[: len(data.train) % 8 + 7]:
        corrupt(folder / data.train_source.keys[index])
    steps = (len(data.train) - len(data.train) % 8 - 7) // 8
    progress = list(probe.train_head(5, 0, lambda: False))
    assert progress[-1].step == progress[-1].num_steps == 3 * steps
    assert all(values["loss"] < 100 for each in progress for _, values in each.points if "loss" in values)


def test_too_many_unreadable_images(folder: Path) -> None:
    for path in sorted((folder / "dark").iterdir())[:15]:
        corrupt(path)
    run = run_of(folder, data={"max_corrupt_fraction": 0.2})
    with pytest.raises(DataError, match=r"1\d of \d\d images cannot be read, more than data\.max_corrupt_fraction 0\.2"):
        list(run.progress(lambda: False))


def test_a_batch_larger_than_the_data(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"optim\.batch_size 64 is larger than the data \(\d\d training images\); lower it"):
        list(run_of(folder, optim={**OPTIM, "batch_size": 64}).progress(lambda: False))


def test_a_loss_that_is_not_finite(folder: Path) -> None:
    run = run_of(folder, optim={**OPTIM, "base_lr": 1e38})
    with pytest.raises(DivergedError, match=r"the loss of step \d is (nan|inf); lower optim\.base_lr"):
        list(run.progress(lambda: False))


@pytest.mark.parametrize("after", [0, 3])
def test_a_stop_is_agreed(folder: Path, after: int) -> None:
    run = run_of(folder, num_seeds=2)
    asked = 0

    def wants_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    progress = list(run.progress(wants_stop))
    assert [each.stop_agreed for each in progress] == [False] * after + [True]
    assert run.metrics == {}


def test_a_probe_of_another_size_reads_its_own_pixels(folder: Path) -> None:
    run = run_of(folder, model=ModelConfig(arch="vit_tiny_patch4", image_size=(4, 12)).model_dump())
    list(run.progress(lambda: False))
    assert run.metrics["val_accuracy"]
