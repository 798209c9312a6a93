"""Every setting of a run, once. Pydantic only: the service validates specs with this file and never loads torch.

A spec is one of three kinds (`pretrain`, `probe`, `finetune`), told apart by its `kind`. A field of another kind, or one that is
misspelt, is an error: nothing a user writes is silently ignored. Sections and tables cited are those of He et al. 2021.
"""

import re
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator

# name: (width, depth, heads). Tiny and small are DeiT's; base, large and huge are ViT's (paper, section 4).
ARCH_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DIGITS = "digits"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
_MAX_PATCHES = 65_536
_DECODER_HEAD_WIDTH = 32  # 512 wide, 16 heads in the paper


class Strict(BaseModel):
    """A frozen model that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Strict):
    """The encoder: `vit_<size>_patch<n>` on images of `image_size` (a side, or [height, width]) with `in_chans` channels."""

    arch: str = Field(examples=["vit_base_patch16"])
    image_size: tuple[int, int] = Field(examples=[224, [32, 48]])
    in_chans: int = Field(default=3, ge=1, le=1024)

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        match = re.fullmatch(r"vit_([a-z]+)_patch([1-9][0-9]{0,2})", self.arch)
        if match is None or match[1] not in ARCH_SIZES:
            sizes = ", ".join(ARCH_SIZES)
            raise ValueError(f"arch {self.arch!r} is not known: write vit_<size>_patch<n> with a size of {sizes}")
        for name, side in zip(("height", "width"), self.image_size, strict=True):
            if side < 1 or side % self.patch_size:
                lower = max(side // self.patch_size, 1) * self.patch_size
                raise ValueError(
                    f"image_size: {name} {side} is not divisible by the patch size {self.patch_size} of {self.arch}; "
                    f"use {lower} or {lower + self.patch_size}, or another patch size"
                )
        if self.num_patches > _MAX_PATCHES:
            raise ValueError(f"image_size: {self.num_patches} patches are more than {_MAX_PATCHES}; use larger patches or smaller images")
        return self

    @property
    def size_name(self) -> str:
        return self.arch.split("_")[1]

    @property
    def patch_size(self) -> int:
        return int(self.arch.rpartition("patch")[2])

    @property
    def width(self) -> int:
        return ARCH_SIZES[self.size_name][0]

    @property
    def depth(self) -> int:
        return ARCH_SIZES[self.size_name][1]

    @property
    def num_heads(self) -> int:
        return ARCH_SIZES[self.size_name][2]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: p * p * channels."""
        return self.patch_size**2 * self.in_chans


class MaskingConfig(Strict):
    """Which patches the encoder does not see (paper, section 3)."""

    strategy: Literal["random"] = "random"
    ratio: float = Field(default=0.75, gt=0, lt=1)

    def num_keep(self, num_patches: int) -> int:
        """Visible patches of `num_patches`. Decimal, because int(100 * (1 - 0.8)) is 19 in floats."""
        return int(num_patches * (1 - Decimal(str(self.ratio))))


class DecoderConfig(Strict):
    """The light decoder over all tokens (paper, Table 1a and 1b); heads are 32 wide."""

    depth: int = Field(default=8, ge=1, le=64)
    width: int = Field(default=512, ge=32, le=8192, multiple_of=_DECODER_HEAD_WIDTH)

    @property
    def num_heads(self) -> int:
        return self.width // _DECODER_HEAD_WIDTH


class TargetConfig(Strict):
    """What is predicted: pixels, or pixels normalised patch by patch (paper, Table 1d)."""

    norm_pix: bool = True


class TransformConfig(Strict):
    """Random resized crop with this range of areas, and horizontal flips (paper, Table 1e)."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError(f"crop_scale {list(value)} must be [low, high] with 0 < low <= high <= 1")
        return value


class NormalizeConfig(Strict):
    """Per-channel mean and standard deviation of pixels scaled to [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @model_validator(mode="after")
    def _valid(self) -> Self:
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError("mean and std need one number for each channel, and every std must be above 0")
        return self


class DataConfig(Strict):
    """Where images come from: a folder (searched recursively), or `digits`, the handwritten digits that scikit-learn ships.

    Labels are the names of the first-level folders. Validation images are those of the folder `validation`, or a fixed
    fraction of `source` that is the same in every job over the same files, so that a probe's validation images can be kept
    out of its encoder's pretraining.
    """

    source: str = Field(min_length=1, max_length=4096, examples=[DIGITS, "/data/cells"])
    validation: str | None = Field(default=None, min_length=1, max_length=4096)
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    normalize: NormalizeConfig | None = None
    max_corrupt_fraction: float = Field(default=0.01, ge=0, le=1, description="unreadable images above this share fail the job")

    @model_validator(mode="after")
    def _one_split(self) -> Self:
        for name in ("source", "validation"):
            if "://" in (getattr(self, name) or ""):
                raise ValueError(f"{name}: only folders and {DIGITS!r} can be read, not {getattr(self, name)!r}")
            if getattr(self, name) and getattr(self, name) != DIGITS and not PurePosixPath(getattr(self, name)).is_absolute():
                raise ValueError(f"{name}: {getattr(self, name)!r} must be an absolute path, the same on every worker's machine")
        if self.validation is not None and self.validation_fraction:
            raise ValueError("give validation or validation_fraction, not both")
        return self

    def normalize_for(self, in_chans: int) -> NormalizeConfig:
        """The given statistics; else ImageNet's for three channels and (x - 0.5) / 0.5 for any other number."""
        if self.normalize is not None:
            return self.normalize
        if in_chans == 3:
            return NormalizeConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD)
        return NormalizeConfig(mean=(0.5,) * in_chans, std=(0.5,) * in_chans)


