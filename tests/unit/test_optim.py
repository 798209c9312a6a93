import math

import pytest
import torch

from mae_core.classifier import Classifier
from mae_core.mae import MaskedAutoencoder
from mae_core.optim import cosine_lr, finetune_optimizer, pretrain_optimizer, set_lr
from mae_core.options import DecoderConfig, FinetuneOptim, MaskingConfig, PretrainOptim, TargetConfig
from mae_core.vit import Encoder
from tests.unit.core_fixtures import TINY


def authors_lr(step: int, *, steps_per_epoch: int, epochs: int, warmup_epochs: float, lr: float, min_lr: float) -> float:
    """`util/lr_sched.py`, said in our words: by fractional epochs."""
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


@pytest.mark.parametrize("warmup_epochs", [0, 0.5, 3])
def test_the_schedule_is_the_authors(warmup_epochs: float) -> None:
    for step in range(70):
        ours = cosine_lr(step, num_steps=70, warmup_steps=7 * warmup_epochs, lr=0.3, min_lr=0.01)
        theirs = authors_lr(step, steps_per_epoch=7, epochs=10, warmup_epochs=warmup_epochs, lr=0.3, min_lr=0.01)
        assert ours == pytest.approx(theirs, rel=1e-12)


def test_known_points_of_the_schedule() -> None:
    lrs = [cosine_lr(step, num_steps=20, warmup_steps=10, lr=1.0, min_lr=0.2) for step in (0, 5, 10, 15)]
    assert lrs == pytest.approx([0.0, 0.5, 1.0, 0.6])


def test_pretraining_decays_all_but_vectors() -> None:
    """The class and mask tokens decay, as in the authors' code; the fixed positions are not trained."""
    mae = MaskedAutoencoder(Encoder(TINY), masking=MaskingConfig(), decoder=DecoderConfig(depth=1, width=32), target=TargetConfig())
    optimizer = pretrain_optimizer(mae, PretrainOptim(base_lr=0.1, batch_size=512, weight_decay=0.07))
    names = {parameter: name for name, parameter in mae.named_parameters()}
    decayed, spared = ({names[parameter] for parameter in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.07, 0.0]
    assert decayed | spared == set(names.values()) - {"encoder.pos_embed", "decoder_pos_embed"}
    assert spared == {name for name in decayed | spared if name.endswith(".bias") or "norm" in name}
    assert {"encoder.cls_token", "mask_token", "encoder.patch_embed.proj.weight", "decoder_pred.weight"} <= decayed
    assert {(group["betas"], group["lr"], group["lr_scale"]) for group in optimizer.param_groups} == {((0.9, 0.95), 0.2, 1.0)}


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_finetuning_scales_by_layer_and_spares_tokens_and_positions(pooling: str) -> None:
    model = Classifier(Encoder(TINY), num_classes=3, pooling=pooling, generator=torch.Generator())  # type: ignore[arg-type]
    optimizer = finetune_optimizer(model, FinetuneOptim(layer_decay=0.5, weight_decay=0.05))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter]: group for group in optimizer.param_groups for parameter in group["params"]}
    assert found.keys() == set(names.values())
    for name, group in found.items():
        if name.startswith("encoder.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name in ("encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"):
            layer = 0
        else:
            assert name.startswith(("head.", "fc_norm.", "encoder.norm.")), name
            layer = 13
        assert group["lr_scale"] == 0.5 ** (13 - layer), name
        spared = name.endswith(".bias") or "norm" in name or name in ("encoder.cls_token", "encoder.pos_embed")
        assert group["weight_decay"] == (0.0 if spared else 0.05), name
    assert found["head.weight"]["lr_scale"] == 1.0
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}


def test_each_group_gets_its_share_of_the_learning_rate() -> None:
    groups: list[dict[str, object]] = [{"lr_scale": 0.25}, {"lr_scale": 1.0}, {}]
    set_lr(groups, 0.8)
    assert [group["lr"] for group in groups] == [0.2, 0.8, 0.8]
