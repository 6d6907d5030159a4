"""Why: before anything is asked of a rollout, where it is: a run directory or a namespace of a cluster.

Reads records that others write (``serving.json``, ``rollout/controller.json``); starts nothing.
"""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from reelway.platform.cli.terminal import console
from reelway.platform.errors import ConfigError, MalformedFileError
from reelway.platform.runs import RunDirectory

SILENT_AFTER_S: Final = 15.0
"""A controller that has not looked for so long is called silent; it looks every few seconds."""
_Record = TypeVar("_Record", bound=BaseModel)


@dataclass(frozen=True)
class ClusterPlace:
    """A namespace in which rollouts are resources and `reelway operator` moves them."""

    namespace: str | None
    context: str | None

    def __str__(self) -> str:
        return " ".join(f"--{name} {value}" for name, value in vars(self).items() if value)


Place = RunDirectory | ClusterPlace


class ServingRecord(BaseModel):
    """``serving.json``, as far as it is needed here."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    url: str
    pid: int
    release: str


class ControllerRecord(BaseModel):
    """``rollout/controller.json``, as far as it is needed here."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    url: str
    pid: int


class ControllerSight(BaseModel):
    """What can be told of the controller without asking it: whether its process lives and when it last looked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    running: bool
    url: str | None = None
    pid: int | None = None
    last_look_at: float | None = None
    silent_s: float | None = None
    problem: str = ""

    @property
    def silent(self) -> bool:
        """Nothing will move."""
        return bool(self.problem)


def open_run(run: Path) -> RunDirectory:
    """The run directory.

    Raises:
        ConfigError: there is none.
    """
    if not run.is_dir():
        raise ConfigError(f"{run} is not a run directory; name one with --run, or make one with `reelway demo`")
    return RunDirectory(run)


def open_place(run: Path, namespace: str | None, context: str | None) -> Place:
    """Where the rollouts are: on a cluster if anything says so, else in a run directory.

    Raises:
        ConfigError: there is no such run directory.
    """
    return ClusterPlace(namespace, context) if namespace or context else open_run(run)


def flags_of(place: Place) -> str:
    """The same place, for a command that is shown to be copied."""
    return str(place) if isinstance(place, ClusterPlace) else f"--run {place.path}"


def serving_record(run: Place) -> ServingRecord | None:
    """Where the run is being served; None when it is not, when the process that said so is gone, or on a cluster."""
    if isinstance(run, ClusterPlace):
        return None
    record = _read(run.path / "serving.json", ServingRecord)
    return record if record is not None and lives(record.pid) else None


def controller_record(run: RunDirectory) -> ControllerRecord | None:
    """Where the controller listens, or did."""
    return _read(run.path / "rollout" / "controller.json", ControllerRecord)


def lives(pid: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def actor() -> str:
    """Who is asking."""
    return os.environ.get("USER") or getpass.getuser()


def tell(message: str) -> None:
    """A line to the person, never folded here: commands and paths in it can be copied whole."""
    console.print(message, highlight=False, soft_wrap=True)


def _read(path: Path, model: type[_Record]) -> _Record | None:
    try:
        return model.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        expected = f"a record with {', '.join(model.model_fields)}; restart the process that writes it"
        raise MalformedFileError(path, expected, seen=str(error.errors()[0]["msg"])) from error
