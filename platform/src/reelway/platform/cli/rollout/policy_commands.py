"""``reelway rollout policy``: shows and checks rollout policies.

Outcome metrics are checked against those that the service counts. A rollout with any other metric would hold forever,
because there is never evidence for it.
"""

from __future__ import annotations

import json
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import typer
import yaml
from rich.table import Table

from reelway.platform.cli.terminal import stdout_console
from reelway.platform.errors import ConfigError
from reelway.platform.rollout.metric_names import OUTCOME_METRICS
from reelway.platform.rollout.policy import RolloutPolicy, load_policy, parse_policy, policy_schema

PACKAGE: Final = "reelway.platform.rollout"
POLICY_FILE_SUFFIX: Final = "_policy.yaml"
POLICY = typer.Argument(
    "default", metavar="POLICY", help="Policy file, or name of a built-in policy: default, demo, drill."
)


class PolicyOutput(StrEnum):
    """Output format of a policy."""

    TEXT = "text"
    YAML = "yaml"
    JSON = "json"


def policy_group() -> typer.Typer:
    """Returns the commands ``reelway rollout policy show|check|schema``."""
    group = typer.Typer(no_args_is_help=True)
    group.command("show")(show)
    group.command("check")(check)
    group.command("schema")(schema)
    return group


def show(
    policy: str = POLICY,
    output: PolicyOutput = typer.Option(PolicyOutput.TEXT, "-o", "--output", help="Output format: text, yaml or json."),
) -> None:
    """Show a policy with all defaults filled in.

    Examples:

      reelway rollout policy show

      reelway rollout policy show demo -o yaml > mine.yaml
    """
    found = policy_named(policy)
    if output is PolicyOutput.TEXT:
        _print_policy(found)
        return
    plain = found.model_dump(mode="json")
    typer.echo(json.dumps(plain, indent=2) if output is PolicyOutput.JSON else yaml.safe_dump(plain, sort_keys=False))


def check(policy: str = POLICY) -> None:
    """Check a policy. If it is invalid, print the path of each error and the allowed values and exit with code 2.

    Example: reelway rollout policy check mine.yaml
    """
    found = policy_named(policy)
    stdout_console.print(
        f"{policy}: policy {found.name!r} is valid: {len(found.steps)} steps, {len(found.tests)} tests of "
        f"{len(found.outcomes)} outcome metrics",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def schema() -> None:
    """Print the JSON Schema of a policy file, for editors and charts.

    Example: reelway rollout policy schema > policy.schema.json
    """
    typer.echo(json.dumps(schema_with_metrics(), indent=2))


def schema_with_metrics() -> dict[str, Any]:
    """Returns the policy's JSON Schema, in which outcome names are limited to metrics that the service counts."""
    schema = policy_schema()
    schema["$defs"]["OutcomeMetric"]["properties"]["name"]["enum"] = list(OUTCOME_METRICS)
    return schema


def policy_named(name: str) -> RolloutPolicy:
    """Loads a built-in policy by name, or a policy file.

    Raises:
        ConfigError: if there is no such policy or file, or the policy has an invalid key, value or outcome metric.
    """
    builtin = shipped_policies()
    if name in builtin:
        policy = parse_policy(
            (files(PACKAGE) / f"{name}{POLICY_FILE_SUFFIX}").read_text(), source=f"{name}{POLICY_FILE_SUFFIX}"
        )
    elif Path(name).exists():
        policy = load_policy(Path(name))
    else:
        raise ConfigError(f"policy {name!r} is neither a file nor a built-in policy ({', '.join(builtin)})")
    check_metrics(policy, source=name)
    return policy


def shipped_policies() -> tuple[str, ...]:
    """Returns the names of the built-in policies."""
    names = (item.name for item in files(PACKAGE).iterdir())
    return tuple(sorted(name.removesuffix(POLICY_FILE_SUFFIX) for name in names if name.endswith(POLICY_FILE_SUFFIX)))


def check_metrics(policy: RolloutPolicy, *, source: str) -> None:
    """Checks that the service counts the policy's outcome metrics.

    Raises:
        ConfigError: if it does not count one; names the path of each and the allowed metrics.
    """
    unknown = [(i, one.name) for i, one in enumerate(policy.outcomes) if one.name not in OUTCOME_METRICS]
    if unknown:
        lines = (f"{source}: outcomes[{i}].name: saw {name!r}" for i, name in unknown)
        raise ConfigError("\n".join(lines) + f"; the service counts {', '.join(OUTCOME_METRICS)}")


def _print_policy(policy: RolloutPolicy) -> None:
    steps = Table("step", "weight", "held at least", "viewers", "impressions", title=f"policy {policy.name}: steps")
    for number, step in enumerate(policy.steps, start=1):
        weight, held = f"{step.weight_percent:g} %", f"{step.hold_s:g} s"
        steps.add_row(str(number), weight, held, f"{step.minimum_viewers:,}", f"{step.minimum_impressions:,}")
    stdout_console.print(steps)
    alphas: dict[str, float] = {}
    for (metric, part), alpha in zip(policy.tests, policy.rollback_alphas, strict=True):
        alphas[metric.name] = alphas.get(metric.name, 0.0) + alpha
        del part
    outcomes = Table("outcome", "better", "margin", "on slices", "promotion needs", "alpha", title="outcome metrics")
    for metric in policy.outcomes:
        slices = ", ".join(part.value for part in metric.slices)
        needs = "harm excluded" if metric.promotion_requires == "excluded" else "no established harm"
        outcomes.add_row(
            metric.name, metric.direction, f"{metric.margin:.1%}", slices, needs, f"{alphas[metric.name]:.2g}"
        )
    stdout_console.print(outcomes)
    for line in policy_summary_lines(policy):
        stdout_console.print(line, highlight=False, markup=False, soft_wrap=True)


def policy_summary_lines(policy: RolloutPolicy) -> list[str]:
    """Returns one line per guardrail, deadline and duration, with its path in the policy file."""
    lines = []
    for name in ("error_ratio", "empty_slate_ratio", "p99_ms", "parity_mismatches", "firing_alerts"):
        limit = getattr(policy.guardrails, name)
        limit_text = "off" if limit is None else _pairs(limit.model_dump(exclude_none=True))
        lines.append(f"guardrails.{name}: {limit_text}")
    for name in ("preparing", "insufficient", "telemetry_down"):
        deadline = getattr(policy.deadlines, name)
        lines.append(f"deadlines.{name}: after {deadline.after_s:g} s {deadline.action}")
    lines.append(f"cooldown_s: {policy.cooldown_s:g}   retention_s: {policy.retention_s:g}")
    return lines


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in values.items())
