"""``reelway rollout policy``: built-in policies are valid; errors name the path and the allowed values."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from tests.support.cli.rollout_fixtures import SWIFT_TEXT, reelway

from reelway.platform.cli.rollout.policy_commands import policy_named, schema_with_metrics, shipped_policies
from reelway.platform.rollout.metric_names import OUTCOME_METRICS
from reelway.platform.rollout.policy import RolloutPolicy


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_builtin_policies_survive_yaml_and_json_round_trips(tmp_path: Path) -> None:
    assert {"default", "drill"} <= set(shipped_policies())
    for name in shipped_policies():
        assert reelway("rollout", "policy", "check", name).code == 0
        text = reelway("rollout", "policy", "show", name, "-o", "yaml").out
        assert policy_named(str(written(tmp_path, text))) == policy_named(name)
        as_json = json.loads(reelway("rollout", "policy", "show", name, "-o", "json").out)
        assert RolloutPolicy.model_validate(as_json) == policy_named(name)
        jsonschema.validate(as_json, schema_with_metrics())


def test_policy_text_shows_steps_margins_and_guardrails() -> None:
    text = reelway("rollout", "policy", "show").out
    for words in ("5 %", "900 s", "harm excluded", "guardrails.p99_ms: maximum 250", "deadlines.telemetry_down"):
        assert words in text


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("margin: 0.05", "margins: 0.05", "outcomes[0].margins: unknown key, expected one of alpha_weight"),
        ("margin: 0.05", "margin: 1.5", "outcomes[0].margin: saw 1.5"),
        ("weight_percent: 50", "weight_percent: 5", "steps[1].weight_percent is 5"),
        ("long_watch_rate", "watch_rate", "outcomes[0].name: saw 'watch_rate'; the service counts long_watch_rate, "),
    ],
)
def test_policy_check_reports_the_path_of_each_error(tmp_path: Path, before: str, after: str, message: str) -> None:
    path = written(tmp_path, SWIFT_TEXT.replace(before, after))
    ended = reelway("rollout", "policy", "check", path)
    assert ended.code == 2
    assert f"{path}: {message}" in ended.err


def test_unknown_policy_is_rejected_with_the_builtin_names() -> None:
    ended = reelway("rollout", "policy", "check", "nonsense")
    assert (ended.code, "default" in ended.err) == (2, True)


def test_policy_schema_allows_only_counted_metrics() -> None:
    schema = json.loads(reelway("rollout", "policy", "schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    policy = yaml.safe_load(SWIFT_TEXT)
    jsonschema.validate(policy, schema)
    policy["outcomes"][0]["name"] = "watch_rate"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(policy, schema)
    assert schema["$defs"]["OutcomeMetric"]["properties"]["name"]["enum"] == list(OUTCOME_METRICS)
