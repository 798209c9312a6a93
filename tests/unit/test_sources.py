from pathlib import Path
from typing import Any

import pytest

from mae_core.config import RUN_SPEC, Spec
from mae_core.packed import COLUMNS, PackedIndex
from service.errors import Invalid, StorageUnreachable
from service.sources import check_sources
from tests.unit.fake_storage import FakeStorage
from tests.unit.service_fixtures import PRETRAIN, PROBE

RGB = {"arch": "vit_tiny_patch2", "image_size": 8, "in_chans": 3}


def check(spec: Spec, storage: FakeStorage | None = None, *, sources_are_local: bool = True) -> None:
    check_sources(spec, storage or FakeStorage(), sources_are_local=sources_are_local)


def check_folder(source: Path, *, labels: bool = False, **data: Any) -> None:
    base = PROBE | {"encoder": {"init": "random"}} if labels else PRETRAIN
    fraction = {"validation_fraction": 0.2} if labels and "validation" not in data else {}
    check(RUN_SPEC.validate_python(base | {"model": RGB, "data": {"source": str(source)} | fraction | data}))


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def test_the_digits_need_no_folder() -> None:
    check(RUN_SPEC.validate_python(PRETRAIN))


def test_images_anywhere_below_will_do(tmp_path: Path) -> None:
    image(tmp_path / "a" / "b" / "x.JPG")
    check_folder(tmp_path)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"data\.source: the folder '.*nope' does not exist"):
        check_folder(tmp_path / "nope")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    image(tmp_path / "x.jpg")
    with pytest.raises(Invalid, match="is not a folder"):
        check_folder(tmp_path / "x.jpg")


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(Invalid, match=r"data\.source: .* holds no images \(\.jpg"):
        check_folder(tmp_path)


def test_labels(tmp_path: Path) -> None:
    image(tmp_path / "cat" / "x.png")
    with pytest.raises(Invalid, match="only one class folder, 'cat'"):
        check_folder(tmp_path, labels=True)
    image(tmp_path / "dog" / "x.png")
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path, labels=True)
    image(tmp_path / "loose.png")
    with pytest.raises(Invalid, match=r"labels are missing: 'loose\.png' lies in"):
        check_folder(tmp_path, labels=True)
    check_folder(tmp_path)


def test_validation_must_have_the_same_classes(tmp_path: Path) -> None:
    for name in ("train/cat", "train/dog", "test/cat", "test/cow"):
        image(tmp_path / name / "x.png")
    with pytest.raises(Invalid, match=r"data\.validation: .*cow, dog"):
        check_folder(tmp_path / "train", labels=True, validation=str(tmp_path / "test"))
    with pytest.raises(Invalid, match=r"data\.validation: the folder .* does not exist"):
        check_folder(tmp_path / "train", labels=True, validation=str(tmp_path / "nope"))


def test_an_evaluation_may_be_of_one_class(tmp_path: Path) -> None:
    """Its classes are the encoder's, which only the workers open."""
    image(tmp_path / "cat" / "x.npy")
    evaluate = {"kind": "evaluate", "name": "e", "encoder": {"init": "random"}, "model": RGB, "data": {"source": str(tmp_path)}}
    check(RUN_SPEC.validate_python(evaluate))
    image(tmp_path / "loose.tif")
    with pytest.raises(Invalid, match=r"labels are missing: 'loose\.tif' lies in"):
        check(RUN_SPEC.validate_python(evaluate))


def test_images_to_embed_need_no_labels(tmp_path: Path) -> None:
    embed = {"kind": "embed", "name": "e", "encoder": {"init": "random"}, "model": RGB, "data": {"source": str(tmp_path)}}
    with pytest.raises(Invalid, match="holds no images"):
        check(RUN_SPEC.validate_python(embed))
    image(tmp_path / "x.png")
    check(RUN_SPEC.validate_python(embed))


def test_labels_of_evaluations_during_a_pretraining(tmp_path: Path) -> None:
    def check_labelled(source: Path, **data: Any) -> None:
        labelled = {"source": str(source), **(data or {"validation_fraction": 0.2})}
        check(RUN_SPEC.validate_python(PRETRAIN | {"evaluation": {"labelled": labelled}}))

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


