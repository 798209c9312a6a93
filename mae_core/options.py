"""The sections of a spec: every hyper-parameter, once. Pydantic only; `mae_core.config` puts them together into specs.

Defaults are those of the paper for ViT-B; a recipe (`mae_core.recipes`) fills in what a user leaves out. Sections and tables cited are
those of He et al. 2021, unless another source is named.
"""

import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

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
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".npy")
_BUCKET_AND_PREFIX = r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/.+"
_MAX_PATCHES = 65_536
_MAX_WORKERS = 100_000
_DECODER_HEAD_WIDTH = 32  # 512 wide, 16 heads in the paper


class Strict(BaseModel):
    """A frozen model that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Strict):
    """The encoder: `vit_<size>_patch<n>` on images of `image_size` (a side, or [height, width]) with `in_chans` channels."""

    arch: str = Field(
        examples=["vit_base_patch16"], description="`vit_<size>_patch<n>`: tiny, small, base, large or huge, with patches of n x n pixels"
    )
    image_size: tuple[int, int] = Field(
        examples=[224, [32, 48]], description="pixels that the model sees: a side, or [height, width]; each divisible by the patch's side"
    )
    in_chans: int = Field(
        default=3, ge=1, le=1024, description="channels of the images; grey becomes colour and colour grey, other numbers are refused"
    )

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

    def differences(self, saved: "ModelConfig") -> list[str]:
        """Why an encoder that was saved as `saved` cannot become this model. Another image size alone can: positions are interpolated."""
        return [
            f"{name} {getattr(self, name)!r} (encoder: {getattr(saved, name)!r})"
            for name in ("arch", "in_chans")
            if getattr(self, name) != getattr(saved, name)
        ]

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
    """Which patches the encoder does not see (paper, section 3, and Table 1f).

    random: uniform. block: rectangles, as BEiT masks. grid: the visible patches lie on a regular grid. Each keeps exactly `num_keep`.
    """

    strategy: Literal["random", "block", "grid"] = Field(default="random", description="how masked patches are chosen (Table 1f)")
    ratio: float = Field(default=0.75, gt=0, lt=1, description="share of the patches that the encoder does not see (Figure 5)")
    num_masks: int = Field(default=1, ge=1, le=64, description="masks of each decoded image; every one counts as an image of the batch")
    encoder_mask_tokens: bool = Field(default=False, description="masked patches enter the encoder as mask tokens (Table 1c)")

    def num_keep(self, num_patches: int) -> int:
        """Visible patches of `num_patches`. Decimal, because int(100 * (1 - 0.8)) is 19 in floats."""
        return int(num_patches * (1 - Decimal(str(self.ratio))))


class DecoderConfig(Strict):
    """The light decoder (paper, Table 1a and 1b); heads are 32 wide.

    self: the paper's, over all tokens. cross: each predicted patch attends to the visible tokens alone (CrossMAE, Fu et al. 2024), so that
    it costs nothing to predict only `predict_fraction` of the masked patches, chosen anew for each mask.
    """

    depth: int = Field(default=8, ge=1, le=64, description="blocks (Table 1a)")
    width: int = Field(default=512, ge=32, le=8192, multiple_of=_DECODER_HEAD_WIDTH, description="numbers in a token (Table 1b)")
    attention: Literal["self", "cross"] = Field(default="self", description="over all tokens, or from predicted patches to visible ones")
    predict_fraction: float = Field(
        default=1.0, gt=0, le=1, description="share of the masked patches that is predicted; below 1 needs cross"
    )

    @model_validator(mode="after")
    def _fraction_needs_cross(self) -> Self:
        if self.predict_fraction < 1 and self.attention == "self":
            raise ValueError("predict_fraction below 1 needs attention: cross; a decoder of self-attention sees all patches anyway")
        return self

    @property
    def num_heads(self) -> int:
        return self.width // _DECODER_HEAD_WIDTH

    def num_predicted(self, num_masked: int) -> int:
        """Patches predicted of `num_masked`; at least one."""
        return max(1, int((num_masked * Decimal(str(self.predict_fraction))).quantize(Decimal(1), ROUND_HALF_UP)))


class TargetConfig(Strict):
    """What is predicted: pixels, or pixels normalised patch by patch (paper, Table 1d); and where the loss is taken."""

    norm_pix: bool = Field(default=True, description="each patch's pixels less their mean, by their standard deviation (Table 1d)")
    loss_on: Literal["masked", "all"] = Field(default="masked", description="the patches whose squared error is averaged")


CropScale = Annotated[tuple[float, float], Field(description="smallest and largest share of the image's area that a crop has")]


class TransformConfig(Strict):
    """Random resized crop with this range of areas, and horizontal flips (paper, Table 1e).

    crop resized: torchvision's, which draws again until the crop fits. clamped: one draw, cut to the image (as BYOL; the paper's probe).
    """

    crop_scale: CropScale = (0.2, 1.0)
    crop: Literal["resized", "clamped"] = Field(default="resized", description="what is done with a crop that does not fit the image")
    flip: bool = Field(default=True, description="half of the images are mirrored left to right")

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError(f"crop_scale {list(value)} must be [low, high] with 0 < low <= high <= 1")
        return value


class RandAugmentConfig(Strict):
    """RandAugment with magnitudes drawn round `magnitude`, its operations all stronger with it: rand-m9-mstd0.5-inc1 (paper, Table 9)."""

    num_ops: int = Field(default=2, ge=1, le=16, description="operations on each image")
    magnitude: float = Field(default=9.0, ge=0, le=10, description="their mean strength, of 10")
    magnitude_std: float = Field(default=0.5, ge=0, le=10, description="standard deviation of the strength, drawn for each operation")


class FinetuneTransformConfig(TransformConfig):
    """Crops, flips, and what the paper's Table 9 adds."""

    crop_scale: CropScale = (0.08, 1.0)
    rand_augment: RandAugmentConfig | None = Field(default=RandAugmentConfig(), description="null: none. Needs 1 or 3 channels")
    erase_probability: float = Field(default=0.25, ge=0, le=1, description="random erasing, with noise pixel by pixel")


