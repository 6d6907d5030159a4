"""The metric files of a node's processes: one file per process and type, and one per type for all that have died.

The counts of a dead process stay valid, but its files must not stay: replicas are replaced as long as the node runs.
``merge_dead_files`` adds them to the file of process 0 and removes them. Readers and the merge exclude each other by a
lock in the folder, so that no count is read twice or not at all.
"""

from __future__ import annotations

import fcntl
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

ARCHIVE_PID: Final = 0
SUMMED_TYPES: Final = ("counter", "histogram", "summary")


class NodeCollector(MultiProcessCollector):
    """Sums the counts of all processes that share the folder, dead ones included."""

    def __init__(self, registry: CollectorRegistry, folder: Path) -> None:
        super().__init__(registry, path=str(folder))  # type: ignore[no-untyped-call]
        self._folder = folder

    def collect(self) -> list[Metric]:
        """Returns the metrics of the node."""
        with _lock(self._folder, fcntl.LOCK_SH):
            return list(super().collect())  # type: ignore[no-untyped-call]


def merge_dead_files(folder: Path) -> int:
    """Adds the counts of processes that have died to the archive and removes their files. Returns their number.

    It must run in the process namespace of the writers: a process that ``/proc`` does not show counts as dead.
    """
    if not _dead_files(folder):
        return 0
    with _lock(folder, fcntl.LOCK_EX):
        dead = _dead_files(folder)  # another process may have merged them
        for kind in SUMMED_TYPES:
            files = [file for file in dead if file.name.startswith(f"{kind}_")]
            if files:
                _merge(folder / f"{kind}_{ARCHIVE_PID}.db", files)
        for file in dead:
            file.unlink(missing_ok=True)
    return len(dead)


def _dead_files(folder: Path) -> list[Path]:
    """Returns the files that can be removed: counts, and gauges that only living processes report."""
    found = [file for kind in (*SUMMED_TYPES, "gauge_live*") for file in folder.glob(f"{kind}_*.db")]
    return [file for file in found if (pid := _pid(file)) and not Path("/proc", str(pid)).exists()]


def _pid(file: Path) -> int:
    pid = file.stem.rpartition("_")[2]
    return int(pid) if pid.isdigit() else ARCHIVE_PID


def _merge(archive: Path, files: Sequence[Path]) -> None:
    totals: defaultdict[str, float] = defaultdict(float)
    for file in [archive, *files] if archive.exists() else files:
        for key, value, *_ in MmapedDict.read_all_values_from_file(str(file)):  # type: ignore[no-untyped-call]
            totals[key] += value
    aside = archive.with_name(f".{archive.name}.new")
    aside.unlink(missing_ok=True)
    written = MmapedDict(str(aside))  # type: ignore[no-untyped-call]
    try:
        for key, value in totals.items():
            written.write_value(key, value, 0.0)  # type: ignore[no-untyped-call]
    finally:
        written.close()  # type: ignore[no-untyped-call]
    aside.replace(archive)


@contextmanager
def _lock(folder: Path, mode: int) -> Iterator[None]:
    handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, mode)
        yield
    finally:
        os.close(handle)
