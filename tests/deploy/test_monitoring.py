"""Alerts and dashboards, as far as they can be tested with nothing to watch. With a live service: tests/integration/test_prometheus.py."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.compose import PROJECT, read_compose
from tests.deploy.rules import DASHBOARDS, RULES, alerts, groups, rules


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("NO PROMETHEUS: apt-get install prometheus")
    return found


def test_prometheus_takes_config_and_rules(promtool: str, tmp_path: Path) -> None:
    """`check config` looks for the token's file, too."""
    token = tmp_path / "token"
    token.write_text("x")
    config = tmp_path / "prometheus.yml"
    text = (PROJECT / "deploy" / "prometheus" / "prometheus.yml").read_text()
    config.write_text(text.replace("/run/secrets/maestro_metrics_token", str(token)))
    shutil.copytree(RULES.parent, tmp_path / "rules")
    done = subprocess.run([promtool, "check", "config", config], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules())} rules found" in done.stdout


def test_each_alert_fires_when_it_should(promtool: str) -> None:
    cases = PROJECT / "tests" / "deploy" / "rules.test.yml"
    done = subprocess.run([promtool, "test", "rules", cases], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tested = cases.read_text()
    assert [alert["alert"] for alert in alerts() if alert["alert"] not in tested] == []


def test_each_alert_is_in_the_runbook() -> None:
    headings = re.findall(r"^### (\w+)$", (PROJECT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert headings == [alert["alert"] for alert in alerts()]
    for alert in alerts():
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"
        assert alert["annotations"]["summary"]
        assert alert["labels"]["severity"] in ("critical", "warning", "info")


def test_recorded_series_say_of_what_they_are() -> None:
    assert all(rule["record"].startswith("maestro:") for rule in rules() if "record" in rule)
    assert len({group["name"] for group in groups()}) == len(groups())


def test_dashboards_are_whole() -> None:
    assert len(DASHBOARDS) == len({json.loads(path.read_text())["uid"] for path in DASHBOARDS}) == 2
    datasources = PROJECT / "deploy" / "grafana" / "provisioning" / "datasources" / "prometheus.yml"
    [datasource] = yaml.safe_load(datasources.read_text())["datasources"]
    for path in DASHBOARDS:
        panels = json.loads(path.read_text())["panels"]
        assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
        assert len(set(places)) == len(places)
        used = {target["datasource"]["uid"] for panel in panels for target in panel["targets"]}
        assert used == {datasource["uid"]}


def test_grafana_finds_them_where_compose_mounts_them() -> None:
    volumes = read_compose({"MAESTRO_SECRETS": "/secrets"})["services"]["grafana"]["volumes"]
    mounted = dict(volume.split(":")[:2] for volume in volumes)
    provider = yaml.safe_load((PROJECT / "deploy" / "grafana" / "provisioning" / "dashboards" / "maestro.yml").read_text())["providers"][0]
    assert provider["options"]["path"] == mounted["./deploy/grafana/dashboards"]
    assert mounted["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