class MixConfig(Strict):
    """Mixup and cutmix of neighbours in the batch: their Beta parameters, 0 for none; each pair takes one of the two (paper, Table 9)."""

    mixup: float = Field(default=0.8, ge=0, le=100, description="alpha of mixup's Beta(alpha, alpha); 0: no mixup")
    cutmix: float = Field(default=1.0, ge=0, le=100, description="alpha of cutmix's; 0: no cutmix")

    @property
    def is_on(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


class NormalizeConfig(Strict):
    """Per-channel mean and standard deviation of pixels scaled to [0, 1] (float images: of their own values)."""

    mean: tuple[float, ...] = Field(description="one number for each channel")
    std: tuple[float, ...] = Field(description="one number for each channel, above 0")

    @model_validator(mode="after")
    def _valid(self) -> Self:
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError("mean and std need one number for each channel, and every std must be above 0")
        return self


Normalize = Annotated[
    Annotated[NormalizeConfig, Tag("statistics")] | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(lambda given: "auto" if isinstance(given, str) else "statistics"),  # so that an error is of one of the two
]


class DataConfig(Strict):
    """Where images come from: a folder (searched recursively), packed images (`maestro data pack`) in a folder or below an `s3://` prefix,
    the images below such a prefix, or `digits`, the handwritten digits that scikit-learn ships.

    Labels are the names of the first-level folders. Validation images are those of the folder `validation`, or a fixed
    fraction of `source` that is the same in every job over the same files, so that a probe's validation images can be kept
    out of its encoder's pretraining. normalize auto: measured on the training images and stored with the encoder.
    """

    source: str = Field(
        min_length=1,
        max_length=4096,
        examples=[DIGITS, "/data/cells"],
        description="an absolute folder, the same on every worker's machine; below s3://bucket/prefix/; or digits",
    )
    validation: str | None = Field(default=None, min_length=1, max_length=4096, description="a folder of validation images")
    validation_fraction: float = Field(default=0.0, ge=0, lt=1, description="share of source that is held back for validation")
    normalize: Normalize | None = Field(
        default=None, description="{mean, std} or auto; null: the encoder's, else ImageNet's for 3 channels and 0.5, 0.5 for others"
    )
    max_corrupt_fraction: float = Field(default=0.01, ge=0, le=1, description="unreadable images above this share fail the job")

    @model_validator(mode="after")
    def _one_split(self) -> Self:
        for name in ("source", "validation"):
            _check_place(name, getattr(self, name))
        if self.validation is not None and self.validation_fraction:
            raise ValueError("give validation or validation_fraction, not both")
        return self

    def normalize_for(self, in_chans: int) -> NormalizeConfig:
        """The given statistics; else (and until `auto` is measured) ImageNet's for three channels, (x - 0.5) / 0.5 for any other number."""
        if isinstance(self.normalize, NormalizeConfig):
            return self.normalize
        if in_chans == 3:
            return NormalizeConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD)
        return NormalizeConfig(mean=(0.5,) * in_chans, std=(0.5,) * in_chans)


