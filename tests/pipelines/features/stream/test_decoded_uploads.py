"""Uploads that are decoded once for several readers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.support.serving.uploads import upload

from reelway.pipelines.features.stream.decoded_uploads import DecodedUploads
from reelway.platform.eventlog.catalogue_events import decode_upserts
from reelway.platform.eventlog.event_log import StoredRecord

PAYLOADS = [upload(1).payload(), upload(2).payload(), b"", b"no JSON", b"{}"]
RECORDS = [
    StoredRecord(partition, offset, 0, PAYLOADS[(3 * partition + offset) % len(PAYLOADS)])
    for partition in range(3)
    for offset in range(8)
]


@given(reads=st.lists(st.lists(st.sampled_from(RECORDS), max_size=12), max_size=8), kept=st.integers(1, 20))
def test_uploads_are_those_of_decode_upserts(reads: list[list[StoredRecord]], kept: int) -> None:
    decode = DecodedUploads(kept)
    for records in reads:
        assert decode(records) == decode_upserts(records)


def test_record_is_decoded_once_for_two_readers() -> None:
    decode = DecodedUploads()
    (first,), _ = decode(RECORDS[:1])
    (second,), _ = decode(RECORDS[:1])
    assert first is second
