"""Reads the columns of event files (Parquet, CSV, or a folder of parts as Spark writes it) without changing a value.

Ids, times and text of a CSV file are read as text, so that ``007`` and ``7``, or two ids above 2**63, stay different.
Errors name the file, the row and the column. Rows of a CSV file are its lines, from 1; rows of a Parquet file count
from 0.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from reelway.pipelines.datasets.delimited import first_uncastable, line_of_record
from reelway.platform.errors import EmptyDatasetError, MalformedFileError

SUFFIXES: Final = (".parquet", ".csv")
TEXT: Final = pa.large_string()
"""Type of text: a column of ``pa.string()`` holds at most 2 GiB, about 100 million times."""
_WIDER: Final = {pa.string(): TEXT, pa.binary(): pa.large_binary()}
_FAILURES: Final = (OSError, pa.ArrowException)


@dataclass(frozen=True)
class _Part:
    """One file of a source, and its rows in the table."""

    path: Path
    table: pa.Table


def part_files(path: Path) -> list[Path]:
    """Returns the files of a source in a fixed order: the file, or the data files of a folder.

    Files that begin with ``.`` or ``_`` are ignored, such as ``_SUCCESS`` of Spark and ``._NAME`` of macOS.

    Raises:
        MalformedFileError: if the path does not exist, or a folder contains no data file, several kinds, or folders.
    """
    if not path.is_dir():
        if not path.exists():
            raise MalformedFileError(path, "a file", seen="no such file")
        return [path]
    entries = sorted(entry for entry in path.iterdir() if entry.name[0] not in "._")
    if folders := [entry.name for entry in entries if entry.is_dir()]:
        raise MalformedFileError(
            path, "a folder of parts without subfolders; write the data set without partition columns", seen=folders[0]
        )
    kinds = {entry.suffix for entry in entries}
    if len(kinds) != 1 or not kinds <= set(SUFFIXES):
        names = [entry.name for entry in entries[:20]]
        raise MalformedFileError(path, f"a folder of parts of one kind ({' or '.join(SUFFIXES)})", seen=names)
    return entries


class SourceTable:
    """The rows of a source, its columns by name, and errors with the file's own row numbers."""

    def __init__(self, path: Path, columns: Mapping[str, pa.DataType | None]) -> None:
        """Reads a source.

        Args:
            path: a ``.parquet`` or ``.csv`` file, or a folder of such files.
            columns: the columns to read if they exist, and the type of each in a CSV file; None infers the type.

        Raises:
            MalformedFileError: if a file cannot be read, has a column twice, or has other columns than the first.
            EmptyDatasetError: if a file is empty.
        """
        self.path = path
        self._parts = [_Part(file, _read(file, columns)) for file in part_files(path)]
        for part in self._parts[1:]:
            _raise_unless_same_columns(self._parts[0], part, columns)
        self.table = pa.concat_tables([part.table for part in self._parts], promote_options="permissive")

    @property
    def rows(self) -> int:
        return int(self.table.num_rows)

    def get(self, name: str) -> pa.Array | None:
        """Returns a column as one array, or None if there is no such column."""
        if name not in self.table.column_names:
            return None
        column = self.table[name]
        if wider := _WIDER.get(column.type):
            column = column.cast(wider)
        array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        if pa.types.is_dictionary(array.type):
            return array.dictionary_decode()
        return pc.run_end_decode(array) if pa.types.is_run_end_encoded(array.type) else array

    def require(self, name: str) -> pa.Array:
        """Returns a column without nulls.

        Raises:
            MalformedFileError: if the column does not exist or a value is missing.
        """
        array = self.get(name)
        if array is None:
            raise MalformedFileError(self.path, "this column", seen=self.table.column_names, column=name)
        self.raise_if_any(name, array.is_null(), array, "a value")
        return array

    def text(self, name: str, array: pa.Array) -> pa.Array:
        """Returns a column as text.

        Raises:
            MalformedFileError: if a value is not UTF-8, or the column's type has no text form.
        """
        return self.cast(name, array, TEXT, "UTF-8 text")

    def cast(self, name: str, array: pa.Array, kind: pa.DataType, expected: str) -> pa.Array:
        """Casts a column without loss.

        Raises:
            MalformedFileError: if a value does not fit; the first one is named.
        """
        try:
            return array.cast(kind)
        except pa.ArrowInvalid:
            raise self.malformed(name, array, first_uncastable(array, kind), expected) from None
        except _FAILURES as error:
            raise MalformedFileError(self.path, expected, seen=f"type {array.type}", column=name) from error

    def numbers(self, name: str, array: pa.Array, kind: pa.DataType, expected: str) -> pa.Array:
        """Casts as ``cast`` does, but a large integer may be rounded to a floating-point number."""
        if pa.types.is_integer(array.type) and pa.types.is_floating(kind):
            return array.cast(kind, safe=False)
        return self.cast(name, array, kind, expected)

    def raise_if_any(self, name: str, bad: pa.Array, array: pa.Array, expected: str) -> None:
        """Raises an error for the first row of the mask ``bad``, if there is one."""
        row = pc.index(bad, True).as_py()
        if row >= 0:
            raise self.malformed(name, array, row, expected)

    def malformed(self, name: str, array: pa.Array, row: int, expected: str) -> MalformedFileError:
        """Returns the error of one value, in the file and at the row where it is stored."""
        seen = plain_value(array, row)
        for part in self._parts:
            if row < part.table.num_rows:
                if part.path.suffix == ".csv":
                    row = line_of_record(part.path.read_bytes(), row + 1, delimiter=",", quoted=True)
                return MalformedFileError(part.path, expected, seen=seen, row=row, column=name)
            row -= part.table.num_rows
        raise AssertionError(f"{self.path}: row {row} after the last row")


