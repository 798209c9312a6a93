"""What a run will take, by formulas over its spec alone: parameters, arithmetic, memory and time. Loads no torch.

Parameters are exact. FLOPs are those of matrix products (two for each multiplication with its addition). Memory and time are models whose
constants were measured (`benchmarks/README.md`, train_step): on CPUs, in float32, on cores that do some 180 GFLOP/s in a matrix product.
"""

from dataclasses import dataclass

from mae_core.config import FinetuneSpec, PretrainSpec, Spec
from mae_core.options import DecoderConfig, MaskingConfig, ModelConfig

PROCESS_BYTES = 450 * 2**20  # of a worker that has loaded torch, before it has a model
STATE_BYTES = 16  # of a trained parameter: itself, its gradient and AdamW's two moments
EXCHANGE_BYTES = 4  # of a trained parameter, where several workers exchange gradients
SAVED_PER_TOKEN = 16  # numbers of a block's width that wait for the way back, of each of its tokens
CORE_FLOPS = 180e9  # of one core in matrix products, in a second
CORE_BYTES = 1.4e9  # of what waits for the way back, that one core makes and uses in a second


@dataclass(frozen=True)
class Work:
    """Of one image of the batch: FLOPs of a forward pass, and numbers that it keeps for the way back; in the blocks of each, and beside."""

    flops: float
    kept_numbers: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.kept_numbers + other.kept_numbers)


@dataclass(frozen=True)
class Estimate:
    """Of a run with its most workers. flops_per_image: of a step, both ways. None: what nothing was measured of, as on GPUs."""

    num_parameters: int
    num_trained_parameters: int
    flops_per_image: float
    memory_bytes_per_worker: float | None
    images_per_second: float | None


def estimate(spec: Spec, model: ModelConfig) -> Estimate:
    """model: the spec's, or its encoder's where it has none of its own."""
    total, trained = num_parameters(spec, model), num_trained_parameters(spec, model)
    work, ways = forward(spec, model), _ways(spec, trained / total)
    resources, num_workers = spec.resources, spec.worker_counts()[-1]
    on_cpus = resources.gpus_per_worker == 0
    kept_bytes = 4 * work.kept_numbers
    seconds = ways * work.flops / CORE_FLOPS + kept_bytes / CORE_BYTES
    return Estimate(
        num_parameters=total,
        num_trained_parameters=trained,
        flops_per_image=ways * work.flops,
        memory_bytes_per_worker=_memory(spec, work, total=total, trained=trained, num_workers=num_workers) if on_cpus else None,
        images_per_second=num_workers * resources.cpus_per_worker / seconds if on_cpus else None,
    )


def num_parameters(spec: Spec, model: ModelConfig) -> int:
    """All numbers of the model, but for a classifier's head, whose classes the data says; fixed positions are among them."""
    return encoder_parameters(model) + (decoder_parameters(spec.masking, spec.decoder, model) if isinstance(spec, PretrainSpec) else 0)


def num_trained_parameters(spec: Spec, model: ModelConfig) -> int:
    """Those that a step changes: none of an encoder that is probed, evaluated or used."""
    positions = (model.num_patches + 1) * model.width
    if isinstance(spec, PretrainSpec):
        return num_parameters(spec, model) - positions - (model.num_patches + 1) * spec.decoder.width
    if not isinstance(spec, FinetuneSpec):
        return 0
    if spec.trainable_blocks is None:
        return encoder_parameters(model)
    width, whole = model.width, int(spec.trainable_blocks)
    half = 8 * width**2 + 7 * width if spec.trainable_blocks > whole else 0  # a block's MLP and the norm before it
    return whole * _block_parameters(width) + half + 2 * width


def encoder_parameters(model: ModelConfig) -> int:
    width = model.width
    tokens = (model.num_patches + 2) * width  # positions, and the class token
    return tokens + model.patch_dim * width + width + model.depth * _block_parameters(width) + 2 * width


