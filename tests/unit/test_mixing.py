from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from mae_core import mixing
from mae_core.mixing import MixPlan, erase, mix_batch, mix_plan
from mae_core.options import MixConfig
from mae_core.randomness import Stream, uniform
from tests.torchvision_ops import import_torchvision

import_torchvision()
from timm.data import mixup, random_erasing  # noqa: E402

SIZE = (12, 20)
PAPER = MixConfig()


def plan_of(num_images: int, *, mix: MixConfig = PAPER, seed: int = 1, epoch: int = 2, size: tuple[int, int] = SIZE) -> MixPlan:
    return mix_plan(torch.arange(100, 100 + num_images), seed=seed, epoch=epoch, mix=mix, size=size)


def images_of(num_images: int, *, channels: int = 3) -> torch.Tensor:
    return torch.randn(num_images, channels, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mix", [PAPER, MixConfig(mixup=0.3, cutmix=0), MixConfig(mixup=0, cutmix=2)])
def test_the_arithmetic_is_timms_of_mode_pair(mix: MixConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, images, labels = plan_of(16, mix=mix), images_of(16), torch.arange(16) % 5
    is_cutmix = (plan.weight_P == 1).numpy()
    boxes = iter(plan.box_P4[torch.from_numpy(is_cutmix)].tolist())
    theirs = mixup.Mixup(mixup_alpha=mix.mixup, cutmix_alpha=mix.cutmix, mode="pair", label_smoothing=0.1, num_classes=5)
    monkeypatch.setattr(
        theirs, "_params_per_elem", lambda _: (np.where(is_cutmix, 0.5, plan.weight_P.numpy()).astype(np.float32), is_cutmix)
    )
    monkeypatch.setattr(mixup, "rand_bbox", lambda *args, **kwargs: next(boxes))

    order = torch.tensor([*range(0, 16, 2), *range(15, 0, -2)])  # timm pairs the first with the last
    expected_images, expected_labels = theirs(images[order].clone(), labels[order])
    mixed, targets = mix_batch(images, labels, plan, num_classes=5, smoothing=0.1)
    assert torch.equal(mixed[order], expected_images)
    assert torch.equal(targets[order], expected_labels)
    assert not torch.equal(mixed, images)


def test_boxes_are_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.random.default_rng(0).random((300, 3))
    boxes = mixing._boxes(*drawn.T, SIZE)
    for (lam, y, x), box in zip(drawn, boxes, strict=True):
        middles = iter([int(y * SIZE[0]), int(x * SIZE[1])])
        monkeypatch.setattr(mixup.np.random, "randint", lambda *args, middles=middles, **kwargs: next(middles))
        assert tuple(box) == mixup.rand_bbox((3, *SIZE), lam)


def test_each_pair_takes_mixup_or_cutmix_with_lambda_of_its_beta() -> None:
    plan = plan_of(40_000, mix=MixConfig(mixup=0.8, cutmix=1.0), size=(512, 512))
    is_cutmix = plan.weight_P == 1
    assert is_cutmix.float().mean().item() == pytest.approx(0.5, abs=0.015)
    assert stats.kstest(plan.weight_P[~is_cutmix], stats.beta(0.8, 0.8).cdf).pvalue > 0.01
    assert torch.equal(plan.label_weight_P[~is_cutmix], plan.weight_P[~is_cutmix])
    assert plan.box_P4[~is_cutmix].abs().max() == 0
    top, bottom, left, right = plan.box_P4[is_cutmix].T
    uncut = (top > 0) & (left > 0) & (bottom < 512) & (right < 512)
    sides = torch.stack([bottom - top, right - left])
    assert (sides[0] - sides[1])[uncut].abs().max() == 0  # of the image's shape
    assert torch.allclose(plan.label_weight_P[is_cutmix], 1 - sides[0] * sides[1] / 512**2)
    middle_y = ((top + bottom) / 2 / 512)[uncut & (sides[0] < 50)]
    assert stats.kstest(middle_y, stats.uniform(0.05, 0.9).cdf).pvalue > 0.01


@pytest.mark.parametrize(("mix", "share"), [(MixConfig(mixup=1, cutmix=0), 0.0), (MixConfig(mixup=0, cutmix=1), 1.0)])
def test_where_one_is_off_all_pairs_take_the_other(mix: MixConfig, share: float) -> None:
    assert (plan_of(2000, mix=mix).weight_P == 1).float().mean() == share


def test_lambdas_of_any_beta_are_shares() -> None:
    for alpha in (1e-3, 0.1, 100.0):
        weights = plan_of(20_000, mix=MixConfig(mixup=alpha, cutmix=0)).label_weight_P
        assert ((weights >= 0) & (weights <= 1)).all()
        assert weights.mean().item() == pytest.approx(0.5, abs=0.1)


def test_a_pair_is_mixed_alike_in_any_part_of_any_worker() -> None:
    samples, images, labels = torch.randperm(16, generator=torch.Generator().manual_seed(3)), images_of(16), torch.arange(16) % 3

    def mixed(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        plan = mix_plan(samples[rows], seed=1, epoch=2, mix=PAPER, size=SIZE)
        return mix_batch(images[rows], labels[rows], plan, num_classes=3, smoothing=0.0)

    whole, parts = mixed(slice(0, 16)), [mixed(slice(first, first + 4)) for first in range(0, 16, 4)]
    assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))
    assert torch.equal(whole[1], torch.cat([part[1] for part in parts]))


def test_plans_differ_between_epochs_and_seeds() -> None:
    plans = [plan_of(64, seed=seed, epoch=epoch).label_weight_P for seed, epoch in ((1, 2), (1, 3), (2, 2))]
    assert not any(torch.equal(plans[place], plans[place - 1]) for place in range(3))


def test_soft_labels_add_up_to_one() -> None:
    _, targets = mix_batch(images_of(8), torch.arange(8) % 4, plan_of(8), num_classes=4, smoothing=0.1)
    assert torch.allclose(targets.sum(dim=1), torch.ones(8))
    assert targets.min() >= 0.1 / 4 - 1e-6


class ScriptedRandom:
    """Stands for the module `random` in timm's random erasing: each kind of draw from given numbers in [0, 1)."""

    def __init__(self, numbers: list[float]) -> None:
        self._numbers = iter(numbers)

    def random(self) -> float:
        return next(self._numbers)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._numbers)

    def randint(self, low: int, high: int) -> int:
        return low + int(next(self._numbers) * (high - low + 1))


