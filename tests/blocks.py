"""The code blocks of our documents, and how they are run: those of a page in order, in one shell, in a folder of their own."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parents[1]
PAGES = sorted(path for path in [PROJECT / "README.md", *(PROJECT / "docs").rglob("*.md")] if path.parent != PROJECT / "docs" / "reference")
RUN = ("sh", "python")
CHECKED = ("yaml",)
SHOWN = ("text", "mermaid")  # what a command prints; a drawing
_FENCE = re.compile(
    r"(?:^ *<!-- (?P<mark>not run|fails): (?P<why>.+?) -->\n\n?)?^(?P<indent> *)```(?P<language>\S*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
# timm imports torchvision, which does not load beside the CPU-only torch of our tests as it would beside a reader's.
_BEFORE_TIMM = "from tests.torchvision_ops import import_torchvision; import_torchvision()\n"
_FILE = re.compile(r"# ([\w.-]+\.(?:py|yaml))\n")


@dataclass(frozen=True)
class Block:
    """One fenced block. `mark`: an HTML comment before it says that it is `not run`, or that it `fails`, and why."""

    page: Path
    line: int
    language: str
    text: str
    mark: str | None
    why: str | None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(PROJECT)}:{self.line}"

    @property
    def file_name(self) -> str | None:
        """The name that its first line gives it: it is saved, to be used by the commands that follow."""
        found = _FILE.match(self.text)
        return found[1] if found else None

    @property
    def is_run(self) -> bool:
        return self.mark != "not run" and (self.language in RUN or self.file_name is not None)


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        found.append(Block(page, line, match["language"], textwrap.dedent(match["text"]), match["mark"], match["why"]))
    assert len(found) * 2 == len(re.findall(r"^ *```", text, re.MULTILINE)), f"{page}: a fence has no end"
    return found


def runs(page: Path) -> bool:
    return any(block.is_run for block in blocks_of(page))


def run_page(page: Path, folder: Path, environment: dict[str, str], *, timeout_seconds: float = 300) -> str:
    """Runs a page's blocks in `folder`, as its reader would; answers what they printed. Fails with the block that failed."""
    script = "\n".join(["set -euo pipefail", *(_as_shell(block) for block in blocks_of(page) if block.is_run)])
    own = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT),
        "HOME": str(folder),
        "LANG": "C.UTF-8",
    }
    output = folder / ".output"
    with output.open("w") as to:
        shell = subprocess.Popen(
            ["bash", "-c", script],
            cwd=folder,
            env=own | environment,
            stdin=subprocess.DEVNULL,
            stdout=to,
            stderr=to,
            start_new_session=True,
        )
        try:
            code = shell.wait(timeout_seconds)
        finally:  # with what it has left in the background
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    told = output.read_text(encoding="utf-8", errors="replace")
    assert code == 0, f"the last of these blocks failed ({code}):\n{told[-6000:]}"
    return told


def _as_shell(block: Block) -> str:
    told = f"echo '### {block.where}'"
    text = _BEFORE_TIMM + block.text if block.language == "python" and "import timm" in block.text else block.text
    if block.file_name is not None:
        return f"{told}\ncat > {block.file_name} <<'END_OF_BLOCK'\n{text}END_OF_BLOCK"
    if block.language == "python":
        text = f"python - <<'END_OF_BLOCK'\n{text}END_OF_BLOCK\n"
    if block.mark == "fails":
        return f"{told}\nif (\n{text}); then echo 'it was to fail: {block.why}'; exit 1; fi"
    return f"{told}\n{text}"
