"""A collector in a child process to be killed: follows the event log of a folder and prints each commit."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from reelway.platform.eventlog.topics import open_topic
from reelway.serving.outcomes import OutcomeCollector


def main() -> None:
    folder = Path(sys.argv[1])
    collector = OutcomeCollector(folder / "sums.db", partial(open_topic, folder / "events"))
    print("ready", flush=True)
    while True:
        if records := collector.advance():
            print(records, flush=True)


if __name__ == "__main__":
    main()
