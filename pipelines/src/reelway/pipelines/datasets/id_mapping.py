"""Maps the ids of a source to contract ids: integers in 0..MAX_ID.

Ids that are integers in this range are kept. Other ids are numbered in order of appearance by their text, so two ids
that differ as text never share a number. The table ``id_map`` of the data set lists the original ids.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reelway.pipelines.datasets.source_table import TEXT, SourceTable
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.errors import MalformedFileError

I64 = NDArray[np.int64]

ID_MAP: Final = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),  # viewer_id, video_id, creator_id, request_id, impression_id
        pa.field("original", pa.string(), nullable=False),  # "" stands for a missing creator
        pa.field("id", pa.int64(), nullable=False),
    ]
)
_INT = pa.int64()
_INTEGER: Final = r"^(0|[1-9][0-9]{0,15})$"
_EXACT_BELOW: Final = {pa.float16(): 2.0**11, pa.float32(): 2.0**24, pa.float64(): 2.0**53}


class IdMapper:
    """Maps the source's ids to contract ids."""

    def __init__(self) -> None:
        self._known: dict[str, pa.Array] = {}

    def map_columns(self, kind: str, *columns: pa.Array) -> list[I64]:
        """Returns the contract ids of all columns with this kind of id, one array per column.

        Args:
            columns: columns that ``read_ids`` returned.
        """
        if all(_is_contract_id_column(column) for column in columns):
            return [column.cast(_INT).to_numpy(zero_copy_only=False) for column in columns]
        texts = [column.cast(TEXT) for column in columns]
        known = pc.unique(pa.concat_arrays(texts))
        if _are_contract_ids(known):
            return [text.cast(_INT).to_numpy(zero_copy_only=False) for text in texts]
        self._known[kind] = known
        return [pc.index_in(text, known).cast(_INT).to_numpy(zero_copy_only=False) for text in texts]

    def table(self) -> pa.Table:
        """Returns all numbered ids in the schema ``ID_MAP``."""
        parts = [
            pa.table({"kind": [kind] * len(known), "original": known.cast(pa.string()),
                      "id": pa.array(np.arange(len(known)))}, schema=ID_MAP)
            for kind, known in sorted(self._known.items())
        ]  # fmt: skip
        return pa.concat_tables(parts) if parts else ID_MAP.empty_table()


def read_ids(source: SourceTable, name: str, *, missing: str | None = None) -> pa.Array:
    """Returns a column of ids as integers or as text; two different values have different results.

    Bytes that are not UTF-8 and values of fixed width become hexadecimal text, UUIDs their usual text.

    Args:
        missing: text that stands for a missing value in a column that exists; None rejects missing values.

    Raises:
        MalformedFileError: if the column does not exist, a value is missing, a number in floating point is not a whole
            number that the type represents exactly, or the type has no text form.
    """
    if missing is None:
        array = source.require(name)
        ids = _distinguished(source, name, array)
        if ids.type == TEXT:
            source.raise_if_any(name, pc.equal(ids, ""), array, "a value")
        return ids
    ids = _distinguished(source, name, source.get(name))
    return pc.fill_null(ids.cast(TEXT), missing) if ids.null_count else ids


def _distinguished(source: SourceTable, name: str, array: pa.Array) -> pa.Array:
    kind = array.type
    if pa.types.is_integer(kind):
        return array
    if kind in _EXACT_BELOW:
        return _whole_numbers(source, name, array)
    if pa.types.is_decimal(kind):
        try:
            return array.cast(_INT)
        except pa.ArrowInvalid:
            return source.text(name, array)
    return _texts(source, name, array)


def _whole_numbers(source: SourceTable, name: str, array: pa.Array) -> pa.Array:
    limit = _EXACT_BELOW[array.type]
    values = array.cast(pa.float64())
    whole = pc.and_(pc.equal(values, pc.round(values)), pc.less(pc.abs(values), limit))
    expected = f"a whole number below {limit:.0f}; {array.type} merges larger ids, write ids as integers or text"
    source.raise_if_any(name, pc.invert(whole), array, expected)
    return values.cast(_INT)


def _texts(source: SourceTable, name: str, array: pa.Array) -> pa.Array:
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        storage = array.storage
        if kind.extension_name == "arrow.uuid":
            return _each_distinct(storage, lambda value: str(uuid.UUID(bytes=value)))
        return _texts(source, name, storage)
    if pa.types.is_fixed_size_binary(kind):
        return _each_distinct(array, bytes.hex)
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        octets = array.cast(pa.large_binary())
        try:
            return octets.cast(TEXT)
        except pa.ArrowInvalid:
            return _each_distinct(octets, bytes.hex)
    if pa.types.is_nested(kind):
        raise MalformedFileError(source.path, "ids as integers, text or bytes", seen=f"type {kind}", column=name)
    return source.text(name, array)


def _each_distinct(array: pa.Array, text_of: Callable[[bytes], str]) -> pa.Array:
    encoded = array.dictionary_encode()
    texts = pa.array([text_of(value) for value in encoded.dictionary.to_pylist()], TEXT)
    return texts.take(encoded.indices)


def _is_contract_id_column(column: pa.Array) -> bool:
    if not pa.types.is_integer(column.type):
        return False
    ends = pc.min_max(column).as_py()
    return not len(column) or (ends["min"] >= 0 and ends["max"] <= MAX_ID)


def _are_contract_ids(texts: pa.Array) -> bool:
    if not pc.all(pc.match_substring_regex(texts, _INTEGER), min_count=0).as_py():
        return False
    return bool(pc.all(pc.less_equal(texts.cast(_INT), MAX_ID), min_count=0).as_py())
