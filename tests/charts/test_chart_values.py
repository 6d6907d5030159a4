"""Unusual but valid names, versions, numbers and nulls render right, or are refused by their path."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from tests.support.charts.chart_tool import (
    CHART,
    COMPONENTS,
    ENVIRONMENT_FILES,
    ENVIRONMENTS,
    LOADER,
    NEEDED,
    Document,
    documents,
    helm_template,
    merged,
)

DEFAULTS: Final[Document] = yaml.load((CHART / "values.yaml").read_text(), Loader=LOADER)
LABEL: Final = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
IMAGE: Final = re.compile(r"[a-z0-9.:/_-]+(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}|@sha256:[0-9a-f]{64})")
SERVICE: Final = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
OBJECT: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
EVERYTHING: Final = ("jobs", "live", "kserve", "redis-bundled", "monitoring", "budgets", "priorities", "secrets", "pvc")
"""Components that together render almost every template."""


def with_everything(values: Document) -> Document:
    found: Document = NEEDED
    for component in EVERYTHING:
        found = merged(found, COMPONENTS[component])
    return merged(found, values)


def rendered(values: Document, release: str = "rw", namespace: str = "reelway") -> str:
    files = [ENVIRONMENTS / name for name in ENVIRONMENT_FILES["production-cpu"]]
    done = helm_template(with_everything(values), *files, arguments=("--namespace", namespace), release=release)
    assert done.returncode == 0, done.stderr
    return done.stdout


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every scalar, also of those in YAML documents inside of ConfigMaps."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, f"{path}.{key}")
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from leaves(one, f"{path}[{index}]")
    elif isinstance(value, str) and re.search(r"\.data\.[a-z_.-]+\.yaml$", path):
        yield from leaves(yaml.load(value, Loader=LOADER), path)
    else:
        yield path, value


def labels_of(value: Any) -> Iterator[Any]:
    for path, one in leaves(value):
        if re.search(r"(^|\.)(labels|matchLabels|selector)\.[^\[]+$", path):
            yield one


def check_names(text: str) -> None:
    found = documents(text)
    assert len(found) > 60
    for one in found:
        for label in labels_of(
            one["metadata"] if one["kind"] == "PrometheusRule" else one
        ):  # an alert's labels are text
            assert isinstance(label, str), (one["kind"], one["metadata"], label)
            assert LABEL.fullmatch(label.replace("{release}", "3f9c")), label
        name = one["metadata"].get("name")
        if name is not None:
            assert isinstance(name, str), name
            assert (SERVICE if one["kind"] in ("Service", "RayService") else OBJECT).fullmatch(name), name
    for path, value in leaves(list(found)):
        if path.endswith(".image"):
            assert IMAGE.fullmatch(value), value
        if re.search(r"(name|Name|namespace)$", path) and ".data." not in path:
            assert isinstance(value, str), (path, value)


@pytest.mark.parametrize("release", ["1234", "true", "my.rel", "1e3", "null", "0x1f", "9-reelway", "a" * 53])
def test_every_release_name_renders_valid_names(release: str) -> None:
    check_names(rendered({}, release))


def test_numeric_namespace_stays_text() -> None:
    check_names(rendered({}, namespace="1234"))


def test_build_metadata_of_a_version_is_no_part_of_a_label(tmp_path: Path) -> None:
    copied = tmp_path / "reelway"
    shutil.copytree(CHART, copied)
    chart = copied / "Chart.yaml"
    chart.write_text(re.sub(r"(?m)^(version|appVersion): .*$", r"\1: 0.1.0+git.1234567", chart.read_text()))
    files = [ENVIRONMENTS / name for name in ENVIRONMENT_FILES["production-cpu"]]
    done = helm_template(with_everything({}), *files, chart=copied)
    assert done.returncode == 0, done.stderr
    check_names(done.stdout)
    assert 'app.kubernetes.io/version: "0.1.0_git.1234567"' in done.stdout
    assert "training:0.1.0_git.1234567" in done.stdout


def test_large_whole_numbers_stay_whole_numbers() -> None:
    large = {
        "serving": {
            "env": {"RAY_max_direct_call_object_size": 1048576, "SOME_BYTES": 2000000000, "SOME_RATIO": 0.5},
            "deployments": {"ranking": {"memoryMiB": 1048576}},
        },
        "operator": {"env": {"SOME_BYTES": 2000000000}, "prometheusAccess": {"labels": {"cluster": "1e6"}}},
        "jobs": {
            "defaults": {"activeDeadlineSeconds": 1048576}, "train": {"activeDeadlineSeconds": 2000000},
            "startTimeoutSeconds": 1000000, "parity": {"activeDeadlineSeconds": 2000000},
        },
        "features": {"registryCacheSeconds": 1048576},
        "priorityClasses": {"serving": 1000000, "training": 1048576}, "tests": {"viewer": 1048576},
    }  # fmt: skip
    text = rendered(large)
    assert not re.findall(r".*\d(?:\.\d+)?e\+\d+.*", text)
    container = next(one for one in documents(text) if one["kind"] == "RayService")["spec"]["rayClusterConfig"][
        "headGroupSpec"
    ]["template"]["spec"]["containers"][0]
    environment = {one["name"]: one.get("value") for one in container["env"]}
    assert environment["RAY_max_direct_call_object_size"] == "1048576"
    assert (environment["SOME_BYTES"], environment["SOME_RATIO"]) == ("2000000000", "0.5")
    found = dict(leaves([one for one in documents(text) if one["kind"] in ("RayJob", "CronJob", "PriorityClass")]))
    for wanted in (1048576, 2000000, 1000000):
        assert any(value == wanted and type(value) is int for value in found.values()), wanted


TEXTS: Final = {
    "image": {"pullSecrets": ["{}"], "serving": {"tag": "{}"}, "training": {"repository": "{}"}},
    "secrets": {"generate": False, "name": "{}"},
    "serviceAccount": {"annotations": {"a": "{}"}},
    "releases": {
        "publicKeys": {"configMap": "{}"}, "store": {"pvc": {"existingClaim": "", "storageClassName": "{}"}}
    },
    "serving": {
        "priorityClassName": "{}", "bucketSalt": "{}", "env": {"SOME": "{}"},
        "ingress": {"className": "{}", "tlsSecret": "{}", "annotations": {"a": "{}"}},
        "head": {"nodeSelector": {"a": "{}"}},
    },
    "operator": {
        "priorityClassName": "{}", "prometheusAccess": {"tokenSecret": "{}", "caConfigMap": "{}", "labels": {"a": "{}"}}
    },
    "features": {"registry": "{}"},
    "jobs": {"runsClaim": "{}", "kueueQueue": "{}", "signingSecret": "{}", "runsPath": "runs/{}"},
    "eventLog": {"kafkaSettingsSecret": "{}"},
    "stream": {"state": {"persistent": True, "storageClassName": "{}"}},
    "monitoring": {
        "monitors": {"labels": {"a": "{}"}}, "rules": {"labels": {"a": "{}"}}, "dashboards": {"labels": {"a": "{}"}}
    },
}  # fmt: skip


def filled(value: Any, text: str) -> Any:
    if isinstance(value, dict):
        return {key: filled(one, text) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, text) for one in value]
    return value.replace("{}", text) if isinstance(value, str) else value


@pytest.mark.parametrize("text", ["1234", "true", "null", "1e3", "0x1f", "010", "no"])
def test_text_that_looks_like_another_type_stays_text(text: str) -> None:
    def types(one: str) -> dict[str, str]:
        found = documents(rendered(filled(TEXTS, one)))
        return {
            f"{index}{path}".replace(one, "?"): type(value).__name__
            for index, document in enumerate(found)
            for path, value in leaves(document)
        }

    plain, odd = types("name"), types(text)
    assert {path: kind for path, kind in odd.items() if plain.get(path) not in (kind, None)} == {}


def keys_of(value: Document, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, default) of every key of values.yaml."""
    for key, one in value.items():
        yield (*path, key), one
        if isinstance(one, dict):
            yield from keys_of(one, (*path, key))


