"""The manifests of deploy/kubernetes, built as an installation builds them, against schemas, and against each other."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from service.app import create_app
from service.settings import SECRETS_VARIABLE, Settings, load_settings
from tests.deploy.compose import PROJECT
from tests.deploy.rules import groups
from tests.deploy.test_compose import secrets_folder  # noqa: F401 (a fixture)
from tests.unit.service_fixtures import make_settings

KUBERNETES = "1.34"
CUSTOM_RESOURCES = yaml.safe_load((Path(__file__).parent / "custom_resources.yaml").read_text())
SECRETS = {"maestro-secrets", "maestro-ray-token"}


@cache
def objects() -> list[dict[str, Any]]:
    program = shutil.which("kustomize")
    command = [program, "build"] if program else [shutil.which("kubectl"), "kustomize"]
    if command[0] is None:
        pytest.skip("NO KUSTOMIZE: install kubectl or kustomize")
    done = subprocess.run([*command, PROJECT / "deploy" / "kubernetes" / "example"], capture_output=True, text=True, check=True, timeout=60)
    return list(yaml.safe_load_all(done.stdout))


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [one for one in objects() if one["kind"] in kinds]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each pod template, by the name of what it is of."""
    for one in of_kind("Deployment", "Job"):
        yield one["metadata"]["name"], one["spec"]["template"]
    [cluster] = of_kind("RayCluster")
    yield "head", cluster["spec"]["headGroupSpec"]["template"]
    for group in cluster["spec"]["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    expressions = selector.get("matchExpressions", ())
    assert all(each["operator"] == "In" for each in expressions)
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


def test_each_object_is_one_that_kubernetes_takes() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="NO SCHEMAS: pip install kubernetes-validate").validate
    for one in objects():
        if one["kind"] in CUSTOM_RESOURCES:
            schema = CUSTOM_RESOURCES[one["kind"]] | {"$defs": CUSTOM_RESOURCES["$defs"]}
            jsonschema.validate(one["spec"], schema)
        else:
            validate(one, KUBERNETES, strict=True)
    for name, template in pods():
        metadata = {"name": name} | template.get("metadata", {})
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}, KUBERNETES, strict=True)


def test_a_misspelt_field_is_seen() -> None:
    [cluster] = of_kind("RayCluster")
    schema = CUSTOM_RESOURCES["RayCluster"] | {"$defs": CUSTOM_RESOURCES["$defs"]}
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(cluster["spec"] | {"workerGroupSpecs": [cluster["spec"]["workerGroupSpecs"][0] | {"maxReplica": 2}]}, schema)


def test_all_parts_are_there() -> None:
    replicas = {one["metadata"]["name"]: one["spec"]["replicas"] for one in of_kind("Deployment")}
    assert replicas == {"maestro-api": 2, "maestro-dispatcher": 2}
    assert {one["metadata"]["namespace"] for one in objects() if one["kind"] != "Namespace"} == {"maestro"}
    assert [one["metadata"]["name"] for one in of_kind("Job")] == ["maestro-migrations"]
    [cluster] = of_kind("RayCluster")
    assert [group["groupName"] for group in cluster["spec"]["workerGroupSpecs"]] == ["cpu", "gpu"]
    assert cluster["spec"]["enableInTreeAutoscaling"] is True
    assert cluster["spec"]["authOptions"] == {"mode": "token", "secretName": "maestro-ray-token"}


def test_no_pod_has_more_rights_than_it_needs() -> None:
    for name, template in pods():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] == (name == "head"), "the autoscaler beside the head asks Kubernetes for machines"
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert all("hostPath" not in volume for volume in spec["volumes"])
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert "memory" in container["resources"]["limits"]
            assert not container["image"].endswith(":latest")
            assert ":" in container["image"].rpartition("/")[2]


def test_secrets_are_named_and_not_written() -> None:
    assert of_kind("Secret") == []
    for name, template in pods():
        for container in template["spec"]["containers"]:
            for variable in container.get("env", ()):
                assert "value" in variable, (name, variable)
                assert not any(word in variable["name"] for word in ("PASSWORD", "TOKEN", "KEY"))
        named = {
            source["secret"].get("secretName") or source["secret"].get("name")
            for volume in template["spec"]["volumes"]
            for source in (volume, *volume.get("projected", {}).get("sources", ()))
            if "secret" in source
        }
        assert named <= SECRETS


