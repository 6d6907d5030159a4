"""Generates the CRDs of the chart from the types in ``resources``.

``python -m reelway.platform.cluster.crds FOLDER`` writes the files; a test compares them with the chart's. Defaults are
left to pydantic (``status.policy`` shows them), except those that a user's patch relies on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel

from reelway.platform.cluster import resources

_COPIED: Final = (
    "type", "format", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems",
    "description",
)  # fmt: skip
_IMMUTABLE_MESSAGE: Final = "is immutable; delete the rollout (its traffic returns to stable) and create another one"

_SPEC_RULES: Final = (
    {
        "rule": "!(has(self.policy) && has(self.policyRef))",
        "message": "saw policy and policyRef, expected at most one of them",
    },
    {
        "rule": "!has(self.stableRelease) || self.stableRelease != self.release",
        "message": "stableRelease equals release, expected the release that is live",
        "fieldPath": ".stableRelease",
    },
    {"rule": "self.release == oldSelf.release", "message": f"release {_IMMUTABLE_MESSAGE}", "fieldPath": ".release"},
    {"rule": "self.backend == oldSelf.backend", "message": f"backend {_IMMUTABLE_MESSAGE}", "fieldPath": ".backend"},
    *(
        {
            "rule": f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})",
            "message": f"{name} {_IMMUTABLE_MESSAGE}",
        }
        for name in ("stableRelease", "policy", "policyRef", "force")
    ),
)
_POLICY_RULES: Final = (
    {
        "rule": "self.steps.map(s, double(s.weight_percent)).isSorted() && "
        "self.steps.all(a, self.steps.exists_one(b, b.weight_percent == a.weight_percent))",
        "message": "saw a weight_percent that is not above the previous step's, expected increasing weights",
        "fieldPath": ".steps",
    },
    {
        "rule": "self.steps.all(s, double(s.weight_percent) + (has(self.holdout_percent) ? "
        "double(self.holdout_percent) : 0.0) < 100.0)",
        "message": "weight_percent + holdout_percent leaves no traffic for stable, expected a sum below 100",
        "fieldPath": ".steps",
    },
)
_BACKEND_RULES: Final = (
    {
        "rule": "has(self.rayService) != has(self.serve)",
        "message": "expected exactly one of rayService and serve",
    },
)
_COMMANDS_RULES: Final = (
    {
        "rule": "oldSelf.all(o, self.all(c, c.id != o.id || (c.verb == o.verb && c.force == o.force)))",
        "message": "a command is immutable; add another command with its own id",
    },
)
_RELEASE_RULES: Final = (
    {
        "rule": "self.metadata.name == self.spec.id.substring(0, 12)",
        "message": "metadata.name, expected the first 12 characters of spec.id",
    },
    {
        "rule": "self.spec == oldSelf.spec",
        "message": "spec is immutable; create another Release",
        "fieldPath": ".spec",
    },
)


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the structural OpenAPI v3 schema of a model."""
    schema = model.model_json_schema(by_alias=True, mode="validation")
    return _structural_schema(schema, schema.get("$defs", {}))