def is_empty(default: Any) -> bool:
    return default in ("", {}, []) and default is not False


INHERITING: Final = re.compile(r"jobs\.(dataset|features|train|evaluate|release|parity)\.")
"""Keys that jobs.defaults has, too."""
REMOVABLE: Final = ("serving.workers.cpu",)
"""Entries of a map whose keys users choose."""


def nested(path: tuple[str, ...], value: Any) -> Document:
    for part in reversed(path):
        value = {part: value}
    made: Document = value
    return made


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_null_for_a_value_that_is_needed_is_refused_by_path(depth: int) -> None:
    """The schema names every missing key at once, so that one rendering shows all of a depth."""
    values: Document = {}
    refused = []
    for path, default in keys_of(DEFAULTS):
        name = ".".join(path)
        inherited = INHERITING.match(name) and path[-1] in DEFAULTS["jobs"]["defaults"]
        chosen = name.startswith(REMOVABLE) or "Labels" in name or ".dashboards.labels." in name
        if len(path) == depth and not is_empty(default) and not inherited and not chosen:
            values = merged(values, nested(path, None))
            refused.append(path)
    assert refused
    done = helm_template(values, ENVIRONMENTS / "dev.yaml")
    assert done.returncode != 0
    said = {
        (where.strip("/").replace("/", "."), key)
        for where, keys in re.findall(r"at '([^']*)': missing propert(?:y|ies) (.*)", done.stderr)
        for key in re.findall(r"'([^']+)'", keys)
    }
    missing = [path for path in refused if (".".join(path[:-1]), path[-1]) not in said]
    assert not missing, done.stderr


