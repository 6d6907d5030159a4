"""Every environment renders with every optional component, and the result is valid Kubernetes."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from tests.support.charts.chart_tool import (
    CHART,
    COMBINATIONS,
    COMPONENTS,
    ENVIRONMENT_FILES,
    ENVIRONMENTS,
    NEEDED,
    RELEASE,
    REPOSITORY,
    Document,
    helm_template,
    merged,
    program,
    rendered,
    rendered_text,
)
from tests.support.charts.kubernetes_schemas import LOCATION, write_schemas


@pytest.mark.parametrize(("environment", "component"), COMBINATIONS)
def test_every_combination_renders_unique_names(environment: str, component: str) -> None:
    seen = [
        (one["kind"], one["metadata"].get("name") or one["metadata"]["generateName"])
        for one in rendered(environment, component)
    ]
    assert len(seen) == len(set(seen))
    assert {"Deployment", "Role", "ServiceAccount"} <= {kind for kind, _ in seen}


def test_kubeconform_accepts_every_manifest(tmp_path: Path) -> None:
    kubeconform, schemas, manifests = program("kubeconform"), tmp_path / "schemas", tmp_path / "manifests"
    schemas.mkdir()
    manifests.mkdir()
    kinds: set[tuple[str, str]] = set()
    seen: set[str] = set()
    for environment, component in COMBINATIONS:
        for one in rendered(environment, component):
            kinds.add((one["apiVersion"], one["kind"]))
            text = yaml.dump(one, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))
            if text not in seen:
                (manifests / f"{environment}-{component}-{len(seen)}.yaml").write_text(text)
                seen.add(text)
    write_schemas(schemas, kinds)
    command = [kubeconform, "-strict", "-summary", "-schema-location", f"{schemas}/{LOCATION}", str(manifests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert len(seen) > 200


def test_kubeconform_rejects_an_unknown_field(tmp_path: Path) -> None:
    kubeconform = program("kubeconform")
    service = next(one for one in rendered("air-gapped", "as-is") if one["kind"] == "Deployment")
    wrong = merged(service, {"spec": {"replica": 1}})
    write_schemas(tmp_path, {("apps/v1", "Deployment")})
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    command = [kubeconform, "-strict", "-schema-location", f"{tmp_path}/{LOCATION}", str(tmp_path / "wrong.yaml")]
    assert "replica" in subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("component", ["as-is", "secrets", "kserve"])
@pytest.mark.parametrize("environment", ENVIRONMENT_FILES)
def test_rendering_twice_is_byte_identical(environment: str, component: str) -> None:
    """Argo CD and Flux render without a cluster, at every sync."""
    files = [ENVIRONMENTS / name for name in ENVIRONMENT_FILES[environment]]
    again = helm_template(merged(NEEDED, COMPONENTS[component]), *files)
    assert again.stdout == rendered_text(environment, component)


@pytest.mark.parametrize(("environment", "component"), COMBINATIONS)
def test_manifests_contain_no_live_state(environment: str, component: str) -> None:
    """Releases, routing, generated secrets and rankers belong to the cluster; a manifest would overwrite them."""
    for one in rendered(environment, component):
        assert one["kind"] not in ("Secret", "InferenceService")
        if one["kind"] == "RayService":
            assert "serveConfigV2" not in one["spec"]


def test_no_template_reads_the_cluster_or_draws_random_values() -> None:
    impure = re.compile(r"\b(lookup|rand[A-Z]\w+|genCA|genSelfSignedCert|genPrivateKey|uuidv4|now)\b")
    for path in (path for path in (CHART / "templates").rglob("*") if path.is_file()):
        text = re.sub(r"\{\{-? ?/\*.*?\*/ ?-?\}\}", "", path.read_text(), flags=re.DOTALL)
        actions = re.findall(r"\{\{.*?\}\}", text, flags=re.DOTALL)
        assert not [action for action in actions if impure.search(action)], path


def test_new_chart_version_alone_changes_no_pod(tmp_path: Path) -> None:
    copy = tmp_path / "reelway"
    subprocess.run(["cp", "-r", str(CHART), str(copy)], check=True)
    chart = copy / "Chart.yaml"
    chart.write_text(chart.read_text().replace("\nversion: 0.1.0", "\nversion: 0.1.1"))
    files = [f"--values={REPOSITORY}/infra/environments/air-gapped.yaml", f"--set=releases.initial={RELEASE}"]
    command = [program("helm"), "template", "rw", str(copy), "--namespace", "reelway", *files]
    after = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    templates = [
        [pod_template(one) for one in yaml.safe_load_all(text) if one]
        for text in (rendered_text("air-gapped", "as-is"), after)
    ]
    assert templates[0] == templates[1]


def pod_template(document: Document) -> Document | None:
    spec = document.get("spec") or {}
    return spec.get("template") if document["kind"] == "Deployment" else None


@pytest.mark.cluster
@pytest.mark.parametrize("environment", ENVIRONMENT_FILES)
def test_api_server_accepts_every_environment(environment: str, tmp_path: Path) -> None:
    kubeconfig = os.environ.get("KUBECONFIG", str(REPOSITORY / ".cluster" / "state" / "admin.kubeconfig"))
    kubectl = [program("kubectl"), "--kubeconfig", kubeconfig, "--request-timeout=5s"]
    if not Path(kubeconfig).exists() or subprocess.run([*kubectl, "get", "crd"], capture_output=True).returncode:
        pytest.skip("no cluster is up (`make cluster`)")
    known = subprocess.run(
        [*kubectl, "api-resources", "--no-headers"], capture_output=True, text=True, check=True
    ).stdout
    objects = [one for one in rendered(environment, "as-is") if one["metadata"].get("name")]
    there = [one for one in objects if f" {one['kind']}" in known.replace("\n", " \n") and one["apiVersion"] in known]
    assert len(there) >= 10
    path = tmp_path / "manifests.yaml"
    path.write_text(yaml.safe_dump_all(there))
    command = [*kubectl, "apply", "--dry-run=server", "--validate=strict", "--namespace", "default", "-f", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_missing_secret_name_fails() -> None:
    done = helm_template({"releases": {"initial": RELEASE}})
    assert "secrets.name" in done.stderr
