"""Why: what a direct scrape and Prometheus have in common, so that one function makes evidence of either.

Names, samples and who was asked; refuses to judge. A series is known by its name and its labels; ``job`` and
``instance`` are among them, as Prometheus writes them. Whether somebody was heard is told by ``up``, as there: a sample
of 1 for every scrape that succeeded and 0 for one that did not, at the time that the scrape's other samples carry. An
``up`` that ends in NaN is of a target that is gone: nobody expects it to answer any more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from reelway.platform.rollout import series as names
from reelway.platform.rollout.counters import Sample
from reelway.platform.rollout.state import Phase, RolloutState

UP: Final = "up"
WINDOW_S: Final = 60.0
"""What "the last window" of a guardrail is."""
LONGEST_SHADOW_S: Final = 3600.0
"""Mirrored requests are counted over the shadow phase, at most over this long."""
BUCKET: Final = f"{names.LATENCY}_bucket"
COUNTED_OVER_A_WINDOW: Final = (names.REQUESTS, names.EMPTY_SLATES, BUCKET)
KEPT_SINCE_THE_START: Final = (names.EXPOSURE, names.STATISTIC)


class SeriesKey(NamedTuple):
    """Which series. ``labels`` are sorted pairs."""

    name: str
    labels: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, name: str, labels: Mapping[str, str]) -> SeriesKey:
        return cls(name, tuple(sorted(labels.items())))

    def get(self, label: str) -> str:
        """The label's value; empty where there is none, as in PromQL."""
        return dict(self.labels).get(label, "")


Series = Mapping[SeriesKey, Sequence[Sample]]
"""Samples in ascending order of time."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Which part of all series is about one rollout, and how far back it has to reach."""

    rollout: str
    releases: tuple[str, str]
    started_at: float
    shadow_since: float | None
    window_s: float = WINDOW_S

    @classmethod
    def of(cls, state: RolloutState, window_s: float = WINDOW_S) -> Scope:
        """The scope of a rollout in this state; ``releases`` are label values, canary's first."""
        releases = (state.canary_release[: names.SHORT_RELEASE], state.stable_release[: names.SHORT_RELEASE])
        shadow_since = state.changed_at if state.phase is Phase.SHADOW else None
        return cls(state.id, releases, state.started_at, shadow_since, window_s)


@dataclass(frozen=True, slots=True)
class Heard:
    """What a reader has. ``problem`` says why nothing newer was heard; empty when everybody answered."""

    series: Series = field(default_factory=dict)
    problem: str = ""


class SeriesReader(Protocol):
    """Where series come from."""

    def read(self, scope: Scope, now: float) -> Heard:
        """The samples of the window before ``now``; raises nothing.

        ``EXPOSURE`` of ``viewers`` begins with the highest sample since the rollout started, however old, so that a
        fall is seen long after it happened; of other sums the newest sample is enough. ``SHADOW_REQUESTS`` reach back
        to ``scope.shadow_since``.
        """
        ...

    def close(self) -> None:
        """Let go of the connections."""
        ...


@dataclass(frozen=True, slots=True)
class Instance:
    """One exporter within the window. ``gone``: its pod was taken away; it is not expected to answer."""

    name: str
    first_heard: float
    last_heard: float
    gone: bool


@dataclass(frozen=True, slots=True)
class Job:
    """All exporters of one kind. With a ``problem`` nothing of them can be believed."""

    name: str
    instances: Mapping[str, Instance]
    problem: str = ""

    @property
    def heard_at(self) -> float:
        """The moment that everything heard of it is at least as new as."""
        return min((i.last_heard for i in self.instances.values() if not i.gone), default=-math.inf)


def job_of(name: str, heard: Heard, *, now: float, max_age_s: float, window_s: float = WINDOW_S) -> Job:
    """Who of a job was heard.

    A replica that vanished is not one that fell silent. Vanished: its target is gone (``up`` ends in NaN); what it
    counted in the window counts, and nobody waits for it. Silent: it is still a target and has not answered for
    ``max_age_s``; then the job as a whole is unknown, since what it does not say may be what is wrong.
    """
    instances, problem = dict[str, Instance](), ""
    for key, samples in heard.series.items():
        if key.name != UP or key.get("job") != name:
            continue
        recent = [s for s in samples if s.time >= now - window_s]
        if not recent:
            continue
        times = [s.time for s in recent if s.value == 1.0]
        gone, instance = math.isnan(recent[-1].value), key.get("instance")
        if not gone and (not times or now - times[-1] > max_age_s):
            since = f"for {now - times[-1]:.0f} s" if times else f"in {now - recent[0].time:.0f} s"
            problem = f"{name} at {instance} has not answered {since}, allowed {max_age_s:.0f} s"
        if times:
            instances[instance] = Instance(instance, times[0], times[-1], gone)
    if not problem and not any(not i.gone for i in instances.values()):
        problem = f"no {name} was heard in the last {min(window_s, max_age_s):.0f} s"
    if problem and heard.problem:
        problem += f" ({heard.problem})"
    return Job(name, instances, problem)


def within(heard: Heard, job: Job, *wanted: str, since: float) -> Iterator[tuple[SeriesKey, Instance, list[Sample]]]:
    """The named series of a job's instances, with their samples from ``since`` on."""
    for key, samples in heard.series.items():
        if key.name in wanted and (instance := job.instances.get(key.get("instance"))) is not None:
            yield key, instance, [s for s in samples if s.time >= since]
