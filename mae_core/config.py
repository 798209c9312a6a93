"""The specs of runs. Pydantic only: the service validates specs with this file and never loads torch.

A spec is one of five kinds (`pretrain`, `probe`, `finetune`, `evaluate`, `embed`), told apart by its `kind`. A field of another kind, one
that is misspelt, or one that would change nothing, is an error: nothing a user writes is silently ignored. What they leave out comes from
a recipe, and the resolved spec shows it. Tables cited are those of He et al. 2021.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ModelWrapValidatorHandler, TypeAdapter, model_validator

from mae_core.exports.formats import ExportConfig, Refusals, check_formats, finetuning_refusals, pretraining_refusals
from mae_core.options import (
    DIGITS,
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    EncoderRef,
    EvaluationConfig,
    FinetuneDataConfig,
    FinetuneOptim,
    KeepConfig,
    MaskingConfig,
    MixConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Pooling,
    PretrainOptim,
    ProbeDataConfig,
    ProbeOptim,
    ResourcesConfig,
    RetryConfig,
    Strict,
    TargetConfig,
    TrainingDataConfig,
)
from mae_core.recipes import RecipeName, merged, recipe_fields, recipe_for


class RunConfig(Strict):
    """What specs of every kind have."""

    name: str = Field(min_length=1, max_length=200, description="for people; it need not be the only one of this name")
    labels: dict[Annotated[str, Field(max_length=63)], Annotated[str, Field(max_length=200)]] = Field(
        default={}, max_length=32, description="words to find jobs by, such as {team: cells}"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="of weights, order, crops and masks: the same seed, the same run")
    recipe: RecipeName = Field(default="small", description="default: paper for base, large and huge models, else small")
    data: DataConfig
    resources: ResourcesConfig = ResourcesConfig()
    retry: RetryConfig = RetryConfig()
    priority: int = Field(default=0, ge=-1000, le=1000, description="jobs of a higher one start before those of a lower one")
    time_limit_hours: float | None = Field(
        default=None, gt=0, description="longest training, over all attempts; waiting and pauses do not count; null: none"
    )

    @model_validator(mode="wrap")
    @classmethod
    def _filled_in(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """The spec with what its recipe says; its `model_fields_set` stay those that the user gave, in every section."""
        if not isinstance(given, dict) or ("recipe" in given and given["recipe"] not in ("paper", "small")):
            return handler(given)
        size = _size_of(given.get("model"))
        recipe = given.get("recipe") or recipe_for(size)
        fields = recipe_fields(recipe, kind=str(given.get("kind")), size=size)
        spec = handler(merged(given, fields | {"recipe": recipe}))
        _forget_unset(spec, given)
        return spec

    def worker_counts(self) -> list[int]:
        """The numbers of workers that the run may have, fewest first: those between which its batches divide evenly."""
        num_images, parts = self._shared_batch()
        each = math.prod(parts.values())
        return [count for count in self.resources.workers_asked if num_images % (count * each) == 0]

    def ranked_by(self) -> frozenset[str]:
        """The series by which its training states can be told to be better or worse; none where it saves no states."""
        return frozenset()

    def check_keep(self, keep: KeepConfig) -> None:
        """Raises ValueError, beginning with the field's name, where this run's states cannot be kept so."""
        known = self.ranked_by()
        if keep.best is not None and keep.best.metric not in known:
            raise ValueError(
                f"checkpoint.keep.best.metric: {keep.best.metric!r} is not told while this run trains; it tells {', '.join(sorted(known))} "
                "(val_accuracy with evaluate_every_epochs, knn_accuracy and probe_accuracy with evaluation.labelled)"
            )

    def _shared_batch(self) -> tuple[int, dict[str, int]]:
        """A step's images (0: workers share no batches), and into what each worker divides its part of them, as an error names it."""
        return 0, {}

    def _check_batch(self, optim: OptimConfig) -> None:
        asked, parts, counts = self.resources.workers_asked, self._shared_batch()[1], self.worker_counts()
        if not counts:
            workers = f"{asked[0]} worker(s)" if len(asked) == 1 else f"any number of workers from {asked[0]} to {asked[-1]}"
            raise ValueError(
                f"optim.batch_size {optim.batch_size} is not divisible by {' x '.join([workers, *parts])}; use {{}} or {{}}".format(
                    *_near(optim.batch_size, [count * math.prod(parts.values()) for count in asked])
                )
            )
        if len(counts) > 1:
            if optim.batch_size_per_device is not None:
                raise ValueError(f"optim.batch_size_per_device: it is another for {counts[0]} workers than for {counts[-1]}; leave it out")
            return
        per_device = optim.batch_size // (counts[0] * optim.accumulation)
        if optim.batch_size_per_device not in (None, per_device):
            raise ValueError(
                f"optim.batch_size_per_device {optim.batch_size_per_device} x {counts[0]} worker(s) x accumulation {optim.accumulation} "
                f"is not optim.batch_size {optim.batch_size}; it would be {per_device}. Leave it out, or change one of them"
            )
        optim.__dict__["batch_size_per_device"] = per_device

    def _check_data(self, model: ModelConfig) -> None:
        if DIGITS in (self.data.source, self.data.validation) and model.in_chans != 1:
            raise ValueError(f"model.in_chans: the digits have 1 channel, not {model.in_chans}")
        normalize = self.data.normalize
        if normalize is not None and normalize != "auto" and len(normalize.mean) != model.in_chans:
            raise ValueError(f"data.normalize has {len(normalize.mean)} channel(s), but model.in_chans is {model.in_chans}")


