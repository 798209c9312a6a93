import math
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mae_core.config import RUN_SPEC
from mae_core.options import ARCH_SIZES, IMAGENET_MEAN, DataConfig, FinetuneOptim, ModelConfig, NormalizeConfig, PretrainOptim, ProbeOptim
from mae_core.train import read_spec
from tests.unit.core_fixtures import finetune_spec, pretrain_spec, probe_spec, spec_of

DATA = "/data/cells"
SPECS = sorted((Path(__file__).parents[2] / "deploy" / "specs").rglob("*.yaml"))

# (kind, what to change in a valid spec, what the error must say)
BAD = [
    ("pretrain", {"modle": {}}, r"modle.*Extra inputs are not permitted"),
    ("pretrain", {"optim": {"bach_size": 8}}, r"optim\.bach_size.*Extra inputs"),
    ("pretrain", {"optim": {"layer_decay": 0.5}}, r"optim\.layer_decay.*Extra inputs"),
    ("pretrain", {"encoder": {"init": "random"}}, r"encoder: a pretraining begins with random weights anyway; leave it out"),
    ("pretrain", {"num_seeds": 2}, r"num_seeds.*Extra inputs"),
    ("probe", {"masking": {"ratio": 0.5}}, r"masking.*Extra inputs"),
    ("probe", {"checkpoint": {"every_steps": 5}}, r"checkpoint: a probe of features that are encoded once .*leave it out"),
    ("pretrain", {"checkpoint": {"keep": {"last": 0}}}, r"checkpoint\.keep\.last.*greater than or equal to 1"),
    ("pretrain", {"checkpoint": {"keep": {"best": {"metric": "loss"}}}}, r"checkpoint\.keep\.best\.mode.*Field required"),
    (
        "pretrain",
        {"checkpoint": {"keep": {"best": {"metric": "knn_accuracy", "mode": "max"}}}},
        r"checkpoint\.keep\.best\.metric: 'knn_accuracy' is not told while this run trains; it tells loss \(.*with evaluation\.labelled\)",
    ),
    (
        "finetune",
        {"checkpoint": {"keep": {"best": {"metric": "val_accuracy", "mode": "max"}}}},
        r"'val_accuracy' is not told while this run trains; it tells loss \(val_accuracy with evaluate_every_epochs",
    ),
    ("probe", {"checkpoint": {"keep": {"last": 5}}}, r"checkpoint: a probe of features that are encoded once .*leave it out"),
    ("probe", {"optim": {"betas": [0.9, 0.95]}}, r"optim\.betas.*Extra inputs"),
    ("finetune", {"decoder": {"depth": 1}}, r"decoder.*Extra inputs"),
    ("finetune", {"optim": {"momentum": 0.9}}, r"optim\.momentum.*Extra inputs"),
    ("embed", {"data": {"validation_fraction": 0.2}}, r"data: all images of data\.source are embedded; leave validation and"),
    ("embed", {"data": {"normalize": "auto"}}, r"data\.normalize auto: statistics are measured when an encoder is first trained"),
    ("embed", {"pooling": "patches"}, r"pooling .*'mean', 'cls' or 'tokens'"),
    ("embed", {"optim": {"epochs": 3}}, r"optim.*Extra inputs"),
    ("train", {}, r"'train' found using 'kind' does not match any of .*'pretrain', 'probe', 'finetune', 'evaluate'"),
    ("pretrain", {"model": {"image_size": 30}}, r"image_size: height 30 is not divisible by the patch size 4.*use 28 or 32"),
    ("pretrain", {"model": {"image_size": [8, 30]}}, r"image_size: width 30 is not divisible by the patch size 4"),
    ("pretrain", {"model": {"image_size": 3}}, r"height 3 is not divisible.*use 4 or 8"),
    ("pretrain", {"model": {"image_size": 0}}, r"height 0 is not divisible"),
    ("pretrain", {"model": {"arch": "vit_giant_patch14"}}, r"'vit_giant_patch14' is not known: .*a size of tiny, small, base, large, huge"),
    ("pretrain", {"model": {"arch": "vit_tiny_patch4_224"}}, r"is not known"),
    ("finetune", {"model": {"in_chans": 2}, "data": {"transform": {"rand_augment": {}}}}, r"rand_augment: .* 1 or 3 channels, not 2"),
    ("pretrain", {"decoder": {"predict_fraction": 0.5}}, r"predict_fraction below 1 needs attention: cross"),
    ("pretrain", {"decoder": {"attention": "cross"}, "target": {"loss_on": "all"}}, r"target\.loss_on all: a decoder of cross"),
    ("pretrain", {"decoder": {"attention": "cross"}, "masking": {"encoder_mask_tokens": True}}, r"masking\.encoder_mask_tokens: .* self"),
    ("pretrain", {"masking": {"num_masks": 3}}, r"optim\.batch_size 4 is not divisible by .* x 3 masks; use 3 or 6"),
    ("pretrain", {"optim": {"batch_size_per_device": 3}}, r"batch_size_per_device 3 x 1 worker\(s\) x accumulation 1 is not .*be 4\."),
    ("pretrain", {"optim": {"lr": 0.1}}, r"lr 0\.1 is not base_lr 0\.02 x batch_size 4 / 256 = 0\.0003125; leave one out"),
    ("pretrain", {"evaluation": {"labelled": {"source": DATA}}}, r"labelled: give validation \(a folder\) or validation_fraction"),
    ("pretrain", {"evaluation": {"knn": 5}}, r"labelled: k-NN and probe need images with labels; give labelled"),
    ("pretrain", {"evaluation": {"every_epochs": 3}}, r"evaluation\.every_epochs 3 is more than optim\.epochs 2"),
    ("finetune", {"evaluate_every_epochs": 3}, r"evaluate_every_epochs 3 is more than optim\.epochs 2"),
    ("pretrain", {"optim": {"min_lr": 1.0}}, r"min_lr 1 is above the learning rate 0\.0003125"),
    ("pretrain", {"optim": {"base_lr": math.inf}}, r"optim\.base_lr.*finite number"),
    ("pretrain", {"data": {"normalize": {"mean": [0.5, 0.5, 0.5], "std": [1.0, 1.0, math.nan]}}}, r"std\.2.*finite number"),
    (
        "pretrain",
        {"evaluation": {"labelled": {"source": DATA, "validation_fraction": 0.2}, "knn": 0, "probe_epochs": 0}},
        r"labelled: neither knn nor probe_epochs measures anything",
    ),
    (
        "pretrain",
        {"evaluation": {"labelled": {"source": "digits", "validation_fraction": 0.2}}},
        r"evaluation\.labelled: the digits have 1 channel, but model\.in_chans is 3",
    ),
    ("pretrain", {"recipe": "large"}, r"recipe.*'paper' or 'small'"),
    (
        "finetune",
        {"mix": {"mixup": 0.8}, "optim": {"accumulation": 4}},
        r"batch_size 4 is not divisible by .* x 2 images that are mixed; use 8 or 16",
    ),
    ("finetune", {"trainable_blocks": 12.5}, r"trainable_blocks 12\.5: the encoder has 12"),
    ("finetune", {"trainable_blocks": 0.7}, r"trainable_blocks.*multiple of 0\.5"),
    ("evaluate", {"optim": {"epochs": 3}}, r"optim.*Extra inputs"),
    ("pretrain", {"data": {"source": "digits"}}, r"model\.in_chans: the digits have 1 channel, not 3"),
    ("pretrain", {"masking": {"ratio": 0.9}}, r"masking\.ratio 0\.9 leaves 0 of 4 patches visible"),
    ("pretrain", {"masking": {"ratio": 1.0}}, r"masking\.ratio.*less than 1"),
    ("pretrain", {"decoder": {"width": 100}}, r"decoder\.width.*multiple of 32"),
    ("pretrain", {"optim": {"batch_size": 10, "accumulation": 4}}, r"optim\.batch_size 10 is not divisible .*accumulation 4; use 8 or 12"),
    ("pretrain", {"resources": {"num_workers": 3}}, r"optim\.batch_size 4 is not divisible by 3 worker\(s\).*use 3 or 6"),
    (
        "pretrain",
        {"resources": {"num_workers": {"min": 3, "max": 3}}},
        r"optim\.batch_size 4 is not divisible by 3 worker\(s\).*use 3 or 6",
    ),
    (
        "pretrain",
        {"resources": {"num_workers": {"min": 5, "max": 7}}, "optim": {"batch_size": 11}},
        r"optim\.batch_size 11 is not divisible by any number of workers from 5 to 7 x accumulation 1; use 10 or 12",
    ),
    ("pretrain", {"resources": {"num_workers": {"min": 2, "max": 1}}}, r"num_workers\.range .*min 2 is more than max 1"),
    ("pretrain", {"resources": {"num_workers": {"max": 2}}}, r"num_workers\.range\.min Field required"),
    ("pretrain", {"resources": {"num_workers": 0}}, r"num_workers\.number.*greater than or equal to 1"),
    (
        "pretrain",
        {"resources": {"num_workers": {"min": 1, "max": 2}}, "optim": {"batch_size_per_device": 2}},
        r"optim\.batch_size_per_device: it is another for 1 workers than for 2; leave it out",
    ),
    ("pretrain", {"optim": {"warmup_epochs": 2}}, r"warmup_epochs 2 must be less than epochs 2"),
    ("pretrain", {"optim": {"betas": [0.9, 1.0]}}, r"optim\.betas\.1.*less than 1"),
    ("finetune", {"optim": {"betas": [-1, 0.9]}}, r"optim\.betas\.0.*greater than or equal to 0"),
    ("probe", {"optim": {"batch_size": 1}}, r"optim\.batch_size.*greater than or equal to 2"),
    ("probe", {"optim": {"accumulation": 2}}, r"optim\.accumulation: features are encoded once"),
    ("probe", {"num_seeds": 2, "data": {"transform": {"flip": True}}}, r"num_seeds: several heads share features that are encoded once"),
    ("pretrain", {"data": {"validation": "/data/val"}}, r"data\.validation: pretraining uses no validation images; leave it out"),
    ("pretrain", {"data": {"transform": {"crop_scale": [0.5, 0.2]}}}, r"crop_scale \[0\.5, 0\.2\] must be \[low, high\]"),
    ("pretrain", {"data": {"source": "cells"}}, r"source: 'cells' must be an absolute path"),
    (
        "pretrain",
        {"data": {"source": "gs://bucket/cells"}},
        r"source: only folders, s3://bucket/prefix/ and 'digits' .*, not 'gs:",
    ),
    ("pretrain", {"data": {"source": "s3://bucket/"}}, "source: only folders, s3://bucket/prefix/"),
    ("pretrain", {"data": {"source": "s3://bucket/cells/../other/"}}, "has an empty part, or one of dots"),
    ("pretrain", {"data": {"normalize": {"mean": [0.5], "std": [0.5]}}}, r"data\.normalize has 1 channel\(s\), but model\.in_chans is 3"),
    ("pretrain", {"data": {"normalize": {"mean": [0.5], "std": [0.0]}}}, r"every std must be above 0"),
    ("probe", {"data": {"validation_fraction": 0}}, r"give validation \(a folder\) or validation_fraction"),
    ("probe", {"data": {"validation": "/data/val"}}, r"give validation or validation_fraction, not both"),
    ("probe", {"model": None}, r"model: needed with encoder \{init: random\}"),
    ("probe", {"encoder": {}}, r"give exactly one of job, artifact, file or init; got none"),
    ("probe", {"encoder": {"job": "abc", "init": "random"}}, r"give exactly one of .*got job, init"),
    ("finetune", {"encoder": {"artifact": "http://x/y"}}, r"encoder\.artifact.*should match pattern"),
    ("finetune", {"encoder": {"job": "No Such"}}, r"encoder\.job.*should match pattern"),
    ("pretrain", {"name": ""}, r"name.*at least 1 character"),
    ("pretrain", {"seed": -1}, r"seed.*greater than or equal to 0"),
]


