"""Who may import whom: the table of ARCHITECTURE.md, walked by ast."""

import ast
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
PACKAGES = ("mae_core", "workers", "service")
CONTROL = {"pydantic"}
CORE = {"pydantic", "torch", "numpy", "PIL", "tifffile", "imagecodecs", "simplejpeg", "scipy", "safetensors", "yaml", "pyarrow"}
WORKERS = {"pydantic", "torch", "numpy", "safetensors", "ray", "boto3", "botocore", "httpx", "psutil"}
SERVICE = {
    *("pydantic", "pydantic_core", "pydantic_settings", "fastapi", "starlette", "uvicorn", "h11", "sqlalchemy", "alembic"),
    *("boto3", "botocore", "httpx", "typer", "rich", "yaml", "psutil", "numpy", "prometheus_client"),
}
NAMES = {"workers.names", "mae_core.exports.names"}  # the standard library alone
SHARED = {"workers.contract", "workers.stored", "workers.state_names", *NAMES}
SPECS = {"mae_core.config", "mae_core.options", "mae_core.packed", "mae_core.saved_config", "mae_core.exports.formats"}
OF_CLIENT = {"service.client", "service.client_*", "service.user_errors", *NAMES}
TYPES_ONLY = {"mypy_boto3_s3", "mypy_boto3_s3.type_defs"}

# The first pattern that fits a module decides: third-party libraries, then modules of ours.
RULES: list[tuple[str, set[str], set[str]]] = [
    ("mae_core.recipes", set(), set()),
    ("mae_core.memory", set(), set()),
    ("mae_core.options", CONTROL, set()),
    ("mae_core.packed", CONTROL, {"mae_core.options"}),
    ("mae_core.saved_config", CONTROL, {"mae_core.options"}),
    ("mae_core.exports.names", set(), set()),
    ("mae_core.exports.formats", CONTROL, {"mae_core.exports.names", "mae_core.options"}),
    ("mae_core.config", CONTROL, {"mae_core.exports.formats", "mae_core.options", "mae_core.recipes"}),
    ("mae_core.estimates", CONTROL, {"mae_core.config", "mae_core.options"}),
    ("mae_core.exports.programs", {*CORE, "onnxruntime"}, {"mae_core.*"}),  # an ONNX file is run before it is handed out
    ("mae_core.*", CORE, {"mae_core.*"}),
    ("workers.names", set(), set()),
    ("workers.contract", CONTROL, {"workers.names", *SPECS}),
    ("workers.stored", CONTROL, {"workers.contract", "workers.names", *SPECS}),
    ("workers.state_names", set(), {"workers.stored"}),
    ("workers.*", WORKERS, {"workers.*", "mae_core.*"}),
    ("service.user_errors", set(), set()),
    ("service.installed", set(), {"service.user_errors"}),
    ("service.client_downloads", set(), {*OF_CLIENT, *SHARED}),
    ("service.client_job", {"numpy"}, OF_CLIENT),
    ("service.client", set(), {*OF_CLIENT, "workers.stored"}),
    ("service.client_*", {"httpx"}, OF_CLIENT),
    ("service.spec_file", {"pydantic", "yaml"}, {"service.user_errors", *SPECS}),
    ("service.wording", set(), set()),
    ("service.comparison", set(), {"service.client_errors", "service.wording", *NAMES}),
    ("service.console", {"typer"}, {"service.client", "service.installed", "service.wording"}),
    ("service.data_commands", {"typer", "rich"}, {"service.*", "mae_core.packed"}),
    ("service.*_commands", {"typer", "yaml", "psutil"}, {"service.*", *NAMES}),
    ("service.cli", {"typer"}, {"service.*", *NAMES}),
    ("service.*", SERVICE, {"service.*", *SHARED, "mae_core.memory", "mae_core.recipes", "mae_core.estimates", *SPECS}),
]
# Inside service: who may be imported by whom, beyond the table above.
ONLY_BY = {
    "service.routes.*": {"service.app", "service.routes.*"},
    "service.app": set[str](),
    "service.dispatcher": set[str](),
    "service.cli": set[str](),
}
USER_SIDE = (
    "service.client",
    "service.client_*",
    "service.user_errors",
    "service.installed",
    "service.wording",
    "service.cli",
    "service.*_commands",
    "service.comparison",
    "service.console",
    "service.demo",
    "service.watch",
    "service.watched_events",
    "service.spec_file",
    "service.home",
    "service.up",
    "service.local",
)
USER_SIDE_MAY_USE = {*USER_SIDE, "service.processes", "service.doctor"}  # the doctor looks at a service from inside


def module_name(file: Path) -> str:
    parts = file.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(file for package in PACKAGES for file in (PROJECT / package).rglob("*.py"))
MODULES = {module_name(file): file for file in FILES}


def imports_of(file: Path) -> set[str]:
    """Every module that a file imports, wherever in it: `from a import b` counts as a.b where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else node.module for alias in node.names}
    return found


def fits(module: str, patterns: set[str]) -> bool:
    return any(fnmatchcase(module, pattern) or f"{module}.*" == pattern for pattern in patterns)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_it_may(module: str) -> None:
    libraries, ours = next((rule[1], rule[2]) for rule in RULES if fits(module, {rule[0]}))
    for imported in sorted(imports_of(MODULES[module]) - TYPES_ONLY):
        top = imported.partition(".")[0]
        if top in PACKAGES:
            assert fits(imported, ours), f"{module} may not import {imported}"
        elif top not in sys.stdlib_module_names:
            assert top in libraries, f"{module} may not import {imported}"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("service")))
def test_inside_the_service_imports_go_one_way(module: str) -> None:
    for imported in sorted(imports_of(MODULES[module])):
        for pattern, importers in ONLY_BY.items():
            if fits(imported, {pattern}):
                assert fits(module, importers), f"{module} may not import {imported}"
        if fits(module, set(USER_SIDE)) and imported.startswith("service."):
            assert fits(imported, USER_SIDE_MAY_USE), f"{module} runs on the user's side and may not import {imported}"


@pytest.mark.parametrize("package", PACKAGES)
def test_package_files_are_empty(package: str) -> None:
    for file in (PROJECT / package).rglob("__init__.py"):
        assert file.read_text().strip() == "", f"{file} must stay empty: that keeps torch out of the service"


def test_every_folder_of_modules_is_a_package() -> None:
    assert {file.parent for file in FILES if not (file.parent / "__init__.py").exists()} == set()


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split())


def test_the_service_loads_neither_torch_nor_ray() -> None:
    assert loaded_by("import service.app, service.dispatcher, service.cli") & {"torch", "ray", "torchvision", "sklearn", "pyarrow"} == set()


def test_the_client_loads_nothing_but_httpx() -> None:
    assert loaded_by("import service.client") <= {"service", "workers", "mae_core", *loaded_by("import httpx")}


def test_the_command_line_starts_with_little() -> None:
    late = {"pydantic", "httpx", "rich", "boto3", "sqlalchemy", "fastapi", "yaml", "numpy", "psutil", "torch"}
    assert loaded_by("import service.cli, typer; typer.main.get_command(service.cli.app)") & late == set()


def test_the_driver_loads_nothing_that_trains() -> None:
    heavy = {"torch", "numpy", "scipy", "sklearn", "pyarrow", "pandas", "boto3", "botocore"}
    assert loaded_by("import workers.main") & heavy == set()


def test_a_worker_loads_what_its_first_step_needs() -> None:
    later = {"scipy", "sympy", "sklearn", "pyarrow", "pandas"}  # sympy: torch's, with DTensor
    assert loaded_by("import workers.causes, workers.train_loop") & later == set()
