"""Why: from outside, a viewer must be seen to stay on one arm; this counts every time that somebody was moved back.

It knows only what a client can know: the arm of each answer, and which canary the service says has traffic. While a
canary runs a viewer may go from stable to it, and back only when it has ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

CANARY: Final = "canary"
GRACE_S: Final = 2.0
"""A request that was under way, and a look at the routing that is half a second old, are not a change of arm."""
SHOWN: Final = 10


@dataclass
class ArmLedger:
    """Counts changes that are neither a monotone ramp nor the end of a rollout."""

    changes: int = 0
    examples: list[str] = field(default_factory=list)
    _last: dict[int, tuple[str, str]] = field(default_factory=dict)
    _back: dict[str, list[tuple[float, int, str]]] = field(default_factory=dict)
    """Canary release -> who was moved away from it: when, who, where to; open until it is known why."""

    def answered(self, viewer_id: int, release: str, arm: str, at_s: float) -> None:
        """A viewer was answered by this release under this arm, for a request sent at ``at_s``."""
        before = self._last.get(viewer_id)
        now = (release, arm)
        if before == now:
            return
        self._last[viewer_id] = now
        if before is not None and before[1] == CANARY:
            self._back.setdefault(before[0], []).append((at_s, viewer_id, f"{release[:12]} ({arm})"))

    def looked(self, canaries: frozenset[str], at_s: float) -> None:
        """The service says that these releases, and no others, have traffic as a canary at ``at_s``."""
        for canary in list(self._back):
            if canary not in canaries:
                del self._back[canary]  # it ended: everybody goes back
                continue
            waiting = []
            for moved_s, viewer_id, where in self._back[canary]:
                if at_s - moved_s <= GRACE_S:
                    waiting.append((moved_s, viewer_id, where))
                    continue
                self.changes += 1
                if len(self.examples) < SHOWN:
                    self.examples.append(f"viewer {viewer_id}: from canary {canary[:12]}, which runs on, to {where}")
            self._back[canary] = waiting
