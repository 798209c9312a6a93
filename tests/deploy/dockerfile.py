"""Reads a Dockerfile as far as tests need it: its instructions, by stage."""

import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """From one FROM to the next. arguments: ARG's names and what they are where nobody says."""

    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        return [rest for instruction, rest in self.instructions if instruction == name]

    @property
    def arguments(self) -> dict[str, str]:
        return dict((*rest.split("=", 1), "")[:2] for rest in self.all("ARG"))  # type: ignore[misc]


def read_stages(path: Path) -> list[Stage]:
    """The stages of a Dockerfile; what is before the first FROM is known to bases alone."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    known = Stage("")
    stages: list[Stage] = []
    for line in filter(None, (line.strip() for line in text.replace("\\\n", " ").splitlines())):
        name, rest = line.split(maxsplit=1)
        if name == "FROM":
            base = rest.split()[0]
            for argument, value in known.arguments.items():
                base = base.replace(f"${{{argument}}}", value)
            stages.append(Stage(base))
        else:
            (stages[-1] if stages else known).instructions.append((name, rest))
    return stages
