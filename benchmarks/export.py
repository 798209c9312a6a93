"""`python -m benchmarks.export`: images/s of our encoder alone, to pooled features, against timm's model of the same size.

All have the same weights and see the same images in memory, in turn, in float32 on pinned threads: our own encoder as features are encoded
here, timm's model opened from what we export, and in `others` what ONNX Runtime, torch.export and Hugging Face make of the same export.
Figures are medians of images per second: of wall time, and in `cpu` of the process's CPU time. `export_seconds`: processor seconds that
writing and testing all formats took. Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from mae_core.config import PretrainSpec
from mae_core.export import write_encoder
from mae_core.exports.trained import Sample, Trained
from mae_core.exports.write import write_exports
from mae_core.features import features_of
from mae_core.mae import MaskedAutoencoder
from mae_core.options import ModelConfig
from mae_core.provenance import provenance
from mae_core.vit import Encoder, initialise
from tests.torchvision_ops import import_torchvision

import_torchvision()
import timm  # noqa: E402  (needs the line above)
from transformers import ViTModel  # noqa: E402

Way = Callable[[Tensor], Tensor]


def measure(folder: Path, *, model: ModelConfig, batch_size: int, rounds: int) -> dict[str, Any]:
    """Every way in turn, `rounds` times, each time in another order; `folder` gets the exports."""
    started = time.process_time()
    encoder = export(folder, model)
    export_seconds = time.process_time() - started
    images_BCHW = torch.randn(batch_size, model.in_chans, *model.image_size, generator=torch.Generator().manual_seed(1))
    every = ways(folder, encoder)
    with torch.inference_mode():
        expected = every["ours"](images_BCHW)
        differences = {name: float((way(images_BCHW) - expected).abs().max()) for name, way in every.items()}
        assert max(differences.values()) < 1e-4, differences
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in every}
        names = list(every)
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                wall, cpu = time.perf_counter(), time.process_time()
                every[name](images_BCHW)
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    wall_rates, cpu_rates = (
        {name: batch_size / statistics.median(each[place] for each in taken) for name, taken in seconds.items()} for place in (0, 1)
    )
    return {
        "name": "export",
        "unit": "images/s",
        "ours": wall_rates["ours"],
        "peer": wall_rates["timm"],
        "peer_name": "timm forward_features",
        "ratio": wall_rates["ours"] / wall_rates["timm"],
        "device": "cpu",
        "cpu": {"ours": cpu_rates["ours"], "peer": cpu_rates["timm"], "ratio": cpu_rates["ours"] / cpu_rates["timm"]},
        "others": {name: rate for name, rate in wall_rates.items() if name not in ("ours", "timm")},
        "max_difference": differences,
        "export_seconds": export_seconds,
        "arch": model.arch,
        "image_size": model.image_size,
        "batch_size": batch_size,
        "rounds": rounds,
        "num_threads": torch.get_num_threads(),
    }


def export(folder: Path, model: ModelConfig) -> Encoder:
    """An encoder of random weights in every format."""
    spec = PretrainSpec.model_validate({"kind": "pretrain", "name": "benchmark", "model": model.model_dump(), "data": {"source": "/none"}})
    mae = MaskedAutoencoder(Encoder(model), masking=spec.masking, decoder=spec.decoder, target=spec.target)
    initialise(mae, torch.Generator().manual_seed(0))
    normalize = spec.data.normalize_for(model.in_chans)
    write_encoder(mae.encoder, folder, normalize=normalize)
    trained = Trained(
        spec=spec,
        module=mae.encoder,
        mae=mae,
        classes=[],
        normalize=normalize,
        sample=Sample(torch.randn(3, model.in_chans, *model.image_size), resized=True),
        num_images=0,
        metrics={},
    )
    left_out = {
        name: outcome.left_out for name, outcome in write_exports(trained, folder, made_by=provenance()).items() if outcome.left_out
    }
    assert not left_out, left_out
    return mae.encoder.eval()


def ways(folder: Path, encoder: Encoder) -> dict[str, Way]:
    """Images (B, C, H, W) to the mean of the patch tokens (B, D), by each library from its own export."""
    in_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    program = torch.export.load(folder / "torch_export/model.pt2").module()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads would slow whoever comes next
    session = onnxruntime.InferenceSession(folder / "onnx/model.onnx", options, providers=["CPUExecutionProvider"])
    in_hf = ViTModel.from_pretrained(folder / "hf", add_pooling_layer=False).eval()
    return {
        "ours": features_of(encoder, "mean"),
        "timm": lambda images: in_timm.forward_features(images)[:, 1:].mean(dim=1),
        "onnx": lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])[:, 1:].mean(dim=1),
        "torch-export": lambda images: program(images)["features"][:, 1:].mean(dim=1),
        "hf": lambda images: in_hf(images).last_hidden_state[:, 1:].mean(dim=1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("--arch", default="vit_base_patch16")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    with tempfile.TemporaryDirectory() as folder:
        model = ModelConfig(arch=given.arch, image_size=given.image_size)
        print(json.dumps(measure(Path(folder), model=model, batch_size=given.batch_size, rounds=given.rounds)), flush=True)


if __name__ == "__main__":
    main()
