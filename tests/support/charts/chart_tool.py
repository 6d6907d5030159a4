"""Renders the chart with Helm: one cached rendering per combination of an environment and a component."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

REPOSITORY: Final = Path(__file__).resolve().parents[3]
CHART: Final = REPOSITORY / "charts" / "reelway"
ENVIRONMENTS: Final = REPOSITORY / "infra" / "environments"
RELEASE: Final = "3f9c" * 16
Document = dict[str, Any]
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

ENVIRONMENT_FILES: Final = {
    "dev": ("dev.yaml",),
    "production-cpu": ("production-cpu.yaml",),
    "production-gpu": ("production-cpu.yaml", "production-gpu.yaml"),
    "air-gapped": ("air-gapped.yaml",),
}
NEEDED: Final = {"releases": {"initial": RELEASE, "store": {"hostPath": {"path": "/srv/reelway"}}}}
"""Values that no environment file can contain."""

_MONITORS: Final = {"monitors": {"enabled": True}}
_RULES: Final = {**_MONITORS, "rules": {"enabled": True}}
_LIVE: Final = {"jobs": {"runsClaim": "runs"}}
_REDIS: Final = {"type": "redis", "registry": "s3://features/registry.db"}
_S3: Final = {"bucket": "releases", "endpoint": "https://s3.test", "credentialsSecret": "c"}
_ROUTE: Final = {"enabled": True, "parentRefs": [{"name": "gateway"}], "hostnames": ["a.test"]}
_GIVEN_CLAIM: Final = {"pvc": {"existingClaim": ""}}
_JWT: Final = {"mode": "jwt", "jwt": {"audience": "reelway", "jwksUrl": "https://id.test:8443/keys"}}
_GATEWAY: Final = {"mode": "gateway", "gateway": {"keysSecret": "gateway-keys"}}
COMPONENTS: Final[dict[str, Document]] = {
    "as-is": {},
    "gcs-store": {"ray": {"gcs": {"redisAddress": "redis.test:6379"}}},
    "fused": {"serving": {"composition": "fused"}},
    "kserve": {"ranker": {"backend": "kserve"}},
    "s3": {"releases": {"store": {"type": "s3", "s3": _S3}}},
    "gs": {"releases": {"store": {"type": "gs", "gs": {"bucket": "releases"}}}},
    "pvc": {"releases": {"store": {"type": "pvc"}}},
    "parity-volume": {"releases": {"store": {"type": "pvc"}}, "features": {"type": "directory"}},
    "parity-s3": {
        "releases": {"store": {"type": "s3", "s3": _S3}},
        "features": {**_REDIS, "redis": {"mode": "bundled", "host": "", "tls": False}},
        "jobs": {
            "runsClaim": "", "parity": {"run": "s3://runs/production"}, "features": {"enabled": False},
            "train": {"enabled": False}, "evaluate": {"enabled": False},
        },
        "stream": {"enabled": False},
    },
    "host-path": {"releases": {"store": {"type": "hostPath", **_GIVEN_CLAIM}}},
    "redis-bundled": {"features": {**_REDIS, "redis": {"mode": "bundled", "host": "", "tls": False}}},
    "redis-external": {"features": {**_REDIS, "redis": {"mode": "external", "host": "redis.test", "tls": True}}},
    "features-directory": {"releases": {"store": {"type": "pvc"}}, "features": {"type": "directory"}},
    "jobs": {
        "jobs": {
            "runsClaim": "runs", "signingSecret": "signing", "kueueQueue": "reelway", "features": {"enabled": True},
            "train": {"enabled": True, "gpus": 1, "workers": 2}, "evaluate": {"enabled": True},
            "dataset": {"enabled": True}, "release": {"enabled": True},
            "submitters": [{"kind": "Group", "name": "ml", "apiGroup": "rbac.authorization.k8s.io"}],
        }
    },
    "live": {
        "jobs": {"runsClaim": "runs"}, "monitoring": _RULES,
        "eventLog": {"address": "kafka://kafka-0.test:9092,kafka-1.test:9093/live-", "kafkaSettingsSecret": "kafka"},
    },
    "live-elsewhere": {
        **_LIVE, "overlay": {"url": "s3://features/overlay", "state": {"persistent": False}},
        "eventLog": {"address": "kafka://kafka.test:9092", "createTopics": False},
        "stream": {"state": {"persistent": False}, "podDisruptionBudget": {"enabled": False}},
        "networkPolicies": {
            "kafka": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kafka"}}}],
            "catalogueClients": [{"podSelector": {"matchLabels": {"app": "uploads"}}}],
        },
    },
    "live-in-part": {
        "eventLog": {"address": "kafka://kafka.test:9092"}, "stream": {"enabled": False}, "overlay": {"enabled": False},
        "catalogue": {"enabled": False}, "monitoring": _RULES,
    },
    "not-live": {"eventLog": {"address": ""}, "monitoring": _RULES},
    "slow-bound": {"monitoring": {**_MONITORS, "rules": {"enabled": True, "latencyThresholdMs": 1000}}},
    "monitoring": {"monitoring": {**_RULES, "alertmanagerConfig": {"enabled": True}, "dashboards": {"enabled": True}}},
    "ingress": {
        "serving": {"ingress": {"enabled": True, "host": "a.test", "tlsSecret": "tls", "className": "nginx"}},
        "auth": {**_JWT, "trustedProxies": 1},
    },
    "http-route": {"serving": {"httpRoute": _ROUTE}, "auth": {**_GATEWAY, "trustedProxies": 1}},
    "jwt-keys": {
        "auth": {
            "mode": "jwt",
            "jwt": {"audience": "reelway", "issuer": "https://id.test", "jwksUrl": "", "keysConfigMap": "k"},
            "trustedProxies": 2, "unlimitedCidrs": ["10.1.0.0/16"],
        },
        "networkPolicies": {"keySet": [{"ipBlock": {"cidr": "10.2.0.0/16"}}]},
    },
    "no-outcomes": {"serving": {"outcomes": {"enabled": False}}},
    "outcomes-kept": {"serving": {"outcomes": {"enabled": True, "persistence": {"enabled": True}}}},
    "budgets": {
        "operator": {"replicas": 2, "podDisruptionBudget": {"enabled": True}},
        "serving": {"podDisruptionBudget": {"enabled": True}},
    },
    "priorities": {"priorityClasses": {"create": True}},
    "open-network": {"networkPolicies": {"enabled": False}},
    "no-service": {"serving": {"enabled": False}, "releases": {"initial": ""}},
    "no-test": {"tests": {"enabled": False}},
    "secrets": {"secrets": {"generate": True, "name": ""}},
    "tls": {
        "ray": {"tls": {"caSecret": "ray-ca"}, "autoscaling": {"enabled": True}},
        "operator": {
            "webhookTls": {"secret": "webhook-tls"},
            "prometheusUrl": "https://prometheus.test",
            "prometheusAccess": {"tokenSecret": "p", "caConfigMap": "ca", "clientSecret": "pc", "serverName": "p.test"},
            "alertmanagerUrl": "https://alertmanager.test", "alertmanagerAccess": {"clientSecret": "ac"},
        },
        "features": {
            **_REDIS,
            "redis": {
                "mode": "external", "host": "redis.test", "tls": True,
                "tlsFiles": {"secret": "redis-tls", "clientCertificate": True},
            },
        },
        "eventLog": {"address": "kafka://kafka.test:9093", "tlsFiles": {"secret": "kafka-tls"}},
        "jobs": {"runsClaim": "runs", "features": {"enabled": True}, "train": {"enabled": True, "workers": 2}},
        "monitoring": {**_RULES, "alertmanagerConfig": {"enabled": True}},
    },
    "ray-autoscaling": {"ray": {"autoscaling": {"enabled": True}}},
}  # fmt: skip
COMBINATIONS: Final = [(environment, component) for environment in ENVIRONMENT_FILES for component in COMPONENTS]


def program(name: str) -> str:
    """Path of a program of the cluster's tools or of the system. Skips the test if it is missing."""
    built = REPOSITORY / ".cluster" / "bin" / name
    found = str(built) if built.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is neither in .cluster/bin (`make cluster` builds it) nor on the PATH")
    return found