def erased(images: torch.Tensor, samples: torch.Tensor, **changes: Any) -> torch.Tensor:
    return erase(images, samples, **({"seed": 5, "epoch": 1, "probability": 0.25} | changes))


@pytest.mark.parametrize("size", [(12, 20), (20, 12), (9, 9)])
def test_timm_erases_the_same_pixels(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    samples, images = torch.arange(300), torch.zeros(300, 2, *size)
    ours = erased(images, samples, probability=0.6) != 0
    numbers = uniform(seed=5, epoch=1, stream=Stream.ERASE, samples=samples, count=41).double().tolist()
    theirs = random_erasing.RandomErasing(probability=0.6, mode="pixel", max_count=1, device="cpu")
    for row in range(300):
        # A try of ours that does not fit has drawn its place already; timm draws none.
        tries = [numbers[row][first : first + 4] for first in range(1, 41, 4)]
        script = [numbers[row][0]]
        for attempt in tries:
            box = mixing._erased_boxes(np.array([[attempt]]), size)[0]
            script += attempt if box.any() else attempt[:2]
        monkeypatch.setattr(random_erasing, "random", ScriptedRandom(script))
        assert torch.equal(ours[row], theirs(torch.zeros(2, *size)) != 0), row


def test_a_quarter_of_the_images_is_erased_and_the_others_are_untouched() -> None:
    images = images_of(4000, channels=1)
    changed = erased(images, torch.arange(4000)) != images
    share = changed.flatten(1).double().mean(dim=1)
    assert (share > 0).double().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)
    assert share[share > 0].min() > 0.01
    assert share.max() < 0.36


def test_erased_pixels_are_normal_noise_each_of_its_own() -> None:
    before = torch.full((200, 3, *SIZE), 100.0)
    after = erased(before, torch.arange(200), probability=1.0)
    noise = after[after != 100]
    assert len(noise) > 10_000
    assert stats.kstest(noise, stats.norm.cdf).pvalue > 0.01
    assert len(noise.unique()) > 0.99 * len(noise)
    assert torch.equal(before, torch.full_like(before, 100.0))


def test_noise_has_nothing_of_the_numbers_that_chose_its_image() -> None:
    """Were the first pixel's noise the number that chose, it would be below the lower quartile."""
    first = erased(torch.zeros(4000, 1, *SIZE), torch.arange(4000))[:, 0, 0, 0]
    assert (first > 0).sum() > 5


def test_noise_is_finite_at_the_ends() -> None:
    ends = mixing._normal(torch.tensor([0.0, 0.5 - 2.0**-24, 0.5, 1 - 2.0**-24]))
    assert ends.tolist() == [-ends[3].item(), -ends[2].item(), ends[2].item(), ends[3].item()]
    assert 5 < ends[3] < 6
    assert 0 < ends[2] < 1e-6


def test_erasing_is_a_function_of_the_sample() -> None:
    images, samples = images_of(16), torch.arange(7, 23)
    whole = erased(images, samples, probability=0.8)
    assert torch.equal(whole[4:9], erased(images[4:9], samples[4:9], probability=0.8))
    assert not torch.equal(whole, erased(images, samples, probability=0.8, epoch=2))
    assert not torch.equal(whole, erased(images, samples, probability=0.8, seed=6))


def test_nothing_is_erased_with_no_probability_or_no_room() -> None:
    images = images_of(16)
    assert torch.equal(erased(images, torch.arange(16), probability=0.0), images)
    row = images[..., :1, :1]
    assert torch.equal(erased(row, torch.arange(16), probability=1.0), row)