def _check_place(name: str, place: str | None) -> None:
    if place is None or place == DIGITS:
        return
    if "://" not in place:
        if not PurePosixPath(place).is_absolute():
            raise ValueError(f"{name}: {place!r} must be an absolute path, the same on every worker's machine")
        return
    if not re.fullmatch(_BUCKET_AND_PREFIX, place):
        raise ValueError(f"{name}: only folders, s3://bucket/prefix/ and {DIGITS!r} can be read, not {place!r}")
    if not {".", "..", ""}.isdisjoint(place.removeprefix("s3://").removesuffix("/").split("/")):
        raise ValueError(f"{name}: {place!r} has an empty part, or one of dots; write the prefix as it is")


class TrainingDataConfig(DataConfig):
    """Data that is augmented."""

    transform: TransformConfig = TransformConfig()


class FinetuneDataConfig(DataConfig):
    """Data for fine-tuning, augmented as in the paper's Table 9."""

    transform: FinetuneTransformConfig = FinetuneTransformConfig()


class ProbeDataConfig(DataConfig):
    """Data for a probe. transform null: each image is encoded once, centre-cropped; else anew in every epoch, as in the paper."""

    transform: TransformConfig | None = Field(default=None, description="null: images are encoded once, and only the head sees them again")


Epochs = Annotated[int, Field(ge=1, le=1_000_000, description="passes over the training images")]
BatchSize = Annotated[
    int, Field(ge=1, le=1_048_576, description="images of one optimiser step: per device x workers x accumulation; with num_masks, masks")
]
BaseLr = Annotated[float, Field(gt=0, description="learning rate for a batch of 256; lr is base_lr * batch_size / 256")]
WarmupEpochs = Annotated[float, Field(ge=0, description="epochs in which the learning rate rises from 0; then it falls as half a cosine")]
MinLr = Annotated[float, Field(ge=0, description="where the cosine ends")]
WeightDecay = Annotated[float, Field(ge=0, description="not of biases and norms; in a probe by sgd of all")]


class OptimConfig(Strict):
    """What every kind's optimiser has. The learning rate is base_lr * batch_size / 256 (paper, Table 8).

    `lr` and `batch_size_per_device` follow from the others: a resolved spec shows them, and where a user gives them they are checked.
    """

    epochs: Epochs
    batch_size: BatchSize
    batch_size_per_device: int | None = Field(default=None, ge=1, description="follows from batch_size, workers and accumulation")
    accumulation: int = Field(
        default=1, ge=1, le=65_536, description="parts of a step's images that a device takes one after the other; more need less memory"
    )
    base_lr: BaseLr
    lr: float = Field(default=0.0, ge=0, description="0: base_lr * batch_size / 256")
    warmup_epochs: WarmupEpochs
    min_lr: MinLr = 0.0
    weight_decay: WeightDecay = 0.05

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warmup_epochs > 0 and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} must be less than epochs {self.epochs}; give both")
        lr = self.base_lr * self.batch_size / 256
        if self.lr and abs(self.lr - lr) > 1e-9 * lr:
            raise ValueError(f"lr {self.lr:g} is not base_lr {self.base_lr:g} x batch_size {self.batch_size} / 256 = {lr:g}; leave one out")
        if self.min_lr > lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above the learning rate {lr:g}, to which it should fall; lower it")
        self.__dict__["lr"] = lr
        return self


