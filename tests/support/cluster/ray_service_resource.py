"""The RayService resource and its CRD, without a controller that reconciles it."""

from __future__ import annotations

import json
from typing import Any

import yaml
from tests.support.cluster.kubectl import Kubectl

PATH = "ray.io/v1/rayservices/reelway"


CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "rayservices.ray.io"},
    "spec": {
        "group": "ray.io",
        "scope": "Namespaced",
        "names": {"kind": "RayService", "plural": "rayservices", "singular": "rayservice"},
        "versions": [
            {
                "name": "v1", "served": True, "storage": True, "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}  # fmt: skip


def declare(kubectl: Kubectl, config: dict[str, Any]) -> None:
    container = {"name": "ray", "image": "none"}
    head = {"rayStartParams": {}, "template": {"spec": {"containers": [container]}}}
    kubectl.apply({
        "apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": "reelway"},
        "spec": {"serveConfigV2": yaml.safe_dump(config), "rayClusterConfig": {"headGroupSpec": head}},
    })  # fmt: skip


def declared(kubectl: Kubectl) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(
        json.loads(kubectl.run("get", "rayservice", "reelway", "-o", "json"))["spec"]["serveConfigV2"]
    )
    return found