def release_rollout_crd() -> dict[str, Any]:
    spec, status = schema_of(resources.ReleaseRolloutSpec), schema_of(resources.ReleaseRolloutStatus)
    fields = spec["properties"]
    spec["x-kubernetes-validations"] = list(_SPEC_RULES)
    fields["policy"]["x-kubernetes-validations"] = list(_POLICY_RULES)
    fields["policy"]["properties"]["outcomes"] |= _list_map_key("name")
    fields["backend"]["x-kubernetes-validations"] = list(_BACKEND_RULES)
    commands = fields["commands"]
    commands |= {"default": [], **_list_map_key("id")}
    commands["x-kubernetes-validations"] = list(_COMMANDS_RULES)
    for name in ("actor", "force", "note"):
        commands["items"]["properties"][name]["default"] = resources.CommandRequest.model_fields[name].default
    fields["policyRef"]["properties"]["key"]["default"] = "policy.yaml"
    status["properties"]["conditions"] |= _list_map_key("type")
    columns: list[dict[str, Any]] = [
        {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
        {"name": "Step", "type": "string", "jsonPath": ".status.step"},
        {"name": "Weight", "type": "string", "jsonPath": ".status.weight"},
        {"name": "Release", "type": "string", "jsonPath": ".status.release"},
        {"name": "Verdict", "type": "string", "jsonPath": ".status.verdict"},
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
        {"name": "Reason", "type": "string", "jsonPath": ".status.reason"},
        {"name": "Policy", "type": "string", "jsonPath": ".status.policy.name", "priority": 1},
        {"name": "Waiting for", "type": "string", "jsonPath": ".status.waitsFor", "priority": 1},
    ]
    schema = {
        "description": "Rolls out a release as a canary and rolls it back when the evidence is bad.",
        "type": "object",
        "required": ["spec"],
        "properties": {"spec": spec, "status": status},
    }
    return _crd(resources.ROLLOUT_KIND, resources.ROLLOUTS, ["rr", "rollout"], schema, columns)


def release_crd() -> dict[str, Any]:
    status = schema_of(resources.ReleaseStatus)
    status["properties"]["conditions"] |= _list_map_key("type")
    columns: list[dict[str, Any]] = [
        {"name": "Run", "type": "string", "jsonPath": ".status.name"},
        {"name": "Gates", "type": "string", "jsonPath": ".status.gates"},
        {"name": "Created", "type": "date", "jsonPath": ".status.createdAt"},
        {"name": "In store", "type": "string", "jsonPath": '.status.conditions[?(@.type=="InStore")].status'},
        {"name": "Parent", "type": "string", "jsonPath": ".spec.parent", "priority": 1},
        {"name": "Store", "type": "string", "jsonPath": ".spec.store", "priority": 1},
        {"name": "Note", "type": "string", "jsonPath": ".spec.note"},
    ]
    schema = {
        "description": "A release in a store: immutable, named by the first 12 characters of its id.",
        "type": "object",
        "required": ["spec"],
        "properties": {"spec": schema_of(resources.ReleaseSpec), "status": status},
        "x-kubernetes-validations": list(_RELEASE_RULES),
    }
    return _crd(resources.RELEASE_KIND, resources.RELEASES, [], schema, columns)


def crd_files() -> dict[str, str]:
    """Returns the name and text of each file in the chart's ``crds`` folder."""
    crds = {"releaserollouts.yaml": release_rollout_crd(), "releases.yaml": release_crd()}
    head = (
        "# Generated by `python -m reelway.platform.cluster.crds charts/reelway/crds` from the types in resources.py.\n"
    )
    return {name: head + yaml.safe_dump(crd, sort_keys=False, width=118) for name, crd in crds.items()}


def _list_map_key(field: str) -> dict[str, Any]:
    """Marks a list whose items are identified by ``field``."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [field]}


def _crd(
    kind: str, plural: str, short: list[str], schema: dict[str, Any], columns: list[dict[str, Any]]
) -> dict[str, Any]:
    names: dict[str, Any] = {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()}
    if short:
        names["shortNames"] = short
    version = {
        "name": resources.VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns,
        "schema": {"openAPIV3Schema": schema},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{resources.GROUP}"},
        "spec": {
            "group": resources.GROUP,
            "scope": "Namespaced",
            "names": {**names, "categories": ["reelway"]},
            "versions": [version],
        },
    }


def _structural_schema(node: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Converts pydantic's JSON Schema to a structural schema: no references, no unions, nullable fields."""
    if "$ref" in node:
        target = known[node["$ref"].removeprefix("#/$defs/")]
        return _structural_schema({**target, **{k: v for k, v in node.items() if k != "$ref"}}, known)
    if "anyOf" in node:
        non_null = [branch for branch in node["anyOf"] if branch.get("type") != "null"]
        if len(non_null) != 1:
            raise ValueError(f"{node}: a union has no structural schema; use one type for the field")
        other_keys = {key: value for key, value in node.items() if key not in ("anyOf", "default")}
        return {**_structural_schema({**non_null[0], **other_keys}, known), "nullable": True}
    schema: dict[str, Any] = {key: node[key] for key in _COPIED if key in node}
    if "description" in schema:
        schema["description"] = schema["description"].split("\n\n")[0].replace("\n", " ")
    if "const" in node:
        schema["enum"] = [node["const"]]
    for source_key, target_key in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if source_key in node:
            schema |= {target_key: node[source_key], source_key: True}
    if node.get("type") == "integer":
        schema["format"] = "int64"
    if node.get("type") == "object":
        _object(node, known, schema)
    if node.get("type") == "array":
        schema["items"] = _items(node, known)
    return schema


def _object(node: Mapping[str, Any], known: Mapping[str, Any], schema: dict[str, Any]) -> None:
    if "properties" in node:
        schema["properties"] = {name: _structural_schema(field, known) for name, field in node["properties"].items()}
        if required := node.get("required"):
            schema["required"] = list(required)
    elif isinstance(values := node.get("additionalProperties"), Mapping):
        schema["additionalProperties"] = _structural_schema(values, known)
    else:
        schema["x-kubernetes-preserve-unknown-fields"] = True


def _items(node: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    if "prefixItems" in node:  # a tuple: all items have the same type
        return _structural_schema(node["prefixItems"][0], known)
    return _structural_schema(node["items"], known)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in crd_files().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
