"""Packing: what becomes of images, the same bytes from anybody, a repeat after a kill, lists, checks."""

import csv
import gc
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mae_core.data.__main__ import main
from mae_core.data.decode import read_image
from mae_core.data.encode import encode
from mae_core.data.listing import FolderImages, list_images
from mae_core.data.pack import Packed, Packing, pack
from mae_core.data.packed_source import PackedSource
from mae_core.data.skipped import SkippedImages
from mae_core.data.source import FolderSource, LabelledData, digest, open_source, split
from mae_core.data.statistics import channel_statistics
from mae_core.errors import DataError
from mae_core.options import DataConfig
from mae_core.packed import INDEX, PackedIndex
from mae_core.stores import FolderParts
from mae_core.world import World
from tests.unit.core_fixtures import corrupt, image_folder, picture

SHARD_BYTES = 10_000  # a few of the small pictures
PACKING = """
import sys
from pathlib import Path
from mae_core.data.listing import FolderImages, list_images
from mae_core.data.pack import Packing, pack
from mae_core.stores import FolderParts

def tell(done):
    print(done, flush=True)
    if done.shards:
        sys.stdin.read()

if __name__ == "__main__":
    images = FolderImages(Path(sys.argv[1]))
    pack(images, list_images(images, None), FolderParts(Path(sys.argv[2])), Packing(shard_bytes=10_000), num_processes=2, tell=tell)
"""


def packed(folder: Path, dest: Path, *, processes: int = 1, list_name: str | None = None, **packing: int) -> PackedIndex:
    images = FolderImages(folder)
    how = Packing(**({"shard_bytes": SHARD_BYTES} | packing))
    return pack(images, list_images(images, list_name), FolderParts(dest), how, num_processes=processes, tell=lambda _: None)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_packed_images_are_those_of_the_folder(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "raw", per_class=20)
    index = packed(folder, tmp_path / "packed")
    assert len(index.shards) > 4
    source, raw = open_source(str(tmp_path / "packed"), in_chans=3), FolderSource(folder, 3)
    assert isinstance(source, PackedSource)
    assert sorted(source.keys) == raw.keys
    assert list(source.classes) == raw.classes
    places = {key: place for place, key in enumerate(raw.keys)}
    for place in range(len(source.keys)):
        of_raw = places[source.keys[place]]
        assert source.labels[place] == raw.labels[of_raw]
        assert np.array_equal(np.asarray(source.read(place)), np.asarray(raw.read(of_raw)))


def test_the_same_images_are_held_back_as_of_the_folder(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "raw", per_class=30)
    packed(folder, tmp_path / "packed")
    for fraction in (0.0, 0.1, 0.5, 0.99):
        found = []
        for place in (folder, tmp_path / "packed"):
            source = open_source(str(place), in_chans=3)
            found.append([{source.keys[index] for index in part} for part in split(source, fraction)])
        assert found[0] == found[1]
    data = LabelledData(DataConfig(source=str(tmp_path / "packed"), validation_fraction=0.3), in_chans=3)
    assert (data.classes, len(data.train) + len(data.validation)) == (["cat", "dog"], 60)


def test_statistics_are_those_that_would_be_measured(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "raw", per_class=20)
    packed(folder, tmp_path / "packed")
    given = {"in_chans": 3, "world": World(), "num_threads": 1, "skipped": SkippedImages()}
    raw, source = FolderSource(folder, 3), open_source(str(tmp_path / "packed"), in_chans=3)
    expected = channel_statistics(raw, range(40), **given)  # type: ignore[arg-type]
    found = channel_statistics(source, range(40), **given)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.std, expected.std, rtol=1e-12)
    grey = channel_statistics(open_source(str(tmp_path / "packed"), in_chans=1), range(40), **(given | {"in_chans": 1}))  # type: ignore[arg-type]
    np.testing.assert_allclose(
        grey.mean, channel_statistics(FolderSource(folder, 1), range(40), **(given | {"in_chans": 1})).mean, rtol=1e-6
    )  # type: ignore[arg-type]


def test_corrupt_images_are_listed_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_folder(tmp_path / "raw", per_class=20)
    bad = {corrupt(folder / "cat" / "003.png"), corrupt(folder / "dog" / "011.png")}
    assert main(["pack", str(folder), str(tmp_path / "packed"), "--processes", "1"]) == 0
    assert "38 images in 1 shards" in capsys.readouterr().err
    unreadable = json.loads((tmp_path / "packed" / "unreadable.json").read_text())
    assert unreadable.keys() == bad
    assert all("cannot identify" in why for why in unreadable.values())
    assert bad.isdisjoint(open_source(str(tmp_path / "packed"), in_chans=3).keys)


