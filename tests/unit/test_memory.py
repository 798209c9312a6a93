import subprocess
import sys

from mae_core.memory import KEEPS_MEMORY

_PROGRAM = "import os, sys; from mae_core.memory import keep_memory; keep_memory(); print(os.environ['GLIBC_TUNABLES'], *sys.argv)"


def _told(environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", _PROGRAM, "an", "argument"]
    environment = {"PYTHONPATH": ":".join(path or "." for path in sys.path), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_a_process_starts_itself_again_to_keep_its_memory() -> None:
    assert _told({}) == f"{KEEPS_MEMORY['GLIBC_TUNABLES']} -c an argument"


def test_what_was_set_is_kept() -> None:
    assert _told({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}) == "glibc.malloc.arena_max=2 -c an argument"