def _size_of(model: object) -> str | None:
    arch = model.get("arch") if isinstance(model, dict) else getattr(model, "arch", None)
    return arch.split("_")[1] if isinstance(arch, str) and arch.count("_") >= 2 else None


def _near(number: int, divisors: list[int]) -> tuple[int, int]:
    """The two numbers nearest to `number`, one on each side where there is one, that one of `divisors` divides."""
    multiples = sorted({max(number // divisor + more, 1) * divisor for divisor in divisors for more in (0, 1, 2)})
    place = max(sum(multiple < number for multiple in multiples) - 1, 0)
    return multiples[place], multiples[place + 1]


def _forget_unset(section: BaseModel, given: dict[str, Any]) -> None:
    """Leaves in `model_fields_set` what `given` has, so that a recipe can fill in the rest once more (`with_model`)."""
    section.__pydantic_fields_set__.intersection_update(given)
    for name, inner in given.items():
        part = getattr(section, name, None)
        if isinstance(inner, dict) and isinstance(part, BaseModel):
            _forget_unset(part, inner)


class PretrainSpec(RunConfig):
    """Masked-autoencoder pretraining on unlabelled images (paper, Table 8)."""

    kind: Literal["pretrain"]
    data: TrainingDataConfig
    model: ModelConfig
    encoder: EncoderRef | None = Field(
        default=None, description="goes on from this encoder's weights, and from its decoder's where they are there and fit; null: random"
    )
    masking: MaskingConfig = MaskingConfig()
    decoder: DecoderConfig = DecoderConfig()
    target: TargetConfig = TargetConfig()
    optim: PretrainOptim = PretrainOptim()
    evaluation: EvaluationConfig = EvaluationConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        num_patches, num_keep = self.model.num_patches, self.masking.num_keep(self.model.num_patches)
        if not 1 <= num_keep < num_patches:
            raise ValueError(
                f"masking.ratio {self.masking.ratio:g} leaves {num_keep} of {num_patches} patches visible; "
                "at least one must be visible and one masked"
            )
        if self.target.norm_pix and self.model.patch_dim == 1:
            raise ValueError("target.norm_pix: a patch of one number has no deviation to be normalised by; set it to false")
        if self.decoder.attention == "cross" and self.target.loss_on == "all":
            raise ValueError(
                "target.loss_on all: a decoder of cross attention predicts masked patches alone; use masked, or attention: self"
            )
        if self.decoder.attention == "cross" and self.masking.encoder_mask_tokens:
            raise ValueError("masking.encoder_mask_tokens: a decoder of cross attention reads visible tokens alone; use attention: self")
        if self.encoder is not None and self.encoder.init is not None:
            raise ValueError("encoder: a pretraining begins with random weights anyway; leave it out")
        if self.data.validation is not None:
            raise ValueError(
                "data.validation: pretraining uses no validation images; leave it out "
                "(validation_fraction holds images back, evaluation.labelled measures)"
            )
        if (self.evaluation.every_epochs or 0) > self.optim.epochs:
            raise ValueError(
                f"evaluation.every_epochs {self.evaluation.every_epochs} is more than optim.epochs {self.optim.epochs}; lower it"
            )
        self._check_batch(self.optim)
        self._check_data(self.model)
        labelled = self.evaluation.labelled
        if labelled is not None and DIGITS in (labelled.source, labelled.validation) and self.model.in_chans != 1:
            raise ValueError(f"evaluation.labelled: the digits have 1 channel, but model.in_chans is {self.model.in_chans}")
        self.check_keep(self.checkpoint.keep)
        check_formats(self.export, self.export_refusals())
        return self

    def ranked_by(self) -> frozenset[str]:
        asked = {"knn_accuracy": self.evaluation.knn, "probe_accuracy": self.evaluation.probe_epochs}
        return frozenset({"loss"} | ({name for name, wanted in asked.items() if wanted} if self.evaluation.labelled is not None else set()))

    def _shared_batch(self) -> tuple[int, dict[str, int]]:
        accumulation, num_masks = self.optim.accumulation, self.masking.num_masks
        return self.optim.batch_size, {f"accumulation {accumulation}": accumulation} | (
            {f"{num_masks} masks": num_masks} if num_masks > 1 else {}
        )

    def export_refusals(self) -> Refusals:
        """Formats that cannot be faithful to what this run trains, and why."""
        return pretraining_refusals(self.model, self.masking, self.decoder)

    def with_model(self, model: ModelConfig, *, where: str) -> Self:
        """This spec. Raises ValueError where its encoder's model is another."""
        _check_same(self.model, model, where=where)
        return self


class EncoderRun(RunConfig):
    """What the kinds that start from an encoder share.

    `model` may be left out where the encoder says it; with `encoder: {init: random}` it is needed. Another image_size than the encoder's
    is allowed: its positions are interpolated.
    """

    encoder: EncoderRef
    model: ModelConfig | None = Field(default=None, description="null: the encoder's")

    def _check_encoder(self) -> None:
        if self.model is None and self.encoder.init is not None:
            raise ValueError("model: needed with encoder {init: random}, as there is no encoder to take it from")
        if self.model is not None:
            self._check_data(self.model)
        if self.data.normalize == "auto" and not (isinstance(self, FinetuneSpec) and self.encoder.init is not None):
            raise ValueError(
                "data.normalize auto: statistics are measured when an encoder is first trained, and stored with it; leave it out"
            )

    def _check_held_back(self) -> None:
        if self.data.validation is None and not self.data.validation_fraction:
            raise ValueError("data: accuracy needs images held back: give validation (a folder) or validation_fraction (such as 0.2)")

    def with_model(self, model: ModelConfig, *, where: str) -> Self:
        """This spec with the model of its encoder, and what the recipe says for that. ValueError where the spec asks for another model."""
        if self.model is not None:
            _check_same(self.model, model, where=where, remedy="; leave model out to take the encoder's")
            return self
        return type(self).model_validate(self.model_dump(exclude_unset=True) | {"model": model.model_dump()})


class ProbeSpec(EncoderRun):
    """Linear probe: BatchNorm without affine parameters and a linear layer on frozen features (paper, Table 10)."""

    kind: Literal["probe"]
    pooling: Pooling = "mean"
    data: ProbeDataConfig
    optim: ProbeOptim = ProbeOptim()
    num_seeds: int = Field(default=1, ge=1, le=100, description="heads trained; the accuracy reported is their median")
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_encoder()
        self._check_held_back()
        if self.data.transform is not None:
            self._check_batch(self.optim)
            self.check_keep(self.checkpoint.keep)
            if self.num_seeds > 1:
                raise ValueError(
                    "num_seeds: several heads share features that are encoded once; set data.transform to null, or num_seeds to 1"
                )
            return self
        if self.optim.accumulation > 1:
            raise ValueError("optim.accumulation: features are encoded once and small enough for whole batches; leave it out")
        if self.checkpoint != CheckpointConfig():
            raise ValueError("checkpoint: a probe of features that are encoded once is short and starts over; leave it out")
        if self.optim.batch_size_per_device is not None:
            raise ValueError("optim.batch_size_per_device: every worker trains on whole batches of features; leave it out")
        return self

    def ranked_by(self) -> frozenset[str]:
        return frozenset() if self.data.transform is None else frozenset({"loss"})

    def _shared_batch(self) -> tuple[int, dict[str, int]]:
        if self.data.transform is None:
            return super()._shared_batch()
        return self.optim.batch_size, {f"accumulation {self.optim.accumulation}": self.optim.accumulation}


class FinetuneSpec(EncoderRun):
    """Fine-tuning of the encoder, whole or its last blocks, with a new head (paper, Table 9 and Figure 9)."""

    kind: Literal["finetune"]
    pooling: Pooling = "mean"
    data: FinetuneDataConfig
    optim: FinetuneOptim = FinetuneOptim()
    mix: MixConfig = MixConfig()
    trainable_blocks: float | None = Field(
        default=None, ge=0, multiple_of=0.5, description="train only the last blocks; half a block is its MLP; null: all, embeddings too"
    )
    evaluate_every_epochs: int | None = Field(default=None, ge=1, description="null: only at the end")
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_encoder()
        self._check_held_back()
        self._check_batch(self.optim)
        if (self.evaluate_every_epochs or 0) > self.optim.epochs:
            raise ValueError(f"evaluate_every_epochs {self.evaluate_every_epochs} is more than optim.epochs {self.optim.epochs}")
        if self.model is not None and self.trainable_blocks is not None and self.trainable_blocks > self.model.depth:
            raise ValueError(f"trainable_blocks {self.trainable_blocks:g}: the encoder has {self.model.depth}; null trains all of it")
        if self.data.transform.rand_augment is not None and self.model is not None and self.model.in_chans not in (1, 3):
            raise ValueError(
                f"data.transform.rand_augment: its colour operations need 1 or 3 channels, not {self.model.in_chans}; set it to null"
            )
        self.check_keep(self.checkpoint.keep)
        check_formats(self.export, self.export_refusals())
        return self

    def ranked_by(self) -> frozenset[str]:
        return frozenset({"loss", "val_accuracy"} if self.evaluate_every_epochs is not None else {"loss"})

    def _shared_batch(self) -> tuple[int, dict[str, int]]:
        accumulation = self.optim.accumulation
        return self.optim.batch_size, {f"accumulation {accumulation}": accumulation} | (
            {"2 images that are mixed": 2} if self.mix.is_on else {}
        )

    def export_refusals(self) -> Refusals:
        """Formats that cannot be faithful to what this run trains, and why."""
        return finetuning_refusals(self.pooling)


class EvaluateSpec(EncoderRun):
    """Accuracy of a fine-tuned model (top-1, top-5, per class, confusion matrix), or of a k-NN classifier on an encoder's features.

    A fine-tuned model is measured on the validation images or, where none are given, on all of `data.source`. k-NN needs both parts.
    """

    kind: Literal["evaluate"]
    pooling: Pooling = "mean"
    knn: int = Field(default=20, ge=1, le=10_000, description="neighbours that vote, for an encoder without a head")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_encoder()
        return self


class EmbedSpec(EncoderRun):
    """Features of all images of `data.source`, with labels or without, as Parquet.

    `tokens` are those of the patches, without the class token. Images lie in parts of `images_per_part`, in whole batches: what a killed
    run has to encode again is at most a part for each worker. A resumed run knows images by their
    names: one that was changed under its name is not encoded again.
    """

    kind: Literal["embed"]
    pooling: Literal["mean", "cls", "tokens"] = Field(
        default="mean", description="mean of the patches' tokens, the class token, or all patches'"
    )
    dtype: Literal["float32", "float16"] = Field(default="float32", description="of the features; float16 is half as large")
    batch_size: int | None = Field(default=None, ge=1, le=65_536, description="images encoded at once; null: 256, fewer of many patches")
    images_per_part: int | None = Field(
        default=None, ge=1, le=1_000_000, description="images of a file, rounded up to whole batches; null: 4096, fewer above 256 MiB"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_encoder()
        if self.data.validation is not None or self.data.validation_fraction:
            raise ValueError("data: all images of data.source are embedded; leave validation and validation_fraction out")
        return self


def _check_same(own: ModelConfig, model: ModelConfig, *, where: str, remedy: str = "") -> None:
    if differ := own.differences(model):
        raise ValueError(f"model does not fit the encoder {where}: {', '.join(differ)}{remedy}")


Spec = PretrainSpec | ProbeSpec | FinetuneSpec | EvaluateSpec | EmbedSpec
TrainingSpec = PretrainSpec | ProbeSpec | FinetuneSpec
EncoderSpec = ProbeSpec | FinetuneSpec | EvaluateSpec | EmbedSpec
RunSpec = Annotated[Spec, Field(discriminator="kind")]
RUN_SPEC: TypeAdapter[Spec] = TypeAdapter(RunSpec)

_PATHS = (
    *(("data", "source"), ("data", "validation"), ("encoder", "file")),
    *(("evaluation", "labelled", "source"), ("evaluation", "labelled", "validation")),
)


def with_absolute_paths(spec: dict[str, Any], *, folder: Path) -> dict[str, Any]:
    """A spec as its user wrote it, with its paths counted from `folder`; `digits`, URLs and what is no path stay."""
    for path in _PATHS:
        spec = _made_absolute(spec, path, folder)
    return spec


def _made_absolute(section: dict[str, Any], path: tuple[str, ...], folder: Path) -> dict[str, Any]:
    name, *rest = path
    value = section.get(name)
    if rest and isinstance(value, dict):
        return {**section, name: _made_absolute(value, tuple(rest), folder)}
    if not rest and isinstance(value, str) and value and value != DIGITS and "://" not in value:
        return {**section, name: str((folder / Path(value).expanduser()).resolve())}
    return section