def plain_value(array: pa.Array | pa.ChunkedArray, row: int) -> object:
    """Returns a value for a message. A time that Python cannot represent becomes its number of days or time units."""
    try:
        return array[row].as_py()
    except (OverflowError, ValueError):
        return f"{array.type} {array[row].value}"


def _raise_unless_same_columns(first: _Part, part: _Part, columns: Mapping[str, pa.DataType | None]) -> None:
    """Raises an error if a column of two parts has no common type that keeps every value."""
    for name in sorted({*first.table.column_names, *part.table.column_names}):
        if name not in part.table.column_names or name not in first.table.column_names:
            lacking = part if name not in part.table.column_names else first
            raise MalformedFileError(
                lacking.path, "the same columns in every part", seen=lacking.table.column_names, column=name
            )
        kinds = [table.schema.field(name).type for table in (first.table, part.table)]
        same = kinds[0] == kinds[1] or any(pa.types.is_null(kind) for kind in kinds)
        same |= all(pa.types.is_signed_integer(kind) for kind in kinds)
        same |= columns[name] is None and all(pa.types.is_integer(k) or pa.types.is_floating(k) for k in kinds)
        if not same:
            raise MalformedFileError(part.path, f"type {kinds[0]} as in {first.path}", seen=str(kinds[1]), column=name)


def _read(path: Path, columns: Mapping[str, pa.DataType | None]) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path, columns)
        if path.suffix == ".csv":
            return _read_csv(path, columns)
    except _FAILURES as error:
        raise MalformedFileError(path, f"a readable {path.suffix} file", seen=str(error)) from error
    raise MalformedFileError(path, "a file ending in .parquet or .csv", seen=path.suffix)


def _selected(path: Path, names: Sequence[str], columns: Mapping[str, pa.DataType | None]) -> list[str]:
    for name in columns:
        if names.count(name) > 1:
            raise MalformedFileError(path, "this column once", seen=list(names), column=name)
    return [name for name in names if name in columns]


def _read_parquet(path: Path, columns: Mapping[str, pa.DataType | None]) -> pa.Table:
    with pq.ParquetFile(path, coerce_int96_timestamp_unit="us") as file:
        return file.read(columns=_selected(path, file.schema_arrow.names, columns))


def _read_csv(path: Path, columns: Mapping[str, pa.DataType | None]) -> pa.Table:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        try:
            names = next((fields for fields in csv.reader(lines) if fields), [])
        except csv.Error as error:
            raise MalformedFileError(path, "a header with the columns' names", seen=str(error), row=1) from error
    if not names:
        raise EmptyDatasetError(f"{path}: an empty file, expected a header and at least one row")
    selected = _selected(path, names, columns)
    types = {name: kind for name in selected if (kind := columns[name]) is not None}
    try:
        return _parse_csv(path, selected, types)
    except pa.ArrowInvalid:
        texts = [name for name, kind in types.items() if kind == TEXT]
        raw = _parse_csv(path, texts, dict.fromkeys(texts, pa.large_binary()))
        for name in texts:
            try:
                raw[name].cast(TEXT)
            except pa.ArrowInvalid:
                record = first_uncastable(raw[name], TEXT)
                row = line_of_record(path.read_bytes(), record + 1, delimiter=",", quoted=True)
                seen = raw[name][record].as_py()
                raise MalformedFileError(path, "UTF-8 text", seen=seen, row=row, column=name) from None
        raise


def _parse_csv(path: Path, selected: Sequence[str], types: Mapping[str, pa.DataType], threads: bool = True) -> pa.Table:
    wrong: list[pacsv.InvalidRow] = []

    def note(row: pacsv.InvalidRow) -> str:
        wrong.append(row)
        return "skip"

    table = pacsv.read_csv(
        path,
        read_options=pacsv.ReadOptions(use_threads=threads),
        parse_options=pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
        convert_options=pacsv.ConvertOptions(
            include_columns=list(selected), column_types=dict(types), strings_can_be_null=True, null_values=[""]
        ),
    )
    if wrong and threads:  # only a single-threaded parse reports row numbers
        return _parse_csv(path, selected, types, threads=False)
    if wrong:
        first = wrong[0]
        row = line_of_record(path.read_bytes(), first.number - 1, delimiter=",", quoted=True)
        expected = f"a readable .csv file with {first.expected_columns} fields in every row"
        raise MalformedFileError(path, expected, seen=first.text, row=row)
    return table
