"""Compares the rights granted by the chart with the rights used over the whole flow: none is missing, none is idle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.support.e2e.flow import Flow

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


class Right(NamedTuple):
    """One verb on one resource type, granted to or used by one account."""

    account: str
    group: str
    resource: str
    verb: str


IDLE: dict[Right, str] = {
    Right("reelway-operator", "reelway.dev", "releaserollouts", "get"): (
        "reads a rollout again after a write conflict"
    ),
}
"""Rights that a flow may leave unused, with their purpose."""


@pytest.fixture
def log(flow: Flow) -> Path:
    found = flow.installation.cluster.audit_log()
    if found is None:
        pytest.skip("the API server's audit log is read on the node of `make cluster` only")
    return found


def test_granted_rights_equal_used_rights(flow: Flow, log: Path) -> None:
    granted, used, refused = set(_granted(flow)), set(), []
    for entry in _entries(log, flow.kubectl.namespace):
        right = _right(entry)
        (used.add(right) if entry["responseStatus"]["code"] != 403 else refused.append((right, entry["requestURI"])))
    accounts = {right.account for right in granted}
    assert "reelway-operator" in accounts
    idle = sorted(granted - used - IDLE.keys())
    beyond = sorted(right for right in used - granted if right.account in accounts and right.group != "discovery")
    flow.note("rights refused to the chart's accounts over the flow", float(len(refused)), "requests", "0", not refused)
    flow.note(f"rights granted and never used, of {len(granted)}, beside {len(IDLE)} with a reason", float(len(idle)),
              "rights", "0", not idle)  # fmt: skip
    assert not refused
    assert not idle, f"granted and never used: {idle}"
    assert not beyond, f"used without a Role of the namespace: {beyond}"


def test_chart_grants_no_cluster_wide_right(flow: Flow) -> None:
    namespace = flow.kubectl.namespace
    bindings = json.loads(flow.kubectl.run("get", "clusterrolebindings", "-o", "json"))["items"]
    ours = [
        one["metadata"]["name"]
        for one in bindings
        if any(subject.get("namespace") == namespace for subject in one.get("subjects") or ())
    ]
    assert not ours


def _granted(flow: Flow) -> Iterator[Right]:
    roles = {one["metadata"]["name"]: one for one in _items(flow, "roles")}
    for binding in _items(flow, "rolebindings"):
        accounts = [one["name"] for one in binding.get("subjects") or () if one["kind"] == "ServiceAccount"]
        for rule in roles[binding["roleRef"]["name"]]["rules"]:
            for account in accounts:
                for group in rule["apiGroups"]:
                    for resource in rule["resources"]:
                        for verb in rule["verbs"]:
                            yield Right(account, group, resource, verb)


def _items(flow: Flow, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(flow.kubectl.run("get", kind, "-o", "json"))["items"]
    return found


def _entries(log: Path, namespace: str) -> Iterator[dict[str, Any]]:
    """Audit entries of the namespace's accounts, rotated files included."""
    whose = f'"username":"system:serviceaccount:{namespace}:'
    for path in sorted(log.parent.glob("audit*.log")):
        with path.open() as lines:
            for line in lines:
                if whose in line and '"stage":"ResponseComplete"' in line:
                    entry = json.loads(line)
                    if "objectRef" in entry:
                        yield entry


def _right(entry: dict[str, Any]) -> Right:
    about = entry["objectRef"]
    resource = f"{about['resource']}/{about['subresource']}" if "subresource" in about else about["resource"]
    account = entry["user"]["username"].rpartition(":")[2]
    return Right(account, about.get("apiGroup", ""), resource, entry["verb"])
