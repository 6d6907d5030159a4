"""Why: on a cluster the replay runs in a job and is judged in another pod; the release store is what both can reach.

One file beside the releases, whole or absent. Who judges looks every few seconds and must not wait for object storage,
so the file is read aside, and what was read last is what is known; refuses to pass that off as news when the store has
stopped to answer.
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

from reelway.platform.durable import write_json
from reelway.platform.errors import ConfigError, StorageError
from reelway.platform.rollout.sources.parity_report import ParityReport, parse_parity

EVERY_S: Final = 15.0
"""Between two reads."""
PATIENCE_S: Final = 60.0
"""A read that takes longer, or a store that fails for longer, and nothing is known any more."""
_FIRST_S: Final = 2.0
_AGAIN: Final = "run `reelway features parity --report {url}`, or let the chart's `jobs.parity` do it"


def write_parity(url: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Put a replay's findings where ``ParityInStore`` reads them.

    Raises:
        ConfigError: the URL cannot be opened.
        StorageError: it could not be written; what was there is as it was.
    """
    fs, path = _opened(url)
    if isinstance(fs, LocalFileSystem):
        write_json(Path(path), found)
        return
    try:
        fs.pipe_file(path, json.dumps(found).encode())
    except Exception as error:  # client libraries have errors of their own
        raise StorageError(f"cannot write {url}: {error or type(error).__name__}") from error


class ParityInStore:
    """What a replay has left at a URL; read by a thread of its own from the first ``report`` on.

    Raises:
        ConfigError: the URL cannot be opened.
    """

    def __init__(
        self, url: str, *, every_s: float = EVERY_S, patience_s: float = PATIENCE_S, first_s: float = _FIRST_S
    ) -> None:
        self._url = url
        self._fs, self._path = _opened(url)
        self._every_s, self._patience_s, self._first_s = every_s, patience_s, first_s
        self._stop, self._first = threading.Event(), threading.Event()
        self._known = ParityReport(problem=f"{url} has not been read yet")
        self._read_at = time.monotonic()
        self._thread = threading.Thread(target=self._read_until, name="parity", daemon=True)

    def report(self) -> ParityReport:
        """What was read last, or why nothing is known; waits a moment for the first time only. Raises nothing."""
        if self._thread.ident is None:
            self._read_at = time.monotonic()
            self._thread.start()
            self._first.wait(self._first_s)
        known, silent_s = self._known, time.monotonic() - self._read_at
        if silent_s > self._patience_s:
            return ParityReport(problem=f"{self._url} has not answered for {silent_s:.0f} s")
        return known

    def close(self) -> None:
        """Read no more. A read under way is not waited for."""
        self._stop.set()

    def _read_until(self) -> None:
        while not self._stop.is_set():
            self._known = self._read()
            self._read_at = time.monotonic()
            self._first.set()
            self._stop.wait(self._every_s)

    def _read(self) -> ParityReport:
        again = _AGAIN.format(url=self._url)
        try:
            text = self._fs.cat_file(self._path).decode()
        except FileNotFoundError:
            return ParityReport(problem=f"no parity report at {self._url}; {again}")
        except Exception as error:  # client libraries have errors of their own
            return ParityReport(problem=f"cannot read {self._url}: {error or type(error).__name__}")
        return parse_parity(text, self._url, again)


def _opened(url: str) -> tuple[Any, str]:
    try:
        fs, path = url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"parity report {url} needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise ConfigError(f"parity report {url!r} is not a URL that can be opened: {error}") from error
    return fs, path
