"""Writes schemas for kubeconform from the Go modules that define the resources, without an API server."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from tests.support.charts.chart_tool import LOADER, REPOSITORY


class _CrdLoader(LOADER):  # type: ignore[misc]
    """Reads `=`, an operator of Alertmanager, as a string; YAML 1.1 gives it a special type."""


_CrdLoader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: loader.construct_scalar(node))

_KUBERNETES: Final = ("k8s.io/kubernetes@v1.36.3", "api/openapi-spec/swagger.json")
_RESOURCES: Final = (
    ("github.com/ray-project/kuberay/ray-operator@v1.6.2", "config/crd/bases", ("rayservices", "rayjobs")),
    (
        "github.com/prometheus-operator/prometheus-operator@v0.85.0", "example/prometheus-operator-crd",
        ("podmonitors", "servicemonitors", "prometheusrules", "alertmanagerconfigs"),
    ),
    ("sigs.k8s.io/gateway-api@v1.3.0", "config/crd/standard", ("httproutes",)),
)  # fmt: skip
LOCATION: Final = "{{.ResourceKind}}_{{.ResourceAPIVersion}}.json"


def write_schemas(folder: Path, kinds: set[tuple[str, str]]) -> None:
    """Writes a strict schema for each (apiVersion, kind). The schemas reject unknown fields."""
    definitions = json.loads(_file(*_KUBERNETES).read_text())["definitions"]
    for name, definition in definitions.items():
        for resource in definition.get("x-kubernetes-group-version-kind", ()):
            version = f"{resource['group']}/{resource['version']}" if resource["group"] else resource["version"]
            if (version, resource["kind"]) in kinds:
                schema = _resolved({"$ref": f"#/definitions/{name}"}, definitions)
                _write(folder, resource["kind"], resource["version"], schema)
    for module, directory, plurals in _RESOURCES:
        for path in sorted(_file(module, directory).glob("*.yaml")):
            if any(path.stem.endswith(plural) for plural in plurals):
                _write_crd(folder, path)
    for path in (REPOSITORY / "charts" / "reelway" / "crds").glob("*.yaml"):
        _write_crd(folder, path)


def crd_file(plural: str) -> Path:
    """The manifest of a CRD, in the version of the module that the chart's manifests are checked against."""
    module, directory, _ = next(one for one in _RESOURCES if plural in one[2])
    (path,) = (path for path in _file(module, directory).glob("*.yaml") if path.stem.endswith(plural))
    return path


def _write_crd(folder: Path, path: Path) -> None:
    for crd in yaml.load_all(path.read_text(), Loader=_CrdLoader):
        for version in crd["spec"]["versions"]:
            _write(folder, crd["spec"]["names"]["kind"], version["name"], _closed(version["schema"]["openAPIV3Schema"]))


def _write(folder: Path, kind: str, version: str, schema: dict[str, Any]) -> None:
    (folder / f"{kind.lower()}_{version}.json").write_text(json.dumps(schema))


def _file(module: str, path: str) -> Path:
    if shutil.which("go") is None:
        pytest.skip("Go is not installed; the schemas of Kubernetes' kinds are in Go modules")
    result = subprocess.run(["go", "mod", "download", "-json", module], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip(f"{module} is not in Go's cache and cannot be downloaded: {result.stdout[-300:]}")
    return Path(json.loads(result.stdout)["Dir"]) / path


def _resolved(schema: Any, definitions: dict[str, Any]) -> Any:
    """Returns the schema with its references replaced by their targets. None of the kinds used refers to itself."""
    if isinstance(schema, list):
        return [_resolved(one, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name.endswith(("IntOrString", "Quantity")):
            return {"type": ["string", "integer", "number"]}
        return _resolved(definitions[name], definitions)
    return _close({key: _resolved(value, definitions) for key, value in schema.items()})


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["string", "integer", "number"]}
    return _close({key: _closed(value) for key, value in schema.items()})


def _close(schema: dict[str, Any]) -> dict[str, Any]:
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and not open_ended and schema.get("type", "object") == "object":
        known = schema["properties"]
        metadata = {"metadata": {"type": "object"}} if known.get("metadata") == {"type": "object"} else {}
        return {**schema, "properties": {**known, **metadata}, "additionalProperties": False}
    return schema
