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

    def as_markdown(self, before: str = "") -> str:
        """The table. A cell that this run has no test for, or did not come to, stays as it was `before`, in the table's last text."""
        at, known = commit(), _cells(before)
        told = {cell: self.of(cell) for cell in self._num_planned}
        sums = ", ".join(
            f"{count} {name}" for name in ("passed", "FAILED", "skipped", "not run") if (count := [*told.values()].count(name))
        )
        known |= {cell: f"{outcome} {at}" for cell, outcome in told.items() if outcome != "not run" or cell not in known}
        faults = list(dict.fromkeys(fault for fault, _ in known))
        rows = [
            "# Faults × moments",
            "",
            f"Last run: {self._started_at:%Y-%m-%d}, commit {at}, {os.cpu_count()} CPUs, {self.seconds:.0f} s: {sums}.",
            "Each cell says what came of it and at which commit; `make faults` runs all. After each fault no job was lost, none started",
            "twice, every status right, every loss the undisturbed run's. An empty cell does not apply.",
            "",
            f"| fault | {' | '.join(MOMENTS)} |",
            f"|---|{'---|' * len(MOMENTS)}",
            *(f"| {fault} | {' | '.join(known.get((fault, moment), '') for moment in MOMENTS)} |" for fault in faults),
        ]
        return "\n".join(rows) + "\n"


def _cells(text: str) -> dict[Cell, str]:
    """What a table says, by cell."""
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {(row[0], moment): told for row in rows[1:] for moment, told in zip(MOMENTS, row[1:], strict=True) if told}


def commit() -> str:
    """The commit that was tested, and whether anything had been changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=10", "HEAD") + (" with changes" if changed else "")
