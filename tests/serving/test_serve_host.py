"""The service listens at both IP families; Ray alone would make HAProxy listen at IPv4 only."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from reelway.serving.serve_settings import serve_host

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="the machine has no IPv6")
def test_serve_answers_over_both_families() -> None:
    command = [sys.executable, "-m", "tests.support.serving.serve_at_host", serve_host("*")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[:2] == ["200", "200"]  # Ray prints more when it ends


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "10.0.0.5"])
def test_one_address_is_passed_on(host: str) -> None:
    assert serve_host(host) == host


def test_machine_without_ipv6_serves_at_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    assert serve_host("*") == "0.0.0.0"
