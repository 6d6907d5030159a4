"""Registers the Feast definitions of ``feature_repo/`` with a run's feature store."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from reelway.platform.atomic_files import atomic_file
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.errors import ConfigError, StorageError
from reelway.platform.features.dimensions import write_dimensions
from reelway.platform.features.feast_store import open_feature_store, write_store_config

if TYPE_CHECKING:
    from feast import FeatureStore

REPO_VARIABLE: Final = "REELWAY_FEATURE_REPO"
PUBLISHED_VARIABLE: Final = "REELWAY_FEATURE_REGISTRY"
DIR_VARIABLE: Final = "REELWAY_FEATURES_DIR"
REGISTRY_FILE: Final = "registry.db"
_MODULE: Final = "reelway_feature_definitions"


def feature_repo_path() -> Path:
    """Returns the folder with ``definitions.py``: ``REELWAY_FEATURE_REPO``, or ``feature_repo`` of the checkout.

    Raises:
        ConfigError: if neither exists.
    """
    if configured := os.environ.get(REPO_VARIABLE):
        candidates = [Path(configured)]
    else:
        candidates = [folder / "feature_repo" for folder in (Path.cwd(), *Path(__file__).resolve().parents)]
    for candidate in candidates:
        if (candidate / "definitions.py").is_file():
            return candidate
    raise ConfigError(f"feature definitions: no definitions.py in {candidates[0]}; set {REPO_VARIABLE} to its folder")


def publish_registry(features_dir: Path, url: str) -> None:
    """Copies a run's registry atomically to the path or fsspec URL from which services read it.

    Raises:
        StorageError: if the registry cannot be written there.
    """
    import fsspec

    target = Path(url.removeprefix("file://"))
    try:
        if "://" in url and not url.startswith("file://"):
            with fsspec.open(url, "wb") as handle:  # an object store shows an object only after the upload is complete
                handle.write((features_dir / REGISTRY_FILE).read_bytes())
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as aside:
            shutil.copyfile(features_dir / REGISTRY_FILE, aside)
    except (OSError, ImportError) as error:
        raise StorageError(
            f"Feast registry: cannot write to {url}: {error}; set {PUBLISHED_VARIABLE} to a writable path or URL"
        ) from error


def load_definitions(features_dir: Path) -> list[Any]:
    """Returns the Feast objects of ``feature_repo/definitions.py``, with sources in ``features_dir``."""
    from feast import Entity, FeatureService, FeatureView, FileSource, OnDemandFeatureView

    path = feature_repo_path() / "definitions.py"
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python module; replace it with Feast definitions")
    module = importlib.util.module_from_spec(spec)
    before = os.environ.get(DIR_VARIABLE)
    os.environ[DIR_VARIABLE] = str(features_dir.absolute())
    sys.modules[_MODULE] = module
    try:
        spec.loader.exec_module(module)
    finally:
        if before is None:
            del os.environ[DIR_VARIABLE]
        else:
            os.environ[DIR_VARIABLE] = before
    kinds = (Entity, FeatureService, FeatureView, OnDemandFeatureView, FileSource)
    return [value for value in vars(module).values() if isinstance(value, kinds)]


def register_features(
    features_dir: Path, dimensions: FeatureDimensions, online_store: str | None = None
) -> FeatureStore:
    """Writes the run's store configuration and schema and registers every definition (``feast apply``). Idempotent."""
    write_dimensions(features_dir, dimensions)
    write_store_config(features_dir, online_store)
    store = open_feature_store(features_dir)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="On demand feature view is an experimental", category=RuntimeWarning)
        store.apply(load_definitions(features_dir))
    return store
