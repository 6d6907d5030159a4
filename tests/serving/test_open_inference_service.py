"""Runs killed_rank_servers.py in its own process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]


def test_killed_rank_servers_fail_no_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.serving.killed_rank_servers", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=390, check=False)
    with capsys.disabled():
        print("\n" + done.stdout.strip())
    assert done.returncode == 0, done.stderr[-6000:]
