"""Attacks on the evidence of a simulated rollout: who the attacker is, and what the attacker's viewers do.

The attacker knows which arm serves each viewer, because the response names it. Viewers on the other arm do nothing
unusual. An honest viewer has one or two sessions, about one request each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tests.support.rollout.canary_population import Population
from tests.support.rollout.canary_simulation import Attackers

SHARES: Final = (0.01, 0.05, 0.10)
SLATE: Final = 20
"""Impressions of one request of the attacker."""
FLOOD: Final = 1_000
"""Impressions of an account that asks as often as it can."""
REQUESTS_PER_VIEWER: Final = 1.5
"""Sessions of an honest viewer."""


@dataclass(frozen=True)
class Mode:
    """What the attacker owns.

    ``authenticated``: accounts, and no other viewer is evidence. Otherwise each request is a viewer of its own.
    ``picks_arm``: the attacker tries ids until they are on the arm under attack.
    """

    label: str
    owns: str
    authenticated: bool
    picks_arm: bool


MODES: Final = (
    Mode("authentication on", "the accounts", authenticated=True, picks_arm=False),
    Mode("authentication off, ids of both arms", "the requests, authentication off, on both arms", False, False),
    Mode("authentication off, ids of one arm", "the requests, authentication off, all on one arm", False, True),
)


@dataclass(frozen=True)
class AttackKind:
    """What the attacker's viewers do on one arm. ``hides_harm``: the canary is worse, and the attack is to hide it."""

    label: str
    population: Population
    flood: Population
    canary: bool
    hides_harm: bool

    def attackers(
        self, mode: Mode, share: float, honest_per_minute: float, stable: Population, canary: Population
    ) -> tuple[Attackers, ...]:
        """Returns the attacker's viewers on both arms.

        Args:
            honest_per_minute: arriving honest viewers over both arms.
        """
        per_minute = honest_per_minute * share / (1 - share)
        if mode.authenticated:
            return (
                Attackers(self.flood, self.canary, per_minute),
                Attackers(stable if self.canary else canary, not self.canary, per_minute),
            )
        per_minute *= REQUESTS_PER_VIEWER
        attack = Attackers(self.population, self.canary, per_minute, picks_arm=mode.picks_arm)
        if mode.picks_arm:
            return (attack,)
        return attack, Attackers(stable if self.canary else canary, not self.canary, per_minute)


def attack_kinds() -> tuple[AttackKind, ...]:
    """Returns forged watches, empty exposures and floods, each to cause a rollback and to hide harm."""
    full, flood = (Population.forged(size, long_watch=1.0, skip=0.0) for size in (SLATE, FLOOD))
    none, nothing = (Population.forged(size, long_watch=0.0, skip=1.0) for size in (SLATE, FLOOD))
    silent, silent_flood = (Population.forged(size, long_watch=0.0, skip=0.0, reports=False) for size in (SLATE, FLOOD))
    return (
        AttackKind("watches forged on stable", full, full, canary=False, hides_harm=False),
        AttackKind("watches of nothing forged on the canary", none, none, canary=True, hides_harm=False),
        AttackKind("flood of watches of nothing on the canary", none, nothing, canary=True, hides_harm=False),
        AttackKind("empty exposures on the canary", silent, silent, canary=True, hides_harm=False),
        AttackKind("flood of forged watches on stable", full, flood, canary=False, hides_harm=False),
        AttackKind("flood of empty exposures on the canary", silent, silent_flood, canary=True, hides_harm=False),
        AttackKind("watches forged on the canary", full, full, canary=True, hides_harm=True),
        AttackKind("empty exposures on the canary, which is worse", silent, silent, canary=True, hides_harm=True),
        AttackKind("empty exposures on stable", silent, silent, canary=False, hides_harm=True),
        AttackKind("flood of forged watches on the canary", full, flood, canary=True, hides_harm=True),
    )
