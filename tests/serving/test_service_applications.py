"""The document that says what runs: pure, without secrets, accepted by Serve, and extended by copying an entry."""

from __future__ import annotations

import ast
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError
from tests.release_files import make_release_folder

import reelway.serving
from reelway.platform.errors import ConfigError, DigestMismatchError, ReleaseNotFoundError, SignatureError
from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore
from reelway.platform.rollout.traffic.routing import Routing
from reelway.serving.release_loader import open_trusted
from reelway.serving.serve_config import (
    OutcomesArgs,
    ReleaseShelf,
    ReleaseSource,
    Replicas,
    RouterArgs,
    ServiceOptions,
    serve_config,
)
from reelway.serving.token_secrets import SECRET_VARIABLE, read_token_secrets

SHELF = ReleaseShelf(release_store="s3://releases/live", release_cache=Path("/cache"), public_keys=Path("/keys"))
ROUTING = Routing.whole("a" * 64, warm=("b" * 64,))


def options(**changes: object) -> ServiceOptions:
    given = {"shelf": SHELF, "metrics_dir": Path("/metrics"), "token_secrets": Path("/keys/token.secret")}
    return ServiceOptions(**{**given, "outcomes": Path("/state/outcomes.db"), **changes})  # type: ignore[arg-type]


def test_a_release_is_added_by_copying_anothers_entry_with_two_ids_changed() -> None:
    whole = serve_config(ROUTING, options())
    entries = {one["name"]: one for one in whole["applications"]}
    made = copy.deepcopy(entries["a" * 64])
    assert made["name"] == made["args"]["release"]
    made["name"] = made["args"]["release"] = "b" * 64
    assert made == entries["b" * 64]


def test_every_application_has_its_replicas_and_only_router_and_outcomes_are_reached_over_http() -> None:
    document = serve_config(ROUTING, options(replicas=Replicas(router=2, ranking=3)))
    entries = {one["name"]: one for one in document["applications"]}
    assert set(entries) == {"a" * 64, "b" * 64, "router", "outcomes"}
    counts = {one["name"]: one["num_replicas"] for one in entries["a" * 64]["deployments"]}
    assert counts == {"Retrieval": 1, "Ranking": 3, "Reranking": 1}
    (router,) = entries["router"]["deployments"]
    assert router["num_replicas"] == 2
    assert Routing.model_validate(router["user_config"]) == ROUTING
    prefixes = {name[:1]: one["route_prefix"] for name, one in entries.items()}
    assert prefixes == {"a": None, "b": None, "r": "/", "o": "/v1/outcomes"}


def test_fused_a_release_is_one_deployment_that_checks_it_and_the_routers_are_told() -> None:
    document = serve_config(ROUTING, options(composition="fused", max_ongoing_requests=8, replicas=Replicas(router=2)))
    entries = {one["name"]: one for one in document["applications"]}
    assert [one["name"] for one in entries["a" * 64]["deployments"]] == ["Release"]
    assert entries["a" * 64]["args"]["composition"] == "fused"
    made = copy.deepcopy(entries["a" * 64])
    made["name"] = made["args"]["release"] = "b" * 64
    assert made == entries["b" * 64]
    assert entries["router"]["args"]["composition"] == "fused"
    assert entries["router"]["args"]["max_ongoing_requests"] == 8
    assert entries["router"]["args"]["max_ongoing_sustained"] is None
    with pytest.raises(ValidationError, match="max_ongoing_sustained 9: larger than max_ongoing_requests 8"):
        serve_config(ROUTING, options(max_ongoing_requests=8, max_ongoing_sustained=9))


def test_the_document_is_json_and_its_arguments_are_what_the_builders_take() -> None:
    document = json.loads(json.dumps(serve_config(ROUTING, options(features_dir=Path("/features")))))
    models = {"release": ReleaseSource, "router": RouterArgs, "outcomes": OutcomesArgs}
    for entry in document["applications"]:
        model = models[entry["import_path"].rpartition(":")[2]]
        assert model.model_validate(entry["args"]).model_dump(mode="json") == entry["args"]
        with pytest.raises(ValidationError):
            model.model_validate(entry["args"] | {"surprise": 1})


