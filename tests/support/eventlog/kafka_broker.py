"""A real Kafka broker for tests: the one in ``REELWAY_KAFKA``, or Apache Kafka started from its jars."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

JARS = Path("build/kafka")
POM = Path(__file__).parent / "kafka" / "pom.xml"
READY_S = 60.0


@dataclass(frozen=True)
class Broker:
    """Its address, and its process if the tests started it."""

    servers: str
    process: subprocess.Popen[bytes] | None = None

    def topic(self, partitions: int) -> str:
        """Creates a topic and returns its name."""
        name = f"reelway-test-{uuid4().hex[:12]}"
        admin = AdminClient({"bootstrap.servers": self.servers})
        for future in admin.create_topics([NewTopic(name, partitions, 1)]).values():
            future.result(30)
        return name


@contextmanager
def kafka_broker(folder: Path) -> Iterator[Broker]:
    """Runs a broker for the block; skips the test if no broker can be started."""
    if named := os.environ.get("REELWAY_KAFKA"):
        yield Broker(named)
        return
    _fetch_jars()
    port, controller = _free_ports()
    properties = folder / "server.properties"
    properties.write_text(
        f"""process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
log.dirs={folder / "data"}
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=false
"""
    )
    java = ["java", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{JARS.absolute()}/*"]
    format_ = ["kafka.tools.StorageTool", "format", "-t", "q1Sh-9_ISia_zwGINzRvyQ", "-c", str(properties)]
    subprocess.run([*java, *format_], check=True, capture_output=True, timeout=READY_S)
    with (folder / "broker.log").open("wb") as log:
        process = subprocess.Popen([*java, "kafka.Kafka", str(properties)], stdout=log, stderr=log, cwd=folder)
    try:
        broker = Broker(f"127.0.0.1:{port}", process)
        _wait_until_ready(broker)
        yield broker
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _fetch_jars() -> None:
    if shutil.which("java") is None:
        pytest.skip("no java here and no broker in REELWAY_KAFKA")
    if any(JARS.glob("kafka_*.jar")):
        return
    if not os.environ.get("REELWAY_KAFKA_FETCH"):
        pytest.skip("no broker in REELWAY_KAFKA; REELWAY_KAFKA_FETCH=1 fetches one with Maven")
    if shutil.which("mvn") is None:
        pytest.skip("no mvn here to fetch Kafka with, and no broker in REELWAY_KAFKA")
    fetch = ["mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies", f"-DoutputDirectory={JARS.absolute()}"]
    subprocess.run(fetch, check=True, capture_output=True, timeout=300)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def _wait_until_ready(broker: Broker) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        try:
            AdminClient({"bootstrap.servers": broker.servers, "log_level": 0}).list_topics(timeout=1)
            return
        except KafkaException as error:
            if broker.process is None or broker.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the broker does not answer: {error}") from error
