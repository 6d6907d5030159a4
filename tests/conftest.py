"""Settings of the whole suite: metrics stay in the process that made them, and Ctrl-C reaches what tests start.

Importing Feast turns every metric of the process and its children into files (see ``features.store.import_feast``);
test modules that import Feast directly would do that to the others, depending on their order.
"""

from __future__ import annotations

import os
import signal

import prometheus_client  # noqa: F401  (settles how values are kept, before Feast can)


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C, and so would every process that a test starts and then interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Undo what imports during collection did to the environment."""
    for name in ("PROMETHEUS_MULTIPROCESS_DIR", "PROMETHEUS_MULTIPROC_DIR"):
        os.environ.pop(name, None)
