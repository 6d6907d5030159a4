"""``compose_serve_config``: one configuration for the same options, without secrets, extended by copying an entry."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import ConfigError
from reelway.platform.rollout.traffic.access_options import AccessOptions, JwtOptions
from reelway.platform.rollout.traffic.routing import ArmRoute, Routing
from reelway.platform.rollout.traffic.serve_config import (
    compose_serve_config,
    find_routing,
    release_names,
    with_target,
)
from reelway.platform.rollout.traffic.serving_options import (
    AutoscalingOptions,
    DeploymentOptions,
    Deployments,
    InitialTraffic,
    OutcomesArgs,
    ReleaseArgs,
    ReleaseStoreArgs,
    RouterArgs,
    ServingOptions,
)
from reelway.platform.rollout.traffic.target import TrafficTarget

STORE = ReleaseStoreArgs(release_store="s3://releases/live", release_cache=Path("/cache"), public_keys=Path("/keys"))
OLD, NEW = "a" * 64, "b" * 64
ROUTING = Routing.single_release(OLD, warm=(NEW,))


def options(**changes: Any) -> ServingOptions:
    values: dict[str, Any] = {
        "releases": STORE,
        "metrics_dir": Path("/metrics"),
        "token_secrets": Path("/keys/token.secret"),
        "outcomes": Path("/state/outcomes.db"),
    }
    return ServingOptions(**{**values, **changes})


def compose(**changes: Any) -> dict[str, Any]:
    return compose_serve_config(options(**changes), ROUTING.releases, ROUTING)


def by_name(config: dict[str, Any]) -> dict[str, Any]:
    return {app["name"]: app for app in config["applications"]}


@pytest.mark.parametrize("composition", ["staged", "fused"])
def test_releases_differ_only_in_their_id(composition: str) -> None:
    entries = by_name(compose(composition=composition))
    copied = copy.deepcopy(entries[OLD])
    copied["name"] = copied["args"]["release"] = NEW
    assert copied == entries[NEW]


def test_options_that_went_through_yaml_compose_the_same_configuration() -> None:
    """A cluster reads the options from a ConfigMap, `reelway serve` builds them in its process."""
    built = options(
        initial=InitialTraffic(release=OLD),
        deployments=Deployments(
            ranking=DeploymentOptions(num_replicas=3, num_gpus=0.5, memory_bytes=1 << 30),
            outcomes=DeploymentOptions(num_cpus=0, resources={"reelway_state": 0.01}),
        ),
        features_dir=Path("/features"),
    )
    text = yaml.safe_dump(built.model_dump(mode="json"))
    read = ServingOptions.parse(text, source="options.yaml")
    assert read == built
    assert compose_serve_config(read, (OLD,), ROUTING) == compose_serve_config(built, (OLD,), ROUTING)


def test_whole_numbers_are_integers_as_in_kuberays_json() -> None:
    """Ray Serve builds an application anew if its arguments differ as JSON text, and Go writes 250.0 as 250."""

    def floats(value: Any) -> list[float]:
        if isinstance(value, dict):
            return [found for item in value.values() for found in floats(item)]
        if isinstance(value, list):
            return [found for item in value for found in floats(item)]
        return [value] if isinstance(value, float) else []

    config = compose_serve_config(options(parity_ratio=1.0), (OLD,), ROUTING)
    assert [number for number in floats(config) if number.is_integer()] == []
    assert config["applications"][-1]["args"]["parity_ratio"] == 1
    fraction = compose_serve_config(options(parity_ratio=0.25), (OLD,), ROUTING)
    assert fraction["applications"][-1]["args"]["parity_ratio"] == 0.25


def test_target_over_a_composed_configuration_equals_composing_the_target() -> None:
    """A rollout changes the configuration without options; the operator would compose the same one."""
    arms = (
        ArmRoute(arm=Arm.CANARY, release=NEW, weight_bp=500),
        ArmRoute(arm=Arm.STABLE, release=OLD, weight_bp=9500),
    )
    target = TrafficTarget(routing=Routing(salt="s", rollout="r", arms=arms), releases=(OLD, NEW))
    start = compose_serve_config(options(), (OLD,), Routing.single_release(OLD))
    assert with_target(start, target) == compose_serve_config(options(), (OLD, NEW), target.routing)


def test_only_router_and_outcomes_have_a_route_prefix() -> None:
    entries = by_name(compose(deployments=Deployments.with_replicas(router=2, ranking=3)))
    assert set(entries) == {OLD, NEW, "router", "outcomes"}
    counts = {one["name"]: one["num_replicas"] for one in entries[OLD]["deployments"]}
    assert counts == {"Retrieval": 1, "Ranking": 3, "Reranking": 1}
    (router,) = entries["router"]["deployments"]
    assert router["num_replicas"] == 2
    assert Routing.model_validate(router["user_config"]) == ROUTING
    prefixes = {name[:1]: one["route_prefix"] for name, one in entries.items()}
    assert prefixes == {"a": None, "b": None, "r": "/", "o": "/v1/outcomes/metrics"}


def test_autoscaled_deployment_has_no_fixed_number_of_replicas() -> None:
    scaled = DeploymentOptions(
        autoscaling=AutoscalingOptions(min_replicas=2, max_replicas=8, target_ongoing_requests=4)
    )
    entries = by_name(compose(deployments=Deployments(ranking=scaled)))
    ranking = next(one for one in entries[OLD]["deployments"] if one["name"] == "Ranking")
    assert ranking["num_replicas"] == "auto"
    assert ranking["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 8, "target_ongoing_requests": 4.0}


def test_fused_release_is_one_deployment() -> None:
    entries = by_name(compose(composition="fused", max_ongoing_requests=8))
    assert [one["name"] for one in entries[OLD]["deployments"]] == ["Release"]
    assert entries[OLD]["args"]["composition"] == entries["router"]["args"]["composition"] == "fused"
    assert entries["router"]["args"]["max_ongoing_requests"] == 8
    assert entries["router"]["args"]["max_ongoing_sustained"] is None


def test_application_arguments_are_the_builders_models() -> None:
    config = json.loads(json.dumps(compose(features_dir=Path("/features"))))
    models = {"release": ReleaseArgs, "router": RouterArgs, "outcomes": OutcomesArgs}
    for entry in config["applications"]:
        model = models[entry["import_path"].rpartition(":")[2]]
        assert model.model_validate(entry["args"]).model_dump(mode="json") == entry["args"]
        with pytest.raises(ValidationError):
            model.model_validate(entry["args"] | {"surprise": 1})


def test_without_an_outcomes_file_the_application_is_absent() -> None:
    entries = by_name(compose(outcomes=None))
    assert "outcomes" not in entries
    assert entries["router"]["args"]["log_keeper"] is None


def test_routers_append_to_the_event_log_that_the_outcomes_application_sums() -> None:
    entries = by_name(compose(events="kafka://k:9092"))
    assert (entries["router"]["args"]["events"], entries["router"]["args"]["log_keeper"]) == ("kafka://k:9092", None)
    assert entries["outcomes"]["args"]["events"] == "kafka://k:9092"


def test_without_an_event_log_the_outcomes_application_keeps_it() -> None:
    entries = by_name(compose(outcomes=Path("/state/outcomes.db"), events=None))
    assert (entries["router"]["args"]["events"], entries["router"]["args"]["log_keeper"]) == (None, "outcomes")
    assert entries["outcomes"]["args"] == {
        "token_secrets": "/keys/token.secret", "state": "/state/outcomes.db", "events": "/state/events",
        "require_authenticated": False,
    }  # fmt: skip


def test_composed_configuration_states_its_releases_with_their_routing() -> None:
    assert release_names(compose()) == (OLD, NEW)
    assert Routing.model_validate(find_routing(compose())) == ROUTING


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_ongoing_requests": 8, "max_ongoing_sustained": 9}, "9 exceeds max_ongoing_requests, which is 8"),
        ({"composition": "fused", "ranker_address": "ranker:8081"}, "use composition 'staged'"),
    ],
)
def test_contradicting_options_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        compose(**changes)


def test_outcomes_have_exactly_one_replica() -> None:
    with pytest.raises(ValidationError, match="one process writes their file"):
        Deployments.with_replicas(outcomes=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "ConfigMap c: not YAML"),
        ("metrics_dir: /m", "ConfigMap c: releases: missing, and it has no default"),
        (
            "{metrics_dir: /m, releases: {release_store: s, release_cache: c, public_keys: k, shelves: 1}}",
            "releases.shelves: unknown key, expected one of overlay, public_keys, release_cache, release_store",
        ),
    ],
)
def test_wrong_options_are_rejected_by_their_path(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServingOptions.parse(text, source="ConfigMap c")


def test_only_proven_viewers_are_evidence_where_identity_is_demanded() -> None:
    jwt = {"audience": "reelway", "jwks_url": "https://id.test/keys"}
    entries = by_name(compose(access={"mode": "jwt", "jwt": jwt}))
    assert OutcomesArgs(**entries["outcomes"]["args"]).require_authenticated
    access = RouterArgs(**entries["router"]["args"]).access
    assert access == AccessOptions(mode="jwt", jwt=JwtOptions(audience="reelway", jwks_url="https://id.test/keys"))
