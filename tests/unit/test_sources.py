from pathlib import Path
from typing import Any

import pytest

from mae_core.config import RUN_SPEC
from service.errors import Invalid
from service.sources import check_sources
from tests.unit.service_fixtures import PRETRAIN, PROBE

RGB = {"arch": "vit_tiny_patch2", "image_size": 8, "in_chans": 3}


def check(source: Path, *, labels: bool = False, **data: Any) -> None:
    base = PROBE | {"encoder": {"init": "random"}} if labels else PRETRAIN
    fraction = {"validation_fraction": 0.2} if labels and "validation" not in data else {}
    check_sources(RUN_SPEC.validate_python(base | {"model": RGB, "data": {"source": str(source)} | fraction | data}))


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def test_the_digits_need_no_folder() -> None:
    check_sources(RUN_SPEC.validate_python(PRETRAIN))


def test_images_anywhere_below_will_do(tmp_path: Path) -> None:
    image(tmp_path / "a" / "b" / "x.JPG")
    check(tmp_path)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"data\.source: the folder '.*nope' does not exist"):
        check(tmp_path / "nope")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    image(tmp_path / "x.jpg")
    with pytest.raises(Invalid, match="is not a folder"):
        check(tmp_path / "x.jpg")


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(Invalid, match=r"data\.source: .* holds no images \(\.jpg"):
        check(tmp_path)


def test_labels(tmp_path: Path) -> None:
    image(tmp_path / "cat" / "x.png")
    with pytest.raises(Invalid, match="only one class folder, 'cat'"):
        check(tmp_path, labels=True)
    image(tmp_path / "dog" / "x.png")
    (tmp_path / "empty").mkdir()
    check(tmp_path, labels=True)
    image(tmp_path / "loose.png")
    with pytest.raises(Invalid, match=r"labels are missing: 'loose\.png' lies in"):
        check(tmp_path, labels=True)
    check(tmp_path)


def test_validation_must_have_the_same_classes(tmp_path: Path) -> None:
    for name in ("train/cat", "train/dog", "test/cat", "test/cow"):
        image(tmp_path / name / "x.png")
    with pytest.raises(Invalid, match=r"data\.validation: .*cow, dog"):
        check(tmp_path / "train", labels=True, validation=str(tmp_path / "test"))
    with pytest.raises(Invalid, match=r"data\.validation: the folder .* does not exist"):
        check(tmp_path / "train", labels=True, validation=str(tmp_path / "nope"))


def test_an_evaluation_may_be_of_one_class(tmp_path: Path) -> None:
    """Its classes are the encoder's, which only the workers open."""
    image(tmp_path / "cat" / "x.npy")
    evaluate = {"kind": "evaluate", "name": "e", "encoder": {"init": "random"}, "model": RGB, "data": {"source": str(tmp_path)}}
    check_sources(RUN_SPEC.validate_python(evaluate))
    image(tmp_path / "loose.tif")
    with pytest.raises(Invalid, match=r"labels are missing: 'loose\.tif' lies in"):
        check_sources(RUN_SPEC.validate_python(evaluate))


def test_images_to_embed_need_no_labels(tmp_path: Path) -> None:
    embed = {"kind": "embed", "name": "e", "encoder": {"init": "random"}, "model": RGB, "data": {"source": str(tmp_path)}}
    with pytest.raises(Invalid, match="holds no images"):
        check_sources(RUN_SPEC.validate_python(embed))
    image(tmp_path / "x.png")
    check_sources(RUN_SPEC.validate_python(embed))


def test_labels_of_evaluations_during_a_pretraining(tmp_path: Path) -> None:
    def check_labelled(source: Path, **data: Any) -> None:
        labelled = {"source": str(source), **(data or {"validation_fraction": 0.2})}
        check_sources(RUN_SPEC.validate_python(PRETRAIN | {"evaluation": {"labelled": labelled}}))

    with pytest.raises(Invalid, match=r"evaluation\.labelled\.source: the folder '.*nope' does not exist"):
        check_labelled(tmp_path / "nope")
    for name in ("train/cat", "train/dog", "test/cat", "test/cow"):
        image(tmp_path / name / "x.png")
    check_labelled(tmp_path / "train")
    with pytest.raises(Invalid, match=r"evaluation\.labelled\.validation: .*not those of evaluation\.labelled\.source.*cow, dog"):
        check_labelled(tmp_path / "train", validation=str(tmp_path / "test"))
    (tmp_path / "train" / "dog" / "x.png").unlink()
    with pytest.raises(Invalid, match="only one class folder, 'cat'"):
        check_labelled(tmp_path / "train")
