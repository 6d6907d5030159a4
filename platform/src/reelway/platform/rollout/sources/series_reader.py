"""Scraped series as a direct scrape and Prometheus both return them, so that one function turns either into evidence.

A series has a name and labels; ``job`` and ``instance`` are labels, as in Prometheus. ``up`` states whether an exporter
answered: 1 for a successful scrape and 0 for a failed one, at the time of the scrape's other samples. An ``up`` that
ends in NaN belongs to a removed target, which is not expected to answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from reelway.platform.contracts.ids import short_id
from reelway.platform.rollout import metric_names as names
from reelway.platform.rollout.counters import Sample
from reelway.platform.rollout.state import Phase, RolloutState

UP: Final = "up"
WINDOW_S: Final = 60.0
"""Length of a guardrail's window in seconds."""
MAX_SHADOW_S: Final = 3600.0
"""Mirrored requests are counted over the shadow phase, at most over this many seconds."""
BUCKET: Final = f"{names.LATENCY}_bucket"
WINDOWED_SERIES: Final = (names.REQUESTS, names.EMPTY_SLATES, BUCKET)
CUMULATIVE_SERIES: Final = (names.EXPOSURE, names.STATISTIC, names.AUDIENCE, names.AUDIENCE_WEIGHT)
_IDENTITY: Final = frozenset(
    {"job", "instance", "release", "arm", "outcome", "le", "rollout", "slice", "statistic", "metric", "kind"}
)
"""Labels of the exporters and the two labels that name an exporter. Prometheus adds all others."""


class SeriesKey(NamedTuple):
    """Name and labels of a series; ``labels`` are sorted pairs."""

    name: str
    labels: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, name: str, labels: Mapping[str, str]) -> SeriesKey:
        return cls(name, tuple(sorted(labels.items())))

    def get(self, label: str) -> str:
        """Returns the label's value; empty if absent, as in PromQL."""
        return dict(self.labels).get(label, "")


Series = Mapping[SeriesKey, Sequence[Sample]]
"""Samples in ascending order of time."""


@dataclass(frozen=True, slots=True)
class Scope:
    """The series of one rollout, and how far back to read them."""

    rollout: str
    releases: tuple[str, str]
    started_at: float
    shadow_since: float | None
    window_s: float = WINDOW_S

    @classmethod
    def of(cls, state: RolloutState, window_s: float = WINDOW_S) -> Scope:
        """Returns the scope of a rollout in this state. ``releases`` are label values, the canary's first."""
        releases = (short_id(state.canary_release), short_id(state.stable_release))
        shadow_since = state.changed_at if state.phase is Phase.SHADOW else None
        return cls(state.id, releases, state.started_at, shadow_since, window_s)


@dataclass(frozen=True, slots=True)
class SeriesReadResult:
    """A reader's samples. ``problem`` is the reason why newer ones are missing; empty if every exporter answered."""

    series: Series = field(default_factory=dict)
    problem: str = ""


class SeriesReader(Protocol):
    """Reads series from one kind of source."""

    def read(self, scope: Scope, now: float) -> SeriesReadResult:
        """Returns the samples of the window before ``now``; raises nothing.

        ``AUDIENCE`` of ``viewers`` starts with the highest sample since the rollout began, however old, so that a
        decrease is noticed long after it happened. For other sums the newest sample is enough. ``SHADOW_REQUESTS``
        start at ``scope.shadow_since``.
        """
        ...

    def close(self) -> None:
        """Closes the connections."""
        ...


@dataclass(frozen=True, slots=True)
class ScrapeTarget:
    """One exporter in the window. ``removed``: its pod was deleted, and no answer is expected."""

    name: str
    first_sample_at: float
    last_sample_at: float
    removed: bool

    def joined_with(self, other: ScrapeTarget | None) -> ScrapeTarget:
        """Returns this target and ``other`` of the same name as one: a pod that was replaced, or new labels."""
        if other is None:
            return self
        newer = max(self, other, key=lambda target: target.last_sample_at)
        first_sample_at = min(self.first_sample_at, other.first_sample_at)
        return ScrapeTarget(self.name, first_sample_at, newer.last_sample_at, newer.removed)