class TrainedOptim(OptimConfig):
    """A run whose whole model is trained."""

    max_dropped_steps: int = Field(
        default=10, ge=0, description="steps in a row without a finite loss and gradient, before the run goes back"
    )


Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(description="AdamW's decay of the mean of gradients and of their squares")]


class PretrainOptim(TrainedOptim):
    """AdamW of the paper's Table 8."""

    epochs: Epochs = 800
    batch_size: BatchSize = 4096
    base_lr: BaseLr = 1.5e-4
    warmup_epochs: WarmupEpochs = 40
    betas: Betas = (0.9, 0.95)


class FinetuneOptim(TrainedOptim):
    """AdamW with layer-wise learning-rate decay, label smoothing and stochastic depth (paper, Table 9)."""

    epochs: Epochs = 100
    batch_size: BatchSize = 1024
    base_lr: BaseLr = 5e-4
    warmup_epochs: WarmupEpochs = 5
    min_lr: MinLr = 1e-6
    betas: Betas = (0.9, 0.999)
    layer_decay: float = Field(default=0.65, gt=0, le=1, description="learning rate of a block, as a share of the next one's; 1: the same")
    drop_path: float = Field(default=0.1, ge=0, lt=1, description="of the last block; from 0 at the first, it rises evenly")
    label_smoothing: float = Field(default=0.1, ge=0, lt=1, description="share of a label that is spread evenly over all classes")


class ProbeOptim(OptimConfig):
    """LARS of the paper's Table 10, or SGD with momentum ("SGD works similarly with a 4096 batch")."""

    optimizer: Literal["sgd", "lars"] = Field(default="sgd", description="LARS is the paper's, for batches of thousands")
    epochs: Epochs = 90
    batch_size: Annotated[BatchSize, Field(ge=2)] = 4096  # BatchNorm has nothing to measure in one image
    base_lr: BaseLr = 0.1
    warmup_epochs: WarmupEpochs = 10
    weight_decay: WeightDecay = 0.0
    momentum: float = Field(default=0.9, ge=0, lt=1, description="share of the last update that the next one keeps")


Pooling = Annotated[
    Literal["mean", "cls"], Field(description="an image's features: the mean of its patches' tokens, or the class token (cls)")
]


class EvaluationConfig(Strict):
    """What is measured while pretraining goes on: reconstructions of the same images and, with labels, a k-NN classifier and a linear probe
    on the encoder's features as they are by then.

    The labels come from `labelled`; without it only reconstructions are made.
    """

    every_epochs: int | None = Field(default=None, ge=1, description="null: about ten times in the run")
    labelled: DataConfig | None = Field(default=None, description="images with labels to measure on; null: reconstructions alone")
    pooling: Pooling = "mean"
    knn: int = Field(default=20, ge=0, le=10_000, description="neighbours that vote; 0: no k-NN")
    probe_epochs: int = Field(default=20, ge=0, le=10_000, description="0: no linear probe")

    @model_validator(mode="after")
    def _needs_validation(self) -> Self:
        if self.labelled is None and (self.knn, self.probe_epochs, self.pooling) != (20, 20, "mean"):
            raise ValueError("labelled: k-NN and probe need images with labels; give labelled, or leave knn, probe_epochs and pooling out")
        if self.labelled is not None:
            if not self.knn and not self.probe_epochs:
                raise ValueError("labelled: neither knn nor probe_epochs measures anything on it; leave it out, or set one of them above 0")
            if self.labelled.validation is None and not self.labelled.validation_fraction:
                raise ValueError("labelled: give validation (a folder) or validation_fraction (such as 0.2), to measure on")
            if self.labelled.normalize is not None:
                raise ValueError("labelled.normalize: evaluations use the statistics of the run; leave it out")
        return self


class EncoderRef(Strict):
    """Which encoder a run starts from: exactly one of a job, an artifact in S3, a local folder or file, or random weights.

    Artifacts and files may be of this project, of timm, of Hugging Face or of the MAE authors' code.
    """

    job: str | None = Field(default=None, pattern=r"^[a-z0-9]{1,40}$", description="a job's id; one that goes on is waited for")
    artifact: str | None = Field(
        default=None,
        pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,62}/[^\s?#]{1,900}$",
        examples=["s3://maestro/jobs/…/encoder/"],
        description="a folder (ending in /) or a file of weights in object storage",
    )
    file: str | None = Field(
        default=None, min_length=1, max_length=4096, description="a folder with config.json beside its weights, or a file of weights"
    )
    init: Literal["random"] | None = Field(default=None, description="random weights, to compare with; model is needed then")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in ("job", "artifact", "file", "init") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of job, artifact, file or init; got {', '.join(given) or 'none'}")
        return self


