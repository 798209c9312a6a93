import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.parquet
import pytest
import torch
from numpy.typing import NDArray

from mae_core import parts, rounds
from mae_core.config import EmbedSpec
from mae_core.data.decode import read_image
from mae_core.data.transforms import centre_crop, normalise
from mae_core.embed import EmbedRun
from mae_core.errors import DataError, EncoderError
from mae_core.export import write_encoder
from mae_core.loop import Progress
from mae_core.options import ARCH_SIZES, ModelConfig, NormalizeConfig
from mae_core.parts import Layout
from mae_core.stores import FolderParts
from mae_core.vit import Encoder, initialise
from mae_core.world import World
from tests.torchvision_ops import import_torchvision
from tests.unit.core_fixtures import SHALLOW, TINY, corrupt, image_folder, picture, spec_of
from tests.unit.threaded_world import by_workers

import_torchvision()
import timm  # noqa: E402  (needs the line above)

PROJECT = Path(__file__).parents[2]
NORMALIZE = NormalizeConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
NUM_IMAGES, PARTS = 22, ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCH_SIZES, "tiny", SHALLOW)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """22 images of two classes: two parts of 8 in batches of 4, and one of 6."""
    return image_folder(tmp_path / "images", per_class=NUM_IMAGES // 2)


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    return encoder_in(tmp_path / "encoder", TINY)


def encoder_in(folder: Path, model: ModelConfig) -> Path:
    folder.mkdir()
    encoder = Encoder(model)
    initialise(encoder, torch.Generator().manual_seed(1))
    write_encoder(encoder, folder, normalize=NORMALIZE)
    return folder


def embed_spec(images: Path, **changes: Any) -> EmbedSpec:
    given: dict[str, Any] = {"encoder": {"file": "/encoder"}, "model": None, "batch_size": 4, "images_per_part": 7}
    spec = spec_of("embed", images, **(given | changes))
    assert isinstance(spec, EmbedSpec)
    return spec


def run_of(images: Path, encoder: Path, to: Path, *, world: World | None = None, **changes: Any) -> EmbedRun:
    to.mkdir(exist_ok=True)
    return EmbedRun(embed_spec(images, **changes), world=world or World(), encoder_folder=encoder, parts=FolderParts(to))


def embedded(run: EmbedRun, wants_stop: Callable[[], bool] = lambda: False) -> list[Progress]:
    return list(run.progress(wants_stop))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def inodes(folder: Path) -> dict[str, int]:
    """Of each part: another one where it was written again."""
    return {path.name: path.stat().st_ino for path in folder.glob("*.parquet")}


def table_of(folder: Path) -> pandas.DataFrame:
    return pandas.read_parquet(sorted(folder.glob("*.parquet")))


def features_of(folder: Path) -> NDArray[Any]:
    return np.stack(table_of(folder)["features"].tolist())


def tensors(images: Path, keys: list[str], size: tuple[int, int]) -> torch.Tensor:
    """The images as an evaluation gives them to its encoder."""
    return normalise(torch.stack([torch.tensor(centre_crop(read_image(images / key, 3), size)) for key in keys]), NORMALIZE)


@pytest.mark.parametrize("pooling", ["mean", "cls", "tokens"])
@torch.no_grad()
def test_features_are_those_of_timm(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooling: str) -> None:
    monkeypatch.setitem(ARCH_SIZES, "tiny", (192, 12, 3))
    folder = encoder_in(tmp_path / "encoder", TINY)
    embedded(run_of(images, folder, tmp_path / "out", pooling=pooling))
    table, theirs = table_of(tmp_path / "out"), timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    tokens = theirs.forward_features(tensors(images, table["path"].tolist(), (8, 8)))
    expected = {"mean": tokens[:, 1:].mean(dim=1), "cls": tokens[:, 0], "tokens": tokens[:, 1:]}[pooling]
    ours = torch.tensor(features_of(tmp_path / "out")).reshape(expected.shape)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_a_row_for_each_image_with_what_made_it(images: Path, encoder_folder: Path, tmp_path: Path) -> None:
    run = run_of(images, encoder_folder, tmp_path / "out")
    progress = embedded(run)
    assert [told.step for told in progress] == [1, 2, 3, 4, 5, 6]
    assert {told.num_steps for told in progress} == {6}
    assert all(set(values) == {"images_per_second", "data_wait"} for told in progress for _, values in told.points)
    table = table_of(tmp_path / "out")
    assert table["index"].tolist() == list(range(NUM_IMAGES))
    assert table["path"].tolist() == [f"{name}/{number:03}.png" for name in ("cat", "dog") for number in range(11)]
    assert table["label"].tolist() == ["cat"] * 11 + ["dog"] * 11
    part = pyarrow.parquet.ParquetFile(tmp_path / "out" / PARTS[2])
    assert str(part.schema_arrow.field("features").type) == f"fixed_size_list<element: float not null>[{SHALLOW[0]}]"
    made_of = json.loads(part.schema_arrow.metadata[b"maestro"])
    assert (made_of["spec"]["pooling"], made_of["shape"], made_of["images"]) == ("mean", [SHALLOW[0]], [16, 22])
    assert made_of["normalize"] == NORMALIZE.model_dump(mode="json")
    assert made_of["spec"]["encoder"]["file"] == "/encoder"
    assert run.metrics == {"num_images": NUM_IMAGES, "num_unreadable": 0, "dim": SHALLOW[0]}
    assert {name: stored.bytes for name, stored in run.stored.items()} == {name: (tmp_path / "out" / name).stat().st_size for name in PARTS}


@pytest.mark.parametrize("num_workers", [2, 3, 5])
def test_any_number_of_workers_writes_the_same_bytes(images: Path, encoder_folder: Path, tmp_path: Path, num_workers: int) -> None:
    corrupt(images / "cat" / "005.png")
    alone = run_of(images, encoder_folder, tmp_path / "alone")
    embedded(alone)
    changes = {"resources": {"num_workers": num_workers}, "name": "another"}

    def together(world: World) -> tuple[Any, Any, list[int]]:
        run = run_of(images, encoder_folder, tmp_path / "together", world=world, **changes)
        steps = [told.step for told in embedded(run)]
        return run.stored, run.metrics, steps

    told = by_workers(num_workers, together)
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    assert [each[:2] for each in told] == [(alone.stored, alone.metrics)] * num_workers
    assert all(steps == told[0][2] and steps[-1] == 6 for *_, steps in told)


def test_only_what_is_missing_or_damaged_is_encoded_again(images: Path, encoder_folder: Path, tmp_path: Path) -> None:
    embedded(run_of(images, encoder_folder, tmp_path / "out"))
    whole, before = contents(tmp_path / "out"), inodes(tmp_path / "out")
    flipped = bytearray(whole[PARTS[1]])
    flipped[100] ^= 1

    def without_note(folder: Path) -> None:
        (folder / "part-00001.json").unlink()

    damages: list[Callable[[Path], object]] = [
        lambda folder: (folder / PARTS[1]).unlink(),
        lambda folder: (folder / PARTS[1]).write_bytes(flipped),
        lambda folder: (folder / PARTS[1]).write_bytes(whole[PARTS[1]][:-1]),
        lambda folder: (folder / "part-00001.json").write_text("{"),
        without_note,
    ]
    for damage in damages:
        damage(tmp_path / "out")
        run = run_of(images, encoder_folder, tmp_path / "out")
        encoded = [step for told in embedded(run) for step, _ in told.points]
        assert encoded == [5, 6]  # behind the four batches that are there, those of one part
        assert contents(tmp_path / "out") == whole
        after = inodes(tmp_path / "out")
        assert (after[PARTS[0]], after[PARTS[2]]) == (before[PARTS[0]], before[PARTS[2]])


def test_parts_of_something_else_are_replaced(images: Path, encoder_folder: Path, tmp_path: Path) -> None:
    embedded(run_of(images, encoder_folder, tmp_path / "out"))
    other = encoder_in(tmp_path / "other", TINY.model_copy(update={"image_size": (16, 16)}))
    for changes in ({"pooling": "cls"}, {"dtype": "float16"}, {"batch_size": 8}, {"encoder_folder": other}):
        arguments: dict[str, Any] = {"encoder": changes.pop("encoder_folder", encoder_folder), **changes}
        [told] = [embedded(run_of(images, arguments.pop("encoder"), tmp_path / "out", **arguments))]
        assert sum(len(progress.points) for progress in told) == told[-1].num_steps
    for number in range(4, 11):
        (images / "dog" / f"{number:03}.png").unlink()
    run = run_of(images, encoder_folder, tmp_path / "out")
    embedded(run)
    assert list(run.stored) == PARTS[:2]
    assert sorted(path.name for path in (tmp_path / "out").glob("part-*")) == [
        *("part-00000.json", PARTS[0], "part-00001.json", PARTS[1])
    ]  # nothing of the larger source is left
    assert len(table_of(tmp_path / "out")) == 15


def test_unreadable_images_have_no_row_and_shift_no_other(images: Path, encoder_folder: Path, tmp_path: Path) -> None:
    embedded(run_of(images, encoder_folder, tmp_path / "whole"))
    broken = [corrupt(images / "cat" / f"{number:03}.png") for number in (1, 4, 5, 6, 7)]  # a batch has no other
    run = run_of(images, encoder_folder, tmp_path / "out")
    told = embedded(run)
    assert sorted(key for progress in told for key in progress.skipped) == broken
    table = table_of(tmp_path / "out").set_index("index")
    assert table.index.tolist() == [index for index in range(NUM_IMAGES) if index not in (1, 4, 5, 6, 7)]
    whole = features_of(tmp_path / "whole")
    for index, features in table["features"].items():
        np.testing.assert_allclose(features, whole[index], rtol=0, atol=1e-5)
    assert run.metrics == {"num_images": 17, "num_unreadable": 5, "dim": SHALLOW[0]}
    run.write_result(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "embedding.json").read_text())
    assert sorted(report["unreadable"]) == broken
    assert all("cannot identify" in why for why in report["unreadable"].values())
    assert report["parts"][PARTS[1]] == {"first": 8, "rows": 8}
    again = run_of(images, encoder_folder, tmp_path / "out")
    assert [progress.skipped for progress in embedded(again)] == [{}] * 3  # told before; each part was there
    assert again.metrics == run.metrics