@dataclass(frozen=True, slots=True)
class ScrapeJob:
    """All exporters of one kind. If ``problem`` is set, none of their samples can be trusted."""

    name: str
    instances: Mapping[str, ScrapeTarget]
    problem: str = ""

    @property
    def newest_sample_at(self) -> float:
        """Time of the oldest last sample among the exporters that still run."""
        return min((i.last_sample_at for i in self.instances.values() if not i.removed), default=-math.inf)


def scrape_job(
    name: str, read_result: SeriesReadResult, *, now: float, max_age_s: float, window_s: float = WINDOW_S
) -> ScrapeJob:
    """Returns the exporters of a job that answered in the window.

    A removed replica differs from a silent one. Removed: it is no longer a target (``up`` ends in NaN). Its counts in
    the window are used, and no answer is awaited. Silent: it is a target and has not answered for ``max_age_s``
    seconds. Then the whole job is unknown, because the fault may be in the missing samples.
    """
    instances, problem = dict[str, ScrapeTarget](), ""
    for key, samples in read_result.series.items():
        if key.name != UP or key.get("job") != name:
            continue
        recent = [s for s in samples if s.time >= now - window_s]
        if not recent:
            continue
        times = [s.time for s in recent if s.value == 1.0]
        removed, instance = math.isnan(recent[-1].value), key.get("instance")
        if not removed and (not times or now - times[-1] > max_age_s):
            since = f"for {now - times[-1]:.0f} s" if times else f"in {now - recent[0].time:.0f} s"
            problem = f"{name} at {instance} has not answered {since}, allowed {max_age_s:.0f} s"
        if times:
            target = ScrapeTarget(instance, times[0], times[-1], removed)
            instances[instance] = target.joined_with(instances.get(instance))
    problem = duplicate_series(name, read_result, since=now - window_s) or problem
    if not problem and not any(not i.removed for i in instances.values()):
        problem = f"no {name} answered in the last {min(window_s, max_age_s):.0f} s"
    if problem and read_result.problem:
        problem += f" ({read_result.problem})"
    return ScrapeJob(name, instances, problem)


def duplicate_series(job: str, read_result: SeriesReadResult, *, since: float) -> str:
    """Returns which exporter of a job Prometheus has twice at the same time, so that sums would count it twice.

    Two replicas of Prometheus without deduplication, or two scrape configurations, give an exporter two sets of
    labels. A pod whose exporter has two addresses is noticed by its labels ``namespace`` and ``pod``. An exporter whose
    labels changed, and an address that another pod took over, have one series after the other.
    """
    spans: dict[tuple[str, ...], list[tuple[float, float, SeriesKey]]] = {}
    for key, samples in read_result.series.items():
        times = [s.time for s in samples if s.time > since and not math.isnan(s.value)]
        if not times or key.get("job") != job:
            continue
        labels = dict(key.labels)
        identities = [(key.name, *(f"{k}={v}" for k, v in key.labels if k in _IDENTITY))]
        if key.name == UP and labels.get("pod"):
            identities.append(("pod", labels.get("namespace", ""), labels["pod"]))
        for identity in identities:
            for first, last, other in spans.setdefault(identity, []):
                if first <= times[-1] and times[0] <= last:
                    return _duplicate(job, key, other)
            spans[identity].append((times[0], times[-1], key))
    return ""


def _duplicate(job: str, one: SeriesKey, other: SeriesKey) -> str:
    differing = sorted({label for label, _ in set(one.labels) ^ set(other.labels)})
    values = ", ".join(f"{label} {other.get(label)!r} and {one.get(label)!r}" for label in differing)
    return (
        f"{job} at {one.get('instance')} is in Prometheus twice ({values}); scrape it once, deduplicate the replicas "
        "of Prometheus, or select one replica with the setting prometheus.labels"
    )


def samples_since(
    read_result: SeriesReadResult, job: ScrapeJob, *names: str, since: float
) -> Iterator[tuple[SeriesKey, ScrapeTarget, list[Sample]]]:
    """Returns the named series of a job's exporters, with their samples from ``since`` on."""
    for key, samples in read_result.series.items():
        if (
            key.name in names
            and key.get("job") == job.name
            and (instance := job.instances.get(key.get("instance"))) is not None
        ):
            yield key, instance, [s for s in samples if s.time >= since]
