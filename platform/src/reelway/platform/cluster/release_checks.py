"""Verifies the manifest of a release before its rollout starts: id, signature, gates, and this version's inputs.

The serving processes verify the same and all files when they open the release. The operator's check gives the reason
at once and before any capacity is used. A thread reads the store, so a store that hangs delays no other rollout.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

from reelway.platform.cluster.admission import Refused, Waiting
from reelway.platform.contracts.ids import ReleaseId, short_id
from reelway.platform.errors import ReleaseError, ReleaseNotFoundError, SignatureError, StorageError
from reelway.platform.release.signing import load_public_keys
from reelway.platform.release.store import ReleaseStore
from reelway.platform.release.verify import verify_manifest

_WAIT_S: Final = 2.0
_POLL_S: Final = 1.0


class ReleaseChecks:
    """Checks releases of a store. ``run`` does the work; ``problem`` may be called from another thread.

    Args:
        url: path or URL of the release store.
        public_keys: trusted keys: a PEM file or a folder with ``*.public.pem``, read for every check.
        wait_s: longest wait of ``problem`` for the store.

    Raises:
        ConfigError: if the store's URL cannot be opened.
    """

    def __init__(self, url: str, public_keys: Path, *, wait_s: float = _WAIT_S) -> None:
        self._store, self._public_keys, self._wait_s = ReleaseStore(url), public_keys, wait_s
        self._changed = threading.Condition()  # guards the two below
        self._requested: set[str] = set()
        self._verdicts: dict[str, Waiting | Refused | None] = {}

    def problem(self, release: str) -> Waiting | Refused | None:
        """Returns why a rollout of the release may not start, or None if it may."""
        with self._changed:
            self._requested.add(release)
            self._changed.notify_all()
            if self._changed.wait_for(lambda: release in self._verdicts, self._wait_s):
                self._requested.discard(release)
                return self._verdicts.pop(release)
        return Waiting(f"release {short_id(release)} is being verified; {self._store.url} has not answered yet")

    def run(self, stop: threading.Event) -> None:
        """Checks requested releases until stopped."""
        while not stop.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._requested - self._verdicts.keys(), _POLL_S)
                waiting = sorted(self._requested - self._verdicts.keys())
            for release in waiting:
                verdict = self._verify(release)
                with self._changed:
                    self._verdicts[release] = verdict
                    self._changed.notify_all()

    def _verify(self, release: str) -> Waiting | Refused | None:
        try:
            keys = load_public_keys(self._public_keys)
        except SignatureError as error:
            return Waiting(f"releases cannot be verified: {error}")
        try:
            manifest = self._store.manifest(ReleaseId(release))
            verify_manifest(manifest, public_keys=keys, expected_id=release)
        except (ReleaseNotFoundError, StorageError) as error:
            return Waiting(f"release {short_id(release)} cannot be verified: {error}")
        except ReleaseError as error:
            return Refused(f"release {short_id(release)} is rejected: {error}")
        return None
