"""Copies the build context: only the files that images need, so that no key or run directory is sent."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
IMAGES: Final = ("operator", "serving", "training")
REGISTRY: Final = "reelway.local"
"""Registry name of images that are loaded into a node, never pulled."""
_CONTEXT_PATHS: Final = ("platform", "serving", "pipelines", "feature_repo", "infra/images", "constraints-hashed.txt")
_IGNORED: Final = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.tar", ".*", "decisions", "registry.db")


def version() -> str:
    """Returns the project's version, which is also the chart's ``appVersion``."""
    project = tomllib.loads((REPOSITORY / "platform" / "pyproject.toml").read_text())["project"]
    return str(project["version"])


def image_name(name: str, tag: str) -> str:
    """Returns the full name of an image on the test node."""
    return f"{REGISTRY}/{name}:{tag}"


def copy_sources(folder: Path) -> Path:
    """Copies the build context into ``folder``."""
    for part in _CONTEXT_PATHS:
        source, target = REPOSITORY / part, folder / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=_IGNORED)
        else:
            shutil.copy2(source, target)
    return folder
