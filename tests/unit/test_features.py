import threading
from collections.abc import Sequence

import pytest
import torch

from mae_core import rounds
from mae_core.data.skipped import SkippedImages
from mae_core.data.transforms import centre_crop, normalise
from mae_core.errors import DataError, EncoderError
from mae_core.features import Features, encode_features
from mae_core.options import ARCH_SIZES, ModelConfig, NormalizeConfig
from mae_core.rounds import num_rounds
from mae_core.vit import Encoder, initialise
from mae_core.world import World
from tests.unit.core_fixtures import SHALLOW, PictureSource, finished
from tests.unit.threaded_world import by_workers

MODEL = ModelConfig(arch="vit_tiny_patch4", image_size=8)
NORMALIZE = NormalizeConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
BROKEN = (2, 9)


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCH_SIZES, "tiny", SHALLOW)
    monkeypatch.setattr(rounds, "_MAX_BATCH", 4)


@pytest.fixture
def encoder() -> Encoder:
    encoder = Encoder(MODEL)
    initialise(encoder, torch.Generator().manual_seed(1))
    return encoder


def encoded(
    encoder: Encoder,
    world: World | None = None,
    *,
    members: Sequence[int] = range(13),
    pooling: str = "mean",
    broken: Sequence[int] = BROKEN,
    limit: float = 0.5,
) -> tuple[Features, int, dict[str, str]]:
    """The features, the rounds they took, and the unreadable images that this worker met."""
    skipped = SkippedImages()
    encoding = encode_features(
        encoder,
        PictureSource(20, broken=broken),
        list(members),
        pooling=pooling,
        normalize=NORMALIZE,
        world=world or World(),
        num_threads=1,
        skipped=skipped,
        max_corrupt_fraction=limit,
    )
    return *finished(encoding), skipped.take_new()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@torch.no_grad()
def test_features_are_the_pooled_tokens_of_centre_crops(encoder: Encoder, pooling: str) -> None:
    features, num, _ = encoded(encoder, members=[3, 5, 8, 11, 12], pooling=pooling, broken=[8])
    assert (num, features.labels_N.tolist(), features.features_ND.dtype) == (2, [1, 1, 1, 0], torch.float32)
    pixels = torch.stack([torch.tensor(centre_crop(PictureSource(20).read(index), (8, 8))) for index in (3, 5, 11, 12)])
    tokens = encoder(normalise(pixels, NORMALIZE))
    expected = tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(dim=1)
    torch.testing.assert_close(features.features_ND, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_on_cpus_a_few_images_are_encoded_at_once(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, is_sharded: bool) -> None:
    """Not so by a sharded encoder, which all workers must call equally often."""
    whole, *_ = encoded(encoder)
    seen: list[int] = []
    encoder.register_forward_pre_hook(lambda module, images: seen.append(len(images[0])))
    monkeypatch.setattr("mae_core.features._NUMBERS_IN_CACHE", 3 * 5 * SHALLOW[0])
    if is_sharded:
        monkeypatch.setattr("mae_core.features.is_sharded", lambda _: True)
    by_few, *_ = encoded(encoder)
    assert seen == ([3, 4, 3, 1] if is_sharded else [3, 2, 2, 3, 1])
    torch.testing.assert_close(by_few.features_ND, whole.features_ND, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_workers", [2, 3, 5])
def test_any_number_of_workers_has_the_same_features_bit_for_bit(encoder: Encoder, num_workers: int) -> None:
    alone, _, all_skipped = encoded(encoder)
    assert len(alone.labels_N) == 11
    seen = by_workers(num_workers, lambda world: encoded(encoder, world))
    for features, num, _ in seen:
        assert torch.equal(features.features_ND, alone.features_ND)
        assert torch.equal(features.labels_N, alone.labels_N)
        assert num == num_rounds(13, MODEL, World(0, num_workers))
    assert {key: why for _, _, skipped in seen for key, why in skipped.items()} == all_skipped
    assert sum(len(skipped) for _, _, skipped in seen) == len(BROKEN)


def test_every_worker_calls_the_encoder_in_every_round(encoder: Encoder) -> None:
    """The forward of a sharded encoder is a collective: a worker that left one out would leave the others waiting."""
    calls: list[int] = []
    encoder.register_forward_hook(lambda _module, images, _tokens: calls.append(len(images[0])))
    by_workers(3, lambda world: encoded(encoder, world, members=range(6), broken=[4, 5]))  # 4 images, 2 unreadable ones, none
    assert sorted(calls) == [1, 1, 4]


def test_encoding_leaves_no_trace(encoder: Encoder) -> None:
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    random = torch.get_rng_state()
    features, _, _ = encoded(encoder.train())
    assert not features.features_ND.requires_grad
    assert not features.features_ND.is_inference()  # a head is trained on them
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_too_many_unreadable_images(encoder: Encoder) -> None:
    with pytest.raises(DataError, match=r"2 of 13 images cannot be read, more than data\.max_corrupt_fraction 0\.1"):
        encoded(encoder, limit=0.1)


def test_damaged_weights(encoder: Encoder) -> None:
    torch.nn.init.constant_(encoder.cls_token, float("nan"))
    with pytest.raises(EncoderError, match="the encoder's features are not finite numbers"):
        encoded(encoder)


def test_large_images_come_in_small_batches() -> None:
    def batch_of(image_size: int) -> int:
        return rounds.batch_size(ModelConfig(arch="vit_tiny_patch1", image_size=image_size))

    assert (batch_of(128), batch_of(181), batch_of(256)) == (4, 2, 1)  # 16,384, 32,761 and 65,536 patches


def test_a_batch_without_a_readable_image_shifts_no_other(encoder: Encoder) -> None:
    whole, _, _ = encoded(encoder, broken=[])
    features, num, skipped = encoded(encoder, broken=[4, 5, 6, 7])
    assert (num, len(skipped)) == (4, 4)
    assert torch.equal(features.features_ND, whole.features_ND[[0, 1, 2, 3, 8, 9, 10, 11, 12]])
    assert features.labels_N.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]


def test_encoding_that_is_stopped_ends_its_threads(encoder: Encoder) -> None:
    encoding = encode_features(
        encoder,
        PictureSource(20),
        list(range(20)),
        pooling="mean",
        normalize=NORMALIZE,
        world=World(),
        num_threads=2,
        skipped=SkippedImages(),
        max_corrupt_fraction=0.5,
    )
    next(encoding)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
    encoding.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