class TrainingDataConfig(DataConfig):
    """Data that is augmented. A probe's is not: it sees each image once, centre-cropped."""

    transform: TransformConfig = TransformConfig()


class OptimConfig(Strict):
    """What every kind's optimiser has. The learning rate is base_lr * batch_size / 256 (paper, Table 8)."""

    epochs: int = Field(ge=1, le=1_000_000)
    batch_size: int = Field(ge=1, le=1_048_576, description="images of one optimiser step, over all workers and accumulation")
    accumulation: int = Field(default=1, ge=1, le=65_536)
    base_lr: float = Field(gt=0)
    warmup_epochs: float = Field(ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.05, ge=0)

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_epochs > 0 and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} must be less than epochs {self.epochs}")
        return self

    @property
    def lr(self) -> float:
        return self.base_lr * self.batch_size / 256


Beta = Annotated[float, Field(ge=0, lt=1)]


class PretrainOptim(OptimConfig):
    """AdamW of the paper's Table 8."""

    epochs: int = Field(default=800, ge=1, le=1_000_000)
    batch_size: int = Field(default=4096, ge=1, le=1_048_576)
    base_lr: float = Field(default=1.5e-4, gt=0)
    warmup_epochs: float = Field(default=40, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)


class FinetuneOptim(OptimConfig):
    """AdamW with layer-wise learning-rate decay (paper, Table 9)."""

    epochs: int = Field(default=100, ge=1, le=1_000_000)
    batch_size: int = Field(default=1024, ge=1, le=1_048_576)
    base_lr: float = Field(default=5e-4, gt=0)
    warmup_epochs: float = Field(default=5, ge=0)
    min_lr: float = Field(default=1e-6, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    layer_decay: float = Field(default=0.65, gt=0, le=1)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)


class ProbeOptim(OptimConfig):
    """SGD with momentum on frozen features (paper, appendix A.1: "SGD works similarly with a 4096 batch")."""

    epochs: int = Field(default=90, ge=1, le=1_000_000)
    batch_size: int = Field(default=4096, ge=2, le=1_048_576)  # BatchNorm has nothing to measure in one image
    accumulation: Literal[1] = 1
    base_lr: float = Field(default=0.1, gt=0)
    warmup_epochs: float = Field(default=10, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)


class EncoderRef(Strict):
    """Which encoder a probe or fine-tune starts from: exactly one of a job, an artifact in S3, a local folder, or random weights."""

    job: str | None = Field(default=None, pattern=r"^[a-z0-9]{1,40}$")
    artifact: str | None = Field(
        default=None, pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,62}/[^\s?#]{1,900}$", examples=["s3://maestro/jobs/…/encoder/"]
    )
    file: str | None = Field(default=None, min_length=1, max_length=4096, description="a folder with config.json and model.safetensors")
    init: Literal["random"] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in ("job", "artifact", "file", "init") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of job, artifact, file or init; got {', '.join(given) or 'none'}")
        return self


class ResourcesConfig(Strict):
    """Workers of the run and what each needs."""

    num_workers: int = Field(default=1, ge=1, le=100_000)
    cpus_per_worker: int = Field(default=1, ge=1, le=1024)
    gpus_per_worker: Literal[0, 1] = 0


class RetryConfig(Strict):
    """Times that the workers of an attempt are started again, and as many further attempts after the driver or the cluster was lost."""

    max_failures: int = Field(default=3, ge=0, le=1000)


class CheckpointConfig(Strict):
    """How often training state is saved."""

    every_steps: int = Field(default=200, ge=1)


