"""A real Kafka broker for tests: the one in ``REELWAY_KAFKA``, or one started from the Maven packages of Kafka."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

import pytest
from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from tests.support.certificates import CertificateFiles

POM: Final = Path(__file__).parents[3] / "infra" / "images" / "kafka.pom.xml"
JARS: Final = Path(__file__).parents[3] / "build" / "kafka"
FETCH_TIMEOUT_S: Final = 150.0
START_TIMEOUT_S: Final = 60.0
_JAVA: Final = ("java", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp")


class Broker:
    """A broker that runs, and the topics that tests create on it.

    Args:
        servers: its ``host:port``.
        tls_servers: its ``host:port`` for TLS; empty without.
        folder: data and settings of a broker that the tests start; None for one that they only use.
    """

    def __init__(self, servers: str, folder: Path | None = None, tls_servers: str = "") -> None:
        self.servers = servers
        self.tls_servers = tls_servers
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._admin: AdminClient | None = None

    @property
    def admin(self) -> AdminClient:
        if self._admin is None:
            self._admin = AdminClient({"bootstrap.servers": self.servers, "log_level": 0})
        return self._admin

    @property
    def can_be_killed(self) -> bool:
        return self._folder is not None

    def topic(self, partitions: int, config: Mapping[str, str] | None = None) -> str:
        """Creates a topic and returns its name."""
        name = f"reelway-test-{uuid4().hex[:12]}"
        self.create_topics([NewTopic(name, partitions, 1, config=dict(config or {}))])
        return name

    def create_topics(self, topics: Sequence[NewTopic]) -> None:
        """Creates topics and returns once they are in the broker's metadata."""
        for future in self.admin.create_topics(list(topics)).values():
            future.result(30)
        deadline = time.monotonic() + 30
        for topic in topics:
            while self.admin.list_topics(topic.topic, timeout=10).topics[topic.topic].error is not None:
                assert time.monotonic() < deadline, f"topic {topic.topic} is not in the broker's metadata"
                time.sleep(0.05)

    def delete_records(self, topic: str, partition: int, before: int) -> None:
        """Deletes a partition's records below an offset, as retention does."""
        for future in self.admin.delete_records([TopicPartition(topic, partition, before)]).values():
            future.result(30)

    def start(self) -> None:
        """Starts the process, with the data that it had, and returns when it answers."""
        assert self._folder is not None
        with (self._folder / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*_JAVA, f"{_jars()}/*", "kafka.Kafka", str(self._folder / "server.properties")],
                stdout=log, stderr=log, cwd=self._folder,
            )  # fmt: skip
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                AdminClient({"bootstrap.servers": self.servers, "log_level": 0}).list_topics(timeout=1)
                return
            except KafkaException as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    output = (self._folder / "broker.log").read_text(errors="replace")
                    raise AssertionError(f"the broker does not answer: {error}\n{output[-2000:]}") from error

    def kill(self) -> None:
        """Sends SIGKILL to the broker, which loses nothing that it acknowledged."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the broker's process while the block runs; connections stay open and nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)


@dataclass(frozen=True)
class BrokerTls:
    """A second listener, with TLS and client certificates of one CA."""

    server: CertificateFiles
    ca: Path

    def settings(self, folder: Path) -> dict[str, str]:
        """Writes the broker's PEM key store and returns its settings."""
        store = folder / "keystore.pem"
        store.write_bytes(self.server.key.read_bytes() + self.server.cert.read_bytes())
        return {
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SSL:SSL",
            "ssl.keystore.type": "PEM", "ssl.keystore.location": str(store),
            "ssl.truststore.type": "PEM", "ssl.truststore.location": str(self.ca), "ssl.client.auth": "required",
        }  # fmt: skip


@contextmanager
def kafka_broker(folder: Path, tls: BrokerTls | None = None) -> Iterator[Broker]:
    """Runs a broker for the block. The test is skipped on a machine without Java or Maven."""
    if servers := os.environ.get("REELWAY_KAFKA"):
        if tls:
            pytest.skip("the broker in REELWAY_KAFKA has no certificate of this test")
        yield Broker(servers)
        return
    jars = _jars()
    port, controller_port, tls_port = _free_ports()
    listener = f"SSL://127.0.0.1:{tls_port}," if tls else ""
    more = tls.settings(folder) if tls else {}
    properties = folder / "server.properties"
    properties.write_text(
        f"""process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=PLAINTEXT://127.0.0.1:{port},{listener}CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners={listener}PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
log.dirs={folder / "data"}
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=false
log.message.timestamp.type=LogAppendTime
"""
        + "".join(f"{name}={value}\n" for name, value in more.items())
    )
    format_ = ["kafka.tools.StorageTool", "format", "-t", "q1Sh-9_ISia_zwGINzRvyQ", "-c", str(properties)]
    subprocess.run([*_JAVA, f"{jars}/*", *format_], check=True, capture_output=True, timeout=START_TIMEOUT_S)
    broker = Broker(f"127.0.0.1:{port}", folder, f"127.0.0.1:{tls_port}" if tls else "")
    try:
        broker.start()
        yield broker
    finally:
        broker.kill()


def _jars() -> Path:
    """Returns the folder with the broker's 44 jars (43 MB), which Maven fetches once per version of ``pom.xml``."""
    _require("java")
    target = JARS / hashlib.sha256(POM.read_bytes()).hexdigest()[:12]
    if target.exists():
        return target
    _require("mvn")
    JARS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=JARS) as partial:
        output = Path(partial) / "jars"
        fetch = ["mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies", f"-DoutputDirectory={output}"]
        done = subprocess.run(fetch, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=False)
        assert done.returncode == 0, f"`{' '.join(fetch)}` failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        try:
            output.rename(target)
        except OSError:  # another test run was faster
            assert target.exists()
    return target


def _require(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"no {program} on the PATH; `make system-packages` installs it")


def _free_ports() -> tuple[int, int, int]:
    with socket.socket() as first, socket.socket() as second, socket.socket() as third:
        for probe in (first, second, third):
            probe.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1], third.getsockname()[1]
