"""What a process prints, in storage: nothing lost while it is away, bounded by the quota, and a reader's offsets stay true."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import PROJECT
from workers.log_uploads import CHUNK_BYTES, LogUploads
from workers.stored import log_chunk, log_offset

PREFIX = "jobs/job1/logs/attempt-1/0/"


class Objects(dict[str, bytes]):
    """Storage that can be away."""

    is_away = False

    def put(self, key: str, body: bytes) -> None:
        self._reach()
        self[key] = body

    def sizes(self, prefix: str) -> dict[str, int]:
        self._reach()
        return {key: len(body) for key, body in self.items() if key.startswith(prefix)}

    def delete(self, key: str) -> None:
        self._reach()
        del self[key]

    def text(self) -> bytes:
        return b"".join(self[key] for key in sorted(self))

    def _reach(self) -> None:
        if self.is_away:
            raise OSError("away")


def uploads_of(objects: Objects, *files: Path, max_bytes: int = 100 * CHUNK_BYTES) -> LogUploads:
    return LogUploads(lambda: objects, PREFIX, files, max_bytes=max_bytes)


def append(path: Path, text: bytes) -> None:
    with path.open("ab") as file:
        file.write(text)


def look_at_all(uploads: LogUploads, objects: Objects) -> None:
    before = None
    while before != (before := dict(objects)):
        uploads.look()


def test_lines_arrive_as_they_are_printed(tmp_path: Path) -> None:
    out, err, objects = tmp_path / "out", tmp_path / "err", Objects()
    uploads = uploads_of(objects, out, err)
    uploads.look()  # there is no file yet
    append(out, b":job_id:01000000\n:actor_name:TrainWorker\none\n")
    append(err, b"two\nthr")
    uploads.look()
    assert objects == {log_chunk(PREFIX, 0): b"one\ntwo\n"}
    append(err, b"ee\n")
    append(out, b"no end")
    uploads.look()
    assert objects.text() == b"one\ntwo\nthree\n"
    uploads.look(is_last=True)
    assert objects == {log_chunk(PREFIX, 0): b"one\ntwo\nthree\nno end"}


def test_while_storage_is_away_nothing_is_lost_and_no_more_than_a_chunk_is_held(tmp_path: Path) -> None:
    out, objects = tmp_path / "out", Objects()
    objects.is_away = True
    uploads = uploads_of(objects, out)
    printed = b"".join(b"line %d\n" % number for number in range(200_000))
    append(out, printed)
    for _ in range(3):
        uploads.look()
    assert len(uploads._chunk) <= CHUNK_BYTES
    objects.is_away = False
    look_at_all(uploads, objects)
    assert objects.text() == printed
    assert max(len(body) for body in objects.values()) == CHUNK_BYTES


def test_storage_that_goes_away_in_between(tmp_path: Path) -> None:
    out, objects = tmp_path / "out", Objects()
    uploads = uploads_of(objects, out)
    append(out, b"one\n")
    uploads.look()
    objects.is_away = True
    append(out, b"two\n")
    uploads.look()
    append(out, b"three\n")
    objects.is_away = False
    uploads.look()
    assert objects == {log_chunk(PREFIX, 0): b"one\ntwo\nthree\n"}


def test_another_process_in_its_place_goes_on_behind(tmp_path: Path) -> None:
    first, second, objects = tmp_path / "first", tmp_path / "second", Objects()
    append(first, b"one\n")
    uploads_of(objects, first).look()
    append(second, b"two\n")
    uploads_of(objects, second).look()
    assert objects == {log_chunk(PREFIX, 0): b"one\n", log_chunk(PREFIX, 4): b"two\n"}


def test_the_beginning_and_the_end_are_kept(tmp_path: Path) -> None:
    out, objects, quota = tmp_path / "out", Objects(), 8 * CHUNK_BYTES
    uploads = uploads_of(objects, out, max_bytes=quota)
    printed = b"".join(b"line %07d\n" % number for number in range(400_000))
    append(out, printed)
    look_at_all(uploads, objects)
    assert sum(len(body) for body in objects.values()) <= quota
    assert sum(len(body) for body in objects.values()) > quota - 2 * CHUNK_BYTES
    for key, body in objects.items():
        assert printed[log_offset(key) : log_offset(key) + len(body)] == body
    kept = sorted(log_offset(key) for key in objects)
    assert kept[:2] == [0, CHUNK_BYTES]
    assert kept[-1] + len(objects[log_chunk(PREFIX, kept[-1])]) == len(printed)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=200_000), st.booleans()), max_size=8))
def test_whatever_is_printed_arrives(tmp_path_factory: pytest.TempPathFactory, prints: list[tuple[bytes, bool]]) -> None:
    """Also what is no text, and lines longer than a chunk."""
    out, objects = tmp_path_factory.mktemp("log") / "out", Objects()
    uploads = uploads_of(objects, out)
    for text, is_away in prints:
        append(out, text)
        objects.is_away = is_away
        uploads.look()
    objects.is_away = False
    look_at_all(uploads, objects)
    uploads.look(is_last=True)
    assert objects.text() == b"".join(text for text, _ in prints)


PRINTS = """
import sys
from workers import log_uploads
from tests.unit.test_log_uploads import Objects
print("to out")
print("to err", file=sys.stderr)
sys.stdout.flush()
objects = Objects()
uploads = log_uploads.LogUploads(lambda: objects, "p/", log_uploads.printed_to(), max_bytes=10**6)
uploads.look()
assert sorted(objects.text().splitlines()) == [b"to err", b"to out"], objects
"""


def test_a_process_finds_where_it_prints_to(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        environment = os.environ | {"PYTHONPATH": str(PROJECT)}
        done = subprocess.run([sys.executable, "-c", PRINTS], stdout=out, stderr=err, env=environment, timeout=60, check=False)
    assert done.returncode == 0, (tmp_path / "err").read_text()
