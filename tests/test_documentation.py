"""The documents say what the code does: the reference is what the code gives, blocks are valid, links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from docs.generate import contract, rest, spec
from docs.generate.markdown import anchor
from docs.generate.pages import FOLDER, differing, pages
from docs.generate.settings import OTHERS
from mae_core.config import RUN_SPEC, with_absolute_paths
from mae_core.series import SERIES
from service.errors import all_problems
from service.settings import Settings
from service.user_errors import EXIT_CODES
from tests.blocks import CHECKED, PAGES, PROJECT, RUN, SHOWN, Block, blocks_of
from workers.contract import Condition, EventType, JobStatus, Reason

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
DOCUMENTS = sorted([*(PROJECT / "docs").rglob("*.md"), *PROJECT.glob("*.md")])
_ENCODER, _MODEL = {"init": "random"}, {"arch": "vit_tiny_patch16", "image_size": 224}
_SOURCE, _LABELLED = {"source": "/data/cells"}, {"source": "/data/cells", "validation_fraction": 0.2}
# to which a block adds that shows but some fields
SPECS: list[dict[str, Any]] = [
    {"kind": "pretrain", "name": "x", "model": _MODEL, "data": _SOURCE},
    {"kind": "probe", "name": "x", "encoder": {"job": "x"}, "data": _LABELLED},
    {"kind": "finetune", "name": "x", "encoder": {"job": "x"}, "data": _LABELLED},
    {"kind": "evaluate", "name": "x", "encoder": {"job": "x"}, "data": _SOURCE},
    {"kind": "embed", "name": "x", "encoder": {"job": "x"}, "data": _SOURCE},
]


def headings(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


def test_the_reference_is_what_the_code_gives() -> None:
    assert differing(pages()) == [], "write it anew with: make docs"


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("settings.md", [f"MAESTRO_{name.upper()}" for name in Settings.model_fields]),
        ("events.md", list(EventType)),
        ("reasons.md", list(Reason)),
        ("problems.md", list(all_problems())),
    ],
)
def test_each_has_its_heading(page: str, names: list[str]) -> None:
    assert set(names) <= set(headings(FOLDER / page))


@pytest.mark.parametrize(
    ("page", "names"),
    [("reasons.md", [*JobStatus, *Condition]), ("figures.md", list(SERIES)), ("command-line.md", list(map(str, EXIT_CODES)))],
)
def test_each_has_its_row(page: str, names: list[str]) -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", (FOLDER / page).read_text(), re.MULTILINE)
    assert set(names) <= set(rows)


@pytest.mark.parametrize("kind", [EventType, JobStatus])
def test_what_each_means_stands_behind_it(kind: type[EventType | JobStatus]) -> None:
    assert contract.comments_of(kind).keys() == set(kind), "each member is followed by a comment"


def test_every_variable_that_the_code_names_is_documented() -> None:
    named = {
        name
        for package in ("mae_core", "workers", "service", "tests")
        for path in (PROJECT / package).rglob("*.py")
        for name in re.findall(r'["$]\{?(MAESTRO_[A-Z_]*[A-Z])\b', path.read_text())
    }
    assert named <= set(headings(FOLDER / "settings.md"))
    assert OTHERS.keys() <= named, "a variable that is named nowhere"


def models_of_specs() -> set[type[BaseModel]]:
    return {model for models in spec.models_by_path().values() for model in models.values()}


@pytest.mark.parametrize("model", sorted(models_of_specs(), key=lambda model: model.__name__))
def test_every_field_of_a_spec_says_what_it_is(model: type[BaseModel]) -> None:
    for name, info in model.model_fields.items():
        assert name == "kind" or info.description or spec.sections_in(info.annotation), f"{model.__name__}.{name} needs a description"


def test_every_operation_says_what_it_does() -> None:
    operations = [one for methods in rest.description()["paths"].values() for one in methods.values()]
    assert [one["operationId"] for one in operations if not one.get("description")] == [], "give the route's function a docstring"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_a_block_is_of_a_language_that_is_run_or_checked(block: Block) -> None:
    assert block.language in (*RUN, *CHECKED, *SHOWN), f"{block.where}: text (what is printed), or one of {RUN + CHECKED}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=lambda block: block.where)
def test_yaml_is_a_spec_or_fields_of_one(block: Block, tmp_path: Path) -> None:
    if re.search(r"^kind:", block.text, re.MULTILINE):
        RUN_SPEC.validate_python(with_absolute_paths(yaml.safe_load(block.text), folder=tmp_path))
        return
    for text in re.split(r"\n(?=\w)", block.text):
        fields = yaml.safe_load(text)
        errors = [error for given in SPECS if (error := _error_of(merged(given, fields)))]
        assert len(errors) < len(SPECS), f"{block.where}: {text}: {errors[0]}"


def merged(given: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return given | {name: {**given.get(name, {}), **value} if name == "data" else value for name, value in fields.items()}


def _error_of(given: dict[str, Any]) -> str | None:
    try:
        RUN_SPEC.validate_python(given)
    except ValidationError as error:
        return str(error)
    return None


def test_blocks_that_are_not_run_say_why(record_property: Any) -> None:
    left_out = [block for block in BLOCKS if block.mark == "not run"]
    record_property("not run", "; ".join(f"{block.where}: {block.why}" for block in left_out))
    assert all(block.why and len(block.why) > 10 for block in left_out)
    assert all(block.language in RUN for block in left_out), "only what would be run is marked"
    assert len(left_out) * 3 < sum(block.is_run for block in BLOCKS), "too much of what the documents say is never tried"


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, fragment = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page.name}: {target}"
        if fragment:
            assert fragment in map(anchor, headings(linked)), f"{page.name}: {target}"
