"""The model card of each format: what made it, of which data, how good it is, and how it is loaded in three lines of Python.

The lines are run by the tests as they stand here, in the folder of the card.
"""

import json
from pathlib import Path

from mae_core.classifier import Classifier
from mae_core.config import FinetuneSpec, PretrainSpec
from mae_core.exports.formats import FOLDERS, ExportFormat, ExportOutcome, Outcomes
from mae_core.exports.trained import Trained
from mae_core.provenance import Provenance

CARD = "README.md"
_LIBRARIES: dict[ExportFormat, str] = {
    "timm": "timm",
    "hf": "transformers",
    "hf-mae": "transformers",
    "torch": "pytorch",
    "onnx": "onnx",
    "torch-export": "pytorch",
}
_TITLES: dict[ExportFormat, str] = {
    "timm": "in timm's layout",
    "hf": "in the layout of Hugging Face transformers",
    "hf-mae": "in the layout of Hugging Face transformers, with its decoder",
    "torch": "as a checkpoint with the names of the MAE authors' code",
    "onnx": "as an ONNX graph",
    "torch-export": "as a program of torch.export",
}


def write_cards(trained: Trained, folder: Path, outcomes: Outcomes, made_by: Provenance) -> None:
    """A card into the folder of each format that was written; timm's, in `folder` itself, also tells of those that were not."""
    for name, outcome in outcomes.items():
        if outcome.difference is None:
            continue
        sections = [_head(trained, name), _title(trained, name), _facts(trained, outcome.difference, made_by), _loading(trained, name)]
        if name == "timm":
            sections.append(_formats(outcomes))
        (folder / FOLDERS[name] / CARD).write_text("\n\n".join(sections) + "\n")


def loading_lines(trained: Trained, name: ExportFormat) -> list[str]:
    """Three lines that load the model in `name` from the current folder and run it on `images`."""
    has_head = bool(trained.classes)
    match name:
        case "timm":
            out = "logits = model(images)" if has_head else "features = model.forward_features(images)"
            return ["import timm", 'model = timm.create_model("local-dir:.", pretrained=True).eval()', out]
        case "hf" if has_head:
            load, out = 'ViTForImageClassification.from_pretrained(".")', "logits = model(images).logits"
        case "hf":
            load, out = 'ViTModel.from_pretrained(".", add_pooling_layer=False)', "features = model(images).last_hidden_state"
        case "hf-mae":
            load, out = 'ViTMAEForPreTraining.from_pretrained(".")', "prediction = model(images).logits"
        case "torch":
            state = 'torch.load("model.pth", weights_only=True)["model"]'
            return ["import timm, torch", f"model = {_timm_model(trained)}", f"model.load_state_dict({state}, strict={has_head})"]
        case "onnx":
            out = f'["{"logits" if has_head else "features"}"], {{"images": images.numpy()}}'
            return ["import onnxruntime", 'session = onnxruntime.InferenceSession("model.onnx")', f"[output] = session.run({out})"]
        case "torch-export":
            out = "logits" if has_head else "features"
            return ["import torch", 'model = torch.export.load("model.pt2").module()', f'{out} = model(images)["{out}"]']
    return [f"from transformers import {load.partition('.')[0]}", f"model = {load}.eval()", out]


def _timm_model(trained: Trained) -> str:
    model, module = trained.model, trained.module
    arguments = {
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "in_chans": model.in_chans,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "num_classes": len(trained.classes),
        "global_pool": "avg" if isinstance(module, Classifier) and module.pooling == "mean" else "token",
    }
    return f"timm.models.VisionTransformer({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"


def _head(trained: Trained, name: ExportFormat) -> str:
    """What hubs of models read: YAML, of which JSON is a part."""
    fields: dict[str, object] = {"library_name": _LIBRARIES[name], "tags": ["masked-autoencoder", "vision-transformer", "maestro"]}
    if trained.spec.export.license is not None:
        fields = {"license": trained.spec.export.license} | fields
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"])


def _title(trained: Trained, name: ExportFormat) -> str:
    model = trained.model
    height, width = model.image_size
    what = f"fine-tuned into {len(trained.classes)} classes" if trained.classes else "pretrained as a masked autoencoder (He et al. 2021)"
    return (
        f"# {_one_line(trained.spec.name)}\n\n"
        f"A `{model.arch}` for images of {height} x {width} pixels in {model.in_chans} channel(s), {what}, {_TITLES[name]}."
    )


def _facts(trained: Trained, difference: float, made_by: Provenance) -> str:
    spec, normalize = trained.spec, trained.normalize
    versions = ", ".join(f"{library} {version}" for library, version in made_by.versions.items())
    numbers = {name: value for name, value in trained.metrics.items() if isinstance(value, int | float)}
    rows = {
        "made by": f"MAEstro, {f'job `{made_by.job}`' if made_by.job else 'without a service'}, commit {made_by.git_revision or 'unknown'}",
        "with": versions,
        "recipe": f"`{spec.recipe}`, {spec.kind}, {spec.optim.epochs} epochs of batches of {spec.optim.batch_size}, seed {spec.seed}",
        "started from": _start(spec),
        "data": f"`{_one_line(spec.data.source)}`, {trained.num_images} images",
        "statistics": f"mean {list(normalize.mean)}, standard deviation {list(normalize.std)}, of pixels in [0, 1]",
        "metrics": ", ".join(f"{name} {value:.6g}" for name, value in numbers.items()) or "none",
        "licence": spec.export.license or "not given",
        "difference": f"{difference:.2g} at most between its outputs and the trained model's, on {len(trained.sample.images_BCHW)} images",
    }
    if trained.classes:
        rows["classes"] = ", ".join(f"`{_one_line(name)}`" for name in trained.classes)
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in rows.items())])


def _start(spec: PretrainSpec | FinetuneSpec) -> str:
    named = spec.encoder.model_dump(exclude_none=True, exclude={"init"}) if spec.encoder is not None else {}
    return f"`{_one_line(next(iter(named.values())))}`" if named else "random weights"


def _loading(trained: Trained, name: ExportFormat) -> str:
    notes = ["`images` are float32 (B, C, H, W), with the mean and the standard deviation above."]
    if name in ("hf", "hf-mae"):
        notes.append('`AutoImageProcessor.from_pretrained(".")` makes them of 8-bit images.')
    if name == "hf-mae":
        notes.append("It masks at random; with `noise=` the smallest numbers (B, L) say what is kept.")
        if trained.spec.kind == "pretrain" and trained.spec.target.loss_on == "all":
            notes.append("Its loss is that of masked patches; this run's was of all.")
    if name == "torch" and trained.mae is not None:
        notes.append("The decoder's tensors, where they are there, are what timm's model has no place for.")
    if name in ("onnx", "torch-export"):
        outputs = "`features` (the tokens)" + (" and `logits`" if trained.classes else "")
        notes.append(f"Any number of images goes in; out come {outputs}.")
    return "\n".join(["In this folder:", "", "```python", *loading_lines(trained, name), "```", "", *notes])


def _formats(outcomes: Outcomes) -> str:
    rows = [f"| {name} | `{FOLDERS[name] or './'}` | {_outcome(outcome)} |" for name, outcome in outcomes.items()]
    return "\n".join(["## Other formats", "", "| format | folder | largest difference |", "|---|---|---|", *rows])


def _outcome(outcome: ExportOutcome) -> str:
    return f"left out: {_one_line(outcome.left_out or '')}" if outcome.difference is None else f"{outcome.difference:.2g}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
