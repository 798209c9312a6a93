"""`python -m benchmarks.cifar10_table`: what each way of the method is worth on CIFAR-10, on a few CPU cores and without the service.

A ViT-Tiny/8 is pretrained on a fixed part of the training images, by the full decoder, by one of cross attention that predicts half of
the masked patches, and with four masks of each decoded image, each for the same number of masked images. Every encoder is then
fine-tuned, whole and its last blocks alone, probed and asked for neighbours, with the same labels and the same budget, against the same
fine-tune from random weights; all are measured on the same test images. --variants also pretrains with one setting of the recipe `small`
changed at a time, and probes. Seeds run side by side, one thread each. Whatever is done is kept in --output, so that the same command
goes on where it was stopped. Prints a JSON line for each way, with seconds of processor time.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.cifar10 import prepare

Json = dict[str, Any]
MODEL = {"arch": "vit_tiny_patch8", "image_size": 32}
CROP = {"crop_scale": [0.4, 1.0]}
DECODERS: dict[str, Json] = {
    "full": {},
    "cross, half": {"decoder": {"depth": 2, "width": 192, "attention": "cross", "predict_fraction": 0.5}},
    "four masks": {"masking": {"ratio": 0.6, "num_masks": 4}},
}
VARIANTS: dict[str, Json] = {  # of the recipe, one setting at a time
    "ratio 0.75": {"masking": {"ratio": 0.75}},
    "crops from 0.2": {"data": {"transform": {"crop_scale": [0.2, 1.0]}}},
    "pixels as they are": {"target": {"norm_pix": False}},
    "rate x 2": {"optim": {"base_lr": 4e-3}},
}


def pretrain_spec(name: str, folders: dict[str, Path], seed: int, epochs: int) -> Json:
    changes = (DECODERS | VARIANTS)[name]
    views = changes.get("masking", {}).get("num_masks", 1)
    assert epochs % views == 0, "each way sees the same number of masked images"
    spec: Json = {
        "kind": "pretrain",
        "recipe": "small",
        "model": MODEL,
        "data": {"source": str(folders["train"]), "transform": CROP},
        "optim": {"epochs": epochs // views, "batch_size": 128, "base_lr": 2e-3, "warmup_epochs": 0.5 / views},
        "evaluation": {"every_epochs": epochs},
    }
    for section, fields in changes.items():
        spec[section] = spec.get(section, {}) | fields
    return spec | {"name": f"pretrain, {name}", "seed": seed}


def cells(folders: dict[str, Path], output: Path, seed: int, *, epochs: int, finetune_epochs: int, variants: bool) -> dict[str, Json]:
    """Every run of one seed by its name, in an order in which each comes behind those it needs."""
    labelled = {"source": str(folders["labelled"]), "validation": str(folders["test"])}

    def after(kind: str, encoder: Json, **more: Any) -> Json:
        spec: Json = {"kind": kind, "name": kind, "recipe": "small", "seed": seed, "model": MODEL, "encoder": encoder, "data": labelled}
        if kind == "finetune":
            spec["data"] = labelled | {"transform": CROP}
            spec["optim"] = {"epochs": finetune_epochs, "batch_size": 64, "base_lr": 4e-3, "warmup_epochs": 0.5}
        return spec | more

    runs = {"finetune, scratch": after("finetune", {"init": "random"})}
    for name in DECODERS:
        encoder = {"file": str(output / f"{seed}" / f"pretrain, {name}" / "result")}
        runs[f"pretrain, {name}"] = pretrain_spec(name, folders, seed, epochs)
        runs[f"finetune, {name}"] = after("finetune", encoder)
        runs[f"probe, {name}"] = after("probe", encoder)
        runs[f"knn, {name}"] = after("evaluate", encoder)
        if name == "full":
            runs["last 2 blocks, full"] = after("finetune", encoder, trainable_blocks=2)
    for name in VARIANTS if variants else ():
        encoder = {"file": str(output / f"{seed}" / f"pretrain, {name}" / "result")}
        runs |= {f"pretrain, {name}": pretrain_spec(name, folders, seed, epochs)}
        runs |= {f"probe, {name}": after("probe", encoder), f"knn, {name}": after("evaluate", encoder)}
    runs["probe, scratch"] = after("probe", {"init": "random"})
    runs["knn, scratch"] = after("evaluate", {"init": "random"})
    return runs


def run_seed(folders: dict[str, Path], output: Path, seed: int, epochs: int, finetune_epochs: int, variants: bool) -> None:
    """All runs of one seed that are not in `output` yet."""
    from mae_core.config import RUN_SPEC
    from mae_core.runs import open_run
    from mae_core.world import World

    runs = cells(folders, output, seed, epochs=epochs, finetune_epochs=finetune_epochs, variants=variants)
    for name, given in runs.items():
        folder = output / f"{seed}" / name
        if (folder / "measured.json").exists():
            continue
        (folder / "result").mkdir(parents=True, exist_ok=True)
        spec = RUN_SPEC.validate_python(given)
        encoder = given.get("encoder", {}).get("file")
        run = open_run(spec, world=World(), encoder_folder=Path(encoder) if encoder else None)
        started, cpu = time.monotonic(), time.process_time()
        for progress in run.progress(lambda: False):
            if progress.step % 50 == 0 and progress.points:
                print(
                    json.dumps({"seed": seed, "run": name, "step": progress.step, "of": progress.num_steps} | progress.points[-1][1]),
                    flush=True,
                )
            if progress.reconstructions is not None:
                progress.reconstructions.write_png(folder / "reconstructions.png")
        measured = {"metrics": run.metrics, "cpu_seconds": time.process_time() - cpu, "wall_seconds": time.monotonic() - started}
        run.write_result(folder / "result")
        (folder / "measured.json").write_text(json.dumps(measured | {"spec": spec.model_dump(mode="json")}))
        print(json.dumps({"seed": seed, "run": name} | measured), flush=True)


def lines(output: Path, seeds: int) -> list[Json]:
    """A line for each run that all seeds have done."""
    found = []
    for folder in sorted(path for path in (output / "0").iterdir() if (path / "measured.json").exists()):
        files = [output / f"{seed}" / folder.name / "measured.json" for seed in range(seeds)]
        if all(file.exists() for file in files):
            measured = [json.loads(file.read_text()) for file in files]
            name = next(name for name in ("val_accuracy", "top1", "loss") if name in measured[0]["metrics"])
            values = [each["metrics"][name] for each in measured]
            seconds = [each["cpu_seconds"] for each in measured]
            found.append(
                {
                    "name": "cifar10_table",
                    "run": folder.name,
                    "unit": name,
                    "value": statistics.mean(values),
                    "seeds": values,
                    "cpu_seconds": seconds,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cifar10_table", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/cifar10_table"))
    parser.add_argument("--epochs", type=int, default=8, help="of pretraining, counted in masked images")
    parser.add_argument("--finetune-epochs", type=int, default=8)
    parser.add_argument("--train", type=int, default=2000, help="images of each class to pretrain on")
    parser.add_argument("--labelled", type=int, default=500, help="images of each class with labels")
    parser.add_argument("--test", type=int, default=500, help="test images of each class")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--variants", action="store_true")
    given = parser.parse_args()
    output = given.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    chosen = output / "data" / "chosen"
    folders = {name: chosen / name for name in ("train", "labelled", "test")}
    if not chosen.exists():
        prepare(output / "data", num_train=given.train, num_labelled=given.labelled, num_test=given.test)
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=run_seed, args=(folders, output, seed, given.epochs, given.finetune_epochs, given.variants))
        for seed in range(given.seeds)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for line in lines(output, given.seeds):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
