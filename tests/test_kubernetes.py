"""Kubernetes manifests: valid by Kubernetes' own schemas, and every name in them has its counterpart."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from streams.api_keys import create_key
from streams.settings import Settings
from streams.worker import Worker
from tests.service_links import service_links
from tests.test_compose import WORKERS, dockerfile_variables, settings_fields

FILE = Path(__file__).parent.parent / "deploy" / "kubernetes" / "cortex.yaml"
OLDEST, NEWEST = "1.29", "1.34"
Manifests = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def manifests() -> Manifests:
    """By kind and name."""
    documents = yaml.safe_load_all(FILE.read_text())
    return {(d["kind"], d["metadata"]["name"]): d for d in documents}


def documented_secret() -> dict[str, str]:
    """The variables that the file's comment puts into the Secret, with a password and the hash of a key."""
    comment = FILE.read_text().partition("apiVersion")[0]
    secret = {k: v.replace("…", "p%2Fw") for k, v in re.findall(r"^#   (CORTEX_\w+)=(\S+)$", comment, re.M)}
    assert secret["CORTEX_API_KEYS"].startswith("agent:decide+reply:")
    return secret | {"CORTEX_API_KEYS": create_key("agent", ["decide", "reply"])[1].entry}


def pod_of(manifests: Manifests, name: str) -> dict[str, Any]:
    template: dict[str, Any] = manifests["Deployment", f"cortex-{name}"]["spec"]["template"]
    return template


def environment(manifests: Manifests, name: str) -> dict[str, str]:
    """What the process finds: what the pod names prevails over kubelet's links, and these over the image."""
    links: dict[str, str] = {}
    for kind, service in manifests:
        if kind == "Service":
            links |= service_links(service)
    [container] = pod_of(manifests, name)["spec"]["containers"]
    given: dict[str, str] = {}
    for source in container["envFrom"]:
        [(kind, reference)] = source.items()
        given |= {
            "configMapRef": manifests["ConfigMap", "cortex"]["data"],
            "secretRef": documented_secret(),
        }[kind]
        assert reference == {"name": "cortex"}
    given |= {each["name"]: each["value"] for each in container.get("env", [])}
    assert settings_fields(given), "every variable is a setting"
    return dockerfile_variables() | links | given


@pytest.mark.parametrize("kubernetes", [OLDEST, NEWEST])
def test_valid_by_the_schemas_of_kubernetes(manifests: Manifests, kubernetes: str) -> None:
    for manifest in manifests.values():
        assert kubernetes_validate.validate(manifest, kubernetes, strict=True) == kubernetes


def test_the_check_refuses_what_kubernetes_does(manifests: Manifests) -> None:
    wrong = {**manifests["Service", "cortex"], "spec": {"selectr": {}}}
    with pytest.raises(kubernetes_validate.ValidationError, match="selectr"):
        kubernetes_validate.validate(wrong, NEWEST, strict=True)


@pytest.mark.parametrize("name", WORKERS)
def test_the_manifest_runs_the_image_as_it_is(manifests: Manifests, name: str) -> None:
    deployment = manifests["Deployment", f"cortex-{name}"]["spec"]
    pod = deployment["template"]["spec"]
    [container] = pod["containers"]
    assert deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"]
    assert container["args"] == [name]
    assert container["image"] == f"cortex-streams:{version('cortex-streams')}"
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("name", WORKERS)
def test_a_pod_reads_its_settings_whatever_kubernetes_injects(
    manifests: Manifests, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in environment(manifests, name).items():
        monkeypatch.setenv(variable, value)
    settings = Settings.load().of_worker(name).resolved()
    pod = pod_of(manifests, name)["spec"]
    [container] = pod["containers"]
    assert pod["enableServiceLinks"] is False
    assert container["ports"] == [{"name": "http", "containerPort": settings.port}]
    assert settings.kafka_sasl_username
    assert settings.kafka_sasl_password
    assert settings.redis_address.startswith("rediss://")
    assert settings.min_insync_replicas < settings.replication_factor

    # Certificates are where the settings look for them, and all else that is written goes to /tmp.
    [tls] = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "tls"]
    assert str(settings.kafka_ssl_cafile) == f"{tls}/ca.crt"
    assert settings.redis_address.endswith(f"?ssl_ca_certs={tls}/ca.crt")
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


@pytest.mark.parametrize("name", WORKERS)
def test_probes_ask_what_is_served_and_time_suffices(
    manifests: Manifests, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in environment(manifests, name).items():
        monkeypatch.setenv(variable, value)
    settings = Settings.load()
    pod = pod_of(manifests, name)["spec"]
    [container] = pod["containers"]
    served = [route.path for route in Worker("x", settings).routes()]
    for probe, path in (("startup", "/healthz"), ("liveness", "/healthz"), ("readiness", "/readyz")):
        assert container[f"{probe}Probe"]["httpGet"] == {"path": path, "port": "http"}
        assert path in served
    startup, readiness = container["startupProbe"], container["readinessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 120
    assert pod["terminationGracePeriodSeconds"] > settings.drain_s + settings.shutdown_timeout_s
    if name == "inference":  # the only one that gets requests
        assert settings.drain_s > readiness["periodSeconds"] * readiness["failureThreshold"]
    else:
        assert settings.drain_s == 0


def test_the_service_finds_the_inference_workers(manifests: Manifests) -> None:
    service = manifests["Service", "cortex"]["spec"]
    [port] = service["ports"]
    assert service["selector"] == pod_of(manifests, "inference")["metadata"]["labels"]
    assert port["targetPort"] == pod_of(manifests, "inference")["spec"]["containers"][0]["ports"][0]["name"]


@pytest.mark.parametrize("name", WORKERS)
def test_pods_are_spread_and_leave_one_by_one(manifests: Manifests, name: str) -> None:
    labels = pod_of(manifests, name)["metadata"]["labels"]
    spread = pod_of(manifests, name)["spec"]["topologySpreadConstraints"]
    assert {each["topologyKey"] for each in spread} == {
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    }
    assert all(each["labelSelector"] == {"matchLabels": labels} for each in spread)
    budget = manifests["PodDisruptionBudget", f"cortex-{name}"]["spec"]
    assert budget == {"maxUnavailable": 1, "selector": {"matchLabels": labels}}
    assert manifests["Deployment", f"cortex-{name}"]["spec"]["replicas"] > budget["maxUnavailable"]


def test_only_agents_reach_the_service_and_workers_reach_only_their_servers(manifests: Manifests) -> None:
    everyone, inference = (
        manifests["NetworkPolicy", name]["spec"] for name in ("cortex", "cortex-inference")
    )
    assert everyone["policyTypes"] == ["Ingress", "Egress"]
    for name in WORKERS:
        assert (
            everyone["podSelector"]["matchLabels"].items()
            <= pod_of(manifests, name)["metadata"]["labels"].items()
        )
    assert inference["podSelector"]["matchLabels"] == pod_of(manifests, "inference")["metadata"]["labels"]
    for policy in (everyone, inference):
        assert all(rule["from"] and rule["ports"] == [{"port": "http"}] for rule in policy["ingress"])
    out = {port["port"] for rule in everyone["egress"] for port in rule["ports"]}
    kafka = manifests["ConfigMap", "cortex"]["data"]["CORTEX_KAFKA"]
    [redis] = re.findall(r":(\d+)/", documented_secret()["CORTEX_REDIS_URL"])
    assert out == {53, int(kafka.rpartition(":")[2]), int(redis)}
