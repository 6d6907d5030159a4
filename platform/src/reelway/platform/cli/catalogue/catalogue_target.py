"""Where catalogue commands send changes: to an event log, or to the HTTP API of the catalogue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import httpx
from pydantic import ValidationError

from reelway.platform.cli.catalogue.catalogue_api import (
    CATALOGUE_PATH,
    MAX_CHANGES,
    CatalogueStatus,
    PublishedChanges,
    catalogue_status,
)
from reelway.platform.cli.catalogue.catalogue_files import RefusedChange
from reelway.platform.contracts.feature_dimensions import SCHEMA_FILE, FeatureDimensions
from reelway.platform.errors import ConfigError, StorageError
from reelway.platform.eventlog.catalogue_events import Restore, Takedown, VideoUpsert
from reelway.platform.eventlog.catalogue_log import CataloguePublisher
from reelway.platform.features.dimensions import read_dimensions
from reelway.platform.run_directory import RunDirectory

CATALOGUE_TOKEN: Final = "catalogue.token"
"""Token file in the run's key folder."""
_TIMEOUT_S: Final = 60.0

Changes = Sequence[VideoUpsert | Takedown | Restore]


class CatalogueTarget(Protocol):
    """Takes changes and reports the catalogue's status. Raises ``StorageError`` if it cannot be reached."""

    def publish(self, changes: Changes) -> Sequence[RefusedChange]:
        """Publishes changes; returns those that the API refused, ``line`` being the index in ``changes``."""
        ...

    def status(self) -> CatalogueStatus: ...


@dataclass(frozen=True)
class EventLogTarget:
    """The topics of an event log."""

    publisher: CataloguePublisher

    def publish(self, changes: Changes) -> Sequence[RefusedChange]:
        self.publisher.publish(changes)
        return ()

    def status(self) -> CatalogueStatus:
        return catalogue_status(self.publisher)


@dataclass(frozen=True)
class ApiTarget:
    """``/v1/catalogue`` of a running service."""

    client: httpx.Client

    def publish(self, changes: Changes) -> Sequence[RefusedChange]:
        refused: list[RefusedChange] = []
        for start in range(0, len(changes), MAX_CHANGES):
            part = [
                change.model_dump(mode="json", exclude_none=True) for change in changes[start : start + MAX_CHANGES]
            ]
            answer = PublishedChanges.model_validate(self._request("POST", {"changes": part}))
            refused += [change.model_copy(update={"line": change.line + start}) for change in answer.refused]
        return refused

    def status(self) -> CatalogueStatus:
        return CatalogueStatus.model_validate(self._request("GET"))

    def _request(self, method: str, body: Any = None) -> Any:
        try:
            response = self.client.request(method, CATALOGUE_PATH, json=body)
        except httpx.HTTPError as error:
            raise StorageError(f"{self.client.base_url}: no answer: {error}; check --url") from error
        if response.status_code == 401:
            raise ConfigError(f"{self.client.base_url}: the token was rejected; check --token-file")
        if not response.is_success:
            raise StorageError(f"{self.client.base_url}: answered {response.status_code}: {response.text[:500]}")
        try:
            return response.json()
        except (ValueError, ValidationError) as error:
            raise StorageError(f"{self.client.base_url}: not the catalogue's API: {error}; check --url") from error


@contextmanager
def open_target(run: Path, events: str, url: str, token_file: Path | None) -> Iterator[CatalogueTarget]:
    """Opens the API at ``url`` if it is given, else the event log ``events``, by default that of the run.

    Raises:
        ConfigError: if the run does not exist, or the token cannot be read.
        StorageError: if the event log cannot be opened.
    """
    directory = RunDirectory(run)
    if url:
        headers = {"Authorization": f"Bearer {read_token(token_file or directory.keys / CATALOGUE_TOKEN)}"}
        with httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S) as client:
            yield ApiTarget(client)
        return
    with closing(CataloguePublisher(event_address(directory, events))) as publisher:
        yield EventLogTarget(publisher)


def event_address(run: RunDirectory, events: str) -> str:
    """Returns the event log's address: ``events``, or that of an existing run.

    Raises:
        ConfigError: if the run does not exist.
    """
    if events:
        return events
    if not run.path.is_dir():
        raise ConfigError(f"{run.path}: not a run directory; pass --run, --events or --url")
    return str(run.path / "events")


def run_dimensions(run: Path) -> FeatureDimensions | None:
    """Returns the dimensions of the run's data set, None if the run has none."""
    folder = RunDirectory(run).dataset
    return read_dimensions(folder) if (folder / SCHEMA_FILE).exists() else None


def read_token(path: Path) -> str:
    """Reads a bearer token from a file.

    Raises:
        ConfigError: if the file cannot be read or is empty.
    """
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the token {path}: {error}; pass --token-file") from error
    if not token:
        raise ConfigError(f"token {path}: the file is empty, expected the catalogue's bearer token")
    return token
