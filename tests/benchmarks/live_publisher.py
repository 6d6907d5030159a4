"""Publishes updates of distinct videos at a constant rate, in a process of its own.

Usage: python -m tests.benchmarks.live_publisher EVENTS FIRST_VIDEO RATE SECONDS

It encodes all updates, waits for a line on standard input before it appends them, and prints the updates per second
that it reached.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from datetime import UTC, datetime
from typing import Final

from tests.support.serving.uploads import upload

from reelway.platform.eventlog.catalogue_events import as_record
from reelway.platform.eventlog.topics import Topic, open_topic

BATCH_S: Final = 0.05
CONTENTS: Final = 500


def main(events: str, first: int, rate: int, seconds: float) -> None:
    contents = [upload(first + number) for number in range(CONTENTS)]
    size, now = max(int(rate * BATCH_S), 1), datetime.now(UTC)
    with closing(open_topic(events, Topic.CATALOGUE)) as catalogue:
        records = [
            as_record(
                contents[number % CONTENTS].model_copy(update={"video_id": first + number, "uploaded_at": now}),
                catalogue.partitions,
            )
            for number in range(int(seconds / BATCH_S) * size)
        ]
        print("ready", flush=True)
        sys.stdin.readline()
        start = time.monotonic()
        for batch, begin in enumerate(range(0, len(records), size)):
            catalogue.append(records[begin : begin + size])
            time.sleep(max(start + (batch + 1) * BATCH_S - time.monotonic(), 0.0))
        print(len(records) / (time.monotonic() - start), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
