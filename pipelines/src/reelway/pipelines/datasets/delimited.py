"""Parses delimited text into typed Arrow columns; an error names file, line, column and value.

The fast path is one typed parse. If it fails, the file is parsed again as text to find the first bad value. Rows in
messages are line numbers of the file, from 1. Only empty lines are skipped.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from reelway.platform.errors import MalformedFileError

UTF8_OR_LATIN1: Final = "UTF-8 or Latin-1"
_CANONICAL_INTEGER: Final = r"^(0|-?[1-9][0-9]*)$"


@dataclass(frozen=True)
class DelimitedFormat:
    """Columns and syntax of one kind of file."""

    columns: Mapping[str, pa.DataType]
    """Names and types of the columns to read; in file order if the file has no header."""
    delimiter: str = ","
    header: bool = True
    encoding: str = "utf8"
    """Encoding of the text; ``UTF8_OR_LATIN1`` reads as Latin-1 a file that is not UTF-8."""
    ids: frozenset[str] = field(default_factory=frozenset)
    """Integer columns whose values have one spelling: ``007`` is rejected, because it would become the id 7."""
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
    if layout.encoding == UTF8_OR_LATIN1:
        layout = replace(layout, encoding="utf8" if _is_utf8(content) else "latin-1")
    names = _header(path, content, layout)
    selected = [name for name in layout.columns if name in names]
    types = {name: pa.string() if name in layout.ids else layout.columns[name] for name in selected}
    try:
        table = _parse(path, content, layout, names, types, threads=True)
        table = _convert_ids(path, content, layout, table)
    except pa.ArrowInvalid:
        table = _convert_column_by_column(path, content, layout, names, selected)
    for name in selected:
        if name not in layout.optional and table[name].null_count:
            _raise_bad_value(path, content, layout, name, pc.index(pc.is_null(table[name]), True).as_py(), "")
    return table


def line_of_record(content: bytes, record: int, *, delimiter: str, quoted: bool) -> int:
    """Returns the line number, from 1, at which a record begins. Records count from 0, the header included.

    Empty lines are no records, and a quoted value may contain line breaks.
    """
    text = io.StringIO(content.decode("latin-1"), newline="")
    reader = csv.reader(text, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    line, seen = 1, -1
    try:
        for fields in reader:
            seen += bool(fields)
            if seen == record:
                return line
            line = reader.line_num + 1
    except csv.Error:  # a value of more than 128 KiB
        pass
    return record + 1


def file_line(path: Path, layout: DelimitedFormat, row: int) -> int:
    """Returns the line number, from 1, of a row of ``read_delimited``'s table."""
    return _line(_content(path, layout), layout, row + int(layout.header))


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


def _is_utf8(content: pa.Buffer) -> bool:
    try:
        content.to_pybytes().decode("utf8")
    except UnicodeDecodeError:
        return False
    return True


def _raise_unless_canonical(path: Path, content: pa.Buffer, layout: DelimitedFormat, table: pa.Table) -> None:
    """Raises an error for the first value of ``layout.ids`` with a sign or zeros in front; columns are text."""
    for name in table.column_names:
        if name in layout.ids:
            other = pc.invert(pc.match_substring_regex(table[name], _CANONICAL_INTEGER))
            if (row := pc.index(other, True).as_py()) >= 0:
                _raise_bad_value(path, content, layout, name, row, table[name][row].as_py())


def _convert_ids(path: Path, content: pa.Buffer, layout: DelimitedFormat, table: pa.Table) -> pa.Table:
    """Casts the text columns of ``layout.ids`` to their types."""
    _raise_unless_canonical(path, content, layout, table)
    for i, name in enumerate(table.column_names):
        if name in layout.ids:
            table = table.set_column(i, name, table[name].cast(layout.columns[name]))
    return table


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
        if names.count(name) > 1:
            raise MalformedFileError(path, "this column once in the header", seen=names, row=1, column=name)
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
            row=_line(content, layout, first.number - 1),
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
    _raise_unless_canonical(path, content, layout, text)
    columns = {}
    for name in selected:
        kind = layout.columns[name]
        try:
            columns[name] = text[name].cast(kind)
        except pa.ArrowInvalid:
            row = first_uncastable(text[name], kind)
            _raise_bad_value(path, content, layout, name, row, text[name][row].as_py())
    return pa.table(columns)


def _raise_bad_value(
    path: Path, content: pa.Buffer, layout: DelimitedFormat, name: str, row: int, value: object
) -> None:
    expected = f"a value of type {layout.columns[name]}"
    raise MalformedFileError(
        path, expected, seen=value, row=_line(content, layout, row + int(layout.header)), column=name
    )


def _line(content: pa.Buffer, layout: DelimitedFormat, record: int) -> int:
    return line_of_record(content.to_pybytes(), record, delimiter=_separator(layout), quoted=layout.quoted)
