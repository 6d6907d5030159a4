"""Settings of all tests: metrics stay in memory, and Ctrl-C reaches child processes.

Importing Feast switches the metrics of the process and its children to files; ``feast_store.import_feast`` prevents it.
Without these settings, a test module that imports Feast directly would change the metrics of all later modules.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import prometheus_client  # noqa: F401  (selects in-memory metrics before Feast can select files)
import pytest
from tests.support.eventlog.kafka_broker import Broker, kafka_broker
from tests.support.redis_server import running_redis


def pytest_configure() -> None:
    """Restores Ctrl-C, which a background job of a shell ignores. Child processes inherit the setting."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Removes environment variables that imports set during collection."""
    for name in ("PROMETHEUS_MULTIPROCESS_DIR", "PROMETHEUS_MULTIPROC_DIR"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One Kafka broker for all tests of a run. Tests use topics of their own."""
    with kafka_broker(tmp_path_factory.mktemp("kafka")) as running:
        yield running


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of one Redis server for all tests of a run. Tests use databases or keys of their own."""
    with running_redis(tmp_path_factory.mktemp("redis")) as address:
        yield address
