"""Parity findings in the release store: a replay job writes them, and the operator's pod reads them.

The file is stored beside the releases and is written atomically. The operator reconciles every few seconds and must not
wait for object storage. A thread therefore reads the file, and the operator uses the last result until the store has
not answered for ``MAX_STALENESS_S``.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from reelway.platform.atomic_files import write_json
from reelway.platform.errors import ConfigError, StorageError
from reelway.platform.rollout.sources.parity_findings import ParityFindings, parse_parity
from reelway.platform.supervised_thread import SupervisedThread

REFRESH_INTERVAL_S: Final = 15.0
"""Seconds between two reads."""
MAX_STALENESS_S: Final = 60.0
"""After this many seconds without an answer of the store, the findings are unknown."""
_FIRST_READ_TIMEOUT_S: Final = 2.0
_REMEDY: Final = "run `reelway features parity --report {url}`, or let the chart's `jobs.parity` do it"


def write_parity(url: str, findings: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes a replay's findings to a URL that ``ParityFindingsReader`` reads.

    Raises:
        ConfigError: if the URL cannot be opened.
        StorageError: if the file cannot be written; it is unchanged.
    """
    fs, path = _opened(url)
    if isinstance(fs, LocalFileSystem):
        write_json(Path(path), findings)
        return
    try:
        fs.pipe_file(path, json.dumps(findings).encode())
    except Exception as error:  # every client library has its own errors
        raise StorageError(f"cannot write {url}: {error or type(error).__name__}") from error


class ParityFindingsReader:
    """Reads a replay's findings from a URL, on a thread that the first call of ``findings`` starts.

    Raises:
        ConfigError: if the URL cannot be opened.
    """

    def __init__(
        self,
        url: str,
        *,
        every_s: float = REFRESH_INTERVAL_S,
        max_staleness_s: float = MAX_STALENESS_S,
        first_s: float = _FIRST_READ_TIMEOUT_S,
    ) -> None:
        self._url = url
        self._fs, self._path = _opened(url)
        self._interval_s, self._max_staleness_s, self._first_s = every_s, max_staleness_s, first_s
        self._stop, self._first = threading.Event(), threading.Event()
        self._findings = ParityFindings(problem=f"{url} has not been read yet")
        self._read_at = time.monotonic()
        self._thread = SupervisedThread(self._read_until, name="parity", daemon=True, stop=self._stop)

    def findings(self) -> ParityFindings:
        """Returns the findings read last, or why there are none. Only the first call waits. Raises nothing."""
        if self._thread.ident is None:
            self._read_at = time.monotonic()
            self._thread.start()
            self._first.wait(self._first_s)
        known, silent_s = self._findings, time.monotonic() - self._read_at
        if silent_s > self._max_staleness_s:
            return ParityFindings(problem=f"{self._url} has not answered for {silent_s:.0f} s")
        return known

    def close(self) -> None:
        """Stops reading. Does not wait for a read in progress."""
        self._stop.set()

    def _read_until(self) -> None:
        while not self._stop.is_set():
            self._findings = self._read()
            self._read_at = time.monotonic()
            self._first.set()
            self._stop.wait(self._interval_s)

    def _read(self) -> ParityFindings:
        again = _REMEDY.format(url=self._url)
        try:
            text = self._fs.cat_file(self._path).decode()
        except FileNotFoundError:
            return ParityFindings(problem=f"no parity findings at {self._url}; {again}")
        except Exception as error:  # every client library has its own errors
            return ParityFindings(problem=f"cannot read {self._url}: {error or type(error).__name__}")
        return parse_parity(text, self._url, again)


def _opened(url: str) -> tuple[Any, str]:
    try:
        fs, path = url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"parity findings {url}: a package for it is not installed: {error}") from error
    except ValueError as error:
        raise ConfigError(f"parity findings {url!r}: cannot open the URL: {error}") from error
    return fs, path
