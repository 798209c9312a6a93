import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from mae_core.augmented_probe import AugmentedProbeRun
from mae_core.data.loader import MicroBatch
from mae_core.data.transforms import normalise
from mae_core.errors import DivergedError
from mae_core.export import write_probe
from mae_core.head import ProbeHead
from mae_core.options import ARCH_SIZES
from mae_core.saved_config import WEIGHTS
from mae_core.vit import pool
from mae_core.world import World
from tests.unit.core_fixtures import SHALLOW, corrupt, image_folder, losses, picture, probe_spec

OPTIM = {"optimizer": "lars", "epochs": 3, "batch_size": 8, "base_lr": 10.0}
TRANSFORM = {"crop": "clamped", "crop_scale": [0.3, 1.0]}


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


def run_of(folder: Path, **changes: Any) -> AugmentedProbeRun:
    optim = OPTIM | changes.pop("optim", {})
    spec = probe_spec(folder, optim=optim, data={"transform": TRANSFORM}, **({"pooling": "cls"} | changes))
    return AugmentedProbeRun(spec, world=World(), encoder_folder=None)


def state_of(run: AugmentedProbeRun) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.training_state().items()}


def test_steps_are_a_function_of_the_batchs_features(folder: Path) -> None:
    """The head written out: batch norm over the whole batch, a linear layer, SGD with momentum."""
    run = run_of(folder, optim={"optimizer": "sgd", "base_lr": 1.0})
    state = state_of(run)
    weight, bias = state["module.1.weight"].requires_grad_(), state["module.1.bias"].requires_grad_()
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    mean, variance = torch.zeros(64), torch.ones(64)
    expected = []
    training = run.training
    for step, micro in enumerate(training.loader.from_step(0, training.num_steps)):
        with torch.no_grad():
            features = pool(run._encoder(normalise(micro.batch.pixels_BHWC, run.normalize)), "cls")
        loss = F.cross_entropy(F.batch_norm(features, mean, variance, training=True, eps=1e-6) @ weight.T + bias, micro.batch.labels_B)
        lr = 0.5 * (1 + math.cos(math.pi * step / training.num_steps)) * 8 / 256
        for place, (parameter, gradient) in enumerate(zip((weight, bias), torch.autograd.grad(loss, [weight, bias]), strict=True)):
            momenta[place] = 0.9 * momenta[place] + gradient
            parameter.data -= lr * momenta[place]
        expected.append(loss.item())
    assert list(losses(run).values()) == pytest.approx(expected, rel=1e-5)
    found = run.training_state()
    for name, tensor in {"1.weight": weight, "1.bias": bias, "0.running_mean": mean, "0.running_var": variance}.items():
        torch.testing.assert_close(found[f"module.{name}"], tensor.detach(), rtol=1e-5, atol=1e-6)


def test_accumulation_changes_nothing(folder: Path) -> None:
    whole, parts = run_of(folder), run_of(folder, optim={"accumulation": 4})
    assert list(losses(parts).values()) == pytest.approx(list(losses(whole).values()), rel=1e-5)
    for name, tensor in whole.training_state().items():
        torch.testing.assert_close(parts.training_state()[name], tensor, rtol=1e-4, atol=1e-6)
    assert parts.metrics["val_accuracy"] == whole.metrics["val_accuracy"]


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
@pytest.mark.parametrize("stop", [1, 4, 8])
def test_a_resumed_probe_goes_on_bit_for_bit(folder: Path, stop: int, optimizer: str) -> None:
    whole, first, second = (run_of(folder, optim={"optimizer": optimizer}) for _ in range(3))
    expected = losses(whole)
    for progress in first.progress(lambda: False):
        if progress.step == stop:
            second.load_training_state(state_of(first))
            break
    assert losses(second) == {step: loss for step, loss in expected.items() if step > stop}
    found = second.training_state()
    assert all(torch.equal(tensor, found[name]) for name, tensor in whole.training_state().items())
    assert second.metrics == whole.metrics


@pytest.mark.parametrize(("optimizer", "base_lr"), [("sgd", 3.0), ("lars", 1000.0)])
def test_it_learns_two_classes(folder: Path, optimizer: str, base_lr: float) -> None:
    run = run_of(folder, optim={"optimizer": optimizer, "base_lr": base_lr, "epochs": 20}, pooling="mean")
    found = losses(run)
    assert run.metrics["val_accuracy"] == 1.0
    assert run.metrics["val_accuracy_seeds"] == [1.0]
    assert run.metrics["loss"] == found[max(found)] < 0.5 * found[1]


def test_images_are_augmented_anew_in_every_epoch_and_the_encoder_is_frozen(folder: Path) -> None:
    run, seen = run_of(folder), {}
    before = {name: tensor.clone() for name, tensor in run._encoder.state_dict().items()}
    encode = run.training._encode

    def watched(micro: MicroBatch) -> Tensor:
        features = encode(micro)
        assert not features.requires_grad
        seen.update({(micro.epoch, sample): row for sample, row in zip(micro.batch.samples_B.tolist(), features, strict=True)})
        return features

    run.training._encode = watched
    losses(run)
    twice = [sample for epoch, sample in seen if epoch == 0 and (1, sample) in seen]
    assert len(twice) > 10
    assert not any(torch.equal(seen[0, sample], seen[1, sample]) for sample in twice)
    assert not run._encoder.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in run._encoder.state_dict().items())


def poisoned(run: AugmentedProbeRun, *, calls: set[int]) -> None:
    """Makes the first image's features of these batches not a number."""
    encode, done = run.training._encode, iter(range(1000))

    def encode_badly(micro: MicroBatch) -> Tensor:
        features = encode(micro)
        features[0] = math.nan if next(done) in calls else features[0]
        return features

    run.training._encode = encode_badly


def test_a_step_that_is_not_finite_leaves_no_trace(folder: Path) -> None:
    run = run_of(folder)
    poisoned(run, calls={3})
    states, dropped = {0: state_of(run)}, []
    for progress in run.progress(lambda: False):
        states[progress.step] = state_of(run)
        dropped += [each.step for each in progress.dropped]
    assert dropped == [4]
    assert all(torch.equal(tensor, states[4][name]) for name, tensor in states[3].items() if name != "step")
    assert states[9]["module.0.num_batches_tracked"] == 8
    assert all(tensor.isfinite().all() for tensor in states[9].values())


def test_a_probe_of_broken_features_ends(folder: Path) -> None:
    run = run_of(folder, optim={"epochs": 10})
    poisoned(run, calls=set(range(1000)))
    with pytest.raises(DivergedError, match="11 step"):
        losses(run)


def test_unreadable_images_are_told_and_a_wish_to_stop_is_heard(folder: Path) -> None:
    broken = {corrupt(path) for path in sorted((folder / "light").iterdir())[::5]}
    run = run_of(folder)
    told = [key for progress in run.progress(lambda: False) for key in progress.skipped]
    assert set(told) == broken
    stopped = list(run_of(folder).progress(lambda: True))
    assert [(progress.step, progress.stop_agreed) for progress in stopped] == [(1, True)]


def test_the_result_is_that_of_a_probe(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder)
    losses(run)
    (tmp_path / "ours").mkdir()
    (tmp_path / "probe").mkdir()
    run.write_result(tmp_path / "ours")
    write_probe([ProbeHead(64, 2, torch.Generator())], tmp_path / "probe")
    ours, probe = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "probe" / WEIGHTS)
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: tensor.shape for name, tensor in probe.items()}
    assert torch.equal(ours["heads.0.1.weight"], run.training_state()["module.1.weight"])
