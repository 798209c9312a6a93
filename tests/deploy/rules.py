"""The alerts and dashboards that are deployed, and what they ask Prometheus."""

import json
import re
from typing import Any

import yaml

from tests.deploy.compose import PROJECT

RULES = PROJECT / "deploy" / "prometheus" / "rules" / "maestro.yml"
DASHBOARDS = sorted((PROJECT / "deploy" / "grafana" / "dashboards").glob("*.json"))
_NAME = re.compile(r"\b(?:maestro[:_][a-z0-9_:]+|process_[a-z_]+|ray_[a-z_]+|up)\b")


def groups() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in groups() for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def queries() -> list[str]:
    """Of all panels of all dashboards."""
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    return [target["expr"] for board in boards for panel in board["panels"] for target in panel["targets"]]


def metrics_named() -> set[str]:
    """All that rules and dashboards ask for, recorded series too."""
    return {name for expression in (*(rule["expr"] for rule in rules()), *queries()) for name in _NAME.findall(expression)}
