import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mae_core.data.decode import UnreadableImage
from mae_core.data.names import printable
from mae_core.data.source import DigitsSource, FolderSource, LabelledData, check_same_images, open_source, split
from mae_core.errors import DataError
from mae_core.options import DataConfig
from mae_core.world import World
from tests.unit.core_fixtures import PictureSource, image_folder, picture
from tests.unit.threaded_world import by_workers

FROZEN_SPLIT = [1, 2, 3, 6, 7, 8, 11, 17, 18]


def data_config(source: Path, **more: object) -> DataConfig:
    return DataConfig.model_validate({"source": str(source), **more})


def test_class_folders_in_sorted_order(tmp_path: Path) -> None:
    for name in ("dog/b.png", "cat/deep/er/z.PNG", "dog/a.jpeg", "cat/y.webp", "dog/a.txt", "cat/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    source = FolderSource(tmp_path, 3)
    assert list(source.keys) == ["cat/deep/er/z.PNG", "cat/y.webp", "dog/a.jpeg", "dog/b.png"]
    assert list(source.classes) == ["cat", "dog"]
    assert list(source.labels) == [0, 0, 1, 1]


def test_images_beside_the_class_folders_mean_no_labels(tmp_path: Path) -> None:
    image_folder(tmp_path, per_class=1)
    picture(0).save(tmp_path / "beside.png")
    source = FolderSource(tmp_path, 3)
    assert list(source.keys) == ["beside.png", "cat/000.png", "dog/000.png"]
    assert not source.classes
    assert not source.labels


def test_a_missing_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"folder .*/nowhere does not exist.*check data\.source"):
        open_source(str(tmp_path / "nowhere"), in_chans=3)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"no images below .*looked for \.jpg, \.jpeg"):
        open_source(str(tmp_path), in_chans=3)