class WorkerRange(Strict):
    """An elastic run's fewest and most workers."""

    min: int = Field(ge=1, le=_MAX_WORKERS, description="with fewer it waits")
    max: int = Field(ge=1, le=_MAX_WORKERS, description="more it never takes")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class ResourcesConfig(Strict):
    """Workers of the run and what each needs.

    `num_workers` is a number, or `{min, max}`: then the run is elastic. It begins with as many as find room, goes on with fewer when it
    loses some, and with more when room has come back. Batch, order of samples and losses stay those of any other number.
    """

    num_workers: Annotated[
        Annotated[int, Field(ge=1, le=_MAX_WORKERS), Tag("number")] | Annotated[WorkerRange, Tag("range")],
        Discriminator(
            lambda given: "range" if isinstance(given, dict | WorkerRange) else "number"
        ),  # so that an error is of one of the two
    ] = Field(default=1, description="a number, or {min, max}: elastic")
    cpus_per_worker: int = Field(default=1, ge=1, le=1024, description="cores of each; with a GPU they decode its images")
    gpus_per_worker: Literal[0, 1] = Field(default=0, description="1: each worker has a GPU of its own")

    @property
    def workers_asked(self) -> range:
        """The numbers of workers that the user allows."""
        asked = self.num_workers
        return range(asked, asked + 1) if isinstance(asked, int) else range(asked.min, asked.max + 1)


class ParallelConfig(Strict):
    """How a model is spread over the workers: whole on each (ddp), or its weights and optimiser in shards (fsdp: FSDP2), where one device
    is too small. Activation checkpointing computes each block twice, to keep only its input."""

    strategy: Literal["ddp", "fsdp"] = Field(default="ddp", description="whole on each worker, or in shards (FSDP2)")
    activation_checkpointing: bool = Field(default=False, description="less memory, for a forward pass more")


class RetryConfig(Strict):
    """What happens when a run fails. Out of memory, a loss that diverges and a wrong spec are never tried again: they would fail again.

    A run has failed, too, whose workers live but take no step for `hang_minutes`; where steps are slow, for 100 times their median and
    3 times the longest pause between two of them.
    """

    max_failures: int = Field(
        default=3,
        ge=0,
        le=1000,
        description="times that the workers of an attempt are started again, and further attempts after the driver or the cluster was lost",
    )
    max_user_failures: int = Field(
        default=0, ge=0, le=1000, description="further attempts after an error that is the user's to mend: data, encoder, credentials"
    )
    forgive_after_hours: float = Field(default=1.0, gt=0, description="a run that went well for so long has its earlier failures forgotten")
    hang_minutes: float = Field(default=15.0, gt=0, description="the least time without a step that counts as hanging")


class BestConfig(Strict):
    """The states at which a series was highest or lowest: of each state its newest value then. NaN and infinity are none."""

    metric: str = Field(min_length=1, max_length=100, examples=["val_accuracy"], description="the series' name")
    mode: Literal["max", "min"] = Field(description="whether a high value is good, or a low one")
    number: int = Field(default=1, ge=1, le=1000, description="how many of the best")


class KeepConfig(Strict):
    """Which training states stay in object storage: all that one of these names. The others are deleted, but for those that are pinned.

    On a machine's own disk, and without the service, the newest stay.
    """

    last: int = Field(default=2, ge=1, le=1000, description="the newest ones")
    every_steps: int | None = Field(default=None, ge=1, description="of each so many steps the first one saved; null: none for that reason")
    best: BestConfig | None = Field(default=None, description="null: none for that reason")


class CheckpointConfig(Strict):
    """How often training state is saved, and which of it is kept."""

    every_steps: int = Field(default=200, ge=1, description="optimiser steps between two states: what a lost machine costs at most")
    keep: KeepConfig = KeepConfig()
