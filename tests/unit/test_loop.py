"""The training loop, on a model of a few numbers. Whole runs are in test_runs.py."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mae_core.data.loader import MicroBatch, SkippedImages, TrainLoader
from mae_core.errors import DataError, DivergedError, EncoderError
from mae_core.loop import Progress, Training, load_training_state, training_state
from mae_core.optim import cosine_lr
from mae_core.options import PretrainOptim, TransformConfig
from mae_core.world import World
from tests.unit.core_fixtures import TINY, PictureSource

NUM_IMAGES, EPOCHS = 12, 3  # batches of 4: nine steps


class Brightness(nn.Module):
    """Predicts the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.2, -0.4, 0.1]]))

    def forward(self, images_BHWC: Tensor) -> Tensor:
        return (images_BHWC.float().mean(dim=(1, 2)) / 255 * self.weight).sum(dim=1)


def brightness_loss(module: nn.Module, micro: MicroBatch) -> Tensor:
    loss: Tensor = (module(micro.batch.pixels_BHWC) - 1).square().mean()
    return loss


def training(
    *,
    loss: Callable[[nn.Module, MicroBatch], Tensor] = brightness_loss,
    broken: Sequence[int] = (),
    max_skipped: float = 1.0,
    module: nn.Module | None = None,
    **optim: Any,
) -> Training:
    config = PretrainOptim(**({"epochs": EPOCHS, "batch_size": 4, "base_lr": 0.5, "warmup_epochs": 1} | optim))
    module = module or Brightness()
    loader = TrainLoader(
        source=PictureSource(NUM_IMAGES, broken=broken),
        members=list(range(NUM_IMAGES)),
        model=TINY,
        transform=TransformConfig(),
        seed=1,
        batch_size=4,
        accumulation=config.accumulation,
        world=World(),
        num_threads=1,
        skipped=SkippedImages(),
    )
    optimizer = torch.optim.AdamW([{"params": list(module.parameters()), "lr_scale": 1.0}], lr=0.1)
    return Training(
        module=module, optimizer=optimizer, loader=loader, optim=config, loss=loss, world=World(), max_skipped=max_skipped, save_every=1000
    )


def taken(run: Training, wants_stop: Callable[[], bool] = lambda: False) -> list[Progress]:
    return list(run.steps(wants_stop))


def points_of(progress: list[Progress]) -> dict[int, dict[str, float]]:
    steps = [step for each in progress for step, _ in each.points]
    assert len(steps) == len(set(steps)), "a step was told of twice"
    return {step: values for each in progress for step, values in each.points}


def test_each_step_is_told_with_its_loss_and_rate() -> None:
    progress = taken(training(min_lr=0.001))
    assert [each.step for each in progress] == list(range(1, 10))
    assert {each.num_steps for each in progress} == {9}
    assert [each.epoch for each in progress] == pytest.approx([step / 3 for step in range(1, 10)])
    points = points_of(progress)
    assert list(points) == list(range(1, 10))
    lr = 0.5 * 4 / 256
    expected = [cosine_lr(step, num_steps=9, warmup_steps=3, lr=lr, min_lr=0.001) for step in range(9)]
    assert [values["lr"] for values in points.values()] == expected
    assert expected[0] == 0
    assert expected[3] == lr
    for values in points.values():
        assert values.keys() == {"loss", "lr", "images_per_second", "data_wait"}
        assert values["images_per_second"] > 0
        assert 0 <= values["data_wait"] <= 1


def test_the_first_rate_is_0_and_so_the_first_step_changes_nothing() -> None:
    run = training()
    before = run.module.weight.detach().clone()  # type: ignore[union-attr, operator]
    steps = run.steps(lambda: False)
    next(steps)
    assert torch.equal(run.module.weight, before)  # type: ignore[arg-type]
    next(steps)
    assert not torch.equal(run.module.weight, before)  # type: ignore[arg-type]


def test_accumulating_changes_nothing_but_rounding() -> None:
    once, thrice = training(), training(accumulation=2)
    losses, others = ([values["loss"] for values in points_of(taken(run)).values()] for run in (once, thrice))
    assert losses == pytest.approx(others, rel=1e-5)
    assert len(set(losses)) == 9
    torch.testing.assert_close(once.module.weight, thrice.module.weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_step(value: float) -> None:
    count = 0

    def loss(module: nn.Module, micro: MicroBatch) -> Tensor:
        nonlocal count
        count += 1
        return brightness_loss(module, micro) * (value if count == 5 else 1.0)

    run = training(loss=loss)
    with pytest.raises(DivergedError, match=rf"the loss of step 5 is {value}; lower optim\.base_lr or lengthen optim\.warmup_epochs"):
        taken(run)
    assert run.step == 5


def test_unreadable_images_are_told_once() -> None:
    progress = taken(training(broken=(3, 7), max_skipped=0.2))
    told = [key for each in progress for key in each.skipped]
    assert sorted(told) == ["picture-3", "picture-7"]
    assert progress[-1].step == 9
    assert {why for each in progress for why in each.skipped.values()} == {"picture-3: broken", "picture-7: broken"}


def test_too_many_unreadable_images_end_the_run() -> None:
    with pytest.raises(
        DataError, match=r"2 of 12 images cannot be read, more than data\.max_corrupt_fraction 0\.1 .*Such as: picture-\d: b"
    ):
        taken(training(broken=(3, 7), max_skipped=0.1))
    assert len(taken(training(broken=(3,), max_skipped=1 / 12))) == 9


def test_a_stop_is_agreed_at_the_next_step() -> None:
    run = training()
    progress = taken(run, wants_stop=lambda: run.step >= 4)
    assert [each.stop_agreed for each in progress] == [False, False, False, True]
    assert run.step == 4


def test_between_exchanges_nothing_is_told_and_nothing_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where fetching the losses would wait for the device."""
    monkeypatch.setattr("mae_core.loop._STEPS_PER_EXCHANGE", {"cpu": 3})
    told = [[step for step, _ in each.points] for each in taken(training())]
    assert told == [[1], [], [], [2, 3, 4], [], [], [5, 6, 7], [], [8, 9]]
    run = training()
    progress = taken(run, wants_stop=lambda: run.step >= 2)
    assert [each.step for each in progress if each.stop_agreed] == [4]
    assert len(progress) == 4


def test_losses_do_not_depend_on_how_often_they_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    every = [values["loss"] for values in points_of(taken(training())).values()]
    monkeypatch.setattr("mae_core.loop._STEPS_PER_EXCHANGE", {"cpu": 4})
    assert [values["loss"] for values in points_of(taken(training())).values()] == every


def test_the_state_is_a_copy() -> None:
    run = training()
    steps = run.steps(lambda: False)
    next(steps)
    next(steps)
    state = training_state(run)
    before = {name: tensor.clone() for name, tensor in state.items()}
    for _ in steps:
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert set(state) == {"step", "module.weight", "optimizer.weight.step", "optimizer.weight.exp_avg", "optimizer.weight.exp_avg_sq"}
    assert int(state["step"]) == 2


def test_a_state_before_the_first_step() -> None:
    resumed = training()
    load_training_state(resumed, training_state(training()))
    assert points_of(taken(resumed)).keys() == set(range(1, 10))


def test_a_state_of_another_model_is_refused_whole() -> None:
    class Other(Brightness):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1))

    run = training(module=Other())
    with pytest.raises(EncoderError, match="the training state does not fit: bias is missing"):
        load_training_state(run, training_state(training()))
    assert run.step == 0
