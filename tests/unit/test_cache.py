"""The cache of remote files: whole or not there, bounded, shared by processes, right in the end or a named error."""

import fcntl
import hashlib
import os
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from mae_core.data.cache import FileCache, RemoteFile
from mae_core.errors import DataError
from mae_core.world import World
from tests.unit.forked import in_workers

SIZE = 1000


def content(number: int) -> bytes:
    return bytes([number % 256]) * SIZE


def remote(number: int, size: int = SIZE) -> RemoteFile:
    return RemoteFile(f"s3://bucket/{number}", size, hashlib.sha256(content(number)).hexdigest())


class Storage:
    """Files by number. `wrong`: how often each is delivered damaged."""

    def __init__(self, wrong: dict[int, int] | None = None) -> None:
        self.fetched: Counter[int] = Counter()
        self.lock = threading.Lock()
        self._wrong = Counter(wrong)

    def fetch(self, address: str, start: int, length: int) -> bytes:
        number = int(address.rpartition("/")[2])
        if number < 0:
            raise FileNotFoundError(address)
        with self.lock:
            self.fetched[number] += 1
            is_wrong = self._wrong[number] > 0
            self._wrong[number] -= 1
        found = content(number)[start : start + length]
        return found[:-1] + b"!" if is_wrong else found


def held(folder: Path) -> int:
    """Bytes of all copies, unfinished ones too."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks")


def read(cache: FileCache, number: int) -> bytes:
    with cache.open(remote(number)) as file:
        return file.read()


def test_what_was_read_is_not_fetched_again(tmp_path: Path) -> None:
    storage = Storage()
    cache = FileCache(tmp_path, fetch=storage.fetch, max_bytes=10 * SIZE)
    assert all(read(cache, number) == content(number) for number in (1, 2, 1, 2))
    assert storage.fetched == {1: 1, 2: 1}
    assert read(FileCache(tmp_path, fetch=storage.fetch, max_bytes=10 * SIZE), 1) == content(1)
    assert storage.fetched == {1: 1, 2: 1}


def test_the_least_recently_read_goes_and_the_bound_holds(tmp_path: Path) -> None:
    storage = Storage()
    cache = FileCache(tmp_path, fetch=storage.fetch, max_bytes=3 * SIZE)
    for number in (1, 2, 3):
        read(cache, number)
    with cache.open(remote(2)) as reading:  # read now: 1 is the oldest
        for path, age in ((remote(1), 300), (remote(3), 200), (remote(2), 100)):
            os.utime(tmp_path / path.copy_name[:2] / path.copy_name, (1e9 - age, 1e9 - age))
        read(cache, 4)
        assert held(tmp_path) == 3 * SIZE
        read(cache, 5)
        read(cache, 6)
        assert held(tmp_path) == 3 * SIZE
        assert reading.read() == content(2), "who reads a copy still has it"
    assert {number for number in range(1, 7) if (tmp_path / remote(number).copy_name[:2] / remote(number).copy_name).exists()} == {4, 5, 6}


def test_a_wrong_checksum_is_fetched_again_then_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = Storage(wrong={1: 2, 2: 3})
    cache = FileCache(tmp_path, fetch=storage.fetch, max_bytes=10 * SIZE)
    assert read(cache, 1) == content(1)
    assert storage.fetched[1] == 3
    assert caplog.text.count("s3://bucket/1 is damaged") == 2
    with pytest.raises(DataError, match=r"s3://bucket/2 is damaged: its sha256 is \w+, the index says \w+, 3 times; .*data verify`"):
        read(cache, 2)
    assert held(tmp_path) == SIZE
    assert read(cache, 2) == content(2), "and whoever asks later, gets it"


def test_what_is_missing_too_large_or_short_is_an_error(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, fetch=Storage().fetch, max_bytes=2 * SIZE)
    with pytest.raises(DataError, match="s3://bucket/-1 is missing"):
        cache.open(RemoteFile("s3://bucket/-1", SIZE, None))
    with pytest.raises(DataError, match=r"has 2001 bytes, more than this machine's whole cache \(2000\)"):
        cache.open(RemoteFile("s3://bucket/1", 2 * SIZE + 1, None))
    with pytest.raises(DataError, match="has 1000 bytes, not 1500"):
        cache.open(RemoteFile("s3://bucket/1", 1500, None))
    assert held(tmp_path) == 0


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    cache = FileCache(tmp_path, fetch=Storage().fetch, max_bytes=10 * SIZE)
    with pytest.raises(DataError, match=r"the cache .* cannot take 1000 bytes \(No space left on device\); give its disk room"):
        read(cache, 1)
    assert held(tmp_path) == 0


def test_wanted_files_are_fetched_in_the_background_once(tmp_path: Path) -> None:
    storage = Storage()
    cache = FileCache(tmp_path, fetch=storage.fetch, max_bytes=100 * SIZE)
    for _ in range(3):
        cache.want([remote(number) for number in range(20)])
    while [thread for thread in threading.enumerate() if thread.name == "fetch"]:
        threading.Event().wait(0.001)
    assert held(tmp_path) == 20 * SIZE
    assert set(storage.fetched.values()) == {1}
    assert all(read(cache, number) == content(number) for number in range(20))
    assert set(storage.fetched.values()) == {1}


def test_what_goes_wrong_in_the_background_is_told_to_the_reader(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, fetch=Storage(wrong={1: 10}).fetch, max_bytes=100 * SIZE)
    cache.want([remote(1)])
    with pytest.raises(DataError, match="s3://bucket/1 is damaged"):
        read(cache, 1)


def test_processes_share_one_cache(tmp_path: Path) -> None:
    """Four of them read 40 files in different orders, with room for eight: all get the right bytes, and the bound holds throughout."""

    assert max(in_workers(read_in_turn, 4, tmp_path, tmp_path / "cache")) <= 8 * SIZE


def read_in_turn(world: World, folder: Path) -> int:
    cache, most = FileCache(folder, fetch=Storage().fetch, max_bytes=8 * SIZE), 0
    for place in range(40):
        number = (place * (2 * world.rank + 1)) % 40
        cache.want([remote((number + ahead) % 40) for ahead in range(3)])
        assert read(cache, number) == content(number)
        most = max(most, held_now(folder))
    return most


def held_now(folder: Path) -> int:
    """While nobody adds: whoever does holds this lock. Without it one file could be counted before another takes its place, and both be."""
    total = 0
    with (folder / "locks/all").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in folder.glob("??/*"):
            with suppress(FileNotFoundError):  # one that was damaged
                total += path.stat().st_size
    return total


def test_processes_that_want_the_same_file_fetch_it_once(tmp_path: Path) -> None:
    assert sum(in_workers(num_fetched, 3, tmp_path, tmp_path / "cache")) == 20


def num_fetched(_: World, folder: Path) -> int:
    storage = Storage()
    cache = FileCache(folder, fetch=storage.fetch, max_bytes=100 * SIZE)
    for number in range(20):
        read(cache, number)
    return storage.fetched.total()


def test_what_a_killed_process_left_is_room(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, fetch=Storage().fetch, max_bytes=3 * SIZE)
    left = tmp_path / remote(9).copy_name[:2] / f"{remote(9).copy_name}.part"
    left.parent.mkdir()
    left.write_bytes(bytes(2 * SIZE))
    os.utime(left, (1, 1))
    for number in (1, 2, 3):
        assert read(cache, number) == content(number)
    assert not left.exists()
    assert held(tmp_path) == 3 * SIZE
