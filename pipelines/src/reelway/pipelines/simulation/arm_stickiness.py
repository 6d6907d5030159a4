"""Checks from the client's side that viewers stay on their arm.

Uses only the arm of each response and the canaries that the service reports. While a canary is running, a viewer may
move from stable to the canary, and may move back only after the canary has ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from reelway.platform.contracts.ids import short_id
from reelway.platform.viewer_pseudonyms import viewer_pseudonym

CANARY: Final = "canary"
GRACE_S: Final = 2.0
"""Tolerance for requests in flight and for a routing that was read up to 0.5 s ago."""
SHOWN: Final = 10


@dataclass
class ArmStickinessCheck:
    """Counts arm changes that neither a monotone ramp nor the end of a rollout explains."""

    changes: int = 0
    examples: list[str] = field(default_factory=list)
    _last: dict[int, tuple[str, str]] = field(default_factory=dict)
    _back: dict[str, list[tuple[float, int, str]]] = field(default_factory=dict)
    """Canary release -> viewers who left it (time, viewer, new arm), until the reason is known."""

    def record_response(self, viewer_id: int, release: str, arm: str, at_s: float) -> None:
        """Records the release and arm of a response to a request sent at ``at_s``."""
        before = self._last.get(viewer_id)
        now = (release, arm)
        if before == now:
            return
        self._last[viewer_id] = now
        if before is not None and before[1] == CANARY:
            self._back.setdefault(before[0], []).append((at_s, viewer_id, f"{short_id(release)} ({arm})"))

    def record_routing(self, canaries: frozenset[str], at_s: float) -> None:
        """Records the canaries that have traffic at ``at_s`` according to the service."""
        for canary in list(self._back):
            if canary not in canaries:
                del self._back[canary]  # the canary has ended, so its viewers move back
                continue
            waiting = []
            for moved_s, viewer_id, new_arm in self._back[canary]:
                if at_s - moved_s <= GRACE_S:
                    waiting.append((moved_s, viewer_id, new_arm))
                    continue
                self.changes += 1
                if len(self.examples) < SHOWN:
                    self.examples.append(
                        f"{viewer_pseudonym(viewer_id)}: from canary {canary[:12]}, still running, to {new_arm}"
                    )
            self._back[canary] = waiting
