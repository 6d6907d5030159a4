"""Logs of a Ray Serve replica, with Ray Serve's own replacement of the error stream."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from reelway.serving.serve_settings import SERVE_SETTINGS

REPLICA = """
import logging, sys
from ray.serve._private.common import ServeComponentType
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.schema import LoggingConfig
from reelway.serving.deployments.replica_logging import log_to_replica_file

configure_component_logger(
    component_name="Router", component_id="1", component_type=ServeComponentType.REPLICA,
    logging_config=LoggingConfig(log_level="WARNING", logs_dir=sys.argv[1]), max_bytes=1 << 20, backup_count=1,
)
assert sys.stderr is not sys.__stderr__, "Ray Serve no longer replaces the error stream"
log_to_replica_file()
log_to_replica_file()
logging.getLogger("reelway.serving.router").error("routing not applied")
logging.getLogger("reelway.serving.router").info("routing applied")
"""


def test_replica_logs_each_line_once_to_its_error_file(tmp_path: Path) -> None:
    replica = subprocess.run(
        [sys.executable, "-c", REPLICA, str(tmp_path)],
        env={**os.environ, **SERVE_SETTINGS}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    lines = [line for line in replica.stderr.splitlines() if "routing" in line]
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", "", line) for line in lines] == [
        "ERROR reelway.serving.router: routing not applied",
        "INFO reelway.serving.router: routing applied",
    ]
