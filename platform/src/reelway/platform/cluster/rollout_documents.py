"""ReleaseRollouts as the JSON objects that are sent to the API server."""

from __future__ import annotations

from typing import Any

from reelway.platform.cluster.resources import (
    GROUP,
    ROLLOUT_KIND,
    VERSION,
    ReleaseRolloutSpec,
    ReleaseRolloutStatus,
    RolloutResource,
)


def object_head(name: str) -> dict[str, Any]:
    """Returns kind and name."""
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": ROLLOUT_KIND, "metadata": {"name": name}}


def spec_document(spec: ReleaseRolloutSpec) -> dict[str, Any]:
    """Returns ``spec``."""
    document = spec.document()
    if spec.policy is not None:  # null disables a guardrail, so nulls are kept
        document["policy"] = spec.policy.model_dump(mode="json")
    return document


def status_document(resource: RolloutResource, status: ReleaseRolloutStatus) -> dict[str, Any]:
    """Returns the object that replaces the status of this version of the resource."""
    document = status.document()
    parts = {"state": status.state, "policy": status.policy, "lastReconcile": status.last_reconcile}
    document |= {name: part.model_dump(mode="json") for name, part in parts.items() if part is not None}
    document["history"] = [entry.model_dump(mode="json") for entry in status.history]
    head = object_head(resource.name)
    head["metadata"] |= {"namespace": resource.namespace, "resourceVersion": resource.resource_version}
    return {**head, "status": document}