def test_a_folder_that_cannot_be_listed_is_no_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out in silence, its images would be missing on one worker and not on another."""
    image_folder(tmp_path)
    scandir = os.scandir

    def forbidding(place: str) -> object:
        if str(place).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", forbidding)
    with pytest.raises(DataError, match=r"folder .*/dog cannot be read.*Permission denied"):
        FolderSource(tmp_path, 3)


def test_an_image_of_other_channels_is_told_of_when_the_source_is_opened(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")  # counted later, as any unreadable image
    np.save(tmp_path / "c.npy", np.zeros((4, 6, 7), dtype=np.uint16))
    with pytest.raises(DataError, match=r"data: .*/c\.npy: 7 channel\(s\) .*model\.in_chans is 5; set model\.in_chans to 7"):
        open_source(str(tmp_path), in_chans=5)
    assert len(open_source(str(tmp_path), in_chans=7).keys) == 3
    np.save(tmp_path / "c.npy", np.zeros((4, 6, 5), dtype=np.int64))
    with pytest.raises(DataError, match=r"/c\.npy: its pixels are int64; save them as uint8, uint16 or float32"):
        open_source(str(tmp_path), in_chans=5)


def test_opening_a_source_reads_no_more_than_a_few_unreadable_images(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02d}.png").write_bytes(b"no image")
    np.save(tmp_path / "99.npy", np.zeros((4, 6, 7), dtype=np.uint16))
    assert len(open_source(str(tmp_path), in_chans=3).keys) == 21


def test_an_image_that_vanished_is_unreadable(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    source = FolderSource(tmp_path, 3)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UnreadableImage, match=r"a\.png"):
        source.read(0)


def test_the_digits() -> None:
    source = DigitsSource()
    assert len(source.keys) == len(source.labels) == 1797
    assert list(source.classes) == [str(digit) for digit in range(10)]
    image = np.asarray(source.read(0))
    assert image.shape == (8, 8)
    assert image.max() > 200  # 16 levels spread over 256


def test_the_digits_are_scikit_learns() -> None:
    ours, theirs = DigitsSource(), load_digits()
    np.testing.assert_array_equal([np.asarray(ours.read(index)) for index in range(1797)], np.rint(theirs.images * (255 / 16)))
    assert ours.labels == theirs.target.tolist()


def test_the_split_goes_by_key_alone() -> None:
    few, many = PictureSource(500), PictureSource(1000)
    train, held_back = split(few, 0.2)
    assert sorted(train + held_back) == list(range(500))
    assert 60 < len(held_back) < 140
    more_train, more_held_back = split(many, 0.2)
    assert {few.keys[index] for index in held_back} == {many.keys[index] for index in more_held_back} & set(few.keys)
    assert set(split(few, 0.1)[1]) < set(held_back)
    assert split(few, 0.0) == (list(range(500)), [])
    assert len(more_train) + len(more_held_back) == 1000


def test_the_split_never_changes_between_releases() -> None:
    """Else a probe would measure on images that its encoder was trained on."""
    assert split(PictureSource(20), 0.3)[1] == FROZEN_SPLIT


def test_names_that_are_no_utf_8_can_be_split(tmp_path: Path) -> None:
    picture(0).save(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfc\xdfe.png"))
    source = FolderSource(tmp_path, 3)
    train, held_back = split(source, 0.5)
    assert train + held_back == [0]
    assert np.asarray(source.read(0)).shape == (10, 10, 3)


def test_labelled_data_with_a_fraction_held_back(tmp_path: Path) -> None:
    data = LabelledData(data_config(image_folder(tmp_path, per_class=20), validation_fraction=0.3), in_chans=3)
    assert sorted([*data.train, *data.validation]) == list(range(40))
    assert data.train_source is data.validation_source


def test_labelled_data_with_a_validation_folder(tmp_path: Path) -> None:
    train, validation = image_folder(tmp_path / "train", per_class=3), image_folder(tmp_path / "val", per_class=2)
    data = LabelledData(data_config(train, validation=str(validation)), in_chans=3)
    assert (list(data.train), list(data.validation)) == (list(range(6)), list(range(4)))


@pytest.mark.parametrize(
    ("classes", "validation_classes", "message"),
    [
        (("only",), None, "has no labels: put the images of each class into a folder of its name"),
        (("cat", "dog"), ("cat", "fox"), "other classes than data.source; only in one: dog, fox"),
        (("cat", "dog"), ("cat",), "only in one: dog"),
    ],
)
def test_labels_missing_or_different(tmp_path: Path, classes: tuple[str], validation_classes: tuple[str] | None, message: str) -> None:
    train = image_folder(tmp_path / "train", classes=classes, per_class=2)
    more: dict[str, object] = {"validation_fraction": 0.5}
    if validation_classes:
        more = {"validation": str(image_folder(tmp_path / "val", classes=validation_classes, per_class=1))}
    with pytest.raises(DataError, match=message):
        LabelledData(data_config(train, **more), in_chans=3)


def test_a_split_that_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="4 training and 0 validation images; change validation_fraction"):
        LabelledData(data_config(image_folder(tmp_path, per_class=2), validation_fraction=1e-6), in_chans=3)


def test_workers_that_see_other_images_are_told_so(tmp_path: Path) -> None:
    same = FolderSource(image_folder(tmp_path / "same"), 3)
    fewer = FolderSource(image_folder(tmp_path / "fewer", per_class=7), 3)
    other = FolderSource(image_folder(tmp_path / "other", classes=("cat", "fox")), 3)

    def check(third: FolderSource) -> list[str | None]:
        def of_one(world: World) -> str | None:
            try:
                check_same_images([same, third if world.rank == 2 else same], world)
            except DataError as error:
                return str(error)
            return None

        return by_workers(3, of_one)

    assert check(same) == [None] * 3
    told = check(fewer)
    assert len(set(told)) == 1
    assert str(told[0]).startswith("data: 1 of 3 workers see other images than worker 0 (such as ")
    assert "worker 0 has 16 images, worker 2 has 14" in str(told[0])
    assert "worker 2 has 16" in str(check(other)[0])


def test_names_that_are_no_utf_8_become_text() -> None:
    assert printable("a\udcff.png") == "a\ufffd.png"
    assert printable("Straße/ü.png") == "Straße/ü.png"