@pytest.mark.parametrize(("kind", "changes", "said"), BAD)
def test_bad_input_is_named_with_its_remedy(kind: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        spec_of(kind, DATA, **changes)
    faults = [f"{'.'.join(map(str, fault['loc'][1:]))} {fault['msg']}" for fault in caught.value.errors()]
    assert len(faults) == 1
    assert re.search(said, faults[0]), faults


@pytest.mark.parametrize("spec", [pretrain_spec(DATA, masking={"ratio": 0.75}), probe_spec(DATA), finetune_spec(DATA)])
def test_json_and_back(spec: Any) -> None:
    assert RUN_SPEC.validate_json(spec.model_dump_json()) == spec
    assert RUN_SPEC.validate_python(spec.model_dump()) == spec


@pytest.mark.parametrize("file", SPECS, ids=lambda file: file.name)
def test_every_committed_spec_is_valid(file: Path) -> None:
    assert read_spec(file).name


def test_there_are_committed_specs() -> None:
    assert {"digits-pretrain.yaml", "digits-probe.yaml"} <= {file.name for file in SPECS}


def test_what_is_left_out_is_the_paper() -> None:
    spec = RUN_SPEC.validate_python(
        {"kind": "pretrain", "name": "x", "model": {"arch": "vit_base_patch16", "image_size": 224}, "data": {"source": DATA}}
    )
    assert spec.kind == "pretrain"
    assert (spec.masking.ratio, spec.decoder.depth, spec.decoder.width, spec.decoder.num_heads) == (0.75, 8, 512, 16)
    assert spec.target.norm_pix
    assert (spec.data.transform.crop_scale, spec.data.transform.flip) == ((0.2, 1.0), True)
    paper = PretrainOptim(epochs=800, batch_size=4096, base_lr=1.5e-4, warmup_epochs=40, weight_decay=0.05, betas=(0.9, 0.95))
    assert paper.model_copy(update={"batch_size_per_device": 4096}) == spec.optim
    assert spec.optim.lr == pytest.approx(2.4e-3)
    finetuning = FinetuneOptim()
    assert (finetuning.betas, finetuning.layer_decay, finetuning.base_lr, finetuning.min_lr) == ((0.9, 0.999), 0.65, 5e-4, 1e-6)
    assert (ProbeOptim().weight_decay, ProbeOptim().momentum, ProbeOptim().warmup_epochs) == (0.0, 0.9, 10)


def test_what_a_model_is() -> None:
    model = ModelConfig(arch="vit_base_patch16", image_size=(32, 48), in_chans=4)
    assert (model.width, model.depth, model.num_heads) == (768, 12, 12)
    assert (model.grid, model.num_patches, model.patch_dim) == ((2, 3), 6, 1024)
    assert ModelConfig(arch="vit_huge_patch14", image_size=224).image_size == (224, 224)
    assert [width // heads for width, _, heads in ARCH_SIZES.values()] == [64, 64, 64, 64, 80]


def test_statistics_for_other_channels_than_three() -> None:
    data = DataConfig(source=DATA)
    assert data.normalize_for(3).mean == IMAGENET_MEAN
    assert data.normalize_for(4) == NormalizeConfig(mean=(0.5,) * 4, std=(0.5,) * 4)
    given = NormalizeConfig(mean=(0.1,), std=(0.2,))
    assert DataConfig(source=DATA, normalize=given).normalize_for(1) == given


ELASTIC = {"resources": {"num_workers": {"min": 2, "max": 9}}}


@pytest.mark.parametrize(
    ("spec", "counts"),
    [
        (pretrain_spec(DATA), [1]),
        (pretrain_spec(DATA, optim={"batch_size": 24}, **ELASTIC), [2, 3, 4, 6, 8]),
        (pretrain_spec(DATA, optim={"batch_size": 24, "accumulation": 2}, masking={"num_masks": 2}, **ELASTIC), [2, 3, 6]),
        (finetune_spec(DATA, optim={"batch_size": 24}, mix={"mixup": 0.5}, **ELASTIC), [2, 3, 4, 6]),
        (finetune_spec(DATA, optim={"batch_size": 24}, mix={"mixup": 0, "cutmix": 0}, **ELASTIC), [2, 3, 4, 6, 8]),
        (probe_spec(DATA, optim={"batch_size": 24}, data={"transform": {"flip": True}}, **ELASTIC), [2, 3, 4, 6, 8]),
        (probe_spec(DATA, **ELASTIC), list(range(2, 10))),
    ],
)
def test_an_elastic_run_has_as_many_workers_as_divide_its_batch(spec: Any, counts: list[int]) -> None:
    assert spec.worker_counts() == counts
    shared = spec.kind != "probe" or spec.data.transform is not None
    assert (spec.optim.batch_size_per_device is None) == (len(counts) > 1 or not shared)


def test_a_spec_takes_its_encoders_model() -> None:
    model = ModelConfig(arch="vit_tiny_patch2", image_size=8)
    without = probe_spec(DATA, model=None, encoder={"file": "/encoder"})
    assert without.with_model(model, where="/encoder").model == model
    with pytest.raises(ValueError, match=r"encoder /encoder: arch 'vit_tiny_patch4' \(encoder: 'vit_tiny_patch2'\); leave model out"):
        probe_spec(DATA).with_model(model, where="/encoder")
    digits = probe_spec("digits", model=None, encoder={"file": "/encoder"})
    with pytest.raises(ValueError, match="the digits have 1 channel, not 3"):
        digits.with_model(model, where="/encoder")


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        pretrain_spec(DATA).seed = 4


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (pretrain_spec(DATA), {"loss"}),
        (pretrain_spec(DATA, evaluation={"labelled": {"source": DATA, "validation_fraction": 0.2}, "knn": 0}), {"loss", "probe_accuracy"}),
        (finetune_spec(DATA, evaluate_every_epochs=1), {"loss", "val_accuracy"}),
        (probe_spec(DATA), set()),
        (probe_spec(DATA, data={"transform": {}}), {"loss"}),
    ],
)
def test_by_what_training_states_can_be_ranked(spec: Any, expected: set[str]) -> None:
    assert spec.ranked_by() == expected
