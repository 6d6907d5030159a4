"""Compares the rights that the chart grants with those that the end-to-end tests used: none is missing or unused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.support.e2e.shared_installation import SharedInstallation

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
"""Rights that the tests may leave unused, with their purpose."""


@pytest.fixture
def log(shared: SharedInstallation) -> Path:
    path = shared.installation.cluster.audit_log()
    if path is None:
        pytest.skip("the API server's audit log is read on the node of `make cluster` only")
    return path


def test_granted_rights_equal_used_rights(shared: SharedInstallation, log: Path) -> None:
    granted, used, refused = set(_granted(shared)), set(), []
    for entry in _entries(log, shared.kubectl.namespace):
        right = _right(entry)
        (used.add(right) if entry["responseStatus"]["code"] != 403 else refused.append((right, entry["requestURI"])))
    accounts = {right.account for right in granted}
    assert "reelway-operator" in accounts
    idle = sorted(granted - used - IDLE.keys())
    beyond = sorted(right for right in used - granted if right.account in accounts and right.group != "discovery")
    shared.note(
        "rights refused to the chart's accounts over all tests", float(len(refused)), "requests", "0", not refused
    )
    shared.note(f"rights granted and never used, of {len(granted)}, beside {len(IDLE)} with a reason", float(len(idle)),
              "rights", "0", not idle)  # fmt: skip
    assert not refused
    assert not idle, f"granted and never used: {idle}"
    assert not beyond, f"used without a Role of the namespace: {beyond}"


def test_chart_grants_no_cluster_wide_right(shared: SharedInstallation) -> None:
    namespace = shared.kubectl.namespace
    bindings = json.loads(shared.kubectl.run("get", "clusterrolebindings", "-o", "json"))["items"]
    bound = [
        one["metadata"]["name"]
        for one in bindings
        if any(subject.get("namespace") == namespace for subject in one.get("subjects") or ())
    ]
    assert not bound


def _granted(shared: SharedInstallation) -> Iterator[Right]:
    roles = {one["metadata"]["name"]: one for one in _items(shared, "roles")}
    for binding in _items(shared, "rolebindings"):
        accounts = [one["name"] for one in binding.get("subjects") or () if one["kind"] == "ServiceAccount"]
        for rule in roles[binding["roleRef"]["name"]]["rules"]:
            for account in accounts:
                for group in rule["apiGroups"]:
                    for resource in rule["resources"]:
                        for verb in rule["verbs"]:
                            yield Right(account, group, resource, verb)


def _items(shared: SharedInstallation, kind: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = json.loads(shared.kubectl.run("get", kind, "-o", "json"))["items"]
    return items


def _entries(log: Path, namespace: str) -> Iterator[dict[str, Any]]:
    """Audit entries of the namespace's accounts, rotated files included."""
    user = f'"username":"system:serviceaccount:{namespace}:'
    for path in sorted(log.parent.glob("audit*.log")):
        with path.open() as lines:
            for line in lines:
                if user in line and '"stage":"ResponseComplete"' in line:
                    entry = json.loads(line)
                    if "objectRef" in entry:
                        yield entry


def _right(entry: dict[str, Any]) -> Right:
    target = entry["objectRef"]
    resource = f"{target['resource']}/{target['subresource']}" if "subresource" in target else target["resource"]
    account = entry["user"]["username"].rpartition(":")[2]
    return Right(account, target.get("apiGroup", ""), resource, entry["verb"])
