"""`reelway serve --auth` with its own Ray and HAProxy: proofs, rates by the client's address, and evidence.

All tests of the module share one service.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from tests.support.serving.served_run import KNOWN_VIEWER, READY_S, make_run

from reelway.platform.cli.processes import reelway_command, terminate_process_group
from reelway.platform.eventlog import open_event_log
from reelway.platform.eventlog.exposure_events import decode_exposures
from reelway.platform.eventlog.topics import Topic, topic_address
from reelway.platform.run_directory import RunDirectory
from reelway.serving.serve_settings import SERVE_SETTINGS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]

BURST = 60
AUTH = {
    "mode": "jwt",
    "jwt": {"keys_file": "viewers-public.pem", "audience": "reelway"},
    "per_address": {"per_second": 0.01, "burst": BURST},
    "unlimited_networks": ["192.0.2.0/24"],
    "trusted_proxies": 1,
}
NEAR = {"X-Forwarded-For": "192.0.2.1"}
"""A client behind the trusted proxy, which runs on this machine: HAProxy appends 127.0.0.1."""


@dataclass
class Service:
    run: Path
    url: str
    internal_url: str
    log: Path

    def reelway(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(reelway_command(*arguments), capture_output=True, text=True, check=False, timeout=60)

    def token(self, viewer_id: int) -> str:
        options = ["--viewer", str(viewer_id), "--key", str(self.run / "viewers.pem"), "--audience", "reelway"]
        return self.reelway("viewer-token", *options).stdout.strip()

    def ask(self, viewer_id: int, headers: dict[str, str]) -> httpx.Response:
        body = {"viewer_id": viewer_id, "count": 5}
        return httpx.post(f"{self.url}/v1/recommend", json=body, headers=headers, timeout=30, trust_env=False)

    def metric(self, name: str, **labels: str) -> float:
        text = httpx.get(f"{self.internal_url}/metrics", timeout=30, trust_env=False).text
        samples = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(value) for found, value in samples if all(one in found for one in wanted))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    run = tmp_path_factory.mktemp("run")
    make_run(run)
    log, record, auth = run / "serve.log", run / "serving.json", run / "auth.yaml"
    subprocess.run(reelway_command("viewer-key", "--key", str(run / "viewers.pem")), check=True, timeout=60)
    auth.write_text(yaml.safe_dump(AUTH))
    command = reelway_command(
        "serve",
        "--run",
        str(run),
        "--port",
        "0",
        "--composition",
        "fused",
        "--no-controller",
        "--no-live",
        "--auth",
        str(auth),
    )
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + READY_S
        while not (record.exists() and json.loads(record.read_text())["url"] in log.read_text()):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        written = json.loads(record.read_text())
        yield Service(run, written["url"], written["internal_url"], log)
    finally:
        terminate_process_group(process)


def test_start_states_the_proof_and_the_internal_address(service: Service) -> None:
    text = " ".join(service.log.read_text().split())
    assert "authentication is 'jwt': each request proves its viewer with a JSON Web Token" in text
    assert f"internal API at {service.internal_url}" in text
    assert httpx.get(f"{service.url}/healthz", trust_env=False).json()["authentication"] == "jwt"


def test_command_sends_the_token_of_a_file(service: Service, tmp_path: Path) -> None:
    token = tmp_path / "viewer.jwt"
    token.write_text(service.token(KNOWN_VIEWER))
    options = ["--url", service.url, "--viewer", str(KNOWN_VIEWER), "--json"]
    answered = service.reelway("recommend", *options, "--token-file", str(token))
    assert len(json.loads(answered.stdout)["videos"]) == 10, answered.stderr
    refused = service.reelway("recommend", *options)
    assert refused.returncode == 8
    assert "answered 401" in refused.stderr


def test_viewer_gets_its_own_slates_alone(service: Service) -> None:
    proof = {"Authorization": f"Bearer {service.token(7)}", **NEAR}
    slate = service.ask(7, proof)
    assert slate.status_code == 200
    assert service.ask(8, proof).status_code == 403
    unproven = service.ask(7, NEAR)
    assert (unproven.status_code, unproven.headers["WWW-Authenticate"]) == (401, 'Bearer realm="reelway"')
    outcomes = {"outcomes": [{"token": video["token"], "type": "like"} for video in slate.json()["videos"]]}
    other = {"Authorization": f"Bearer {service.token(8)}", **NEAR}
    for headers, accepted in ((proof, 5), (other, 0)):
        answer = httpx.post(f"{service.url}/v1/outcomes", json=outcomes, headers=headers, timeout=30, trust_env=False)
        assert (answer.status_code, answer.json()["accepted"]) == (200, accepted)
    assert service.metric("reelway_ingress_denied_total", kind="viewer") == 1


def test_slate_of_a_proven_viewer_is_recorded_so(service: Service) -> None:
    """The warm-up's slates are those of the service itself, and no evidence."""
    address = topic_address(str(RunDirectory(service.run).events), Topic.EXPOSURES)
    deadline = time.monotonic() + 20
    while True:
        log = open_event_log(address)
        tables = [decode_exposures(record.payload) for record in log.read({}, limit=1_000).records]
        log.close()
        proven = {(row["viewer_id"], row["authenticated"]) for table in tables for row in table.to_pylist()}
        if (7, True) in proven:
            break
        assert time.monotonic() < deadline, proven
        time.sleep(0.2)
    assert (0, False) in proven
    assert not {viewer for viewer, authenticated in proven if authenticated} - {7, KNOWN_VIEWER}


@pytest.mark.skipif(SERVE_SETTINGS["RAY_SERVE_ENABLE_HA_PROXY"] == "0", reason="HAProxy is not installed")
def test_address_is_that_of_the_client_before_the_proxies(service: Service) -> None:
    """An entry before the trusted ones changes nothing, so no client escapes its limit."""
    status = [service.ask(7, {"X-Forwarded-For": f"{i}.1.1.1, 203.0.113.5"}).status_code for i in range(BURST + 5)]
    assert status == [401] * BURST + [429] * 5
    assert service.ask(7, {"X-Forwarded-For": "203.0.113.6"}).status_code == 401
    limited = service.ask(7, {"X-Forwarded-For": "203.0.113.5"})
    assert 1 <= int(limited.headers["Retry-After"]) <= 100
    assert service.metric("reelway_ingress_denied_total", kind="address_rate") == 6
