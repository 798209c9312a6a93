import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mae_core import train as train_command
from mae_core.classifier import Classifier
from mae_core.encoders import load_encoder
from mae_core.export import write_classifier
from mae_core.loop import Progress, Training
from mae_core.options import ARCH_SIZES, ModelConfig, NormalizeConfig
from mae_core.saved_config import WEIGHTS
from mae_core.series import SERIES
from mae_core.train import main
from mae_core.vit import Encoder, initialise
from tests.unit.core_fixtures import SHALLOW, corrupt, image_folder

PROJECT = Path(__file__).parents[2]
STATES = "training_state"
DIGITS = """\
kind: pretrain
name: digits
model: {arch: vit_tiny_patch4, image_size: 8, in_chans: 1}
masking: {ratio: 0.75}
decoder: {depth: 1, width: 32}
data: {source: digits, validation_fraction: 0.5}
optim: {epochs: 2, batch_size: 256, base_lr: 1.0e-3, warmup_epochs: 1}
resources: {num_workers: 2}
"""


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCH_SIZES, "tiny", SHALLOW)


def spec_file(folder: Path, **changes: Any) -> Path:
    """Pretraining on 16 pictures: eight steps, with a state after each third."""
    if not (folder / "images").exists():
        image_folder(folder / "images")
    spec: dict[str, Any] = {
        "kind": "pretrain",
        "name": "pictures",
        "model": {"arch": "vit_tiny_patch4", "image_size": 8},
        "decoder": {"depth": 1, "width": 32},
        "data": {"source": str(folder / "images"), "max_corrupt_fraction": 0.5},
        "optim": {"epochs": 2, "batch_size": 4, "base_lr": 0.01, "warmup_epochs": 1},
        "checkpoint": {"every_steps": 3},
        "export": {"formats": []},
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec | changes))
    return path


def run(spec: Path, output: Path) -> int:
    code = main([str(spec), "--output", str(output)])
    told = metrics_of(output) if (output / "metrics.jsonl").exists() else []
    assert {name for line in told for name in line} <= {"step", *SERIES}, "mae_core.series says what each is"
    return code


def metrics_of(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def points_of(output: Path) -> list[dict[str, float]]:
    """What is told of steps, without the evaluations."""
    return [line for line in metrics_of(output) if "lr" in line]


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tell = train_command._tell

    def interrupting(progress: Progress, **more: Any) -> None:
        tell(progress, **more)
        if progress.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "_tell", interrupting)


