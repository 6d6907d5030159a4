"""Reads and writes ``schema.json``: the feature dimensions in a data set's folder and in its features' folder."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from reelway.platform.atomic_files import atomic_file
from reelway.platform.contracts.feature_dimensions import SCHEMA_FILE, FeatureDimensions
from reelway.platform.errors import MalformedFileError


def read_dimensions(folder: Path) -> FeatureDimensions:
    """Returns the dimensions that are recorded in a folder.

    Raises:
        MalformedFileError: if the folder has no ``schema.json``, or a field of it is missing, unknown or out of range.
    """
    path = folder / SCHEMA_FILE
    try:
        return FeatureDimensions.from_json(path.read_bytes())
    except FileNotFoundError:
        expected = "the feature dimensions; run `reelway simulate` or `reelway import`, then `reelway features`"
        raise MalformedFileError(path, expected, seen="no such file") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in problem["loc"]) or None
        raise MalformedFileError(path, problem["msg"], seen=problem["input"], column=field) from error


def write_dimensions(folder: Path, dimensions: FeatureDimensions) -> None:
    """Records the dimensions in a folder, which is created if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / SCHEMA_FILE) as temporary:
        temporary.write_text(dimensions.to_json() + "\n")
