"""The stream's time axis, recorded with the run for the stream's members and for the parity replay."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

from reelway.platform.atomic_files import write_json
from reelway.platform.run_directory import RunDirectory

STREAM_CLOCK_FILE: Final = "stream/clock.json"


@dataclass(frozen=True)
class StreamClock:
    """The first watermark, and the offset of the stream's time to the log's; both in microseconds.

    Events of the log count from ``began_us`` on, in the stream's time. ``behind_us`` is 0 unless the data set ended
    long ago.
    """

    began_us: int
    behind_us: int


def write_stream_clock(run: RunDirectory, clock: StreamClock) -> None:
    """Records the time axis of a run's stream."""
    write_json(run.path / STREAM_CLOCK_FILE, asdict(clock))
