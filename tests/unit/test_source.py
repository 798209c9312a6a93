import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_core.data.source import DigitsSource, FolderSource, LabelledData, UnreadableImage, open_source, split
from mae_core.errors import DataError
from mae_core.options import DataConfig
from tests.unit.core_fixtures import PictureSource, image_folder, picture

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


@pytest.mark.parametrize(("in_chans", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_images_are_given_in_the_channels_asked_for(tmp_path: Path, in_chans: int, mode: str) -> None:
    picture(0, mode="L").save(tmp_path / "a.png")
    picture(0, mode="RGBA").save(tmp_path / "b.png")
    picture(0).convert("P").save(tmp_path / "c.gif")
    source = FolderSource(tmp_path, in_chans)
    assert [source.read(index).mode for index in range(3)] == [mode] * 3


def test_a_png_is_read_bit_for_bit(tmp_path: Path) -> None:
    picture(5).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(FolderSource(tmp_path, 3).read(0)), np.asarray(picture(5)))


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


def png_of_16_bits() -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(buffer, "PNG")
    return buffer.getvalue()


def truncated(suffix: str) -> bytes:
    buffer = BytesIO()
    picture(0, width=64, height=64).save(buffer, suffix)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        pytest.param(b"no image", "cannot identify", id="no-image"),
        pytest.param(b"", "cannot identify", id="empty"),
        pytest.param(truncated("PNG"), "truncated", id="half-a-png"),
        pytest.param(truncated("JPEG"), "truncated", id="half-a-jpeg"),
        pytest.param(png_of_16_bits(), "16 or 32 bits.*convert it to 8 bits", id="16-bits"),
    ],
)
def test_an_unreadable_image_is_named_with_the_reason(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(UnreadableImage, match=rf"{tmp_path}/bad\.png.*{why}"):
        FolderSource(tmp_path, 3).read(0)


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
    assert source.read(0).size == (10, 10)


def test_labelled_data_with_a_fraction_held_back(tmp_path: Path) -> None:
    data = LabelledData(data_config(image_folder(tmp_path, per_class=20), validation_fraction=0.3), in_chans=3)
    assert sorted(data.train + data.validation) == list(range(40))
    assert data.train_source is data.validation_source


def test_labelled_data_with_a_validation_folder(tmp_path: Path) -> None:
    train, validation = image_folder(tmp_path / "train", per_class=3), image_folder(tmp_path / "val", per_class=2)
    data = LabelledData(data_config(train, validation=str(validation)), in_chans=3)
    assert (data.train, data.validation) == (list(range(6)), list(range(4)))


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