def helm_template(
    values: Document, *files: Path, arguments: tuple[str, ...] = (), release: str = "rw", chart: Path = CHART
) -> subprocess.CompletedProcess[str]:
    """Runs ``helm template`` with values files and these values over them."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as last:
        json.dump(values, last)  # JSON is YAML; PyYAML would not quote the text 1e3, which Helm reads as a number
        last.flush()
        named = [part for file in (*files, Path(last.name)) for part in ("--values", str(file))]
        command = [program("helm"), "template", release, str(chart), "--namespace", "reelway", *named, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@functools.cache
def rendered_text(environment: str, component: str) -> str:
    """All manifests of a combination, without CRDs."""
    files = [ENVIRONMENTS / name for name in ENVIRONMENT_FILES[environment]]
    done = helm_template(merged(NEEDED, COMPONENTS[component]), *files)
    assert done.returncode == 0, f"{environment} with {component}: {done.stderr}"
    return done.stdout


@functools.cache
def rendered(environment: str, component: str) -> tuple[Document, ...]:
    """All objects of a combination."""
    return documents(rendered_text(environment, component))


def documents(text: str) -> tuple[Document, ...]:
    """The objects of a YAML stream, and the RayJob templates in its ConfigMaps."""
    found = [one for one in yaml.load_all(text, Loader=LOADER) if one]
    for one in list(found):
        if one["kind"] == "ConfigMap" and one["metadata"]["name"].endswith("-jobs"):
            found += [yaml.load(text, Loader=LOADER) for key, text in one["data"].items() if key.endswith(".yaml")]
    return tuple(found)


def merged(one: Document, other: Document) -> Document:
    """``one`` with ``other`` merged over it."""
    result = dict(one)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def named(objects: tuple[Document, ...], kind: str, ending: str = "") -> Document:
    """The only object of a kind whose name has this ending."""
    found = [one for one in objects if one["kind"] == kind and one["metadata"].get("name", "").endswith(ending)]
    assert len(found) == 1, [(one["kind"], one["metadata"].get("name")) for one in objects]
    return found[0]
