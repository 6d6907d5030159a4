"""Rollout policies: the steps, guardrails, outcome metrics and deadlines of a rollout, read from a YAML file.

Unknown keys and invalid values are reported with their path and the allowed values. Weights are percent in the file and
basis points everywhere else.

**Division of alpha.** ``alpha.rollback`` bounds the probability that a release without harm beyond its margins is ever
rolled back by an outcome metric. It is divided over all (metric, slice) tests in proportion to ``alpha_weight``
(Bonferroni). ``alpha.promotion`` bounds the probability that a release with harm beyond a margin is promoted. Promotion
requires that *every* required metric excludes such harm, an intersection-union test (Berger 1982), so each metric is
tested at the full ``alpha.promotion``. Harm and its exclusion are two one-sided tests with separate budgets. The tests
are valid at any time and never restart, so reconciles and steps spend no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reelway.platform.errors import ConfigError
from reelway.platform.rollout.sequential import BASIS_POINTS
from reelway.platform.validation_errors import explain_problem, known_keys

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
DeadlineAction = Literal["hold", "pause", "rollback"]


class Slice(StrEnum):
    """Part of the traffic that a metric is computed on. Recommenders usually degrade first on the cold slices."""

    OVERALL = "overall"
    NEW_VIEWERS = "new_viewers"
    NEW_VIDEOS = "new_videos"
    SMALL_CREATORS = "small_creators"


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _basis_points(percent: float, path: str) -> int:
    points = round(percent * 100)
    if abs(points - percent * 100) > 1e-6:
        raise ValueError(f"{path} is {percent:g}, expected a multiple of 0.01 (weights are whole basis points)")
    return points


class Step(StrictModel):
    """A weight of the ramp and the exposure that it requires. Exposure is the canary's since the rollout started."""

    weight_percent: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
    hold_s: Seconds = Field(default=600, description="seconds of observed traffic at this weight before the next step")
    minimum_viewers: Annotated[int, Field(ge=0)] = 200
    minimum_impressions: Annotated[int, Field(ge=0)] = 2_000

    @model_validator(mode="after")
    def _whole_points(self) -> Step:
        _basis_points(self.weight_percent, "weight_percent")
        return self

    @property
    def weight_bp(self) -> int:
        return _basis_points(self.weight_percent, "weight_percent")


class RatioLimit(StrictModel):
    """Maximum share of requests. The test is exact, so that a handful of requests can establish a breach."""

    maximum: Ratio
    minimum_requests: Annotated[int, Field(ge=1)] = 20


class LatencyLimit(StrictModel):
    """Limit of the canary's 99th percentile: in milliseconds, as a multiple of stable's, or the stricter of both."""

    maximum: Annotated[float | None, Field(gt=0)] = None
    maximum_ratio_to_stable: Annotated[float | None, Field(gt=1)] = None
    minimum_requests: Annotated[int, Field(ge=1)] = 200

    @model_validator(mode="after")
    def _one_of_them(self) -> LatencyLimit:
        if self.maximum is None and self.maximum_ratio_to_stable is None:
            raise ValueError("neither maximum nor maximum_ratio_to_stable is set, expected at least one")
        return self


class CountLimit(StrictModel):
    """Maximum of a count."""

    maximum: Annotated[int, Field(ge=0)] = 0


class Guardrails(StrictModel):
    """Limits whose breach rolls back immediately. Null disables a guardrail."""

    significance: Ratio = Field(
        default=1e-6,
        description="a ratio is a breach if the observed number of events is less probable than this at the limit; "
        "with a reading every 30 s for a day and a true ratio at the limit, 1e-6 adds 0.3 % to the false rollback rate",
    )
    error_ratio: RatioLimit | None = RatioLimit(maximum=0.02)
    empty_slate_ratio: RatioLimit | None = RatioLimit(maximum=0.01)
    p99_ms: LatencyLimit | None = LatencyLimit(maximum=250.0)
    parity_mismatches: CountLimit | None = CountLimit()
    firing_alerts: CountLimit | None = CountLimit()


