"""What came of the table of faults × moments, and its text."""

import os
import subprocess
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

MOMENTS = ("starting", "running", "saving", "stopping")
PROJECT = Path(__file__).parent.parent.parent
Cell = tuple[str, str]


class Outcomes:
    """Of every test that speaks for a cell, what came of it; a cell is as good as the worst of its tests."""

    def __init__(self, cells_of_tests: Iterable[list[Cell]]) -> None:
        self.seconds = 0.0
        self._started_at = datetime.now(UTC)
        self._num_planned = Counter(cell for cells in cells_of_tests for cell in cells)
        self._found: dict[Cell, list[str]] = {}

    def add(self, cells: list[Cell], *, phase: str, outcome: str, seconds: float) -> None:
        """One phase of one test: set-up and tear-down count where they fail or skip."""
        if cells:
            self.seconds += seconds
        for cell in cells:
            if phase == "call" or outcome != "passed":
                self._found.setdefault(cell, []).append(outcome)

    def of(self, cell: Cell) -> str:
        """passed, FAILED, skipped, not run; empty where no test speaks for the cell."""
        found = self._found.get(cell, [])
        if "failed" in found:
            return "FAILED"
        if len(found) < self._num_planned[cell]:
            return "not run"
        return "skipped" if "skipped" in found else "passed" if found else ""

    def as_markdown(self) -> str:
        faults = list(dict.fromkeys(fault for fault, _ in self._num_planned))
        told = [self.of(cell) for cell in self._num_planned]
        sums = ", ".join(f"{told.count(name)} {name}" for name in ("passed", "FAILED", "skipped", "not run") if name in told)
        rows = [
            "# Faults × moments",
            "",
            f"{self._started_at:%Y-%m-%d}, commit {commit()}, {os.cpu_count()} CPUs, {self.seconds:.0f} s, by `make faults`: {sums}.",
            "After each fault no job was lost, none started twice, every status right, every loss the undisturbed run's.",
            "An empty cell does not apply.",
            "",
            f"| fault | {' | '.join(MOMENTS)} |",
            f"|---|{'---|' * len(MOMENTS)}",
            *(f"| {fault} | {' | '.join(self.of((fault, moment)) for moment in MOMENTS)} |" for fault in faults),
        ]
        return "\n".join(rows) + "\n"


def commit() -> str:
    """The commit that was tested, and whether anything had been changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=10", "HEAD") + (" with changes" if changed else "")
