import pytest
import torch
from torch import nn

from mae_core.classifier import Classifier
from mae_core.options import ModelConfig
from mae_core.vit import Encoder, initialise
from tests.unit.core_fixtures import TINY


def classifier(pooling: str, *, seed: int = 1, model: ModelConfig = TINY) -> Classifier:
    encoder = Encoder(model)
    initialise(encoder, torch.Generator().manual_seed(0))
    return Classifier(encoder, num_classes=5, pooling=pooling, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


@torch.no_grad()
def test_mean_pooling_leaves_the_class_token_out_and_norms_afterwards() -> None:
    model, images = classifier("mean"), torch.randn(2, 3, 8, 8)
    nn.init.normal_(model.head.weight)
    tokens = model.encoder(images)
    assert not torch.allclose(tokens[:, 1:].mean(dim=-1), torch.zeros(2, 4), atol=1e-3), "the encoder's own norm is gone"
    expected = model.head(model.fc_norm(tokens[:, 1:].mean(dim=1)))
    assert torch.equal(model(images), expected)
    assert sorted(name for name in model.state_dict() if "blocks" not in name and "norm" in name) == ["fc_norm.bias", "fc_norm.weight"]


@torch.no_grad()
def test_cls_pooling_takes_the_normed_class_token() -> None:
    model, images = classifier("cls"), torch.randn(2, 3, 8, 8)
    nn.init.normal_(model.head.weight)
    assert torch.equal(model(images), model.head(model.encoder(images)[:, 0]))
    assert not hasattr(model, "fc_norm")
    assert isinstance(model.encoder.norm, nn.LayerNorm)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_every_parameter_is_trained(pooling: str) -> None:
    """DDP waits for the gradient of each."""
    model = classifier(pooling)
    nn.init.normal_(model.head.weight)
    nn.functional.cross_entropy(model(torch.randn(2, 3, 8, 8)), torch.tensor([1, 4])).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert model.encoder.pos_embed.requires_grad


def test_the_head_starts_near_zero_from_its_own_generator() -> None:
    first, again, other = classifier("mean"), classifier("mean"), classifier("mean", seed=2)
    assert 1e-5 < first.head.weight.std() < 3e-5
    assert not first.head.bias.any()
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("num_blocks", "trained"),
    [
        (0, set()),
        (0.5, {"blocks.11.norm2", "blocks.11.mlp"}),
        (1, {"blocks.11.norm1", "blocks.11.attn", "blocks.11.norm2", "blocks.11.mlp"}),
        (1.5, {"blocks.11.norm1", "blocks.11.attn", "blocks.11.norm2", "blocks.11.mlp", "blocks.10.norm2", "blocks.10.mlp"}),
    ],
)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_last_blocks_alone_are_trained(num_blocks: float, trained: set[str], pooling: str) -> None:
    model = classifier(pooling)
    model.train_last(num_blocks)
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {f"encoder.{name}" for name in trained} | {"head", "fc_norm" if pooling == "mean" else "encoder.norm"}
    assert all(any(name.startswith(f"{part}.") for part in expected) for name in free)
    assert all(any(name.startswith(f"{part}.") for name in free) for part in expected)


def test_all_blocks_leave_the_embeddings_frozen() -> None:
    model = classifier("mean")
    model.train_last(12)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    embeddings = {"encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"}
    assert frozen == embeddings