class OutcomeMetric(StrictModel):
    """A metric of viewer outcomes, and the harm to it that is accepted."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    kind: Literal["ratio", "mean"] = Field(default="ratio", description="per impression, or per viewer")
    direction: Literal["higher", "lower"] = Field(default="higher", description="direction that is better for viewers")
    role: Literal["outcome", "safeguard"] = "outcome"
    margin: Ratio = Field(description="largest accepted harm, relative to stable")
    tuned_for: Ratio | None = Field(
        default=None, description="relative harm that is detected with the fewest viewers; defaults to 2 x margin"
    )
    promotion_requires: Literal["excluded", "not_established"] = Field(
        default="excluded",
        description="whether promotion requires that overall harm beyond the margin is excluded, or not established",
    )
    slices: tuple[Slice, ...] = (Slice.OVERALL,)
    slice_margin: Ratio | None = Field(default=None, description="margin on the other slices; defaults to margin")
    alpha_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    slice_alpha_weight: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    minimum_viewers: Annotated[int, Field(ge=50)] = Field(
        default=200, description="viewers in each arm before the metric is assessed: burn-in of the asymptotic test"
    )

    @model_validator(mode="after")
    def _consistent(self) -> OutcomeMetric:
        if len(set(self.slices)) != len(self.slices) or Slice.OVERALL not in self.slices:
            raise ValueError(f"slices {[s.value for s in self.slices]}, expected overall and no duplicates")
        for margin in {self.margin, self.slice_margin or self.margin}:
            if self.tuned_for is not None and self.tuned_for <= margin:
                raise ValueError(f"tuned_for {self.tuned_for:g} is not beyond the margin {margin:g}; raise tuned_for")
        return self

    def margin_on(self, part: Slice) -> float:
        """Returns the margin on a slice."""
        return self.margin if part is Slice.OVERALL or self.slice_margin is None else self.slice_margin

    def effect_beyond_margin(self, part: Slice) -> float:
        """Returns the harm beyond the margin that the rollback test is tuned for."""
        margin = self.margin_on(part)
        return margin if self.tuned_for is None else self.tuned_for - margin

    def alpha_weight_on(self, part: Slice) -> float:
        """Returns the weight of a slice in the division of ``alpha.rollback``."""
        return self.alpha_weight if part is Slice.OVERALL else (self.slice_alpha_weight or self.alpha_weight)


class Alpha(StrictModel):
    """Error rates per rollout; see the module's docstring."""

    rollback: Ratio = 0.005
    promotion: Ratio = 0.005


class Suspicion(StrictModel):
    """When a difference of the arms' audiences holds the rollout, because viewers may be forged."""

    alpha: Ratio = Field(default=0.005, description="probability of a suspicion in a rollout without forged viewers")
    margin: Ratio = Field(
        default=0.02,
        description="largest accepted difference: relative, of the numbers of new viewers, and absolute, of the "
        "shares of silent, saturated and idle viewers",
    )


class Deadline(StrictModel):
    """How long a rollout holds without evidence, and the action after that."""

    after_s: Seconds
    action: DeadlineAction = "pause"


class Deadlines(StrictModel):
    """Deadlines of holds. ``hold`` never ends, ``pause`` waits for a command, ``rollback`` gives up."""

    preparing: Deadline = Deadline(after_s=900, action="rollback")
    insufficient: Deadline = Deadline(after_s=24 * 3600, action="pause")
    telemetry_down: Deadline = Deadline(after_s=1800, action="pause")


class Shadow(StrictModel):
    """Mirroring of requests to the release before it takes traffic; the responses are discarded."""

    duration_s: Seconds = 600
    mirror_percent: Percent = 5
    minimum_requests: Annotated[int, Field(ge=0)] = 500

    @model_validator(mode="after")
    def _whole_points(self) -> Shadow:
        _basis_points(self.mirror_percent, "mirror_percent")
        return self