def index(**changes: Any) -> str:
    file = {"name": "offsets.bin", "bytes": 1, "sha256": "0" * 64}
    content: dict[str, Any] = {
        "made_of": "",
        "num_images": 100,
        "num_unreadable": 0,
        "channels": 3,
        "classes": ["cat", "dog"],
        "statistics": {"mean": [0, 0, 0], "std": [1, 1, 1]},
        "columns": dict.fromkeys(COLUMNS, file),
        "shards": [file | {"name": "shard-000000.tar", "num_images": 100}],
    }
    return PackedIndex.model_validate(content | changes).model_dump_json()


def labelled_spec(place: str, **data: Any) -> Spec:
    given = {"source": place, "validation_fraction": 0.2} | data
    return RUN_SPEC.validate_python(PROBE | {"encoder": {"init": "random"}, "model": RGB, "data": given})


def pretrain_spec(place: str, batch_size: int = 8) -> Spec:
    optim = PRETRAIN["optim"] | {"batch_size": batch_size}
    return RUN_SPEC.validate_python(PRETRAIN | {"model": RGB, "data": {"source": place}, "optim": optim})


@pytest.mark.parametrize("sources_are_local", [True, False])
def test_packed_images_in_storage(sources_are_local: bool) -> None:
    storage = FakeStorage()
    storage.objects["photos", "packed/index.json"] = index().encode()
    for place in ("s3://photos/packed", "s3://photos/packed/"):
        check(pretrain_spec(place), storage, sources_are_local=sources_are_local)
        check(labelled_spec(place), storage, sources_are_local=sources_are_local)
    with pytest.raises(Invalid, match=r"optim\.batch_size: 128 is more than the 100 images"):
        check(pretrain_spec("s3://photos/packed", batch_size=128), storage)
    storage.objects["photos", "packed/index.json"] = index(classes=[]).encode()
    with pytest.raises(Invalid, match=r"data\.source: labels are missing: .*was packed without classes"):
        check(labelled_spec("s3://photos/packed"), storage)
    storage.objects["photos", "packed/index.json"] = index().encode().replace(b'"version":1', b'"version":7')
    with pytest.raises(Invalid, match=r"index\.json is damaged or of another version \(version"):
        check(pretrain_spec("s3://photos/packed"), storage)


def test_classes_of_packed_images_and_of_folders_are_compared(tmp_path: Path) -> None:
    storage = FakeStorage()
    storage.objects["photos", "packed/index.json"] = index(classes=["cat", "fox"]).encode()
    for name in ("cat", "dog"):
        image(tmp_path / name / "x.png")
    with pytest.raises(Invalid, match=r"not those of data\.source; only one of the two has dog, fox"):
        check(labelled_spec("s3://photos/packed", validation=str(tmp_path), validation_fraction=0), storage)


def test_images_below_a_prefix() -> None:
    storage = FakeStorage()
    storage.objects["photos", "cells/cat/a.PNG"] = b""
    check(pretrain_spec("s3://photos/cells"), storage)
    check(labelled_spec("s3://photos/cells"), storage)  # whether they have labels is for the workers to find out
    with pytest.raises(Invalid, match=r"below s3://photos/cel there are neither packed images \(index\.json\) nor images"):
        check(pretrain_spec("s3://photos/cel"), storage)


def test_results_of_jobs_are_no_images() -> None:
    storage = FakeStorage()
    storage.objects["maestro", "jobs/other/reconstructions/step=1.png"] = b""
    with pytest.raises(Invalid, match="lies among the results of jobs"):
        check(pretrain_spec("s3://maestro/jobs/other/reconstructions/"), storage)
    storage.is_down = True
    with pytest.raises(StorageUnreachable):
        check(pretrain_spec("s3://photos/cells"), storage)


def test_a_packed_folder(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(index())
    check(labelled_spec(str(tmp_path)))
    (tmp_path / "index.json").write_text('{"kind": "of something else"}')
    with pytest.raises(Invalid, match="holds no images"):
        check(labelled_spec(str(tmp_path)))
    check(labelled_spec(str(tmp_path)), sources_are_local=False)
