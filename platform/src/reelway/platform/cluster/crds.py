"""Why: a CRD and the types that read it are two lists of the same things, so one is made from the other.

``python -m reelway.platform.cluster.crds FOLDER`` writes the chart's files; a test compares them with this. Defaults
are left out (pydantic knows them; ``status.policy`` shows them), but for those that a person's patch needs.
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
_TRANSITION: Final = (
    "is fixed once it is written; delete the rollout (its traffic goes back to stable) and make another"
)

_SPEC_RULES: Final = (
    {
        "rule": "!(has(self.policy) && has(self.policyRef))",
        "message": "saw policy and policyRef, expected one of them, or neither for the default policy",
    },
    {
        "rule": "!has(self.stableRelease) || self.stableRelease != self.release",
        "message": "stableRelease is the release itself, expected the one that it is to replace",
        "fieldPath": ".stableRelease",
    },
    {"rule": "self.release == oldSelf.release", "message": f"release {_TRANSITION}", "fieldPath": ".release"},
    {"rule": "self.backend == oldSelf.backend", "message": f"backend {_TRANSITION}", "fieldPath": ".backend"},
    *(
        {
            "rule": f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})",
            "message": f"{name} {_TRANSITION}",
        }
        for name in ("stableRelease", "policy", "policyRef", "force")
    ),
)
_POLICY_RULES: Final = (
    {
        "rule": "self.steps.map(s, double(s.weight_percent)).isSorted() && "
        "self.steps.all(a, self.steps.exists_one(b, b.weight_percent == a.weight_percent))",
        "message": "weight_percent of the steps, expected each to be more than the one before",
        "fieldPath": ".steps",
    },
    {
        "rule": "self.steps.all(s, double(s.weight_percent) + (has(self.holdout_percent) ? "
        "double(self.holdout_percent) : 0.0) < 100.0)",
        "message": "weight_percent + holdout_percent leaves stable nothing to be compared with, expected less than 100",
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
        "message": "a command that was given is not changed, expected another one with an id of its own",
    },
)
_RELEASE_RULES: Final = (
    {
        "rule": "self.metadata.name == self.spec.id.substring(0, 12)",
        "message": "metadata.name, expected the first 12 characters of spec.id",
    },
    {
        "rule": "self.spec == oldSelf.spec",
        "message": "a release never changes, expected another one",
        "fieldPath": ".spec",
    },
)


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """A structural schema (Kubernetes' OpenAPI v3) of a model."""
    whole = model.model_json_schema(by_alias=True, mode="validation")
    return _structural(whole, whole.get("$defs", {}))


def release_rollout_crd() -> dict[str, Any]:
    """The CustomResourceDefinition of ``ReleaseRollout``."""
    spec, status = schema_of(resources.ReleaseRolloutSpec), schema_of(resources.ReleaseRolloutStatus)
    fields = spec["properties"]
    spec["x-kubernetes-validations"] = list(_SPEC_RULES)
    fields["policy"]["x-kubernetes-validations"] = list(_POLICY_RULES)
    fields["policy"]["properties"]["outcomes"] |= _keyed_by("name")
    fields["backend"]["x-kubernetes-validations"] = list(_BACKEND_RULES)
    commands = fields["commands"]
    commands |= {"default": [], **_keyed_by("id")}
    commands["x-kubernetes-validations"] = list(_COMMANDS_RULES)
    for name in ("actor", "force", "note"):
        commands["items"]["properties"][name]["default"] = resources.AskedCommand.model_fields[name].default
    fields["policyRef"]["properties"]["key"]["default"] = "policy.yaml"
    status["properties"]["conditions"] |= _keyed_by("type")
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
        "description": "Rolls a release out as a canary and takes it back when the evidence says so.",
        "type": "object",
        "required": ["spec"],
        "properties": {"spec": spec, "status": status},
    }
    return _definition(resources.ROLLOUT_KIND, resources.ROLLOUTS, ["rr", "rollout"], schema, columns)