class RunConfig(Strict):
    """What specs of every kind have."""

    name: str = Field(min_length=1, max_length=200)
    labels: dict[Annotated[str, Field(max_length=63)], Annotated[str, Field(max_length=200)]] = Field(default={}, max_length=32)
    seed: int = Field(default=0, ge=0, lt=2**31)
    data: DataConfig
    resources: ResourcesConfig = ResourcesConfig()
    retry: RetryConfig = RetryConfig()

    def _check_batch(self, optim: OptimConfig) -> None:
        parts = self.resources.num_workers * optim.accumulation
        if optim.batch_size % parts:
            near = max(optim.batch_size // parts, 1) * parts
            raise ValueError(
                f"optim.batch_size {optim.batch_size} is not divisible by {self.resources.num_workers} worker(s) x accumulation "
                f"{optim.accumulation}; use {near} or {near + parts}"
            )

    def _check_data(self, model: ModelConfig) -> None:
        if DIGITS in (self.data.source, self.data.validation) and model.in_chans != 1:
            raise ValueError(f"model.in_chans: the digits have 1 channel, not {model.in_chans}")
        if model.in_chans not in (1, 3, 4):
            raise ValueError(f"model.in_chans: images have 1 (grey), 3 (RGB) or 4 (RGBA) channels, not {model.in_chans}")
        normalize = self.data.normalize
        if normalize is not None and len(normalize.mean) != model.in_chans:
            raise ValueError(f"data.normalize has {len(normalize.mean)} channel(s), but model.in_chans is {model.in_chans}")


class PretrainSpec(RunConfig):
    """Masked-autoencoder pretraining on unlabelled images."""

    kind: Literal["pretrain"]
    data: TrainingDataConfig
    model: ModelConfig
    masking: MaskingConfig = MaskingConfig()
    decoder: DecoderConfig = DecoderConfig()
    target: TargetConfig = TargetConfig()
    optim: PretrainOptim = PretrainOptim()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        num_patches = self.model.num_patches
        if not 1 <= self.masking.num_keep(num_patches) < num_patches:
            raise ValueError(
                f"masking.ratio {self.masking.ratio:g} leaves {self.masking.num_keep(num_patches)} of {num_patches} patches visible; "
                "at least one must be visible and one masked"
            )
        if self.target.norm_pix and self.model.patch_dim == 1:
            raise ValueError("target.norm_pix: a patch of one number has no deviation to be normalised by; set it to false")
        if self.data.validation is not None:
            raise ValueError("data.validation: pretraining uses no validation images; leave it out (validation_fraction holds images back)")
        self._check_batch(self.optim)
        self._check_data(self.model)
        return self


class LabelledRun(RunConfig):
    """What probe and fine-tune share: an encoder, its model, labels and a validation set.

    `model` may be left out where the encoder says it; with `encoder: {init: random}` it is needed.
    """

    encoder: EncoderRef
    model: ModelConfig | None = None
    pooling: Literal["mean", "cls"] = "mean"

    def _check_labelled(self) -> None:
        if self.model is None and self.encoder.init is not None:
            raise ValueError("model: needed with encoder {init: random}, as there is no encoder to take it from")
        if self.data.validation is None and not self.data.validation_fraction:
            raise ValueError("data: accuracy needs images held back: give validation (a folder) or validation_fraction (such as 0.2)")
        if self.model is not None:
            self._check_data(self.model)

    def with_model(self, model: ModelConfig, *, where: str) -> Self:
        """This spec with the model of its encoder. ValueError where the spec asks for another one."""
        if self.model is not None and self.model != model:
            differ = [
                f"{name} {getattr(self.model, name)!r} (encoder: {getattr(model, name)!r})"
                for name in ModelConfig.model_fields
                if getattr(self.model, name) != getattr(model, name)
            ]
            raise ValueError(f"model does not fit the encoder {where}: {', '.join(differ)}; leave model out to take the encoder's")
        return type(self).model_validate(self.model_dump() | {"model": model.model_dump()})


class ProbeSpec(LabelledRun):
    """Linear probe: BatchNorm without affine parameters and a linear layer on frozen features (paper, appendix A.1)."""

    kind: Literal["probe"]
    optim: ProbeOptim = ProbeOptim()
    num_seeds: int = Field(default=1, ge=1, le=100, description="heads trained; the accuracy reported is their median")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_labelled()
        return self


class FinetuneSpec(LabelledRun):
    """Fine-tuning of the whole encoder with a new head (paper, Table 9)."""

    kind: Literal["finetune"]
    data: TrainingDataConfig
    optim: FinetuneOptim = FinetuneOptim()
    evaluate_every_epochs: int | None = Field(default=None, ge=1, description="None: only at the end")
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_labelled()
        self._check_batch(self.optim)
        return self


RunSpec = Annotated[PretrainSpec | ProbeSpec | FinetuneSpec, Field(discriminator="kind")]
RUN_SPEC: TypeAdapter[PretrainSpec | ProbeSpec | FinetuneSpec] = TypeAdapter(RunSpec)