def test_nothing_that_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_folder(tmp_path / "raw", per_class=2)
    for path in folder.rglob("*.png"):
        corrupt(path)
    assert main(["pack", str(folder), str(tmp_path / "packed"), "--processes", "1"]) == 1
    assert "none of 4 images can be read, such as" in capsys.readouterr().err
    assert main(["pack", str(tmp_path / "nowhere"), str(tmp_path / "packed")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_images_of_other_channels_end_it_at_once(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    np.save(tmp_path / "raw" / "a.npy", np.zeros((8, 8, 5), dtype=np.uint16))
    with pytest.raises(DataError, match=r"5 channel\(s\) .*set --channels to 5"):
        packed(tmp_path / "raw", tmp_path / "packed")
    assert packed(tmp_path / "raw", tmp_path / "packed", channels=5).channels == 5


def test_a_killed_packing_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """kill -9 in the midst of it, in two processes; and its processes end with it."""
    folder = image_folder(tmp_path / "raw", per_class=60)
    packed(folder, tmp_path / "undisturbed")
    script = tmp_path / "packing.py"
    script.write_text(PACKING)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    child = subprocess.Popen(
        [sys.executable, script, folder, tmp_path / "killed"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin, child.stdout:
        for _ in range(2):  # "nothing yet", and the first shard; who tells waits until it is read
            assert child.stdout.readline()
        children = psutil.Process(child.pid).children()
        assert children
        child.kill()
        child.wait()
    psutil.wait_procs(children, timeout=60)
    assert not [left for left in children if left.is_running()]
    left = files(tmp_path / "killed")
    assert INDEX not in left
    assert any(name.startswith("shard-") for name in left)
    packed(folder, tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "undisturbed")


def test_a_repeat_takes_up_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dest = image_folder(tmp_path / "raw", per_class=20), tmp_path / "packed"
    told: list[Packed] = []
    images = FolderImages(folder)

    def repeat() -> PackedIndex:
        how = Packing(shard_bytes=SHARD_BYTES)
        return pack(images, list_images(images, None), FolderParts(dest), how, num_processes=1, tell=told.append)

    def dies(progress: Packed) -> None:
        if progress.shards == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(images, list_images(images, None), FolderParts(dest), Packing(shard_bytes=SHARD_BYTES), num_processes=1, tell=dies)
    before = {path.name: path.stat().st_mtime_ns for path in dest.glob("*.tar")}
    assert len(before) == 3
    index = repeat()
    assert told[0].shards == 3
    assert {name: (dest / name).stat().st_mtime_ns for name in before} == before
    whole = files(dest)
    assert not [name for name in whole if name.startswith((".", "shard-")) and not name.endswith(".tar")]
    assert repeat() == index, "and a repeat of what is done does nothing"
    assert files(dest) == whole


def test_other_images_in_the_same_place_are_refused(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "raw", per_class=3)
    packed(folder, tmp_path / "packed")
    picture(77).save(folder / "cat" / "new.png")
    with pytest.raises(DataError, match="holds other packed images"):
        packed(folder, tmp_path / "packed")
    (tmp_path / "packed" / INDEX).unlink()
    assert packed(folder, tmp_path / "packed").num_images == 7


def test_larger_images_are_resized(tmp_path: Path) -> None:
    photo = Image.fromarray(np.tile(np.linspace(0, 255, 300, dtype=np.uint8)[:, None, None], (1, 400, 3)))
    for suffix in ("jpg", "png"):
        photo.save(tmp_path / f"photo.{suffix}", quality=95)
    picture(1, width=40, height=30).save(tmp_path / "small.png")
    for name in ("photo.jpg", "photo.png"):
        encoded = encode((tmp_path / name).read_bytes(), name, channels=3, resize=100)
        assert encoded.suffix == Path(name).suffix
        image = np.asarray(Image.open(io.BytesIO(encoded.data)))
        assert image.shape == (100, 133, 3)
        expected = np.asarray(photo.resize((133, 100), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(image - expected).mean() < (1.5 if name.endswith("jpg") else 0.01)
    small = (tmp_path / "small.png").read_bytes()
    assert encode(small, "small.png", channels=3, resize=100).data == small


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_are_resized_in_their_own_type(dtype: type) -> None:
    file = io.BytesIO()
    ramp = np.tile(np.linspace(0, 250, 60)[:, None, None], (1, 80, 5))
    np.save(file, ramp.astype(dtype))
    encoded = encode(file.getvalue(), "a.npy", channels=5, resize=30)
    array = np.load(io.BytesIO(encoded.data))
    assert (encoded.suffix, array.dtype, array.shape) == (".npy", dtype, (30, 40, 5))
    np.testing.assert_allclose(array[5:-5, 0, 3], ramp.astype(dtype).reshape(30, 2, 80, 5).mean(axis=1)[5:-5, 0, 3], atol=1)


def test_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_folder(tmp_path / "raw", per_class=3)
    rows = [
        {"path": "dog/001.png", "label": "hound"},
        {"path": "cat/002.png", "label": "tom"},
        {"path": str(folder / "cat/000.png"), "label": "tom"},
    ]
    with (folder / "some.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["label", "path"])
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "some.parquet")
    for name in ("some.csv", "some.parquet"):
        dest = tmp_path / name
        assert main(["pack", str(folder / name), str(dest), "--processes", "1"]) == 0
        source = open_source(str(dest), in_chans=3)
        assert {key: source.classes[source.labels[place]] for place, key in enumerate(source.keys)} == {
            row["path"]: row["label"] for row in rows
        }
    capsys.readouterr()
    for content, why in (
        ("file\na.png\n", "has no column 'path'"),
        ("path\na.png\na.png\n", "has a.png 2 times"),
        ("path,label\na.png,cat\nb.png,\n", "b.png has no label"),
        ("path\n", "has no column 'path', only none"),
    ):
        (folder / "bad.csv").write_text(content)
        assert main(["pack", str(folder / "bad.csv"), str(tmp_path / "bad")]) == 1
        assert why in capsys.readouterr().err


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    picture(1).save(tmp_path / "raw" / "plain.png")
    os.link(tmp_path / "raw" / "plain.png", tmp_path / "raw" / os.fsdecode(b"odd\xff.png"))
    packed(tmp_path / "raw", tmp_path / "packed")
    assert set(open_source(str(tmp_path / "packed"), in_chans=3).keys) == {"plain.png", "odd\udcff.png"}


def test_show_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, dest = image_folder(tmp_path / "raw", per_class=20), tmp_path / "packed"
    assert main(["show", str(dest)]) == 1
    assert "no index.json" in capsys.readouterr().err
    index = packed(folder, dest)
    assert main(["show", str(dest)]) == 0
    assert "classes    cat, dog" in capsys.readouterr().out
    assert main(["show", str(dest), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 40
    assert main(["verify", str(dest)]) == 0
    assert f"{len(index.shards) + 4} files are whole" in capsys.readouterr().out
    content = bytearray((dest / "shard-000001.tar").read_bytes())
    content[1000] ^= 1
    (dest / "shard-000001.tar").write_bytes(content)
    (dest / "hashes.bin").unlink()
    assert main(["verify", str(dest)]) == 1
    told = capsys.readouterr()
    assert "shard-000001.tar is damaged" in told.out
    assert "hashes.bin is missing" in told.out
    assert "2 of" in told.err
    assert main(["verify", str(dest), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["num_files"], found["num_images"], len(found["faults"])) == (len(index.files), 40, 2)


def test_damage_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    packed(image_folder(tmp_path / "raw", per_class=20), tmp_path / "packed")
    shard = tmp_path / "packed" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"shard-000000\.tar has \d+ bytes, its index says"):
        open_source(str(tmp_path / "packed"), in_chans=3)
    (tmp_path / "packed" / INDEX).write_text('{"format":"maestro-packed","version":2}')
    with pytest.raises(DataError, match=r"index\.json is damaged or of another version \(version: "):
        open_source(str(tmp_path / "packed"), in_chans=3)


def test_what_is_different_has_another_digest(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "raw", per_class=3)
    packed(folder, tmp_path / "a")
    picture(5).save(folder / "cat" / "000.png")
    packed(folder, tmp_path / "b")
    first, second = (open_source(str(tmp_path / name), in_chans=3) for name in "ab")
    assert list(first.keys) == list(second.keys)
    assert digest(first) != digest(second)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    import webdataset

    folder = image_folder(tmp_path / "raw", per_class=20)
    index = packed(folder, tmp_path / "packed")
    urls = [str(tmp_path / "packed" / shard.name) for shard in index.shards]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    source = open_source(str(tmp_path / "packed"), in_chans=3)
    assert [each["json"]["key"] for each in found] == list(source.keys)
    assert [each["cls"] for each in found] == list(source.labels)
    for each in found:
        assert np.array_equal(each["png"], np.asarray(read_image(folder / each["json"]["key"], 3)))
    with tarfile.open(urls[0]) as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}
    gc.collect()  # it closes no files: that is to be seen here, where it is allowed
