"""Parity findings in a run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reelway.platform.rollout.evidence import EvidenceState, GuardrailReading
from reelway.platform.rollout.sources.parity_findings import parity_path, read_parity
from reelway.platform.run_directory import RunDirectory

RELEASE = "c" * 64
FOUND = {"rows": 40, "mismatches": 2, "checked_at": 1_700_000_000.0, "detail": "viewer.watches_7d differs"}


def reading(folder: Path, text: str | None) -> GuardrailReading:
    run = RunDirectory(folder)
    if text is not None:
        parity_path(run).parent.mkdir(exist_ok=True)
        parity_path(run).write_text(text)
    return read_parity(run).reading(RELEASE)


def test_reading_has_the_mismatches_of_the_release(tmp_path: Path) -> None:
    guardrail = reading(tmp_path, json.dumps({RELEASE: FOUND, "d" * 64: {"rows": 1, "mismatches": 0}}))
    assert (guardrail.state, guardrail.events, guardrail.trials) == (EvidenceState.OK, 2, 40)
    assert guardrail.detail == "viewer.watches_7d differs, replayed at 2023-11-14 22:13:20 UTC"


def test_missing_file_is_telemetry_down_with_a_command(tmp_path: Path) -> None:
    guardrail = reading(tmp_path, None)
    assert guardrail.state is EvidenceState.TELEMETRY_DOWN
    assert f"run `reelway features parity --run {tmp_path}`" in guardrail.detail


@pytest.mark.parametrize("report", [{}, {RELEASE: {"rows": 0, "mismatches": 0}}])
def test_release_without_replayed_rows_is_insufficient(tmp_path: Path, report: dict[str, object]) -> None:
    guardrail = reading(tmp_path, json.dumps(report))
    assert guardrail.state is EvidenceState.INSUFFICIENT
    assert "0 rows" in guardrail.detail


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {"rows": -1, "mismatches": 0}}', "\xff"])
def test_invalid_file_is_telemetry_down(tmp_path: Path, text: str) -> None:
    guardrail = reading(tmp_path, text)
    assert guardrail.state is EvidenceState.TELEMETRY_DOWN
    assert "does not contain parity findings" in guardrail.detail