def interrupted(spec: Path, output: Path, *, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that has ended behind step `at`."""
    with monkeypatch.context() as patched:
        interrupt_at(at, patched)
        with pytest.raises(KeyboardInterrupt):
            run(spec, output)


def saved_steps(output: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step=")) for folder in (output / STATES).iterdir())


def watch_steps(output: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Gets the steps taken, and how many points are on disk after each."""
    tell, seen = train_command._tell, dict[int, int]()

    def watching(progress: Progress, **more: Any) -> None:
        tell(progress, **more)
        seen[progress.step] = len(metrics_of(output))

    monkeypatch.setattr(train_command, "_tell", watching)
    return seen


def test_a_steps_figures_are_on_disk_before_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed has those of every step before its state, and no half of a line."""
    seen = watch_steps(tmp_path / "out", monkeypatch)
    assert run(spec_file(tmp_path), tmp_path / "out") == 0
    assert seen == {step: step for step in range(1, 9)}


def test_the_digits_from_spec_to_encoder_and_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.yaml").write_text(DIGITS)
    assert run(tmp_path / "spec.yaml", tmp_path / "out") == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    points = metrics_of(tmp_path / "out")
    assert [point["step"] for point in points] == list(range(1, 7))  # three batches an epoch
    assert said == {"result": str(tmp_path / "out" / "result"), "metrics": {"loss": points[-1]["loss"]}}
    assert (tmp_path / "out" / "reconstructions.png").stat().st_size > 1000
    with np.load(tmp_path / "out" / "reconstructions.npz") as arrays:
        assert arrays["prediction"].shape == arrays["input"].shape
    assert not (tmp_path / "out" / STATES).exists()
    wanted = ModelConfig(arch="vit_tiny_patch4", image_size=8, in_chans=1)
    load_encoder(tmp_path / "out" / "result", wanted=wanted)
    written = {path.name for path in (tmp_path / "out" / "result").iterdir() if path.is_dir()}
    assert written == {"hf", "hf-mae", "torch", "onnx", "torch_export"}

    probe = {
        "kind": "probe",
        "name": "digits",
        "encoder": {"file": str(tmp_path / "out" / "result")},
        "data": {"source": "digits", "validation_fraction": 0.5},
        "optim": {"epochs": 5, "batch_size": 128, "warmup_epochs": 1},
    }
    (tmp_path / "probe.yaml").write_text(yaml.safe_dump(probe))
    assert run(tmp_path / "probe.yaml", tmp_path / "probe") == 0
    accuracy = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]["val_accuracy"]
    assert 0.5 < accuracy <= 1


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_file(tmp_path)
    if kind == "finetune":
        content = yaml.safe_load(spec.read_text()) | {"kind": kind, "encoder": {"init": "random"}}
        content["data"]["validation_fraction"] = 0.25
        del content["decoder"]
        spec.write_text(yaml.safe_dump(content))
    assert run(spec, tmp_path / "undisturbed") == 0
    interrupted(spec, tmp_path / "interrupted", at=4, monkeypatch=monkeypatch)
    assert saved_steps(tmp_path / "interrupted") == [3]
    with monkeypatch.context() as patched:
        steps = watch_steps(tmp_path / "interrupted", patched)
        assert run(spec, tmp_path / "interrupted") == 0
    assert next(iter(steps)) == 4, "it goes on from its state, it does not start over"
    undisturbed, again = (load_file(tmp_path / name / "result" / WEIGHTS) for name in ("undisturbed", "interrupted"))
    assert all(torch.equal(undisturbed[name], again[name]) for name in undisturbed)
    losses, others = ({point["step"]: point["loss"] for point in points_of(tmp_path / name)} for name in ("undisturbed", "interrupted"))
    assert losses == others
    assert [point["step"] for point in points_of(tmp_path / "interrupted")] == list(range(1, len(losses) + 1))
    said = [json.loads(line)["metrics"] for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert said[0] == said[1]
    for name in ("undisturbed", "interrupted"):
        assert json.loads((tmp_path / name / "result" / "metrics.json").read_text()) == said[0]
        evaluated = [line for line in metrics_of(tmp_path / name) if "lr" not in line]
        assert evaluated == ([{"step": len(losses), "val_accuracy": said[0]["val_accuracy"]}] if kind == "finetune" else [])


def test_a_state_of_another_spec_is_not_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    interrupted(spec_file(tmp_path), output, at=4, monkeypatch=monkeypatch)
    assert run(spec_file(tmp_path, seed=1), output) == 1
    assert "is the training state of another spec; choose another --output, or delete it" in capsys.readouterr().err
    assert run(spec_file(tmp_path, name="renamed", checkpoint={"every_steps": 4}, export={"formats": ["torch"]}), output) == 0


def test_a_damaged_state_is_passed_over_and_an_unfinished_one_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    spec = spec_file(tmp_path, checkpoint={"every_steps": 1})
    interrupted(spec, output, at=7, monkeypatch=monkeypatch)
    kept = saved_steps(output)
    assert len(kept) == 2
    (output / STATES / "step=0000000009.unfinished").mkdir()
    newest = output / STATES / f"step={kept[-1]:010d}" / "state-00000.safetensors"
    newest.write_bytes(b"half a file")
    with monkeypatch.context() as patched:
        steps = watch_steps(output, patched)
        interrupt_at(kept[0] + 1, patched)
        with pytest.raises(KeyboardInterrupt):
            run(spec, output)
    assert next(step for step in steps if step != kept[0]) == kept[0] + 1  # an evaluation due at the state is made again
    assert re.search(r"the training state in .* cannot be read: .*; going back to the one before", capsys.readouterr().err)
    for file in (output / STATES).glob("step=*/*.safetensors"):
        file.write_bytes(b"half a file")
    assert run(spec, output) == 1
    assert re.search(rf"cannot be read: .*; delete {output / STATES} to start over\n$", capsys.readouterr().err)


def test_a_history_that_a_kill_has_damaged_keeps_its_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, spec = tmp_path / "out", spec_file(tmp_path)
    interrupted(spec, output, at=4, monkeypatch=monkeypatch)
    history = output / "metrics.jsonl"
    first, second, *others = history.read_text().splitlines()
    history.write_text("\n".join([first, second[:20], "[]", "3", *others, '{"step": 3, "val_accuracy": 1}', '{"ste']))
    assert run(spec, output) == 0
    assert [line["step"] for line in metrics_of(output)] == [1, *range(3, 9)]


def test_a_history_is_replaced_in_one_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, spec = tmp_path / "out", spec_file(tmp_path)
    interrupted(spec, output, at=4, monkeypatch=monkeypatch)
    before = (output / "metrics.jsonl").read_text()
    monkeypatch.delattr(train_command, "_is_before")
    with pytest.raises(NameError):
        run(spec, output)
    assert (output / "metrics.jsonl").read_text() == before


def diverging_at(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of these steps is not a number, each one once."""
    take_gradients = Training._take_gradients

    def diverging(training: Training, batches: Any) -> torch.Tensor:
        loss = take_gradients(training, batches)
        if training.step + 1 in steps:
            steps.remove(training.step + 1)
            for parameter in training.module.parameters():
                parameter.grad = None if parameter.grad is None else torch.full_like(parameter.grad, float("nan"))
            return loss * float("nan")
        return loss

    monkeypatch.setattr(Training, "_take_gradients", diverging)


def test_where_the_loss_is_not_finite_for_too_long_it_goes_back_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = {"epochs": 2, "batch_size": 4, "base_lr": 0.01, "warmup_epochs": 1, "max_dropped_steps": 1}
    spec = spec_file(tmp_path, optim=optim)
    assert run(spec, tmp_path / "undisturbed") == 0
    with monkeypatch.context() as patched:
        diverging_at([5, 6], patched)
        assert run(spec, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "dropped step 5 (loss nan" in said
    assert re.search(r"2 step\(s\) in a row had no finite loss .* the first: step 5 .*; going back to the newest training state", said)
    undisturbed, again = ({point["step"]: point["loss"] for point in points_of(tmp_path / name)} for name in ("undisturbed", "out"))
    assert again == undisturbed
    with monkeypatch.context() as patched:
        diverging_at([5, 5, 6, 6], patched)
        assert run(spec, tmp_path / "again") == 1
    assert "error: 2 step(s) in a row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- a list", "a spec is a mapping of fields"),
        ("kind: [", r"spec\.yaml: while parsing"),
        ("name: x", r"Unable to extract tag using discriminator 'kind'"),
        ("kind: train", r"'train' found using 'kind' does not match any of the expected tags: 'pretrain', 'probe', 'finetune'"),
        (DIGITS.replace("epochs: 2", "epochs: none"), r"\n  optim\.epochs: Input should be a valid integer"),
        (DIGITS.replace("256", "255"), r"\n  .*optim\.batch_size 255 is not divisible by 2 worker"),
        (DIGITS + "nonsense: 1\n", r"\n  nonsense: Extra inputs are not permitted"),
        (DIGITS.replace("source: digits", "source: nowhere").replace("in_chans: 1", "in_chans: 3"), r"folder /.*/nowhere does not exist"),
    ],
)
def test_errors_go_to_stderr_with_exit_code_1(content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.yaml").write_text(content)
    assert run(tmp_path / "spec.yaml", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert re.search(said, captured.err), captured.err
    assert "()" not in captured.err


def test_a_spec_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "missing.yaml", tmp_path) == 1
    assert "missing.yaml" in capsys.readouterr().err
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00kind")
    assert run(tmp_path / "binary.yaml", tmp_path) == 1
    assert "binary.yaml" in capsys.readouterr().err


def test_an_encoder_of_a_job_needs_the_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = {"kind": "probe", "name": "x", "encoder": {"job": "abc"}, "data": {"source": "digits", "validation_fraction": 0.2}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert run(tmp_path / "spec.yaml", tmp_path / "out") == 1
    assert "encoder: without the service only {file: PATH} and {init: random}" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{"knn": 5}, {"pooling": "cls"}, {}])