def decoder_parameters(masking: MaskingConfig, decoder: DecoderConfig, model: ModelConfig) -> int:
    """With the mask token, wherever it is."""
    width, context = decoder.width, model.width
    if decoder.attention == "cross":
        each = _block_parameters(width) - 2 * (width**2 + width) + 2 * (context * width + width)
        embed = 0
    else:
        each, embed = _block_parameters(width), context * width + width
    mask_token = context if masking.encoder_mask_tokens else width
    ends = 2 * width + width * model.patch_dim + model.patch_dim
    return (model.num_patches + 1) * width + mask_token + embed + decoder.depth * each + ends


def _block_parameters(width: int) -> int:
    return 12 * width**2 + 13 * width


def forward(spec: Spec, model: ModelConfig) -> Work:
    """Of one image of the batch: a view, where an image is masked several times."""
    if not isinstance(spec, PretrainSpec):
        return _encode(model, model.num_patches)
    masking, decoder = spec.masking, spec.decoder
    kept = masking.num_keep(model.num_patches)
    seen = model.num_patches if masking.encoder_mask_tokens else kept
    predicted = model.num_patches if spec.target.loss_on == "all" else decoder.num_predicted(model.num_patches - kept)
    return _encode(model, seen) + _decode(decoder, model, num_seen=seen + 1, num_predicted=predicted)


def _encode(model: ModelConfig, num_patches: int) -> Work:
    tokens = num_patches + 1
    blocks = _blocks(model.depth, tokens, tokens, model.width)
    return blocks + Work(2.0 * num_patches * model.patch_dim * model.width, num_patches * model.patch_dim)


def _decode(decoder: DecoderConfig, model: ModelConfig, *, num_seen: int, num_predicted: int) -> Work:
    width, tokens = decoder.width, model.num_patches + 1
    last = Work(2.0 * num_predicted * width * model.patch_dim, 2 * num_predicted * model.patch_dim)
    if decoder.attention == "cross":
        return last + _blocks(decoder.depth, num_predicted, num_seen, width, context=model.width)
    embed = Work(2.0 * num_seen * model.width * width, tokens * width)
    # of the last block the other tokens are not computed
    return last + embed + _blocks(decoder.depth - 1, tokens, tokens, width) + _blocks(1, num_predicted, tokens, width)


def _blocks(depth: int, queries: int, keys: int, width: int, *, context: int | None = None) -> Work:
    """Blocks whose `queries` tokens attend to `keys` tokens of the width `context` (their own)."""
    linear = 2.0 * width * (10 * queries * width + 2 * keys * (context or width))
    attention = 4.0 * queries * keys * width
    return Work(depth * (linear + attention), depth * width * (2 * keys + (SAVED_PER_TOKEN - 2) * queries))


def _ways(spec: Spec, trained_share: float) -> float:
    """Forward passes that a step costs: the way back costs two, less where little is trained; checkpointing one more."""
    if isinstance(spec, PretrainSpec):
        return 4.0 if spec.parallel.activation_checkpointing else 3.0
    if not isinstance(spec, FinetuneSpec):
        return 1.0
    return 1.0 + 2.0 * trained_share + (trained_share if spec.parallel.activation_checkpointing else 0.0)


def _memory(spec: Spec, work: Work, *, total: int, trained: int, num_workers: int) -> float | None:
    if not isinstance(spec, PretrainSpec | FinetuneSpec):
        return None  # it depends on how many images are encoded at once, and on the features that are kept
    exchange = EXCHANGE_BYTES * trained if num_workers > 1 else 0
    state: float = STATE_BYTES * trained + 4 * (total - trained)
    if spec.parallel.strategy == "fsdp":
        state = state / num_workers + 4 * total
    images = spec.optim.batch_size / (num_workers * spec.optim.accumulation)
    kept = work.kept_numbers
    if spec.parallel.activation_checkpointing:
        kept = kept / (SAVED_PER_TOKEN - 3)  # each block's input, and all of the one at hand
    return PROCESS_BYTES + state + exchange + 4 * images * kept * (trained / total if isinstance(spec, FinetuneSpec) else 1.0)
