"""Certificates in the chart: mounted where a variable or setting names them, and absent by default."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from cryptography import x509
from tests.support.certificates import CertificateAuthority
from tests.support.charts.chart_tool import CHART, COMBINATIONS, ENVIRONMENT_FILES, Document, named, rendered

from reelway.platform.cluster.operator_settings import OperatorSettings
from reelway.platform.eventlog.addresses import TLS_PREFIX as KAFKA
from reelway.platform.features.redis_address import TLS_PREFIX as REDIS

FOLDER: Final = "/etc/reelway/tls/"
RAY: Final = {"RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"}


def containers(value: Any) -> Iterator[tuple[str, Document, list[Document]]]:
    """Name of the component, container and volumes, for every container of a document."""
    if isinstance(value, dict):
        if "containers" in value and "volumes" in value:
            for one in [*value["containers"], *value.get("initContainers", [])]:
                yield one["name"], one, value["volumes"]
        for below in value.values():
            yield from containers(below)
    elif isinstance(value, list):
        for below in value:
            yield from containers(below)


def files_of(container: Document) -> dict[str, str]:
    """Variables of a container that name a certificate's file."""
    return {
        one["name"]: one["value"] for one in container.get("env", ()) if str(one.get("value", "")).startswith(FOLDER)
    }


@pytest.mark.parametrize("environment", ENVIRONMENT_FILES)
def test_named_certificates_are_mounted_in_the_container(environment: str) -> None:
    hops = set()
    for name, container, volumes in containers(list(rendered(environment, "tls"))):
        mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", ())}
        secrets = {volume["name"]: volume.get("secret", {}).get("secretName") for volume in volumes}
        for variable, path in files_of(container).items():
            volume = mounts[str(Path(path).parent)]
            hop = path.removeprefix(FOLDER).partition("/")[0]
            assert secrets[volume] == {"redis": "redis-tls", "kafka": "kafka-tls", "ray": None}[hop], name
            hops.add((name, variable))
    redis = {f"{REDIS}_{file}" for file in ("CA_FILE", "CERT_FILE", "KEY_FILE")}
    for name in ("ray", "stream"):
        assert redis <= {variable for container, variable in hops if container == name}
    for name in ("ray", "stream", "overlay", "catalogue", "create", "parity"):
        assert (name, f"{KAFKA}_CA_FILE") in hops
    assert {variable for container, variable in hops if container == "ray"} >= RAY - {"RAY_USE_TLS"}
    assert not any(variable == f"{KAFKA}_CERT_FILE" for _, variable in hops)


def test_key_of_the_ca_is_mounted_in_the_issuing_container_only() -> None:
    holders, pods = set(), 0
    for name, container, volumes in containers(list(rendered("dev", "tls"))):
        pods += any(volume["name"] == "ray-ca" for volume in volumes)
        if any(mount["name"] == "ray-ca" for mount in container.get("volumeMounts", ())):
            holders.add(name)
    assert pods > 1
    assert holders == {"ray-certificate"}


def test_operator_serves_https_with_its_certificate() -> None:
    found = rendered("dev", "tls")
    settings = OperatorSettings(**yaml.safe_load(named(found, "ConfigMap", "-operator")["data"]["settings.yaml"]))
    [container] = named(found, "Deployment", "-operator")["spec"]["template"]["spec"]["containers"]
    folders = {mount["mountPath"] for mount in container["volumeMounts"]}
    paths = [settings.webhook.cert_file, settings.webhook.key_file]
    for server in (settings.prometheus, settings.alertmanager):
        paths += [server.token_file, server.ca_file, server.cert_file, server.key_file]
    named_files = [path for path in paths if path is not None]
    assert len(named_files) == 8
    assert {str(path.parent) for path in named_files} <= folders
    assert settings.prometheus.server_name == "p.test"
    assert {container[probe]["httpGet"]["scheme"] for probe in ("readinessProbe", "livenessProbe")} == {"HTTPS"}
    [endpoint] = named(found, "ServiceMonitor", "-operator")["spec"]["endpoints"]
    [receiver] = named(found, "AlertmanagerConfig", "-canary")["spec"]["receivers"]
    [webhook] = receiver["webhookConfigs"]
    host = "rw-reelway-operator.reelway.svc"
    assert webhook["url"].startswith(f"https://{host}:")
    assert endpoint["scheme"] == "https"
    expected = {"ca": {"secret": {"name": "webhook-tls", "key": "ca.crt"}}, "serverName": host}
    assert endpoint["tlsConfig"] == webhook["httpConfig"]["tlsConfig"] == expected


@pytest.mark.parametrize(("environment", "component"), [one for one in COMBINATIONS if one[1] != "tls"])
def test_no_certificates_are_used_by_default(environment: str, component: str) -> None:
    found = list(rendered(environment, component))
    for _, container, _ in containers(found):
        assert files_of(container) == {}
        assert not RAY & {one["name"] for one in container.get("env", ())}


@pytest.mark.parametrize("address", ["10.1.2.3", "fd00::7"])
def test_ray_pod_issues_a_certificate_for_its_address(tmp_path: Path, address: str) -> None:
    authority = CertificateAuthority(tmp_path / "ca")
    (tmp_path / "ca" / "tls.crt").write_bytes(authority.ca.read_bytes())
    (tmp_path / "ca" / "ca.key").rename(tmp_path / "ca" / "tls.key")
    issued = tmp_path / "issued"
    issued.mkdir()
    program = (CHART / "files" / "programs" / "issue_ray_certificate.py").read_text()
    command = [sys.executable, "-c", program, str(tmp_path / "ca"), str(issued), "prod"]
    subprocess.run(command, env={**os.environ, "POD_IP": address}, check=True, timeout=60)
    certificate = x509.load_pem_x509_certificate((issued / "tls.crt").read_bytes())
    signer = x509.load_pem_x509_certificate((issued / "ca.crt").read_bytes())
    certificate.verify_directly_issued_by(signer)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert ipaddress.ip_address(address) in names.get_values_for_type(x509.IPAddress)
    assert "*.prod.svc.cluster.local" in names.get_values_for_type(x509.DNSName)
    assert (issued / "tls.key").stat().st_mode & 0o077 == 0