def test_an_evaluation_takes_no_settings_that_its_model_ignores(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = Encoder(ModelConfig(arch="vit_tiny_patch4", image_size=8))
    initialise(encoder, torch.Generator().manual_seed(0))
    classifier = Classifier(encoder, num_classes=2, pooling="mean", generator=torch.Generator())
    normalize = NormalizeConfig(mean=(0.5,) * 3, std=(0.25,) * 3)
    (tmp_path / "model").mkdir()
    write_classifier(classifier, tmp_path / "model", classes=["cat", "dog"], normalize=normalize)
    images = str(image_folder(tmp_path / "images"))
    spec = {"kind": "evaluate", "name": "x", "encoder": {"file": str(tmp_path / "model")}, "data": {"source": images}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec | given))
    assert run(tmp_path / "spec.yaml", tmp_path / "out") == bool(given)
    refused = [f"error: {name}: a fine-tuned model is measured by its own head and pooling; leave it out" for name in given]
    assert capsys.readouterr().err.splitlines() == refused


def test_unreadable_images_are_told_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = spec_file(tmp_path)
    corrupt(tmp_path / "images" / "cat" / "004.png")
    assert run(spec, tmp_path / "out") == 0
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped cat/004.png: ")]


def test_relative_folders_count_from_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_file(tmp_path, data={"source": "images"})
    monkeypatch.chdir(tmp_path)
    assert main([str(spec), "--output", "out"]) == 0
    assert (tmp_path / "out" / "result" / WEIGHTS).exists()