@pytest.mark.parametrize("environment", ["production-cpu", "dev"])
def test_null_for_a_value_that_may_be_empty_is_the_empty_value(environment: str) -> None:
    null: Document = {}
    empty: Document = {}
    for path, default in keys_of(DEFAULTS):
        if is_empty(default) and ".".join(path) not in NEEDED_TEXTS and path[:2] != ("serving", "workers"):
            same = None if default == {} else default  # {} would be merged into the environment's map
            null, empty = merged(null, nested(path, None)), merged(empty, nested(path, same))
    files = [ENVIRONMENTS / name for name in ENVIRONMENT_FILES[environment]]
    off = {"serving": {"ingress": {"enabled": False}}, "features": {"type": "none"}}
    one, other = (helm_template(merged(merged(NEEDED, off), values), *files) for values in (null, empty))
    assert one.returncode == other.returncode == 0, one.stderr + other.stderr
    assert one.stdout == other.stdout
    assert "<nil>" not in one.stdout


NEEDED_TEXTS: Final = (
    "releases.initial", "secrets.name", "releases.store.hostPath.path", "releases.store.s3.bucket",
    "releases.publicKeys.configMap", "jobs.runsClaim", "auth.jwt.audience", "auth.jwt.jwksUrl",
)  # fmt: skip
"""Empty by default, and needed by the environments."""


@pytest.mark.parametrize(
    "path", [path for path, default in keys_of(DEFAULTS) if len(path) <= 2 and is_empty(default)], ids=".".join
)
def test_null_alone_is_the_empty_value_or_refused_by_path(path: tuple[str, ...]) -> None:
    default: Any = DEFAULTS
    for part in path:
        default = default[part]
    files = [ENVIRONMENTS / name for name in ENVIRONMENT_FILES["dev"]]
    one, other = (helm_template(with_everything(nested(path, value)), *files) for value in (None, default))
    assert (one.returncode, one.stdout) == (other.returncode, other.stdout), one.stderr
    assert one.returncode == 0 or ".".join(path) in one.stderr, one.stderr


@pytest.mark.parametrize("families", [["IPv6"], ["IPv6", "IPv4"], ["IPv4", "IPv6"]], ids="-".join)
def test_services_have_the_families_of_the_cluster(families: list[str]) -> None:
    policy = "SingleStack" if len(families) == 1 else "RequireDualStack"
    found = documents(rendered({"services": {"ipFamilies": families, "ipFamilyPolicy": policy}}))
    services = [one["spec"] for one in found if one["kind"] == "Service"]
    services += [one["spec"]["serveService"]["spec"] for one in found if one["kind"] == "RayService"]
    assert len(services) >= 6
    for one in services:
        assert (one["ipFamilies"], one["ipFamilyPolicy"]) == (families, policy)


@pytest.mark.parametrize("families", [["IPv6"], ["IPv6", "IPv4"]], ids="-".join)
def test_nothing_listens_at_ipv4_alone_where_ipv6_comes_first(families: list[str]) -> None:
    text = rendered({"services": {"ipFamilies": families}})
    assert not re.search(r"(?<![\d.])0\.0\.0\.0", text)
    found = documents(text)
    heads = [one for one in found if one["kind"] in ("RayService", "RayJob")]
    clusters = [one["spec"].get("rayClusterConfig") or one["spec"]["rayClusterSpec"] for one in heads]
    assert {one["headGroupSpec"]["rayStartParams"]["dashboard-host"] for one in clusters} == {"::"}


def test_serve_listens_at_both_families_of_a_dual_stack_cluster() -> None:
    found = documents(rendered({"services": {"ipFamilies": ["IPv4", "IPv6"]}}))
    (options,) = [one["data"]["options.yaml"] for one in found if "options.yaml" in one.get("data", {})]
    assert yaml.safe_load(options)["host"] == "::0"
