"""The reference's pages, by name, and which of the files differ from them."""

from pathlib import Path

from docs.generate import command_line, contract, figures, problems, rest, settings, spec

FOLDER = Path(__file__).parents[1] / "reference"


def pages() -> dict[str, str]:
    return {
        "spec.md": spec.page(),
        "command-line.md": command_line.page(),
        "rest.md": rest.page(),
        "events.md": contract.events_page(),
        "reasons.md": contract.reasons_page(),
        "problems.md": problems.page(),
        "settings.md": settings.page(),
        "figures.md": figures.page(),
    }


def differing(made: dict[str, str]) -> list[str]:
    """Names of files that are not there, are another, or should not be there."""
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    return sorted(name for name in there.keys() | made.keys() if there.get(name) != made.get(name))