class RolloutPolicy(StrictModel):
    """A rollout policy. ``load_policy`` reads a policy from YAML; ``default_policy`` returns the built-in one."""

    version: Literal[1] = 1
    name: Annotated[str, Field(min_length=1, max_length=64)] = "default"
    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=20)]
    holdout_percent: Percent = Field(default=0, description="viewers that always get the popularity ranking")
    shadow: Shadow | None = None
    guardrails: Guardrails = Guardrails()
    outcomes: Annotated[tuple[OutcomeMetric, ...], Field(min_length=1)]
    alpha: Alpha = Alpha()
    suspicion: Suspicion | None = Field(default=Suspicion(), description="null disables the comparison of audiences")
    deadlines: Deadlines = Deadlines()
    cooldown_s: Seconds = Field(default=3600, description="delay after a rollback before the next rollout")
    retention_s: Seconds = Field(default=24 * 3600, description="how long the previous release stays warm")
    evidence_max_age_s: Seconds = Field(default=120, description="older evidence counts as telemetry_down")
    longest_tick_s: Annotated[float, Field(gt=0)] = Field(
        default=120, description="maximum that one decision adds to a timer, so that a clock jump ends no hold"
    )

    @model_validator(mode="after")
    def _consistent(self) -> RolloutPolicy:
        holdout_bp = _basis_points(self.holdout_percent, "holdout_percent")
        previous = 0
        for i, step in enumerate(self.steps):
            if step.weight_bp <= previous:
                raise ValueError(
                    f"steps[{i}].weight_percent is {step.weight_percent:g}, expected more than the previous step"
                )
            if step.weight_bp + holdout_bp >= BASIS_POINTS:
                raise ValueError(
                    f"steps[{i}].weight_percent {step.weight_percent:g} + holdout_percent {self.holdout_percent:g} "
                    "leaves no traffic for stable, expected a sum below 100"
                )
            previous = step.weight_bp
        names = [metric.name for metric in self.outcomes]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"duplicate outcomes: {duplicates}")
        return self

    @property
    def holdout_bp(self) -> int:
        return _basis_points(self.holdout_percent, "holdout_percent")

    @cached_property
    def tests(self) -> tuple[tuple[OutcomeMetric, Slice], ...]:
        """All assessed pairs of metric and slice, in the policy's order."""
        return tuple((metric, part) for metric in self.outcomes for part in metric.slices)

    @cached_property
    def rollback_alphas(self) -> tuple[float, ...]:
        """``alpha.rollback`` divided over ``tests``."""
        weights = [metric.alpha_weight_on(part) for metric, part in self.tests]
        return tuple(self.alpha.rollback * weight / sum(weights) for weight in weights)


def load_policy(path: Path) -> RolloutPolicy:
    """Reads and validates a policy file.

    Raises:
        ConfigError: if the file cannot be read or is invalid; the message has the path of each invalid key or value.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the rollout policy: {error.strerror}") from error
    return parse_policy(text, source=str(path))


def default_policy(*, parity: bool = True) -> RolloutPolicy:
    """Returns the built-in default policy.

    Args:
        parity: whether served features are replayed; without a replay the policy does not require its findings.
    """
    text = (files("reelway.platform.rollout") / "default_policy.yaml").read_text()
    policy = parse_policy(text, source="default_policy.yaml")
    if parity:
        return policy
    return policy.model_copy(update={"guardrails": policy.guardrails.model_copy(update={"parity_mismatches": None})})


def parse_policy(text: str, *, source: str) -> RolloutPolicy:
    """Parses and validates the text of a policy file.

    Args:
        source: name of the file in error messages.

    Raises:
        ConfigError: if the text is invalid, as in ``load_policy``.
    """
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ConfigError(
            f"{source}: saw {type(loaded).__name__}, expected a mapping with the keys {known_keys(RolloutPolicy)}"
        )
    try:
        return RolloutPolicy.model_validate(loaded)
    except ValidationError as error:
        problems = [p for p in error.errors() if not _is_follow_up_error(p, error.errors())]
        raise ConfigError("\n".join(explain_problem(RolloutPolicy, p, source) for p in problems)) from error


def policy_schema() -> dict[str, Any]:
    """Returns the JSON Schema of policy files, for editors and the chart."""
    return RolloutPolicy.model_json_schema()


def _is_follow_up_error(problem: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether a list is too short only because its items are invalid."""
    location = problem["loc"]
    return problem["type"] == "too_short" and any(o["loc"][: len(location)] == location != o["loc"] for o in others)