def test_our_processes_start_with_it(secrets_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """With a Secret of the keys that docs/kubernetes.md names, which are Compose's."""
    for name in [name for name in os.environ if name.startswith("MAESTRO_")]:
        monkeypatch.delenv(name)
    [settings] = [one["data"] for one in of_kind("ConfigMap") if one["metadata"]["name"] == "maestro-settings"]
    text = (PROJECT / "docs" / "kubernetes.md").read_text()
    keys = [path.name for path in secrets_folder.iterdir() if f"--from-file={path.name}" in text or f"={path.name}" in text]
    assert {"maestro_database_url", "maestro_secret_key", "maestro_api_token", "maestro_metrics_token", "s3_credentials"} <= set(keys)
    for key in (*keys, "maestro_ray_token"):
        (tmp_path / key).write_text((secrets_folder / key).read_text())
    for variable, value in (settings | {SECRETS_VARIABLE: str(tmp_path)}).items():
        monkeypatch.setenv(variable, value)
    assert load_settings().s3_endpoint == "https://s3.example.com"
    known = {f"MAESTRO_{field.upper()}" for field in Settings.model_fields} | {SECRETS_VARIABLE}
    assert {name for name in settings if name.startswith("MAESTRO_")} <= known
    for name in ("maestro-api", "maestro-dispatcher", "maestro-migrations"):
        [container] = dict(pods())[name]["spec"]["containers"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted["secrets"] == settings[SECRETS_VARIABLE]
        assert container["envFrom"] == [{"configMapRef": {"name": "maestro-settings"}}]


def test_everything_that_is_selected_is_there() -> None:
    labels = [template["metadata"]["labels"] for _, template in pods()]
    for one in of_kind("Deployment", "PodDisruptionBudget", "PodMonitor"):
        assert any(selects(one["spec"]["selector"], each) for each in labels), one["metadata"]["name"]
    [service] = of_kind("Service")
    assert any(selects({"matchLabels": service["spec"]["selector"]}, each) for each in labels)
    [monitor] = of_kind("ServiceMonitor")
    assert selects(monitor["spec"]["selector"], service["metadata"]["labels"])
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "maestro", "the rules ask for up{job='maestro'}"
    for policy in of_kind("NetworkPolicy"):
        assert any(selects(policy["spec"]["podSelector"], each) for each in labels), policy["metadata"]["name"]
    guarded = {one["metadata"]["name"] for one in of_kind("PodDisruptionBudget")}
    assert guarded == {one["metadata"]["name"] for one in of_kind("Deployment")}


def test_what_no_policy_names_is_refused() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind("NetworkPolicy")}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, template in pods():
        labels = template["metadata"]["labels"]
        own = [policy for policy in policies.values() if selects(policy["podSelector"], labels)]
        comes_in = [rule for policy in own for rule in policy.get("ingress", ())]
        assert all(rule.get("from") for rule in comes_in), "from somebody, never from everywhere"
        if name in ("maestro-dispatcher", "maestro-migrations"):
            assert comes_in == []


def test_probes_and_ingress_ask_for_what_the_api_has(tmp_path: Path) -> None:
    paths = set(create_app(make_settings(tmp_path)).openapi()["paths"])
    [container] = dict(pods())["maestro-api"]["spec"]["containers"]
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
    assert {probe["path"] for probe in probes} <= paths
    [ingress] = of_kind("Ingress")
    assert ingress["spec"]["tls"][0]["hosts"] == [ingress["spec"]["rules"][0]["host"]]
    for path in ingress["spec"]["rules"][0]["http"]["paths"]:
        assert any(known.startswith(path["path"]) for known in paths)
        assert path["backend"]["service"]["name"] == of_kind("Service")[0]["metadata"]["name"]


def test_the_service_counts_on_what_the_autoscaler_may_start() -> None:
    [cluster] = of_kind("RayCluster")
    [settings] = [one["data"] for one in of_kind("ConfigMap") if one["metadata"]["name"] == "maestro-settings"]
    for resource, setting in (("cpu", "MAESTRO_AUTOSCALED_CPUS"), ("nvidia.com/gpu", "MAESTRO_AUTOSCALED_GPUS")):
        most = sum(
            group["maxReplicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get(resource, 0))
            for group in cluster["spec"]["workerGroupSpecs"]
        )
        assert float(settings[setting]) == most


def test_the_operator_gets_the_rules_that_are_tested() -> None:
    [rule] = of_kind("PrometheusRule")
    assert rule["spec"]["groups"] == groups()
    [dashboards] = [one for one in of_kind("ConfigMap") if one["metadata"]["name"] == "maestro-dashboards"]
    assert set(dashboards["data"]) == {path.name for path in (PROJECT / "deploy" / "grafana" / "dashboards").glob("*.json")}
