"""Feast's DuckDB offline store, reading view files by their literal paths.

DuckDB takes a folder ``region=eu`` above a file for a Hive partition and replaces the file's own column ``region`` with
``eu``. It also treats ``[1]``, ``*`` and ``?`` in a folder's name as a pattern. A run directory may have any name.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any, Final

import ibis
from feast import RepoConfig
from feast.data_source import DataSource
from feast.infra.offline_stores.duckdb import DuckDBOfflineStore, DuckDBOfflineStoreConfig, _write_data_source
from feast.infra.offline_stores.ibis import (
    get_historical_features_ibis,
    pull_all_from_table_or_query_ibis,
    pull_latest_from_table_or_query_ibis,
)
from feast.infra.offline_stores.offline_store import RetrievalJob


class LiteralPathOfflineStoreConfig(DuckDBOfflineStoreConfig):  # type: ignore[misc]
    """Settings of ``LiteralPathOfflineStore``; Feast finds this class by its name."""

    type: str = "reelway.platform.features.offline_store.LiteralPathOfflineStore"


def read_view_files(source: DataSource, _repo_path: str) -> ibis.Table:
    """Reads the Parquet files of a file source, but no hidden ones. Only the last part of its path may be a pattern.

    Raises:
        FileNotFoundError: if no file matches.
    """
    path = Path(source.path)
    files = sorted(file for file in path.parent.glob(path.name) if not file.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"{path}: no such file; run `reelway features` first")
    return ibis.read_parquet([glob.escape(str(file)) for file in files], hive_partitioning=False)


_SOURCE: Final[dict[str, Any]] = {
    "data_source_reader": read_view_files,
    "data_source_writer": _write_data_source,
}


class LiteralPathOfflineStore(DuckDBOfflineStore):  # type: ignore[misc]
    """The DuckDB store with ``read_view_files`` as its reader."""

    @staticmethod
    def get_historical_features(config: RepoConfig, **arguments: Any) -> RetrievalJob:
        return get_historical_features_ibis(config=config, **arguments, **_SOURCE)

    @staticmethod
    def pull_latest_from_table_or_query(config: RepoConfig, **arguments: Any) -> RetrievalJob:
        return pull_latest_from_table_or_query_ibis(config=config, **arguments, **_SOURCE)

    @staticmethod
    def pull_all_from_table_or_query(config: RepoConfig, **arguments: Any) -> RetrievalJob:
        return pull_all_from_table_or_query_ibis(config=config, **arguments, **_SOURCE)
