"""`python -m mae_core.train spec.yaml --output DIR`: one run in this process, with no service, no Ray and no network.

The output folder gets `result/` (what the service would put into S3), `reconstructions.png`, `metrics.jsonl` and, while the run goes on,
`training_state.safetensors`, from which the same command goes on after an interruption.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mae_core.config import RUN_SPEC, PretrainSpec, Spec
from mae_core.errors import EncoderError, MaeError, SpecError
from mae_core.loop import Progress
from mae_core.options import DIGITS
from mae_core.run import Run
from mae_core.runs import open_run
from mae_core.world import World

_STATE = "training_state.safetensors"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mae_core.train", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/latest"))
    given = parser.parse_args(arguments)
    try:
        train(read_spec(given.spec), given.output)
    except MaeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def read_spec(path: Path) -> Spec:
    """The spec in a YAML file; relative data folders count from the current folder. Raises SpecError naming each wrong field."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{path}: a spec is a mapping of fields, such as kind, name and data")
    data = content.get("data")
    for name in ("source", "validation"):
        if isinstance(data, dict) and isinstance(data.get(name), str) and data[name] != DIGITS and "://" not in data[name]:
            data[name] = os.path.abspath(data[name])
    try:
        return RUN_SPEC.validate_python(content)
    except ValidationError as error:
        faults = [f"  {': '.join(filter(None, ['.'.join(map(str, fault['loc'][1:])), fault['msg']]))}" for fault in error.errors()]
        raise SpecError("\n".join([f"{path} is not a valid spec:", *faults])) from error


def train(spec: Spec, output: Path) -> Run:
    """Runs `spec` on one worker (its global batch unchanged), printing progress."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = open_run(_for_one_worker(spec), world=World(device=device), encoder_folder=_encoder_folder(spec))
    output.mkdir(parents=True, exist_ok=True)
    state_of = spec.model_dump_json(exclude={"name", "labels", "resources", "retry", "checkpoint"})
    kept: list[str] = []
    if run.resumes and (output / _STATE).exists():
        state = _load_state(output / _STATE, state_of)
        run.load_training_state(state)
        before = output / "metrics.jsonl"
        lines = before.read_text().splitlines(keepends=True) if before.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= int(state["step"])]
    started = time.monotonic()
    with (output / "metrics.jsonl").open("w", buffering=1) as metrics:  # by lines: a killed run leaves no half of one
        metrics.writelines(kept)
        for progress in run.progress(lambda: False):
            _tell(progress, metrics_to=metrics, seconds=time.monotonic() - started)
            if run.is_save_due(progress):
                save_file(run.training_state(), output / f"{_STATE}.new", metadata={"spec": state_of})
                os.replace(output / f"{_STATE}.new", output / _STATE)
    result = output / "result"
    result.mkdir(exist_ok=True)
    run.write_result(result)
    run.write_reconstructions(output / "reconstructions.png")
    (output / _STATE).unlink(missing_ok=True)
    print(json.dumps({"result": str(result), "metrics": run.metrics}))
    return run


def _load_state(path: Path, state_of: str) -> dict[str, Tensor]:
    """The training state at `path`. Raises EncoderError where it cannot be read or is of another spec than `state_of`."""
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise EncoderError(f"{path} cannot be read ({error}); delete it to start over") from error
    if metadata.get("spec") != state_of:
        raise EncoderError(f"{path} is the training state of another spec; choose another --output, or delete it to start over")
    return state


def _for_one_worker(spec: Spec) -> Spec:
    cpus = torch.get_num_threads()
    return spec.model_copy(update={"resources": spec.resources.model_copy(update={"num_workers": 1, "cpus_per_worker": cpus})})


def _encoder_folder(spec: Spec) -> Path | None:
    if isinstance(spec, PretrainSpec) or spec.encoder.init is not None:
        return None
    if spec.encoder.file is None:
        raise SpecError("encoder: without the service only {file: FOLDER} and {init: random} can be used")
    return Path(spec.encoder.file)


def _tell(progress: Progress, *, metrics_to: object, seconds: float) -> None:
    for step, values in progress.points:
        print(json.dumps({"step": step, **values}), file=metrics_to)  # type: ignore[call-overload]
    for key, why in progress.skipped.items():
        print(f"skipped {key}: {why}", file=sys.stderr)
    if progress.points and (progress.step % max(progress.num_steps // 50, 1) == 0 or progress.step == progress.num_steps):
        shown = " ".join(f"{name} {value:.6g}" for name, value in progress.points[-1][1].items())
        print(f"step {progress.step}/{progress.num_steps} epoch {progress.epoch:.2f} {shown} ({seconds:.0f} s)", flush=True)
    if progress.evaluated:
        print(" ".join(f"{name} {value:.4f}" for name, value in progress.evaluated.items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
