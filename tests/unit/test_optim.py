import math
from collections.abc import Callable, Iterable
from copy import deepcopy

import pytest
import torch
from torch import nn

from mae_core.classifier import Classifier
from mae_core.mae import MaskedAutoencoder
from mae_core.optim import Lars, cosine_lr, finetune_optimizer, pretrain_optimizer, probe_optimizer, set_lr
from mae_core.options import DecoderConfig, FinetuneOptim, MaskingConfig, PretrainOptim, ProbeOptim, TargetConfig
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


def test_frozen_parameters_are_left_out_of_finetuning() -> None:
    model = Classifier(Encoder(TINY), num_classes=3, pooling="mean", generator=torch.Generator())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("head.", "fc_norm.", "encoder.blocks.11.mlp.")))
    optimizer = finetune_optimizer(model, FinetuneOptim(layer_decay=0.5))
    assert all(group["params"] for group in optimizer.param_groups)
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert sorted({group["lr_scale"] for group in optimizer.param_groups}) == [0.5, 1.0]


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head() -> list[nn.Parameter]:
    """A weight, a bias, and a weight of zeros."""
    return [nn.Parameter(numbers(3, 5, seed=0)), nn.Parameter(numbers(3, seed=1)), nn.Parameter(torch.zeros(2, 2))]


def give_gradients(parameters: Iterable[nn.Parameter], *, step: int) -> None:
    for place, parameter in enumerate(parameters):
        parameter.grad = numbers(*parameter.shape, seed=100 * step + place)


def plain_lars(weight: list[list[float]], gradients: list[list[list[float]]], *, lr: float, decay: float) -> list[list[float]]:
    """LARS of a matrix, number by number."""
    flat = [value for row in weight for value in row]
    momenta = [0.0] * len(flat)
    for gradient in gradients:
        update = [g + decay * p for g, p in zip((value for row in gradient for value in row), flat, strict=True)]
        norm, update_norm = math.sqrt(sum(p * p for p in flat)), math.sqrt(sum(u * u for u in update))
        trust = 0.001 * norm / update_norm if norm > 0 and update_norm > 0 else 1.0
        momenta = [0.9 * m + trust * u for m, u in zip(momenta, update, strict=True)]
        flat = [p - lr * m for p, m in zip(flat, momenta, strict=True)]
    width = len(weight[0])
    return [flat[first : first + width] for first in range(0, len(flat), width)]


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lars_is_a_plain_loop(decay: float) -> None:
    weight, bias, zeros = parameters = head()
    before, bias_before = weight.tolist(), bias.tolist()
    optimizer = Lars(parameters, lr=0.7, weight_decay=decay)
    gradients: list[list[list[list[float]]]] = [[], [], []]
    for step in range(4):
        give_gradients(parameters, step=step)
        for parameter, given in zip(parameters, gradients, strict=True):
            assert parameter.grad is not None
            given.append(parameter.grad.view(-1, parameter.shape[-1]).tolist())
        optimizer.step()
    torch.testing.assert_close(weight.data, torch.tensor(plain_lars(before, gradients[0], lr=0.7, decay=decay)))
    torch.testing.assert_close(zeros.data, torch.tensor(plain_lars([[0.0] * 2] * 2, gradients[2], lr=0.7, decay=decay)))
    momentum = torch.zeros(3)
    expected = torch.tensor(bias_before)
    for (gradient,) in gradients[1]:
        momentum = 0.9 * momentum + torch.tensor(gradient)  # a vector neither decays nor is scaled
        expected = expected - 0.7 * momentum
    torch.testing.assert_close(bias.data, expected)


def test_lars_moves_by_the_trust_coefficient_whatever_the_gradients_scale() -> None:
    for scale in (1e-4, 1.0, 1e4):
        weight = nn.Parameter(numbers(8, 8, seed=0))
        before = weight.detach().clone()
        optimizer = Lars([weight], lr=2.0)
        weight.grad = scale * numbers(8, 8, seed=1)
        optimizer.step()
        assert ((weight - before).norm() / before.norm()).item() == pytest.approx(0.002, rel=1e-4)


def test_a_parameter_without_a_gradient_stays() -> None:
    weight, bias, zeros = head()
    before = weight.detach().clone()
    give_gradients([bias, zeros], step=0)
    Lars([weight, bias, zeros], lr=1.0, weight_decay=0.1).step()
    assert torch.equal(weight, before)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "lars": lambda parameters: probe_optimizer(parameters, ProbeOptim(optimizer="lars", weight_decay=0.1)),
    "sgd": lambda parameters: probe_optimizer(parameters, ProbeOptim(optimizer="sgd", weight_decay=0.1)),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True),
}


def state_of(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Weights, moments and step counts."""
    moments = [tensor for parameter in parameters for _, tensor in sorted(optimizer.state[parameter].items())]
    return [tensor.detach().clone() for tensor in [*parameters, *moments]]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("dropped", [0, 2])
def test_a_step_with_found_inf_changes_nothing(name: str, dropped: int) -> None:
    """The run goes on as if that step had not been; it may be the first."""
    parameters, others = head(), head()
    optimizer, undisturbed = OPTIMIZERS[name](parameters), OPTIMIZERS[name](others)
    for step in range(4):
        if step == dropped:
            before = state_of(parameters, optimizer)
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, math.nan)
            optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
            optimizer.step()
            assert all(torch.equal(old, new) for old, new in zip(before, state_of(parameters, optimizer)[: len(before)], strict=True))
        give_gradients(parameters, step=step)
        give_gradients(others, step=step)
        optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
        optimizer.step()
        undisturbed.step()
    pairs = list(zip(state_of(parameters, optimizer), state_of(others, undisturbed), strict=True))
    assert len(pairs) > 3
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_the_probes_sgd_is_torchs() -> None:
    optim = ProbeOptim(optimizer="sgd", base_lr=0.2, batch_size=512, momentum=0.8, weight_decay=0.01)
    parameters, others = head(), head()
    optimizer, plain = probe_optimizer(parameters, optim), torch.optim.SGD(others, lr=0.4, momentum=0.8, weight_decay=0.01)
    for step in range(3):
        give_gradients(parameters, step=step)
        give_gradients(others, step=step)
        optimizer.step()
        plain.step()
    for parameter, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(parameter, other)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_an_optimizers_state_can_be_saved_and_taken_up(name: str) -> None:
    parameters = head()
    optimizer = OPTIMIZERS[name](parameters)
    give_gradients(parameters, step=0)
    optimizer.step()
    others = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = OPTIMIZERS[name](others)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    for each, values in ((optimizer, parameters), (resumed, others)):
        give_gradients(values, step=1)
        each.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parameters, others, strict=True))
