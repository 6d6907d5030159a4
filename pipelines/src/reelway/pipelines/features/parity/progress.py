"""How far the replay is, and what it found: one small file beside the run, replaced after each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from reelway.pipelines.features.parity.comparison import ParityReport
from reelway.pipelines.features.parity.run_files import RunFiles
from reelway.platform.errors import MalformedFileError

PROGRESS_FILE: Final = "parity/progress.json"
VERSION: Final = 2
FINDINGS_S: Final = 86_400.0
"""Findings count for so many seconds, so that a release that is rolled out again is judged by what is served then."""
HOUR_S: Final = 3600.0


@dataclass
class ReplayProgress:
    """Positions in the vector log and the event log, and the findings per release and hour."""

    vectors: dict[str, dict[str, Any]] = field(default_factory=dict)
    offsets: dict[str, dict[int, int]] = field(default_factory=dict)
    newest_us: dict[str, dict[int, int]] = field(default_factory=dict)  # append time, by topic and partition
    next_file: int = 0
    findings: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def read(cls, files: RunFiles) -> ReplayProgress:
        """Reads the file; everything is new without one.

        Raises:
            MalformedFileError: if the file is not a replay's progress.
        """
        try:
            content = files.read_json(PROGRESS_FILE)
            if content is None:
                return cls()
            if content.pop("version") != VERSION:
                raise ValueError("another version")
            offsets, newest_us = _by_partition(content.pop("offsets")), _by_partition(content.pop("newest_us"))
            return cls(offsets=offsets, newest_us=newest_us, **content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise MalformedFileError(
                f"{files.location}/{PROGRESS_FILE}",
                f"a replay's progress of version {VERSION}; run `reelway features parity --from-start`",
                seen=str(error),
            ) from error

    def write(self, files: RunFiles) -> None:
        files.write_json(
            PROGRESS_FILE,
            {
                "version": VERSION,
                "vectors": self.vectors,
                "offsets": _as_json(self.offsets),
                "newest_us": _as_json(self.newest_us),
                "next_file": self.next_file,
                "findings": self.findings,
            },
        )

    def add_findings(self, report: ParityReport, checked_at: float) -> None:
        """Adds a report, and forgets findings that no longer count."""
        hour = str(int(checked_at // HOUR_S))
        for release, rows in report.rows.items():
            of_release = self.findings.setdefault(release, {})
            entry = of_release.setdefault(hour, {"rows": 0, "mismatches": 0, "checked_at": 0.0, "first": ""})
            entry["rows"] += rows
            entry["mismatches"] += report.differing[release]
            entry["checked_at"] = checked_at
            if release in report.first:
                entry["first"] = entry["first"] or str(report.first[release])
        oldest = int((checked_at - FINDINGS_S) // HOUR_S)
        for release in list(self.findings):
            kept = {hour: entry for hour, entry in self.findings[release].items() if int(hour) >= oldest}
            if kept:
                self.findings[release] = kept
            else:
                del self.findings[release]

    def by_release(self) -> dict[str, dict[str, Any]]:
        """Returns the findings of each release, as the rollout's parity guardrail reads them."""
        findings = {}
        for release, hours in self.findings.items():
            first = next((entry["first"] for _, entry in sorted(hours.items()) if entry["first"]), "")
            findings[release] = {
                "rows": sum(entry["rows"] for entry in hours.values()),
                "mismatches": sum(entry["mismatches"] for entry in hours.values()),
                "checked_at": max(entry["checked_at"] for entry in hours.values()),
                "detail": f"first: {first}" if first else "",
            }
        return findings


def _by_partition(values: dict[str, dict[str, int]]) -> dict[str, dict[int, int]]:
    return {topic: {int(partition): value for partition, value in some.items()} for topic, some in values.items()}


def _as_json(values: dict[str, dict[int, int]]) -> dict[str, dict[str, int]]:
    return {str(topic): {str(partition): value for partition, value in some.items()} for topic, some in values.items()}


def forget_vectors(files: RunFiles, now_s: float) -> None:
    """Lets the next replay begin with the oldest vector and no findings. The copy of the event log stays.

    If the file is damaged, the event log is copied again, beside the present copy: an event in both counts once.
    """
    try:
        progress = ReplayProgress.read(files)
    except MalformedFileError:
        progress = ReplayProgress(next_file=int(now_s))
    progress.vectors, progress.findings = {}, {}
    progress.write(files)
