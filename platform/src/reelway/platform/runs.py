"""A run directory: what was done, with which configuration and seed, and what need not be done again.

Each step writes ``steps/<step>.json`` when it has ended well. A later call with the same configuration, inputs and
code version is skipped and says so; a changed input reruns the step and everything after it, because each step's
record holds the digest of the records it stands on. Nothing here knows what the steps do.
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

from reelway.platform.durable import write_json
from reelway.platform.errors import ConfigError


def digest_of(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_files(paths: Sequence[Path]) -> str:
    """Hex SHA-256 over the content of ``paths``, in the given order."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as handle:
            whole.update(hashlib.file_digest(handle, "sha256").digest())
    return whole.hexdigest()


@dataclass
class Step:
    """A step under way. ``done`` is true when the same step was done before: skip the work."""

    name: str
    config: Mapping[str, Any]
    done: bool
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunDirectory:
    """One run of the path from events to a release, on local disk."""

    path: Path

    def __post_init__(self) -> None:
        # worker processes have a working directory of their own
        object.__setattr__(self, "path", self.path.absolute())

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
    def event_log(self) -> Path:
        return self.path / "events" / "log.db"

    @property
    def overlay(self) -> Path:
        return self.path / "overlay"

    @property
    def keys(self) -> Path:
        return self.path / "keys"

    def record_path(self, step: str) -> Path:
        return self.path / "steps" / f"{step}.json"

    def record(self, step: str) -> dict[str, Any]:
        """The record of a finished step.

        Raises:
            ConfigError: the step was not done in this run directory.
        """
        try:
            loaded: dict[str, Any] = json.loads(self.record_path(step).read_text())
        except FileNotFoundError:
            raise ConfigError(
                f"{self.path}: step {step!r} was not done here; run `reelway {step} --run {self.path}` first"
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
    ) -> Iterator[Step]:
        """Do a step unless it was done with the same configuration, files and preceding steps.

        Args:
            config: everything that changes the result, JSON-able, the seed included.
            after: names of steps in this run that it stands on; each must have been done.
            inputs: files from outside the run that it reads; their content counts, not their time.
            outputs: paths that must still exist for the step to count as done.
            force: do it again regardless.

        Raises:
            ConfigError: a step named in ``after`` was not done.
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
        step = Step(name, config, done, dict(before["summary"]) if done and before else {})
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