@pytest.mark.parametrize("num_workers", [1, 2])
def test_too_many_unreadable_images_end_the_run_of_all(images: Path, encoder_folder: Path, tmp_path: Path, num_workers: int) -> None:
    for number in range(3):
        corrupt(images / "dog" / f"{number:03}.png")
    changes = {"data": {"max_corrupt_fraction": 0.1}, "resources": {"num_workers": num_workers}}

    def fails(world: World) -> bool:
        with pytest.raises(DataError, match=r"data: 3 of 22 images cannot be read, more than data\.max_corrupt_fraction 0\.1 allows"):
            embedded(run_of(images, encoder_folder, tmp_path / "out", world=world, **changes))
        return True

    assert by_workers(num_workers, fails) == [True] * num_workers


def test_tokens_in_float16_and_their_shape(images: Path, encoder_folder: Path, tmp_path: Path) -> None:
    embedded(run_of(images, encoder_folder, tmp_path / "long", pooling="tokens"))
    embedded(run_of(images, encoder_folder, tmp_path / "short", pooling="tokens", dtype="float16"))
    schema = pyarrow.parquet.read_schema(tmp_path / "short" / PARTS[0])
    assert json.loads(schema.metadata[b"maestro"])["shape"] == [4, SHALLOW[0]]
    short = features_of(tmp_path / "short")
    assert (short.dtype, short.shape) == (np.float16, (NUM_IMAGES, 4 * SHALLOW[0]))
    assert np.array_equal(short, features_of(tmp_path / "long").astype(np.float16))


