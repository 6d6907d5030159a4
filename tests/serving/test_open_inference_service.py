"""No end of a rank server fails a request; see killed_rank_servers.py, which is a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]


def test_servers_killed_in_a_rollout_and_a_rollback_cost_no_request_and_every_degraded_one_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.serving.killed_rank_servers", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=390, check=False)
    with capsys.disabled():
        print("\n" + done.stdout.strip())
    assert done.returncode == 0, done.stderr[-6000:]
