"""Location of rollouts for the command line: a run directory or a namespace of a cluster.

Also reads ``serving.json`` and ``rollout/controller.json``, the records of the service and the local controller.
"""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from reelway.platform.cli.terminal import stderr_console
from reelway.platform.errors import ConfigError, MalformedFileError
from reelway.platform.run_directory import RunDirectory

CONTROLLER_TIMEOUT_S: Final = 15.0
"""A controller that has not reconciled for this long is unresponsive. It normally reconciles every few seconds."""
_Record = TypeVar("_Record", bound=BaseModel)


@dataclass(frozen=True)
class ClusterNamespace:
    """A namespace whose ReleaseRollouts ``reelway operator`` reconciles."""

    namespace: str | None
    context: str | None

    def __str__(self) -> str:
        return " ".join(f"--{name} {value}" for name, value in vars(self).items() if value)


RolloutLocation = RunDirectory | ClusterNamespace


class ServingRecord(BaseModel):
    """``serving.json``: the fields that commands use."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    url: str
    internal_url: str
    pid: int
    release: str


class ControllerRecord(BaseModel):
    """``rollout/controller.json``: the fields that commands use."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    url: str
    pid: int


class ControllerStatus(BaseModel):
    """Status of the controller from its record file and its last reconcile; the controller itself is not queried."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    running: bool
    url: str | None = None
    pid: int | None = None
    last_reconcile_at: float | None = None
    seconds_since_reconcile: float | None = None
    problem: str = ""

    @property
    def unresponsive(self) -> bool:
        """Whether rollouts do not advance because the controller is not running or not reconciling."""
        return bool(self.problem)


def open_run(run: Path) -> RunDirectory:
    """Returns the run directory.

    Raises:
        ConfigError: if it does not exist.
    """
    if not run.is_dir():
        raise ConfigError(f"{run} is not a run directory; give one with --run, or create one with `reelway demo`")
    return RunDirectory(run)


def resolve_location(run: Path, namespace: str | None, context: str | None) -> RolloutLocation:
    """Returns the location of the rollouts: a cluster's namespace if an option gives one, else the run directory.

    Raises:
        ConfigError: if the run directory does not exist.
    """
    return ClusterNamespace(namespace, context) if namespace or context else open_run(run)


def location_flags(location: RolloutLocation) -> str:
    """Returns the options that select this location, for commands that are printed to be copied."""
    return str(location) if isinstance(location, ClusterNamespace) else f"--run {location.path}"


def serving_record(run: RolloutLocation) -> ServingRecord | None:
    """Returns the run's serving record; None if no process serves the run, and on a cluster."""
    if isinstance(run, ClusterNamespace):
        return None
    record = _read(run.path / "serving.json", ServingRecord)
    return record if record is not None and process_alive(record.pid) else None


def controller_record(run: RunDirectory) -> ControllerRecord | None:
    """Returns the record of the local controller, which may have exited since."""
    return _read(run.path / "rollout" / "controller.json", ControllerRecord)


def process_alive(pid: int) -> bool:
    """Returns whether a process of this machine is alive."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def current_user() -> str:
    return os.environ.get("USER") or getpass.getuser()


def print_unwrapped(message: str) -> None:
    """Prints a line on standard error without folding it, so that commands and paths can be copied."""
    stderr_console.print(message, highlight=False, soft_wrap=True)


def _read(path: Path, model: type[_Record]) -> _Record | None:
    try:
        return model.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        expected = f"a record with {', '.join(model.model_fields)}; restart the process that wrote it"
        raise MalformedFileError(path, expected, seen=str(error.errors()[0]["msg"])) from error
