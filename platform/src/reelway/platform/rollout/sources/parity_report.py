"""Why: what the feature replay found is a guardrail too, and it lies in a file that may be absent, old or broken.

Reads ``serving/parity.json`` of a run (``parity_store`` reads a cluster's); refuses to replay anything. No file: nobody
has looked, which is telemetry's fault; a file without the release: somebody has looked, and there was nothing of it to
replay yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from reelway.platform.rollout.evidence import EvidenceState, GuardrailReading
from reelway.platform.runs import RunDirectory


class ReplayedRelease(BaseModel):
    """What was found of one release."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    rows: int = Field(ge=0)
    mismatches: int = Field(ge=0)
    checked_at: float = Field(default=0.0, allow_inf_nan=False)
    detail: str = ""


_REPORT = TypeAdapter(dict[str, ReplayedRelease])


@dataclass(frozen=True, slots=True)
class ParityReport:
    """By release id. With a ``problem`` there is none."""

    releases: Mapping[str, ReplayedRelease] = field(default_factory=dict)
    problem: str = ""

    def reading(self, release: str) -> GuardrailReading:
        """The guardrail ``parity_mismatches``: mismatches of replayed rows."""
        if self.problem:
            return GuardrailReading(EvidenceState.TELEMETRY_DOWN, detail=self.problem)
        found = self.releases.get(release)
        if found is None or not found.rows:
            detail = f"0 rows of {release[:12]} were replayed"
            return GuardrailReading(EvidenceState.INSUFFICIENT, detail=detail)
        when = datetime.fromtimestamp(found.checked_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        detail = ", ".join(part for part in (found.detail, f"replayed at {when}" if found.checked_at else "") if part)
        return GuardrailReading(EvidenceState.OK, found.mismatches, found.rows, detail=detail)


def parity_path(run: RunDirectory) -> Path:
    """Where the replay leaves its findings."""
    return run.path / "serving" / "parity.json"


def read_parity(run: RunDirectory) -> ParityReport:
    """The report of a run, or why there is none; raises nothing."""
    path = parity_path(run)
    again = f"run `reelway features parity --run {run.path}`"
    try:
        return parse_parity(path.read_text(), str(path), again)
    except FileNotFoundError:
        return ParityReport(problem=f"no parity report at {path}; {again}")
    except UnicodeDecodeError as error:
        return ParityReport(problem=f"{path} is not a parity report: {error}; {again}")
    except OSError as error:
        return ParityReport(problem=f"cannot read {path}: {error.strerror or error}")


def parse_parity(text: str, where: str, again: str) -> ParityReport:
    """The report in a text; ``where`` it came from and what to do ``again`` are said if it is none."""
    try:
        return ParityReport(_REPORT.validate_python(json.loads(text)))
    except (ValidationError, ValueError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        return ParityReport(problem=f"{where} is not a parity report: {first}; {again}")