def test_as_a_program_it_fails_without_a_traceback(tmp_path: Path) -> None:
    spec = spec_file(tmp_path, data={"source": str(tmp_path / "nowhere")})
    done = subprocess.run([sys.executable, "-m", "mae_core.train", str(spec)], cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(rf"error: data: the folder {tmp_path}/nowhere does not exist .*\n", done.stderr)


def test_an_embedding_goes_on_with_the_part_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(tmp_path / "images")
    embed = {
        "kind": "embed",
        "name": "features",
        "encoder": {"init": "random"},
        "model": {"arch": "vit_tiny_patch4", "image_size": 8},
        "data": {"source": str(tmp_path / "images")},
        "batch_size": 4,
        "images_per_part": 8,
    }
    (tmp_path / "embed.yaml").write_text(yaml.safe_dump(embed))
    result = tmp_path / "out" / "result"
    interrupted(tmp_path / "embed.yaml", tmp_path / "out", at=3, monkeypatch=monkeypatch)
    [part] = result.glob("*.parquet")
    before = part.stat().st_ino
    assert run(tmp_path / "embed.yaml", tmp_path / "out") == 0
    assert [path.name for path in sorted(result.glob("*.parquet"))] == ["part-00000.parquet", "part-00001.parquet"]
    assert part.stat().st_ino == before
    assert json.loads((result / "metrics.json").read_text()) == {"num_images": 16, "num_unreadable": 0, "dim": SHALLOW[0]}
    assert json.loads((result / "embedding.json").read_text())["shape"] == [SHALLOW[0]]
