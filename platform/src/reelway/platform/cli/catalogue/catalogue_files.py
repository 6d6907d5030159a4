"""Reads catalogue changes from JSON lines or Parquet. A bad line is reported and does not stop the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.errors import MalformedFileError
from reelway.platform.eventlog.catalogue_events import (
    Restore,
    Takedown,
    VideoUpsert,
    explain_first_problem,
    parse_change,
)
from reelway.platform.request_body import parse_json

MAX_KEYS: Final = 32
"""Keys of a change. Each unknown key costs time, because it is an error of its own."""


class RefusedChange(BaseModel):
    """A change that was not accepted: its place (line of a file, index of a request), the reason and the input."""

    model_config = ConfigDict(frozen=True)

    line: int
    problem: str
    input: Any = None


@dataclass(frozen=True)
class CheckedChanges:
    """The changes that are valid, and the others."""

    accepted: Sequence[VideoUpsert | Takedown | Restore]
    refused: Sequence[RefusedChange]


def check_changes(lines: Iterable[tuple[int, Any]], dimensions: FeatureDimensions | None) -> CheckedChanges:
    """Validates parsed changes.

    Args:
        lines: number and content of each line. Content that is no JSON is the text itself.
        dimensions: dimensions of the data set, which content vectors and topics must fit; None: they are not checked.
    """
    accepted: list[VideoUpsert | Takedown | Restore] = []
    refused = []
    for line, value in lines:
        if isinstance(value, dict) and len(value) > MAX_KEYS:
            problem = f"saw {len(value)} keys, expected at most {MAX_KEYS}"
            refused.append(RefusedChange(line=line, problem=problem, input=value))
            continue
        try:
            change = parse_change(value)
        except ValidationError as error:
            refused.append(RefusedChange(line=line, problem=explain_first_problem(error), input=value))
            continue
        misfit = change.problem(dimensions) if dimensions and isinstance(change, VideoUpsert) else None
        if misfit:
            refused.append(RefusedChange(line=line, problem=misfit, input=value))
        else:
            accepted.append(change)
    return CheckedChanges(accepted, refused)


def read_upserts(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Parses JSON lines of videos; empty lines are skipped. A line that is no JSON object is passed on as its text."""
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        try:
            value = parse_json(text)
        except ValueError:
            value = text
        yield number, {"op": "upsert", **value} if isinstance(value, dict) else text


def read_parquet_upserts(path: Path) -> Iterator[tuple[int, Any]]:
    """Reads videos from a Parquet file with the columns of ``events.VIDEOS``, and ``version`` if there is one.

    Raises:
        MalformedFileError: if it is not a Parquet file.
    """
    try:
        rows = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise MalformedFileError(path, "a Parquet file of videos, or JSON lines", seen=str(error)) from error
    with rows:
        number = 0
        for batch in rows.iter_batches(batch_size=1_000):
            for row in batch.to_pylist():
                number += 1
                yield number, {"op": "upsert", **{name: value for name, value in row.items() if value is not None}}