def release_crd() -> dict[str, Any]:
    """The CustomResourceDefinition of ``Release``."""
    status = schema_of(resources.ReleaseStatus)
    status["properties"]["conditions"] |= _keyed_by("type")
    columns: list[dict[str, Any]] = [
        {"name": "Name", "type": "string", "jsonPath": ".status.name"},
        {"name": "Gates", "type": "string", "jsonPath": ".status.gates"},
        {"name": "Created", "type": "date", "jsonPath": ".status.madeAt"},
        {"name": "In store", "type": "string", "jsonPath": '.status.conditions[?(@.type=="InStore")].status'},
        {"name": "Parent", "type": "string", "jsonPath": ".spec.parent", "priority": 1},
        {"name": "Store", "type": "string", "jsonPath": ".spec.store", "priority": 1},
        {"name": "Note", "type": "string", "jsonPath": ".spec.note"},
    ]
    schema = {
        "description": "A release that lies in a store: immutable, named by the first 12 characters of its id.",
        "type": "object",
        "required": ["spec"],
        "properties": {"spec": schema_of(resources.ReleaseSpec), "status": status},
        "x-kubernetes-validations": list(_RELEASE_RULES),
    }
    return _definition(resources.RELEASE_KIND, resources.RELEASES, [], schema, columns)


def files() -> dict[str, str]:
    """Name of a file in the chart's ``crds`` -> its text."""
    made = {"releaserollouts.yaml": release_rollout_crd(), "releases.yaml": release_crd()}
    head = (
        "# Generated by `python -m reelway.platform.cluster.crds charts/reelway/crds` from the types in resources.py.\n"
    )
    return {name: head + yaml.safe_dump(crd, sort_keys=False, width=118) for name, crd in made.items()}


def _keyed_by(field: str) -> dict[str, Any]:
    """A list in which no two items have the same ``field``."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [field]}


def _definition(
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


def _structural(node: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """JSON Schema as pydantic writes it -> what Kubernetes calls structural: no references, no unions, nullable."""
    if "$ref" in node:
        target = known[node["$ref"].removeprefix("#/$defs/")]
        return _structural({**target, **{k: v for k, v in node.items() if k != "$ref"}}, known)
    if "anyOf" in node:
        some = [branch for branch in node["anyOf"] if branch.get("type") != "null"]
        if len(some) != 1:
            raise ValueError(f"{node}: a union has no structural schema; give the field one type")
        rest = {key: value for key, value in node.items() if key not in ("anyOf", "default")}
        return {**_structural({**some[0], **rest}, known), "nullable": True}
    made: dict[str, Any] = {key: node[key] for key in _COPIED if key in node}
    if "description" in made:
        made["description"] = made["description"].split("\n\n")[0].replace("\n", " ")
    if "const" in node:
        made["enum"] = [node["const"]]
    for ours, theirs in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if ours in node:
            made |= {theirs: node[ours], ours: True}
    if node.get("type") == "integer":
        made["format"] = "int64"
    if node.get("type") == "object":
        _object(node, known, made)
    if node.get("type") == "array":
        made["items"] = _items(node, known)
    return made


def _object(node: Mapping[str, Any], known: Mapping[str, Any], made: dict[str, Any]) -> None:
    if "properties" in node:
        made["properties"] = {name: _structural(field, known) for name, field in node["properties"].items()}
        if required := node.get("required"):
            made["required"] = list(required)
    elif isinstance(values := node.get("additionalProperties"), Mapping):
        made["additionalProperties"] = _structural(values, known)
    else:
        made["x-kubernetes-preserve-unknown-fields"] = True


def _items(node: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    if "prefixItems" in node:  # a tuple: items of one type, and as many as there are
        return _structural(node["prefixItems"][0], known)
    return _structural(node["items"], known)


def main(folder: Path) -> None:
    """Write the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
