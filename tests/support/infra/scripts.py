"""Loads scripts of infra/ by path, because they belong to no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_INFRA = Path(__file__).parents[3] / "infra"


def load_script(path: str) -> ModuleType:
    """Loads the script at ``path`` under infra/ as a module."""
    spec = importlib.util.spec_from_file_location(f"infra_{Path(path).stem}", _INFRA / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module in sys.modules
    spec.loader.exec_module(module)
    return module
