"""Parity findings of the feature replay as a guardrail, read from ``serving/parity.json`` of a run.

``parity_store`` reads a cluster's findings. A missing file means that no replay has run: ``telemetry_down``. A file
without the release means that there was nothing of the release to replay yet: ``insufficient``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from reelway.platform.contracts.ids import short_id
from reelway.platform.rollout.evidence import EvidenceState, GuardrailReading
from reelway.platform.run_directory import RunDirectory


class ReleaseParity(BaseModel):
    """Findings about one release."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    rows: int = Field(ge=0)
    mismatches: int = Field(ge=0)
    checked_at: float = Field(default=0.0, allow_inf_nan=False)
    detail: str = ""


_REPORT = TypeAdapter(dict[str, ReleaseParity])


@dataclass(frozen=True, slots=True)
class ParityFindings:
    """Findings by release id; empty if ``problem`` is set."""

    releases: Mapping[str, ReleaseParity] = field(default_factory=dict)
    problem: str = ""

    def reading(self, release: str) -> GuardrailReading:
        """Returns the reading of the guardrail ``parity_mismatches``: mismatches of replayed rows."""
        if self.problem:
            return GuardrailReading(EvidenceState.TELEMETRY_DOWN, detail=self.problem)
        parity = self.releases.get(release)
        if parity is None or not parity.rows:
            detail = f"0 rows of {short_id(release)} were replayed"
            return GuardrailReading(EvidenceState.INSUFFICIENT, detail=detail)
        checked_at = datetime.fromtimestamp(parity.checked_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        detail = ", ".join(
            part for part in (parity.detail, f"replayed at {checked_at}" if parity.checked_at else "") if part
        )
        return GuardrailReading(EvidenceState.OK, parity.mismatches, parity.rows, detail=detail)


def parity_path(run: RunDirectory) -> Path:
    """Returns the file to which the replay writes its findings."""
    return run.path / "serving" / "parity.json"


def read_parity(run: RunDirectory) -> ParityFindings:
    """Reads a run's findings, or why there are none; raises nothing."""
    path = parity_path(run)
    remedy = f"run `reelway features parity --run {run.path}`"
    try:
        return parse_parity(path.read_text(), str(path), remedy)
    except FileNotFoundError:
        return ParityFindings(problem=f"no parity findings at {path}; {remedy}")
    except UnicodeDecodeError as error:
        return ParityFindings(problem=f"{path} does not contain parity findings: {error}; {remedy}")
    except OSError as error:
        return ParityFindings(problem=f"cannot read {path}: {error.strerror or error}")


def parse_parity(text: str, where: str, remedy: str) -> ParityFindings:
    """Parses findings. If the text is invalid, ``problem`` names its location ``where`` and the ``remedy``."""
    try:
        return ParityFindings(_REPORT.validate_python(json.loads(text)))
    except (ValidationError, ValueError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        return ParityFindings(problem=f"{where} does not contain parity findings: {first}; {remedy}")
