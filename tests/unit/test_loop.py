"""The training loop, on a model of a few numbers. Whole runs are in test_runs.py."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mae_core.data.loader import MicroBatch, TrainLoader
from mae_core.data.skipped import SkippedImages
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
    max_dropped: int = 2,
    save_every: int = 1000,
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
    optimizer = torch.optim.AdamW([{"params": list(module.parameters()), "lr_scale": 1.0}], lr=0.1, fused=True)
    return Training(
        module=module,
        optimizer=optimizer,
        loader=loader,
        optim=config,
        loss=loss,
        world=World(),
        max_skipped=max_skipped,
        max_dropped=max_dropped,
        save_every=save_every,
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
        assert values.keys() == {"loss", "lr", "grad_norm", "images_per_second", "data_wait"}
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


def spoilt(steps: Sequence[int], value: float) -> Callable[[nn.Module, MicroBatch], Tensor]:
    """A loss that is `value` in some steps, counted from 1."""
    count = 0

    def loss(module: nn.Module, micro: MicroBatch) -> Tensor:
        nonlocal count
        count += 1
        return brightness_loss(module, micro) * (value if count in steps else 1.0)

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(value: float) -> None:
    run = training(loss=spoilt([5], value))
    seen: list[Progress] = []
    weights, counts = [], []
    for progress in run.steps(lambda: False):
        seen.append(progress)
        weights.append(run.module.weight.detach().clone())  # type: ignore[union-attr, operator]
        counts.append(int(training_state(run)["optimizer.weight.step"]))
    assert torch.equal(weights[4], weights[3])
    assert not torch.equal(weights[5], weights[4])
    assert counts == [1, 2, 3, 4, 4, 5, 6, 7, 8]
    [dropped] = [dropped for each in seen for dropped in each.dropped]
    assert (dropped.step, dropped.rank, len(dropped.images)) == (5, 0, 4)
    assert all(image.startswith("picture-") for image in dropped.images)
    assert not math.isfinite(points_of(seen)[5]["loss"])
    assert math.isfinite(points_of(seen)[6]["loss"])


def test_a_loss_that_is_not_finite_drops_the_step_though_its_gradient_is() -> None:
    class Bounded(torch.autograd.Function):
        """inf forwards, the gradient of x backwards."""

        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            return x * math.inf

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            return gradient

    run = training(loss=lambda module, micro: Bounded.apply(brightness_loss(module, micro)), max_dropped=100)
    before = run.module.weight.detach().clone()  # type: ignore[union-attr, operator]
    assert sum(len(each.dropped) for each in taken(run)) == 9
    assert torch.equal(run.module.weight, before)  # type: ignore[arg-type]


def test_a_gradient_that_overflows_is_dropped_without_a_rank_to_blame() -> None:
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            return x

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            return gradient * math.inf

    dropped = taken(training(loss=lambda module, micro: Overflow.apply(brightness_loss(module, micro)), max_dropped=100))[0].dropped[0]
    assert dropped.rank is None
    assert math.isfinite(dropped.loss)
    assert "whose losses are finite on every rank" in str(dropped)


def test_too_many_in_a_row_end_the_run_with_step_rank_and_images() -> None:
    run = training(loss=spoilt([4, 5, 6], math.nan))
    seen = []
    with pytest.raises(DivergedError) as caught:
        seen += run.steps(lambda: False)
    said = str(caught.value)
    assert said.startswith("3 step(s) in a row had no finite loss or gradient, more than the 2 allowed")
    assert "the first: step 4 (loss nan, gradient norm nan), of rank 0, images picture-" in said
    assert run.step == 6


def test_steps_dropped_apart_from_each_other_do_not_end_the_run() -> None:
    assert len(taken(training(loss=spoilt([1, 2, 4, 5, 7, 8], math.nan)))) == 9


def test_dropped_steps_are_named_between_exchanges_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_core.loop._STEPS_PER_EXCHANGE", {"cpu": 4})
    seen = taken(training(loss=spoilt([3, 7], math.nan)))
    assert [[dropped.step for dropped in each.dropped] for each in seen] == [[], [], [], [], [3], [], [], [], [7]]


def test_a_state_is_saved_when_it_is_due() -> None:
    assert [each.step for each in taken(training(save_every=4)) if each.save_agreed] == [4, 8]
    assert [each.step for each in taken(training(save_every=3)) if each.save_agreed] == [3, 6]  # behind step 9 comes the result


def test_a_save_waits_until_the_last_one_is_done() -> None:
    run = training(save_every=2)
    seen = list(run.steps(lambda: False, lambda: run.step not in (4, 5, 6)))
    assert [each.step for each in seen if each.save_agreed] == [2, 7, 8]


def test_no_state_is_saved_among_dropped_steps() -> None:
    seen = taken(training(save_every=4, loss=spoilt([4, 5], math.nan)))
    assert [each.step for each in seen if each.save_agreed] == [6, 8]


def test_nothing_waits_behind_a_saved_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_core.loop._STEPS_PER_EXCHANGE", {"cpu": 100})
    told = [[step for step, _ in each.points] for each in taken(training(save_every=4))]
    assert told == [[1], [], [], [2, 3, 4], [], [], [], [5, 6, 7, 8], [9]]


def test_the_gradient_norm_is_that_of_the_whole_batch() -> None:
    norms = [values["grad_norm"] for values in points_of(taken(training())).values()]
    again = [values["grad_norm"] for values in points_of(taken(training(accumulation=2))).values()]
    assert norms == pytest.approx(again, rel=1e-5)
    run = training()
    batch = next(run.loader.from_step(0, 1))
    brightness_loss(run.module, batch).backward()
    assert norms[0] == pytest.approx(run.module.weight.grad.norm().item(), rel=1e-6)  # type: ignore[union-attr]


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


def test_the_state_is_the_trainings_own() -> None:
    run = training()
    steps = run.steps(lambda: False)
    next(steps)
    next(steps)
    state = training_state(run)
    assert set(state) == {"step", "module.weight", "optimizer.weight.step", "optimizer.weight.exp_avg", "optimizer.weight.exp_avg_sq"}
    assert int(state["step"]) == 2
    before = {name: tensor.clone() for name, tensor in state.items()}
    next(steps)
    assert {name for name in state if not torch.equal(state[name], before[name])} == set(state) - {"step"}


def test_a_state_has_the_same_tensors_at_any_time() -> None:
    run = training()
    before = {name: (tensor.shape, tensor.dtype) for name, tensor in training_state(run).items()}
    weights = run.module.weight.detach().clone()  # type: ignore[union-attr, operator]
    assert torch.equal(weights, Brightness().weight)
    taken(run)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in training_state(run).items()} == before


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
    with pytest.raises(EncoderError, match=r"the training state does not fit: module\.bias is missing"):
        load_training_state(run, training_state(training()))
    assert run.step == 0
