"""A run directory: the results of each pipeline step, and which steps need not run again.

Each finished step writes ``steps/<step>.json``. A later call with the same configuration, inputs and code version is
skipped. Because a record contains the digests of the records it depends on, a changed input reruns the step and every
step after it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reelway.platform.atomic_files import write_json
from reelway.platform.errors import ConfigError


def digest_of(value: Any) -> str:
    """Returns the hex SHA-256 of a value that JSON can encode, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_files(paths: Sequence[Path]) -> str:
    """Returns the hex SHA-256 over the content of ``paths``, in the given order."""
    combined = hashlib.sha256()
    for path in paths:
        with path.open("rb") as handle:
            combined.update(hashlib.file_digest(handle, "sha256").digest())
    return combined.hexdigest()


@dataclass
class StepExecution:
    """One execution of a step. ``cached``: an earlier result is still valid, so the work can be skipped."""

    name: str
    config: Mapping[str, Any]
    cached: bool
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunDirectory:
    """One run of the pipeline from events to a release, on local disk.

    Raises:
        ConfigError: if the path contains ``::``, by which fsspec separates the parts of a chained URL.
    """

    path: Path

    def __post_init__(self) -> None:
        # worker processes have another working directory
        object.__setattr__(self, "path", self.path.absolute())
        if "::" in str(self.path):
            raise ConfigError(f"run directory {str(self.path)!r}: its path contains '::'; rename the folder")

    @property
    def dataset(self) -> Path:
        return self.path / "dataset"

    @property
    def features(self) -> Path:
        return self.path / "features"

    @property
    def models(self) -> Path:
        return self.path / "models"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def release_store(self) -> Path:
        return self.path / "releases"

    @property
    def events(self) -> Path:
        """Folder of the event log; see ``eventlog.topics``."""
        return self.path / "events"

    @property
    def overlay(self) -> Path:
        return self.path / "overlay"

    @property
    def keys(self) -> Path:
        return self.path / "keys"

    def record_path(self, step: str) -> Path:
        return self.path / "steps" / f"{step}.json"

    def record(self, step: str) -> dict[str, Any]:
        """Returns the record of a finished step.

        Raises:
            ConfigError: if the step has not finished in this run directory.
        """
        try:
            loaded: dict[str, Any] = json.loads(self.record_path(step).read_text())
        except FileNotFoundError:
            raise ConfigError(
                f"{self.path}: step {step!r} has not finished in this run; run `reelway {step} --run {self.path}` first"
            ) from None
        return loaded

    @contextmanager
    def step(
        self,
        name: str,
        *,
        config: Mapping[str, Any],
        after: Sequence[str] = (),
        inputs: Sequence[Path] = (),
        outputs: Sequence[Path] = (),
        force: bool = False,
    ) -> Iterator[StepExecution]:
        """Runs a step, or skips it if it finished before with the same configuration, inputs and preceding steps.

        Args:
            config: everything that changes the result, as JSON, including the seed.
            after: names of the steps of this run that it depends on; each must have finished.
            inputs: files from outside the run that it reads; compared by content, not by time.
            outputs: paths that must still exist for the step to be skipped.
            force: run the step in any case.

        Raises:
            ConfigError: if a step named in ``after`` has not finished.
        """
        identity = digest_of(
            {
                "step": name,
                "config": dict(config),
                "after": [self.record(earlier)["identity"] for earlier in after],
                "inputs": digest_of_files(inputs),
                "version": version("reelway-platform"),
            }
        )
        before = self.record(name) if self.record_path(name).exists() else None
        done = (
            before is not None
            and before["identity"] == identity
            and all(path.exists() for path in outputs)
            and not force
        )
        step = StepExecution(name, config, done, dict(before["summary"]) if done and before else {})
        if done:
            yield step
            return
        self.record_path(name).unlink(missing_ok=True)
        started = datetime.now(UTC)
        clock = time.perf_counter()
        yield step
        write_json(
            self.record_path(name),
            {
                "step": name,
                "identity": identity,
                "config": dict(config),
                "after": list(after),
                "inputs": [str(path) for path in inputs],
                "started": started.isoformat(),
                "elapsed_s": round(time.perf_counter() - clock, 3),
                "version": version("reelway-platform"),
                "summary": step.summary,
            },
        )
