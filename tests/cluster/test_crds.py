"""The CRDs: generated from the types, validated by a real API server, and round-tripped by it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.cluster.fake_serve import GOOD, STABLE
from tests.support.cluster.kubectl import ROOT, Kubectl
from tests.support.cluster.rollout_manifests import QUICK, rollout

from reelway.platform.cluster import crds, resources
from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.resources import RolloutResource
from reelway.platform.rollout.policy import default_policy
from reelway.platform.rollout.state import MAX_REMEMBERED_COMMANDS, Command, Phase, RolloutState

on_a_cluster = pytest.mark.cluster


def test_chart_crds_equal_the_generated_ones() -> None:
    lie = {path.name: path.read_text() for path in (ROOT / "charts/reelway/crds").iterdir()}
    assert lie == crds.crd_files(), "run `python -m reelway.platform.cluster.crds charts/reelway/crds`"


def test_schema_has_every_field_of_a_policy() -> None:
    def names(schema: dict[str, Any]) -> set[str]:
        fields = set(schema.get("properties", {}))
        for field in schema.get("properties", {}).values():
            fields |= names(field) | names(field.get("items", {}))
        return fields

    policy_schema = crds.schema_of(resources.ReleaseRolloutSpec)["properties"]["policy"]

    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {key for inner in value.values() for key in keys(inner)}
        return {key for inner in value for key in keys(inner)} if isinstance(value, list) else set()

    assert keys(default_policy().model_dump(mode="json")) <= names(policy_schema)


def test_union_has_no_structural_schema() -> None:
    class Either(resources._Model):
        value: int | str

    with pytest.raises(ValueError, match="no structural schema"):
        crds.schema_of(Either)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("a short release", {"release": "abc"}, "spec.release"),
    ("a policy and a reference", {"policyRef": {"name": "p"}}, "saw policy and policyRef"),
    ("no backend", {"backend": {}}, "exactly one of rayService and serve"),
    (
        "two backends",
        {"backend": {"rayService": {"name": "a"}, "serve": {"api": "http://a", "url": "http://b"}}},
        "exactly one of rayService and serve",
    ),
    ("an address that is none", {"backend": {"serve": {"api": "a", "url": "http://b"}}}, "spec.backend.serve.api"),
    ("a release over itself", {"stableRelease": GOOD}, "stableRelease equals release"),
    (
        "steps that fall",
        {"policy": {**QUICK, "steps": [{"weight_percent": 20}, {"weight_percent": 10}]}},
        "expected increasing weights",
    ),
    (
        "the same step twice",
        {"policy": {**QUICK, "steps": [{"weight_percent": 20}, {"weight_percent": 20}]}},
        "expected increasing weights",
    ),
    (
        "no room for stable",
        {"policy": {**QUICK, "holdout_percent": 50}},
        "leaves no traffic for stable",
    ),
    ("an outcome twice", {"policy": {**QUICK, "outcomes": QUICK["outcomes"] * 2}}, "duplicate entries"),
    ("no step", {"policy": {**QUICK, "steps": []}}, "spec.policy.steps"),
    ("a ratio of one", {"policy": {**QUICK, "alpha": {"rollback": 1}}}, "spec.policy.alpha.rollback"),
    ("an unknown field", {"polcy": {}}, 'field not declared in schema'),
    ("an unknown guardrail", {"policy": {**QUICK, "guardrails": {"errors": None}}}, "field not declared in schema"),
    ("an unknown verb", {"commands": [{"id": "1", "verb": "stop"}]}, "spec.commands[0].verb"),
    ("a command without an id", {"commands": [{"verb": "pause"}]}, "spec.commands"),
    ("too many commands", {"commands": [{"id": str(i), "verb": "pause"} for i in range(17)]}, "at most 16 items"),
]  # fmt: skip


@on_a_cluster
def test_invalid_rollout_is_rejected_with_the_path(kubectl: Kubectl) -> None:
    for what, spec, words in WRONG:
        assert words in kubectl.apply(rollout(**spec), code=1), what
    kubectl.apply(rollout())  # the valid rollout is accepted


@on_a_cluster
def test_spec_is_immutable_except_for_new_commands(kubectl: Kubectl) -> None:
    kubectl.apply(rollout(commands=[{"id": "1", "verb": "pause"}]))
    given_one = [{"id": "1", "verb": "pause"}]
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"release": STABLE}, "release is immutable"),
        ({"backend": {"rayService": {"name": "other"}}}, "backend is immutable"),
        ({"policy": {**QUICK, "name": "other"}}, "policy is immutable"),
        ({"force": True}, "force is immutable"),
        ({"stableRelease": STABLE}, "stableRelease is immutable"),
        ({"commands": [{"id": "1", "verb": "promote"}]}, "a command is immutable"),
    )
    for change, words in changes:
        assert words in kubectl.apply(rollout(**{"commands": given_one, **change}), code=1)
    kubectl.apply(rollout(commands=[*given_one, {"id": "2", "verb": "resume"}]))
    assert [one["id"] for one in kubectl.read("one")["spec"]["commands"]] == ["1", "2"]


@on_a_cluster
def test_release_resource_is_named_by_its_id(kubectl: Kubectl) -> None:
    release = {
        "apiVersion": "reelway.dev/v1alpha1", "kind": "Release", "metadata": {"name": GOOD[:12]},
        "spec": {"id": GOOD, "store": "s3://releases"},
    }  # fmt: skip
    named = {**release, "metadata": {"name": "mine"}}
    assert "the first 12 characters of spec.id" in kubectl.apply(named, code=1)
    kubectl.apply(release)
    moved = {**release, "spec": {"id": GOOD, "store": "s3://elsewhere"}}
    assert "spec is immutable" in kubectl.apply(moved, code=1)
    assert GOOD[:12] in kubectl.run("get", "releases")


_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
_seconds = st.floats(min_value=0, max_value=1e12, allow_nan=False)
_states = st.builds(
    RolloutState,
    id=_text,
    salt=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
    stable_release=st.just(STABLE),
    canary_release=st.just(GOOD),
    phase=st.sampled_from(Phase),
    step=st.integers(-1, 20),
    canary_bp=st.integers(0, 5_000),
    holdout_bp=st.integers(0, 5_000),
    shadow_bp=st.integers(0, 10_000),
    started_at=_seconds,
    changed_at=_seconds,
    tick_at=_seconds,
    evidence_at=_seconds,
    phase_s=_seconds,
    held_insufficient_s=_seconds,
    held_telemetry_s=_seconds,
    command=st.none()
    | st.builds(Command, id=_text, verb=st.sampled_from(["pause", "rollback"]), actor=_text, note=_text),
    commands_seen=st.lists(_text, max_size=MAX_REMEMBERED_COMMANDS).map(tuple),
    retired=st.booleans(),
    forced=st.booleans(),
    reason=_text,
)


@on_a_cluster
@given(states=st.lists(_states, min_size=1, max_size=3))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_state_survives_the_api_server(api: KubeApi, kubectl: Kubectl, states: list[RolloutState]) -> None:
    for own in states:
        document = api.get("reelway.dev/v1alpha1/releaserollouts/one")
        if document is None:
            kubectl.apply(rollout())
            document = api.get("reelway.dev/v1alpha1/releaserollouts/one")
        assert document is not None
        status = RolloutResource.from_document(document).status.model_copy(
            update={"state": own, "policy": default_policy()}
        )
        document["status"] = {
            **status.document(), "state": own.model_dump(mode="json"),
            "policy": default_policy().model_dump(mode="json"),
        }  # fmt: skip
        read = RolloutResource.from_document(api.replace("reelway.dev/v1alpha1/releaserollouts/one/status", document))
        assert read.status.state == own
        assert read.status.policy == default_policy()


def test_invalid_policy_is_explained_by_its_path() -> None:
    wrong = {**QUICK, "outcomes": [{"name": "long_watch_rate", "margin": 0.1, "tuned_for": 0.05}]}
    document = rollout(policy=wrong)
    document["metadata"] |= {
        "namespace": "n", "uid": "u" * 36, "resourceVersion": "1", "creationTimestamp": "2026-01-01T00:00:00Z"
    }  # fmt: skip
    problem = RolloutResource.from_document(document).policy_problem
    assert "spec.policy: outcomes[0]: tuned_for 0.05 is not beyond the margin" in problem
