from pathlib import Path

import pytest

from mae_core.config import with_absolute_paths
from service.spec_file import SpecFileError, load_spec

PRETRAIN = """\
kind: pretrain
name: cells
model: {arch: vit_tiny_patch2, image_size: 8, in_chans: 1}
data:
  source: digits
"""


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    return tmp_path / "spec.yaml"


def error_of(file: Path, text: str) -> str:
    file.write_text(text)
    with pytest.raises(SpecFileError) as caught:
        load_spec(file, folder=file.parent)
    return str(caught.value).replace(str(file), "spec.yaml")


def test_a_spec_is_loaded_as_it_was_written(spec_file: Path) -> None:
    spec_file.write_text(PRETRAIN)
    spec = load_spec(spec_file, folder=spec_file.parent)
    assert spec["data"] == {"source": "digits"}
    assert "optim" not in spec


def test_relative_paths_start_from_the_folder(tmp_path: Path) -> None:
    spec = {
        "data": {"source": "images/cells", "validation": "../held-out"},
        "encoder": {"file": "encoder"},
        "evaluation": {"knn": 5, "labelled": {"source": "labelled"}},
    }
    assert with_absolute_paths(spec, folder=tmp_path / "here") == {
        "data": {"source": f"{tmp_path}/here/images/cells", "validation": f"{tmp_path}/held-out"},
        "encoder": {"file": f"{tmp_path}/here/encoder"},
        "evaluation": {"knn": 5, "labelled": {"source": f"{tmp_path}/here/labelled"}},
    }


@pytest.mark.parametrize("source", ["digits", "/data/cells", "s3://bucket/cells/"])
def test_other_sources_stay(source: str, tmp_path: Path) -> None:
    assert with_absolute_paths({"data": {"source": source}}, folder=tmp_path) == {"data": {"source": source}}


def test_the_home_folder_is_known(tmp_path: Path) -> None:
    assert with_absolute_paths({"data": {"source": "~/cells"}}, folder=tmp_path) == {"data": {"source": str(Path.home() / "cells")}}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("kind: pretrain\nname: [a\n", "spec.yaml:3: expected ',' or ']', but got '<stream end>'"),
        ("- a\n", "spec.yaml:1: a spec is a mapping"),
        ("", "spec.yaml:1: a spec is a mapping"),
        (PRETRAIN + "name: again\n", "spec.yaml:6: 'name' is given twice"),
        (PRETRAIN + "optim:\n  epochs: 10\n  batch_sise: 64\n", "spec.yaml:8: optim.batch_sise: is not a known field here"),
        (PRETRAIN + "optim:\n  epochs: 0\n", "spec.yaml:7: optim.epochs: Input should be greater than or equal to 1"),
        (
            PRETRAIN.replace("image_size: 8", "image_size: 9"),
            "spec.yaml:3: model: image_size: height 9 is not divisible by the patch size 2",
        ),
        (PRETRAIN.replace("pretrain", "pretrian"), "spec.yaml:1: kind: must be one of pretrain, probe, finetune, evaluate"),
        ("name: x\n", "spec.yaml:1: kind: must be one of pretrain, probe, finetune, evaluate"),
        (PRETRAIN.replace("data:\n  source: digits\n", ""), "spec.yaml:1: data.source: Field required"),
        ("kind: evaluate\nname: x\ndata: {source: digits}\nencoder: {job: y}\nknn: 0\n", "spec.yaml:5: knn: Input should be greater"),
        (PRETRAIN.replace("cells", "2024-01-01"), "spec.yaml:2: name: Input should be a valid string"),
    ],
)
def test_errors_name_file_line_and_field(spec_file: Path, text: str, error: str) -> None:
    assert error_of(spec_file, text).startswith(error)


def test_all_wrong_fields_are_told_at_once(spec_file: Path) -> None:
    message = error_of(spec_file, PRETRAIN + "seed: -1\nretry: {max_failures: many}\n")
    assert [line.split(" ")[0] for line in message.splitlines()] == ["spec.yaml:6:", "spec.yaml:7:"]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecFileError, match=r"missing\.yaml: cannot be read: No such file"):
        load_spec(tmp_path / "missing.yaml", folder=tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecFileError, match="no UTF-8"):
        load_spec(tmp_path / "binary.yaml", folder=tmp_path)


SPECS = sorted((Path(__file__).parents[2] / "deploy" / "specs").glob("*.yaml"))


@pytest.mark.parametrize("file", SPECS, ids=lambda file: file.name)
def test_every_example_spec_is_valid(file: Path) -> None:
    load_spec(file, folder=file.parent)


def test_there_are_example_specs() -> None:
    assert len(SPECS) >= 2
