"""The commands pack, show and verify, whatever the places are. `mae_core.data` runs them on local ones, `workers.data` on `s3://` too."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from mae_core.data.listing import LIST_SUFFIXES, ImagePlace, list_images
from mae_core.data.pack import Packed, Packing, pack
from mae_core.data.packed_source import read_index
from mae_core.errors import DataError, MaeError
from mae_core.packed import INDEX, UNREADABLE, PackedFile, PackedIndex
from mae_core.stores import PartStore

_NUM_READERS = 4
_MAX_CLASSES = 20  # named


def run(arguments: list[str] | None, *, program: str, images_at: Callable[[str], ImagePlace], store_at: Callable[[str], PartStore]) -> int:
    """Does what the arguments say; the exit code: 0, or 1 with what is wrong on stderr. Places are as the user wrote them."""
    given = _parser(program).parse_args(arguments)
    try:
        if given.command == "pack":
            return _pack(given, images_at, store_at)
        look = _show if given.command == "show" else _verify
        return look(store_at(given.place), as_json=given.json)
    except MaeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="images → shards and their index; a repeat goes on where it was broken off")
    packing.add_argument("source", help="a folder, or a list in .csv or .parquet with the columns path and, maybe, label")
    packing.add_argument("dest", help="an empty folder")
    packing.add_argument("--resize", type=positive_number, help="length of the shorter side, to which larger images are brought")
    packing.add_argument("--channels", type=positive_number, default=3, help="of the model to be trained (3)")
    packing.add_argument("--processes", type=positive_number, default=os.cpu_count() or 1)
    packing.add_argument("--json", action="store_true", help="tell progress as JSON lines")
    showing = commands.add_parser("show", help="what is packed there")
    showing.add_argument("place")
    showing.add_argument("--json", action="store_true", help="print the index")
    verifying = commands.add_parser("verify", help="read all files and compare their checksums")
    verifying.add_argument("place")
    verifying.add_argument("--json", action="store_true", help="print what was found as JSON")
    return parser


def positive_number(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _pack(given: argparse.Namespace, images_at: Callable[[str], ImagePlace], store_at: Callable[[str], PartStore]) -> int:
    folder, _, name = given.source.rpartition("/") if given.source.lower().endswith(LIST_SUFFIXES) else (given.source, "", None)
    source = images_at(folder or ("/" if given.source.startswith("/") else "."))

    def tell(done: Packed) -> None:
        if given.json:
            print(json.dumps(done._asdict()), flush=True)
        else:
            bad = f", {done.unreadable} unreadable" if done.unreadable else ""
            print(f"{done.shards} of {done.num_shards} shards, {done.images} images{bad}", flush=True)

    packing = Packing(channels=given.channels, resize=given.resize)
    index = pack(source, list_images(source, name), store_at(given.dest), packing, num_processes=given.processes, tell=tell)
    print(f"{_summary(index)} in {given.dest}", file=sys.stderr)
    return 0


def _summary(index: PackedIndex) -> str:
    size = sum(file.bytes for file in index.files) / 1e6
    bad = f"; {index.num_unreadable} could not be read, see {UNREADABLE}" if index.num_unreadable else ""
    return f"{index.num_images} images in {len(index.shards)} shards ({size:.1f} MB){bad}"


def _index_of(store: PartStore) -> PackedIndex:
    if INDEX not in store.names():
        raise DataError(f"data: there is no {INDEX}: no packed images, or their packing is unfinished; run the same `data pack` again")
    return read_index(store.read(INDEX), "the place")


def _show(store: PartStore, *, as_json: bool) -> int:
    index = _index_of(store)
    if as_json:
        print(index.model_dump_json(indent=1))
        return 0
    print(_summary(index))
    print(f"resized    {f'to a shorter side of {index.resize}' if index.resize else 'no'}")
    print(f"channels   {index.channels}, mean {_listed(index.statistics.mean)}, deviation {_listed(index.statistics.std)}")
    more = f", and {len(index.classes) - _MAX_CLASSES} more" if len(index.classes) > _MAX_CLASSES else ""
    print(f"classes    {', '.join(index.classes[:_MAX_CLASSES]) + more if index.classes else 'none'}")
    return 0


def _listed(numbers: tuple[float, ...]) -> str:
    return f"[{', '.join(f'{number:.6g}' for number in numbers)}]"


def _verify(store: PartStore, *, as_json: bool) -> int:
    """Reads all files; names the damaged ones."""
    index = _index_of(store)

    def fault(file: PackedFile) -> str | None:
        found = store.fingerprint(file.name)
        if found is None:
            return f"{file.name} is missing"
        if found == (file.bytes, file.sha256):
            return None
        return f"{file.name} is damaged: it has {found.bytes} bytes of sha256 {found.sha256}, its index says {file.bytes} of {file.sha256}"

    with ThreadPoolExecutor(_NUM_READERS) as pool:
        faults = [said for said in pool.map(fault, index.files) if said is not None]
    if as_json:
        print(json.dumps({"num_files": len(index.files), "num_images": index.num_images, "faults": faults}))
    for said in [] if as_json else faults:
        print(said)
    if faults:
        raise DataError(f"data: {len(faults)} of {len(index.files)} files; copy them again, or pack the images again into an empty place")
    if not as_json:
        print(f"{len(index.files)} files are whole: {_summary(index)}")
    return 0
