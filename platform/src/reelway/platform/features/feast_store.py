"""Opens a run's Feast feature store and hides Feast's exceptions.

Feast is imported inside functions. The import takes about a second, and commands without features do not need it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import yaml

from reelway.platform.atomic_files import atomic_file
from reelway.platform.errors import FeatureError
from reelway.platform.features.redis_address import ONLINE_STORE_VARIABLE, remember_password, without_password
from reelway.platform.retention import DAY_S, retention

if TYPE_CHECKING:
    from feast import FeatureStore

PROJECT: Final = "reelway"
CONFIG_FILE: Final = "feature_store.yaml"
OFFLINE_STORE: Final = "reelway.platform.features.offline_store.LiteralPathOfflineStore"
_TORCH_WRAPPER: Final = "feast.torch_wrapper"
"""The module that Feast imports torch in."""
ONLINE_STORE: Final = "reelway.platform.features.redis_store.RedisAddressOnlineStore"


def online_store_config(address: str) -> dict[str, Any]:
    """Returns Feast's ``online_store`` section for ``sqlite`` or the address of a Redis, without its password.

    Raises:
        ConfigError: if the address is invalid.
    """
    if address == "sqlite":
        return {"type": "sqlite", "path": "online.db"}
    # skip_dedup: a materialisation writes complete rows of one time, so the last write is correct. Feast's check would
    # drop a corrected row of the same time.
    ttl_s = int(retention().online_row_days * DAY_S)
    return {"type": ONLINE_STORE, "address": without_password(address), "skip_dedup": True, "key_ttl_seconds": ttl_s}


def write_store_config(features_dir: Path, online_store: str | None = None) -> Path:
    """Writes ``feature_store.yaml`` for a run. Relative paths in the file refer to ``features_dir``.

    A password in the address is not written. This process keeps it in memory; other processes that open the store need
    it in their environment (``redis_address``).

    Args:
        online_store: see ``online_store_config``; defaults to the environment variable ``REELWAY_ONLINE_STORE``.

    Raises:
        ConfigError: if the address is invalid.
    """
    address = online_store or os.environ.get(ONLINE_STORE_VARIABLE) or "sqlite"
    config = {
        "project": PROJECT,
        "provider": "local",
        "registry": "registry.db",
        "entity_key_serialization_version": 3,
        "offline_store": {"type": OFFLINE_STORE},
        "online_store": online_store_config(address),
    }
    path = features_dir / CONFIG_FILE
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(config, sort_keys=False))
    remember_password(address)
    return path


def import_feast() -> None:
    """Imports Feast without changing how this process stores its metrics.

    On import Feast sets ``PROMETHEUS_MULTIPROC_DIR``. Then every metric created later, in this process and its
    children, would be a file in a temporary folder that is never scraped.

    Feast also imports torch, for results as tensors, which costs each process some 450 MB. Here it imports torch when
    such a result is asked for.
    """
    import prometheus_client  # noqa: F401  (settles how values are kept, before Feast can)

    if _TORCH_WRAPPER not in sys.modules:
        wrapper = ModuleType(_TORCH_WRAPPER)
        wrapper.get_torch = lambda: importlib.import_module("torch")  # type: ignore[attr-defined]
        sys.modules[_TORCH_WRAPPER] = wrapper

    variables = ("PROMETHEUS_MULTIPROCESS_DIR", "PROMETHEUS_MULTIPROC_DIR")
    before = {name: os.environ.get(name) for name in variables}
    import feast
    import feast.metrics  # noqa: F401

    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)


def open_feature_store(features_dir: Path) -> FeatureStore:
    """Opens the Feast store of a run.

    Raises:
        FeatureError: if the run has no feature store, or its configuration is invalid.
    """
    if not (features_dir / CONFIG_FILE).exists():
        raise FeatureError(f"{features_dir}: no {CONFIG_FILE}; run `reelway features --run {features_dir.parent}`")
    import_feast()
    from feast import FeatureStore, RepoConfig
    from feast.errors import FeastError
    from pydantic import ValidationError

    path = features_dir / CONFIG_FILE
    settings = _read_store_config(path)
    try:
        config = RepoConfig(**settings)
        config.repo_path = features_dir
        return FeatureStore(repo_path=str(features_dir), config=config)
    except ValidationError as error:  # its own text shows values, which may be passwords
        problems = [f"{'.'.join(map(str, one['loc'])) or 'settings'}: {one['msg']}" for one in error.errors()]
        raise FeatureError(f"{path}: cannot open the feature store: {'; '.join(problems)}") from None
    except (FeastError, OSError, ValueError) as error:
        raise FeatureError(f"{path}: cannot open the feature store: {error}") from error


def _read_store_config(path: Path) -> dict[str, Any]:
    """Reads the file and replaces ``$NAME`` and ``${NAME}`` in its values by environment variables.

    Feast replaces them before it parses the YAML, so that a password with a quote or a ``#`` breaks the file.
    """
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        place = f" (line {mark.line + 1})" if (mark := getattr(error, "problem_mark", None)) else ""
        raise FeatureError(f"{path}: cannot read the file as YAML{place}; run `reelway features` again") from None
    if not isinstance(settings, dict):
        raise FeatureError(f"{path}: saw no mapping of settings; run `reelway features` again")
    return {str(name): _expand_variables(value) for name, value in settings.items()}


def _expand_variables(value: Any) -> Any:
    if isinstance(value, str):
        return os.path.expandvars(value)
    if isinstance(value, dict):
        return {name: _expand_variables(below) for name, below in value.items()}
    return [_expand_variables(below) for below in value] if isinstance(value, list) else value


def feature_service(store: FeatureStore, name: str) -> Any:
    """Returns a registered feature service.

    Raises:
        FeatureError: if the store does not contain the service.
    """
    from feast.errors import FeatureServiceNotFoundException

    try:
        return store.get_feature_service(name)
    except FeatureServiceNotFoundException as error:
        known = sorted(service.name for service in store.list_feature_services())
        raise FeatureError(
            f"feature service {name!r} is not registered, expected one of {known}; run `reelway features`"
        ) from error


def registered_services(store: FeatureStore, names: Iterable[str]) -> dict[str, str]:
    """Returns the digests of those feature services that the store has, by name."""
    present = {}
    for name in names:
        with suppress(FeatureError):
            present[name] = feature_service_digest(store, name)
    return present


def feature_service_digest(store: FeatureStore, name: str) -> str:
    """Returns the SHA-256 (hex) of the service's registered views, join keys, fields, types, widths and TTLs.

    Paths are not part of the digest.

    Raises:
        FeatureError: if the store does not contain the service.
    """
    on_demand = {view.name for view in store.list_on_demand_feature_views()}
    views = []
    for projection in feature_service(store, name).feature_view_projections:
        view = None if projection.name in on_demand else store.get_feature_view(projection.name)
        views.append(
            {
                "view": projection.name,
                "keys": [[column.name, str(column.dtype)] for column in view.entity_columns] if view else None,
                "fields": sorted([field.name, str(field.dtype), field.tags] for field in projection.features),
                "ttl_s": view.ttl.total_seconds() if view and view.ttl else None,
            }
        )
    canonical = json.dumps({"service": name, "views": views}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
