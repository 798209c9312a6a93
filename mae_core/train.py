"""`python -m mae_core.train spec.yaml --output DIR`: one run in this process, with no service, no Ray and no network.

The output folder gets `result/` (what the service would put into S3, and the final `metrics.json`), `reconstructions.png` and `.npz`,
`metrics.jsonl` (a line for each step and each evaluation) and, while the run goes on, `training_state/`, from which the same command
goes on after an interruption.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from mae_core.config import RUN_SPEC, EvaluateSpec, Spec, with_absolute_paths
from mae_core.encoders import has_head
from mae_core.errors import DivergedError, MaeError, SpecError
from mae_core.loop import Progress
from mae_core.memory import keep_memory
from mae_core.provenance import provenance
from mae_core.run import Run
from mae_core.runs import open_run
from mae_core.state_folder import StateFolder
from mae_core.stores import FolderParts
from mae_core.world import World

RESULT = "result"
_SAYS_NOTHING_OF_THE_STATE: dict[str, Any] = {
    **dict.fromkeys(("name", "labels", "resources", "retry", "checkpoint", "evaluation", "evaluate_every_epochs", "export"), True),
    "optim": {"batch_size_per_device": True, "max_dropped_steps": True},
}


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
    try:
        return RUN_SPEC.validate_python(with_absolute_paths(content, folder=Path.cwd()))
    except ValidationError as error:
        faults = [f"  {': '.join(filter(None, ['.'.join(map(str, fault['loc'][1:])), fault['msg']]))}" for fault in error.errors()]
        raise SpecError("\n".join([f"{path} is not a valid spec:", *faults])) from error


def train(spec: Spec, output: Path) -> Run:
    """Runs `spec` on one worker (its global batch unchanged), printing progress.

    Where the loss is not finite for too long, it goes back to its newest training state, once. Raises DivergedError the second time.
    """
    output.mkdir(parents=True, exist_ok=True)
    states = StateFolder(output / "training_state", spec.model_dump_json(exclude=_SAYS_NOTHING_OF_THE_STATE))
    run = _train(spec, output, states)
    if isinstance(run, DivergedError):
        print(f"{run}; going back to the newest training state", file=sys.stderr)
        run = _train(spec, output, states)
    if isinstance(run, DivergedError):
        raise run
    result = output / RESULT
    result.mkdir(exist_ok=True)
    run.write_result(result)
    for name, outcome in run.write_exports(result, provenance()).items():
        if outcome.left_out is not None:
            print(f"format {name} left out: {outcome.left_out}", file=sys.stderr)
    (result / "metrics.json").write_text(f"{json.dumps(run.metrics)}\n")
    states.remove()
    print(json.dumps({"result": str(result), "metrics": run.metrics}))
    return run


def _train(spec: Spec, output: Path, states: StateFolder) -> Run | DivergedError:
    """From the newest training state to the end, or to where it diverged. Steps behind that state leave `metrics.jsonl`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = FolderParts(output / RESULT)
    run = open_run(_for_one_worker(spec), world=World(device=device), encoder_folder=_encoder_folder(spec), parts=parts)
    step = states.take_up(run) if run.resumes else 0
    _keep_lines(output / "metrics.jsonl", before=step)
    started = time.monotonic()
    with (output / "metrics.jsonl").open("a", buffering=1) as metrics:  # by lines: a killed run leaves no half of one
        try:
            for progress in run.progress(lambda: False, states.is_ready):
                _tell(progress, output=output, metrics_to=metrics, seconds=time.monotonic() - started)
                if progress.save_agreed:
                    states.save(progress.step, run.training_state())
        except DivergedError as error:
            if not run.resumes:
                raise
            return error.with_traceback(None)  # without the frames that hold the run
        finally:
            states.wait()
    return run


def _keep_lines(path: Path, *, before: int) -> None:
    """Keeps the lines up to a training state's step, all at once; an evaluation made at that step will be made again."""
    lines = path.read_text().splitlines() if path.exists() else []
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(f"{line}\n" for line in lines if _is_before(line, before)))
    unfinished.replace(path)


def _is_before(line: str, state_step: int) -> bool:
    """Whether a line of metrics tells of what a state of `state_step` has seen. What a full disk left of a line does not."""
    try:
        values = json.loads(line)
        return int(values["step"]) < state_step + ("lr" in values)  # a step's own figures, unlike an evaluation's, have a learning rate
    except (ValueError, TypeError, KeyError):
        return False


def _for_one_worker(spec: Spec) -> Spec:
    cpus = torch.get_num_threads()
    return spec.model_copy(update={"resources": spec.resources.model_copy(update={"num_workers": 1, "cpus_per_worker": cpus})})


def _encoder_folder(spec: Spec) -> Path | None:
    if spec.encoder is None or spec.encoder.init is not None:
        return None
    if spec.encoder.file is None:
        raise SpecError("encoder: without the service only {file: PATH} and {init: random} can be used")
    folder = Path(spec.encoder.file)
    ignored = spec.model_fields_set & {"knn", "pooling"}
    if isinstance(spec, EvaluateSpec) and ignored and has_head(folder):  # here, where the spec is as its user wrote it
        raise SpecError(f"{', '.join(sorted(ignored))}: a fine-tuned model is measured by its own head and pooling; leave it out")
    return folder


def _tell(progress: Progress, *, output: Path, metrics_to: object, seconds: float) -> None:
    evaluated = [(progress.step, progress.evaluated)] if progress.evaluated else []
    for step, values in [*progress.points, *evaluated]:
        print(json.dumps({"step": step, **values}), file=metrics_to)  # type: ignore[call-overload]
    for key, why in progress.skipped.items():
        print(f"skipped {key}: {why}", file=sys.stderr)
    for dropped in progress.dropped:
        print(f"dropped {dropped}", file=sys.stderr)
    if progress.reconstructions is not None:
        progress.reconstructions.write_png(output / "reconstructions.png")
        progress.reconstructions.write_arrays(output / "reconstructions.npz")
    if progress.points and (progress.step % max(progress.num_steps // 50, 1) == 0 or progress.step == progress.num_steps):
        shown = " ".join(f"{name} {value:.6g}" for name, value in progress.points[-1][1].items())
        print(f"step {progress.step}/{progress.num_steps} epoch {progress.epoch:.2f} {shown} ({seconds:.0f} s)", flush=True)
    if progress.evaluated:
        print(" ".join(f"{name} {value:.4f}" for name, value in progress.evaluated.items()), flush=True)


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