def test_images_of_no_class_have_no_label(encoder_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for seed in range(3):
        picture(seed).save(tmp_path / "flat" / f"{seed}.png")
    embedded(run_of(tmp_path / "flat", encoder_folder, tmp_path / "out"))
    assert table_of(tmp_path / "out").columns.tolist() == ["index", "path", "features"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_stop_that_one_worker_asks_for_leaves_whole_parts(images: Path, encoder_folder: Path, tmp_path: Path, num_workers: int) -> None:
    def stopped(world: World) -> list[bool]:
        asked = iter(range(1000))
        run = run_of(images, encoder_folder, tmp_path / "out", world=world, resources={"num_workers": num_workers})
        return [told.stop_agreed for told in embedded(run, lambda: world.rank == num_workers - 1 and next(asked) == 2)]

    assert by_workers(num_workers, stopped) == [[False, False, True]] * num_workers
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == sorted(name for part in PARTS[:num_workers] for name in (part, part.replace("parquet", "json")))
    left = inodes(tmp_path / "out")
    embedded(run_of(images, encoder_folder, tmp_path / "out"))
    assert left.items() <= inodes(tmp_path / "out").items()
    assert table_of(tmp_path / "out")["index"].tolist() == list(range(NUM_IMAGES))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_features_that_are_no_numbers_are_never_stored(images: Path, tmp_path: Path, num_workers: int) -> None:
    (tmp_path / "encoder").mkdir()
    encoder = Encoder(TINY)
    torch.nn.init.constant_(encoder.norm.bias, 1e5)  # more than float16 can hold
    write_encoder(encoder, tmp_path / "encoder", normalize=NORMALIZE)
    embedded(run_of(images, tmp_path / "encoder", tmp_path / "float32"))

    def fails(world: World) -> bool:
        with pytest.raises(EncoderError, match=r"are not finite numbers; .* or set dtype to float32"):
            embedded(run_of(images, tmp_path / "encoder", tmp_path / "out", world=world, dtype="float16"))
        return True

    assert by_workers(num_workers, fails) == [True] * num_workers
    assert list((tmp_path / "out").iterdir()) == []


def test_the_documents_say_how_to_read_it(images: Path, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded(run_of(images, encoder_folder, tmp_path / "features"))
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(import numpy, pandas.*?)```", (PROJECT / "docs/how-to/features.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["features"].shape == (NUM_IMAGES, SHALLOW[0])
    assert names["table"].columns.tolist() == ["index", "path", "label", "features"]


def test_parts_are_whole_batches_of_a_good_size() -> None:
    def layout(num_images: int, row_bytes: int, *, batch_size: int = 256, images_per_part: int | None = None) -> Layout:
        return Layout.of(num_images, batch_size=batch_size, images_per_part=images_per_part, row_bytes=row_bytes)

    pooled, tokens = layout(1_281_167, 768 * 4), layout(1_281_167, 196 * 768 * 4)
    assert (pooled.images_per_part, pooled.num_parts) == (4096, 313)
    assert (tokens.images_per_part, tokens.num_batches) == (256, 5005)  # 154 MB
    assert layout(10, 2**40).images_per_part == 256
    assert layout(1000, 4, batch_size=64, images_per_part=100).images_per_part == 128
    for parts_of in (pooled, tokens, layout(10, 4), layout(512, 4, images_per_part=256)):
        covered = [parts_of.images(part) for part in range(parts_of.num_parts)]
        assert [images.start for images in covered] == [0, *(images.stop for images in covered[:-1])]
        assert covered[-1].stop == parts_of.num_images
        assert sum(parts_of.batches(part) for part in range(parts_of.num_parts)) == parts_of.num_batches


def test_rows_are_written_in_groups_before_they_fill_the_memory(
    images: Path, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded(run_of(images, encoder_folder, tmp_path / "whole", images_per_part=22))
    monkeypatch.setattr(parts, "_ROW_GROUP_BYTES", 6 * 4 * SHALLOW[0])
    embedded(run_of(images, encoder_folder, tmp_path / "out", images_per_part=22))
    metadata = pyarrow.parquet.ParquetFile(tmp_path / "out" / PARTS[0]).metadata
    assert [metadata.row_group(place).num_rows for place in range(metadata.num_row_groups)] == [6, 2, 6, 2, 6]
    assert np.array_equal(features_of(tmp_path / "out"), features_of(tmp_path / "whole"))


def test_without_a_batch_size_it_depends_on_the_model(
    images: Path, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "_MAX_BATCH", 5)
    told = embedded(run_of(images, encoder_folder, tmp_path / "out", batch_size=None, images_per_part=None))
    assert [progress.step for progress in told] == [1, 2, 3, 4, 5]
