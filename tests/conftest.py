"""Settings of the whole suite: metrics stay in the process that made them, and Ctrl-C reaches what tests start.

Importing Feast turns every metric of the process and its children into files (see ``features.store.import_feast``);
test modules that import Feast directly would do that to the others, depending on their order.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import prometheus_client  # noqa: F401  (settles how values are kept, before Feast can)
import pytest
from tests.support.eventlog.kafka_broker import Broker, kafka_broker


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C, and so would every process that a test starts and then interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Undo what imports during collection did to the environment."""
    for name in ("PROMETHEUS_MULTIPROCESS_DIR", "PROMETHEUS_MULTIPROC_DIR"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One Kafka broker for all tests of a run. Tests use topics of their own."""
    with kafka_broker(tmp_path_factory.mktemp("kafka")) as running:
        yield running