def test_without_a_file_for_outcomes_there_is_no_application_and_the_router_tells_nobody() -> None:
    document = serve_config(ROUTING, options(outcomes=None))
    entries = {one["name"]: one for one in document["applications"]}
    assert "outcomes" not in entries
    assert entries["router"]["args"]["outcomes"] is None


@pytest.mark.ray
def test_serve_itself_accepts_the_document_and_finds_the_builders() -> None:
    """In a process of its own: importing Ray Serve changes what later tests of this process would see."""
    document = json.dumps(serve_config(ROUTING, options()))
    program = f"""
import json, inspect
from importlib import import_module
from pydantic import BaseModel
import reelway.serving.deployments
from ray.serve.schema import ServeDeploySchema
schema = ServeDeploySchema.model_validate(json.loads({document!r}))
for application in schema.applications:
    module, _, name = application.import_path.partition(":")
    builder = getattr(import_module(module), name)
    (argument,) = inspect.signature(builder).parameters.values()
    assert issubclass(argument.annotation, BaseModel), argument
    built = builder(argument.annotation.model_validate(application.args))
    print(type(built).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Application"] * 4


def test_ray_is_known_in_the_deployments_only() -> None:
    root = Path(reelway.serving.__file__ or "").parent
    users = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            if any(name.split(".")[0] == "ray" for name in names):
                users.add(path.relative_to(root).parts[0])
    assert users == {"deployments"}


@pytest.fixture
def shelf(tmp_path: Path) -> tuple[ReleaseShelf, str]:
    pair = create_keys(tmp_path / "keys")
    manifest = make_release_folder(tmp_path / "made", key=load_private_key(pair.private))
    release = ReleaseStore(str(tmp_path / "store")).write(tmp_path / "made", manifest)
    there = ReleaseShelf(
        release_store=f"file://{tmp_path / 'store'}", release_cache=tmp_path / "cache", public_keys=tmp_path / "keys"
    )
    return there, release


def test_a_release_is_fetched_where_the_cache_lacks_it(shelf: tuple[ReleaseShelf, str]) -> None:
    there, release = shelf
    assert open_trusted(there.source_of(release)).release_id() == release
    assert (there.release_cache / release / "manifest.json").exists()


def test_a_release_that_nobody_trusted_signed_is_not_opened(shelf: tuple[ReleaseShelf, str], tmp_path: Path) -> None:
    there, _ = shelf
    manifest = make_release_folder(tmp_path / "theirs", seed=5, key=Ed25519PrivateKey.generate())
    foreign = ReleaseStore(str(tmp_path / "store")).write(tmp_path / "theirs", manifest)
    with pytest.raises(SignatureError):
        open_trusted(there.source_of(foreign))


def test_a_release_that_was_changed_in_the_store_is_not_opened(shelf: tuple[ReleaseShelf, str], tmp_path: Path) -> None:
    there, release = shelf
    (tmp_path / "store" / release / "ranker.onnx").write_bytes(b"something else")
    with pytest.raises(DigestMismatchError):
        open_trusted(there.source_of(release))


def test_a_release_that_is_nowhere_is_not_opened(shelf: tuple[ReleaseShelf, str]) -> None:
    there, _ = shelf
    with pytest.raises(ReleaseNotFoundError):
        open_trusted(there.source_of("0" * 64))


def test_token_secrets_come_from_the_environment_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token.secret"
    file.write_text("from the file\n")
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    assert read_token_secrets(file) == (b"from the file",)
    monkeypatch.setenv(SECRET_VARIABLE, "new,old")
    assert read_token_secrets(file) == (b"new", b"old")
    monkeypatch.delenv(SECRET_VARIABLE)
    with pytest.raises(ConfigError, match="token secret"):
        read_token_secrets(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=SECRET_VARIABLE):
        read_token_secrets(None)
