"""Parity findings in the release store, written by a job and read without blocking."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tests.support.rollout.servers import eventually

from reelway.platform.errors import ConfigError, StorageError
from reelway.platform.rollout.evidence import EvidenceState
from reelway.platform.rollout.sources.parity_store import ParityFindingsReader, write_parity

RELEASE = "c" * 64
SOUND = {RELEASE: {"rows": 40, "mismatches": 0, "checked_at": 7.0, "detail": ""}}
BAD = {RELEASE: {"rows": 60, "mismatches": 2, "checked_at": 9.0, "detail": "viewer.watches_7d differs"}}


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{tmp_path}/store/parity.json" if request.param == "folder" else f"memory://{uuid.uuid4().hex}/parity.json"


def test_reader_returns_the_written_findings(url: str) -> None:
    write_parity(url, SOUND)
    with closing(ParityFindingsReader(url, every_s=0.05)) as parity:
        first = parity.findings().reading(RELEASE)
        assert (first.state, first.events, first.trials) == (EvidenceState.OK, 0, 40)
        write_parity(url, BAD)
        eventually(lambda: parity.findings().reading(RELEASE).events == 2)
        assert parity.findings().reading("d" * 64).state is EvidenceState.INSUFFICIENT


def test_missing_file_is_telemetry_down_with_a_command(url: str) -> None:
    with closing(ParityFindingsReader(url, every_s=0.05)) as parity:
        findings = parity.findings().reading(RELEASE)
        assert findings.state is EvidenceState.TELEMETRY_DOWN
        assert f"no parity findings at {url}; run `reelway features parity --report {url}`" in findings.detail
        write_parity(url, SOUND)
        eventually(lambda: parity.findings().reading(RELEASE).state is EvidenceState.OK)


def test_invalid_file_is_telemetry_down_until_it_is_replaced(url: str) -> None:
    with fsspec.open(url, "wb", auto_mkdir=True) as file:
        file.write(b'{"half": ')
    with closing(ParityFindingsReader(url, every_s=0.05)) as parity:
        assert f"{url} does not contain parity findings" in parity.findings().reading(RELEASE).detail
        write_parity(url, SOUND)
        eventually(lambda: parity.findings().reading(RELEASE).state is EvidenceState.OK)


class Hanging(MemoryFileSystem):
    """A store that hangs, or raises an error of its client library."""

    protocol = "hanging"
    cachable = False
    goes_on = threading.Event()
    fails: Exception | None = None

    def cat_file(self, path: str, *more: Any, **options: Any) -> bytes:
        assert self.goes_on.wait(30)
        if self.fails is not None:
            raise self.fails
        return bytes(super().cat_file(path, *more, **options))

    def pipe_file(self, path: str, value: bytes, *more: Any, **options: Any) -> None:
        if self.fails is not None:
            raise self.fails
        super().pipe_file(path, value, *more, **options)


@pytest.fixture
def hanging() -> Iterator[type[Hanging]]:
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    Hanging.goes_on.set()
    Hanging.fails = None
    yield Hanging
    Hanging.goes_on.set()
    Hanging.fails = None


def test_hanging_store_does_not_block_the_reader(hanging: type[Hanging]) -> None:
    write_parity("hanging://parity.json", SOUND)
    with closing(ParityFindingsReader("hanging://parity.json", every_s=0.05, max_staleness_s=0.5)) as parity:
        assert parity.findings().reading(RELEASE).state is EvidenceState.OK
        hanging.goes_on.clear()
        slowest = 0.0

        def down() -> bool:
            nonlocal slowest
            began = time.perf_counter()
            findings = parity.findings()
            slowest = max(slowest, time.perf_counter() - began)
            return "has not answered for" in findings.problem

        eventually(down)
        assert slowest < 0.25
        hanging.goes_on.set()
        eventually(lambda: parity.findings().reading(RELEASE).state is EvidenceState.OK)


def test_client_library_error_is_telemetry_down(hanging: type[Hanging]) -> None:
    hanging.fails = RuntimeError("SlowDown: reduce your request rate")
    with closing(ParityFindingsReader("hanging://parity.json", every_s=0.05)) as parity:
        assert parity.findings().problem == "cannot read hanging://parity.json: SlowDown: reduce your request rate"
    with pytest.raises(StorageError, match=r"cannot write hanging://parity.json: SlowDown"):
        write_parity("hanging://parity.json", SOUND)


def test_unknown_protocol_is_rejected_at_startup() -> None:
    with pytest.raises(ConfigError, match="parity findings 'ftpx://a/b': cannot open the URL"):
        ParityFindingsReader("ftpx://a/b")
