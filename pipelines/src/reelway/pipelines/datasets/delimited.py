"""Parses delimited text into typed Arrow columns; an error names file, line, column and value.

The fast path is one typed parse. If it fails, the file is parsed again as text to find the first bad value. Rows in
messages are line numbers of the file, from 1. No line is skipped.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from reelway.platform.errors import MalformedFileError


@dataclass(frozen=True)
class DelimitedFormat:
    """Columns and syntax of one kind of file."""

    columns: Mapping[str, pa.DataType]
    """Names and types of the columns to read; in file order if the file has no header."""
    delimiter: str = ","
    header: bool = True
    encoding: str = "utf8"
    optional: frozenset[str] = field(default_factory=frozenset)
    """Columns that may be missing from the header and null in any row."""
    quoted: bool = True


def read_delimited(path: Path, layout: DelimitedFormat) -> pa.Table:
    """Reads the columns of a file. A delimiter may have several characters (``::``).

    Raises:
        MalformedFileError: if the file or a column is missing, a line has another number of fields, or a value is empty
            or not of its type.
    """
    content = _content(path, layout)
    names = _header(path, content, layout)
    selected = [name for name in layout.columns if name in names]
    try:
        table = _parse(path, content, layout, names, {name: layout.columns[name] for name in selected}, threads=True)
    except pa.ArrowInvalid:
        table = _convert_column_by_column(path, content, layout, names, selected)
    for name in selected:
        if name not in layout.optional and table[name].null_count:
            _raise_bad_value(path, layout, name, pc.index(pc.is_null(table[name]), True).as_py(), "")
    return table


def first_uncastable(column: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> int:
    """Returns the row of the first value that does not cast to ``kind``, by bisection; one such value must exist."""
    low, high = 0, len(column)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            column.slice(low, middle - low).cast(kind)
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low


def _content(path: Path, layout: DelimitedFormat) -> pa.Buffer:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise MalformedFileError(path, "a file", seen="no such file") from None
    except OSError as error:
        raise MalformedFileError(path, "a readable file", seen=error.strerror) from error
    if not raw.strip():
        raise MalformedFileError(path, f"lines with {list(layout.columns)}", seen="an empty file")
    if len(layout.delimiter) > 1:
        raw = raw.replace(layout.delimiter.encode(), _separator(layout).encode())
    return pa.py_buffer(raw)


def _separator(layout: DelimitedFormat) -> str:
    return layout.delimiter if len(layout.delimiter) == 1 else "\x1f"


def _header(path: Path, content: pa.Buffer, layout: DelimitedFormat) -> list[str]:
    if not layout.header:
        return list(layout.columns)
    line = io.BytesIO(content).readline().decode(layout.encoding, errors="replace").lstrip("\ufeff").rstrip("\r\n")
    names = [name.strip().strip('"') for name in line.split(_separator(layout))]
    for name in layout.columns:
        if name not in names and name not in layout.optional:
            raise MalformedFileError(path, "this column in the header", seen=names, row=1, column=name)
    return names


def _parse(
    path: Path,
    content: pa.Buffer,
    layout: DelimitedFormat,
    names: Sequence[str],
    types: Mapping[str, pa.DataType],
    threads: bool,
) -> pa.Table:
    wrong: list[pacsv.InvalidRow] = []

    def note(row: pacsv.InvalidRow) -> str:
        wrong.append(row)
        return "skip"

    table = pacsv.read_csv(
        pa.BufferReader(content),
        read_options=pacsv.ReadOptions(
            column_names=list(names), skip_rows=int(layout.header), encoding=layout.encoding, use_threads=threads
        ),
        parse_options=pacsv.ParseOptions(
            delimiter=_separator(layout),
            quote_char='"' if layout.quoted else False,
            newlines_in_values=False,
            invalid_row_handler=note,
        ),
        convert_options=pacsv.ConvertOptions(
            column_types=dict(types),
            include_columns=list(types),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=True,
        ),
    )
    if wrong and threads:  # only a single-threaded parse reports line numbers
        return _parse(path, content, layout, names, types, threads=False)
    if wrong:
        first = wrong[0]
        raise MalformedFileError(
            path, f"{first.expected_columns} fields ({', '.join(names)})", seen=first.text,
            row=first.number,
        )  # fmt: skip
    return table


def _convert_column_by_column(
    path: Path, content: pa.Buffer, layout: DelimitedFormat, names: Sequence[str], selected: Sequence[str]
) -> pa.Table:
    """Reads the file as text and casts column by column, to find the first value that does not cast."""
    try:
        text = _parse(path, content, layout, names, {name: pa.string() for name in selected}, threads=False)
    except pa.ArrowInvalid as error:
        raise MalformedFileError(path, f"{layout.encoding} text, delimited by {layout.delimiter!r}", seen=str(error)) \
            from error  # fmt: skip
    columns = {}
    for name in selected:
        kind = layout.columns[name]
        try:
            columns[name] = text[name].cast(kind)
        except pa.ArrowInvalid:
            row = first_uncastable(text[name], kind)
            _raise_bad_value(path, layout, name, row, text[name][row].as_py())
    return pa.table(columns)


def _raise_bad_value(path: Path, layout: DelimitedFormat, name: str, row: int, value: object) -> None:
    raise MalformedFileError(
        path, f"a value of type {layout.columns[name]}", seen=value, row=row + 1 + int(layout.header), column=name
    )
