"""Rollout policies: error messages of invalid files, and the division of alpha."""

from __future__ import annotations

import jsonschema
import pytest
import yaml

from reelway.platform.errors import ConfigError
from reelway.platform.rollout.policy import (
    RolloutPolicy,
    Slice,
    default_policy,
    load_policy,
    parse_policy,
    policy_schema,
)

SMALL = "steps: [{weight_percent: 1}]\noutcomes: [{name: long_watch_rate, margin: 0.02}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "steps: [{weigth_percent: 1}]",
            "steps[0].weigth_percent: unknown key, expected one of hold_s, minimum_impressions",
        ),
        (
            SMALL + "guardrails: {error_ratio: {maxim: 1}}",
            "error_ratio.maxim: unknown key, expected one of maximum",
        ),
        (SMALL + "stepz: 1", "stepz: unknown key, expected one of alpha, cooldown_s"),
        (SMALL.replace("1}", "130}"), "steps[0].weight_percent: saw 130, expected less than or equal to 100"),
        (SMALL.replace("0.02}", "0.02, direction: up}"), "direction: saw 'up', expected 'higher' or 'lower'"),
        (SMALL.replace("0.02}", "0.02, slices: [all]}"), "outcomes[0].slices[0]: saw 'all', expected 'overall'"),
        (SMALL + "deadlines: {insufficient: {after_s: 1, action: promote}}", "saw 'promote', expected 'hold', 'pause'"),
        (SMALL.replace("1}", "1.005}"), "expected a multiple of 0.01"),
        (
            SMALL.replace("1}", "5}, {weight_percent: 5}"),
            "steps[1].weight_percent is 5, expected more than the previous",
        ),
        (SMALL.replace("1}", "60}") + "holdout_percent: 40", "leaves no traffic for stable"),
        (SMALL.replace("0.02}", "0.02, tuned_for: 0.02}"), "not beyond the margin"),
        (SMALL.replace("0.02}", "0.02, slices: [new_videos]}"), "expected overall"),
        (
            SMALL.replace("0.02}", "0.02}, {name: long_watch_rate, margin: 0.1}"),
            "duplicate outcomes: ['long_watch_rate']",
        ),
        (SMALL + "guardrails: {p99_ms: {minimum_requests: 5}}", "expected at least one"),
        (SMALL + "cooldown_s: .nan", "cooldown_s: saw nan, expected"),
        ("[1, 2]", "saw list, expected a mapping with the keys alpha"),
        ("a: [", "not YAML"),
    ],
)
def test_invalid_policy_is_rejected_with_path_and_allowed_values(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_policy(text, source="mine.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("mine.yaml: ")


def test_invalid_item_is_reported_only_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse_policy(SMALL.replace("1}", "130}"), source="mine.yaml")
    assert str(error.value).count("\n") == 0


def test_missing_policy_file_is_a_config_error(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="cannot read the rollout policy"):
        load_policy(tmp_path / "none.yaml")


def test_percent_weights_become_whole_basis_points() -> None:
    policy = parse_policy(SMALL.replace("1}", "0.29}, {weight_percent: 57.57}"), source="p")
    assert [step.weight_bp for step in policy.steps] == [29, 5757]


def test_alpha_is_divided_completely_over_the_tests() -> None:
    policy = default_policy()
    assert sum(policy.rollback_alphas) == pytest.approx(policy.alpha.rollback)
    assert len(policy.rollback_alphas) == sum(len(metric.slices) for metric in policy.outcomes)
    by_test = dict(zip([(m.name, s) for m, s in policy.tests], policy.rollback_alphas, strict=True))
    heavy, light = by_test["long_watch_rate", Slice.OVERALL], by_test["long_watch_rate", Slice.NEW_VIDEOS]
    assert heavy == pytest.approx(3 * light)


def test_default_policy_without_a_replay_requires_no_parity() -> None:
    with_replay, without = default_policy(), default_policy(parity=False)
    assert with_replay.guardrails.parity_mismatches is not None
    assert without.guardrails.parity_mismatches is None
    assert without.guardrails.p99_ms == with_replay.guardrails.p99_ms


def test_default_policy_survives_a_round_trip() -> None:
    policy = default_policy()
    body = policy.model_dump(mode="json")
    assert parse_policy(yaml.safe_dump(body), source="again") == policy
    jsonschema.validate(body, policy_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**body, "stepz": 1}, policy_schema())


def test_deadline_action_cannot_be_a_promotion() -> None:
    schema = policy_schema()["$defs"]["Deadline"]["properties"]["action"]
    assert schema["enum"] == ["hold", "pause", "rollback"]
    assert RolloutPolicy.model_config["extra"] == "forbid"
