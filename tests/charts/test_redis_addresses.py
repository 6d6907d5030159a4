"""Redis in the chart: addresses of every form, and a bundled server with any password."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from tests.support.charts.chart_tool import NEEDED, Document, documents, helm_template, merged, named, rendered
from tests.support.redis_server import PASSWORDS

from reelway.platform.features.redis_address import RedisAddress, parse_redis_address


def online_store(found: tuple[Document, ...]) -> dict[str, Any]:
    config = yaml.safe_load(named(found, "ConfigMap", "-features")["data"]["feature_store.yaml"])
    section: dict[str, Any] = config["online_store"]
    return section


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("redis.test", RedisAddress("redis.test", 6380, tls=True)),
        ("fd00::5", RedisAddress("fd00::5", 6380, tls=True)),
        ("[fd00::5]", RedisAddress("fd00::5", 6380, tls=True)),
    ],
)
def test_external_host_is_rendered_as_an_address(host: str, expected: RedisAddress) -> None:
    settings = {"mode": "external", "host": host, "port": 6380, "tls": True}
    features = {"type": "redis", "registry": "s3://features/registry.db", "redis": settings}
    values = {"features": features, "jobs": {"runsClaim": "runs"}, "secrets": {"name": "s"}}
    done = helm_template(merged(NEEDED, {**values, "releases": {"publicKeys": {"configMap": "keys"}}}))
    assert done.returncode == 0, done.stderr
    found = documents(done.stdout)
    assert parse_redis_address(online_store(found)["address"]) == expected
    jobs = named(found, "ConfigMap", "-jobs")["data"]
    head = yaml.safe_load(jobs["features.yaml"])["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    env = {one["name"]: one.get("value") for one in head["containers"][0]["env"]}
    assert parse_redis_address(str(env["REELWAY_ONLINE_STORE"])) == expected


@pytest.mark.redis
@pytest.mark.parametrize("password", [*PASSWORDS, "%s %d", "$HOME", "`id`", "'"])
def test_bundled_server_takes_any_password(tmp_path: Path, password: str) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server on the PATH; `make system-packages` installs it")
    deployment = named(rendered("dev", "redis-bundled"), "Deployment", "-redis")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (script,) = container["args"]
    script = script.replace("/data", str(tmp_path)).replace("6379", str(port))
    environment = {"PATH": os.environ["PATH"], "REDIS_PASSWORD": password}
    server = subprocess.Popen([*container["command"], script], env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        with redis.Redis(port=port, password=password) as client:
            while True:
                try:
                    assert client.ping()
                    break
                except redis.AuthenticationError:
                    raise
                except redis.ConnectionError:
                    assert server.poll() is None, "redis-server ended"
                    assert time.monotonic() < deadline, "redis-server did not come up in ten seconds"
                    time.sleep(0.02)
    finally:
        server.terminate()
        assert server.wait(timeout=10) == 0  # the server itself, not a shell around it
