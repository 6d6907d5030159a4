"""A collector in a child process to be killed: reads pickled requests from stdin, prints committed ones."""

from __future__ import annotations

import pickle
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tests.support.serving.raw_events import NOW

from reelway.serving.outcomes import OutcomeCollector
from reelway.serving.outcomes.exposures import ExposureBatch


def main() -> None:
    collector = OutcomeCollector(Path(sys.argv[1]), clock=lambda: NOW, commit_every_s=0.002)
    saying = threading.Lock()

    def say(line: object) -> None:
        with saying:
            print(line, flush=True)

    say("ready")
    while True:
        number, work = pickle.load(sys.stdin.buffer)

        def acknowledge(done: Future[Any], number: int = number) -> None:
            done.result()
            say(number)

        take: Any = collector.record_exposures if isinstance(work, ExposureBatch) else collector.record_outcomes
        take(work).add_done_callback(acknowledge)


if __name__ == "__main__":
    main()
