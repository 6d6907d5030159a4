"""Opening a feature store loads neither torch nor its memory: every router replica and waiting command opens one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

PROGRAM: Final = """
import os, sys
from pathlib import Path
from reelway.platform.features.feast_store import open_feature_store, write_store_config

folder = Path(sys.argv[1])
write_store_config(folder)
(folder / "registry.db").touch()
open_feature_store(folder).list_feature_views()
assert "torch" not in sys.modules
assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ

from feast.torch_wrapper import get_torch

assert get_torch().arange(3).sum() == 3
"""


def test_feature_store_opens_without_torch_until_tensors_are_asked_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
