"""Ray Serve accepts the composed configuration, and the serving process opens only releases that it trusts."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.support.release_files import describe_files, make_release_folder
from tests.support.serving.viewer_store import make_store

import reelway.serving
from reelway.platform.contracts.feature_names import TRAINING_SERVICE, VIEWER_SERVICE
from reelway.platform.contracts.manifest import BLEND_FILE, RANKER_FILE, VIDEOS_FILE
from reelway.platform.errors import (
    ConfigError,
    DigestMismatchError,
    GateFailedError,
    IncompatibleReleaseError,
    ReleaseNotFoundError,
    SignatureError,
)
from reelway.platform.features.feast_store import registered_services
from reelway.platform.release.folder import write_manifest
from reelway.platform.release.signing import create_keys, load_private_key, sign
from reelway.platform.release.store import ReleaseStore
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serve_config import compose_serve_config
from reelway.platform.rollout.traffic.serving_options import (
    ReleaseStoreArgs,
    ServingOptions,
)
from reelway.serving.release_loader import open_trusted
from reelway.serving.token_secrets import SECRET_VARIABLE, read_token_secrets

RELEASES = ReleaseStoreArgs(release_store="s3://releases/live", release_cache=Path("/cache"), public_keys=Path("/keys"))
ROUTING = Routing.single_release("a" * 64, warm=("b" * 64,))
OPTIONS = ServingOptions(
    releases=RELEASES,
    metrics_dir=Path("/metrics"),
    token_secrets=Path("/keys/token.secret"),
    outcomes=Path("/state/outcomes.db"),
)


@pytest.mark.ray
def test_serve_accepts_the_composed_configuration() -> None:
    """Runs in a process of its own, because importing Ray Serve changes the environment of later tests."""
    config = json.dumps(compose_serve_config(OPTIONS, ROUTING.releases, ROUTING))
    program = f"""
import json, inspect
from importlib import import_module
from pydantic import BaseModel
import reelway.serving.deployments
from ray.serve.schema import ServeDeploySchema
schema = ServeDeploySchema.model_validate(json.loads({config!r}))
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


def test_only_deployments_import_ray() -> None:
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
def store(tmp_path: Path) -> tuple[ReleaseStoreArgs, str]:
    pair = create_keys(tmp_path / "keys")
    manifest = make_release_folder(tmp_path / "made", key=load_private_key(pair.private))
    release = ReleaseStore(str(tmp_path / "store")).write(tmp_path / "made", manifest)
    args = ReleaseStoreArgs(
        release_store=f"file://{tmp_path / 'store'}", release_cache=tmp_path / "cache", public_keys=tmp_path / "keys"
    )
    return args, release


def test_missing_release_is_fetched_into_the_cache(store: tuple[ReleaseStoreArgs, str]) -> None:
    args, release = store
    assert open_trusted(args.release_args(release)).release_id() == release
    assert (args.release_cache / release / "manifest.json").exists()


def test_release_with_an_untrusted_signature_is_rejected(store: tuple[ReleaseStoreArgs, str], tmp_path: Path) -> None:
    args, _ = store
    manifest = make_release_folder(tmp_path / "theirs", seed=5, key=Ed25519PrivateKey.generate())
    foreign = ReleaseStore(str(tmp_path / "store")).write(tmp_path / "theirs", manifest)
    with pytest.raises(SignatureError):
        open_trusted(args.release_args(foreign))


def _write_release(tmp_path: Path, name: str, change: Callable[[Path], None] = lambda _: None, **fields: Any) -> str:
    """Builds, changes and signs a release as a faulty builder with the trusted key would, and stores it."""
    folder = tmp_path / name
    manifest = make_release_folder(folder, videos=64, **fields)
    change(folder)
    manifest = manifest.model_copy(update={"files": describe_files(folder)})
    key = load_private_key(tmp_path / "keys" / "release.private.pem")
    write_manifest(folder, signed := sign(manifest, key))
    return str(ReleaseStore(str(tmp_path / "store")).write(folder, signed))


FAILED_GATE = [{"name": "recall_at_50", "value": 0.1, "bound": 0.3, "comparison": ">=", "passed": False}]


def test_release_with_a_failed_gate_is_opened_only_with_a_waiver(
    store: tuple[ReleaseStoreArgs, str], tmp_path: Path
) -> None:
    args, _ = store
    failed = _write_release(tmp_path, "failed", gates=FAILED_GATE)
    with pytest.raises(GateFailedError, match=r"recall_at_50 is 0\.1, expected >= 0\.3"):
        open_trusted(args.release_args(failed))
    waiver = {"gate": "recall_at_50", "reason": "a new catalogue", "by": "ada"}
    waived = _write_release(tmp_path, "waived", gates=FAILED_GATE, waivers=[waiver])
    assert open_trusted(args.release_args(waived)).release_id() == waived


def test_release_whose_files_disagree_is_rejected(store: tuple[ReleaseStoreArgs, str], tmp_path: Path) -> None:
    """Its digests and signature are right."""
    args, _ = store
    faults: dict[str, Callable[[Path], None]] = {
        "videos.arrow is not an Arrow": lambda folder: (folder / VIDEOS_FILE).write_bytes(b"no table") and None,
        "ranker.onnx is not a graph": lambda folder: (folder / RANKER_FILE).write_bytes(b"no graph") and None,
        "blend.yaml": lambda folder: (folder / BLEND_FILE).write_text("retrieval: 7") and None,
    }
    for number, (message, fault) in enumerate(faults.items()):
        release = _write_release(tmp_path, f"fault-{number}", fault, seed=number)
        with pytest.raises(IncompatibleReleaseError, match=message):
            open_trusted(args.release_args(release))


def test_release_changed_in_the_store_is_rejected(store: tuple[ReleaseStoreArgs, str], tmp_path: Path) -> None:
    args, release = store
    (tmp_path / "store" / release / "ranker.onnx").write_bytes(b"something else")
    with pytest.raises(DigestMismatchError):
        open_trusted(args.release_args(release))


def test_unknown_release_is_rejected(store: tuple[ReleaseStoreArgs, str]) -> None:
    args, _ = store
    with pytest.raises(ReleaseNotFoundError):
        open_trusted(args.release_args("0" * 64))


def test_token_secrets_prefer_the_environment_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.ray
def test_release_with_foreign_feature_services_gets_no_traffic(
    store: tuple[ReleaseStoreArgs, str], tmp_path: Path
) -> None:
    """A release that has traffic already is opened and counted, because a router that restarts must serve viewers."""
    args, foreign = store
    features = make_store(tmp_path / "features")
    services = [
        {"name": name, "digest": digest}
        for name, digest in registered_services(features, (TRAINING_SERVICE, VIEWER_SERVICE)).items()
    ]
    assert len(services) == 2
    own = _write_release(tmp_path, "own", seed=8, feature_services=services)
    program = f"""
import asyncio
from pathlib import Path
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serving_options import RouterArgs
from reelway.serving.deployments.applications import RouterDeployment

args = {args.model_dump(mode="json")!r}
features = Path({str(tmp_path)!r}) / "features"
router = RouterDeployment(RouterArgs(**args, features_dir=features, composition="fused"))

async def opened(release, stable):
    router._requested = Routing.single_release(stable, warm=(release,))
    try:
        await router._open(release)
    except Exception as error:
        return type(error).__name__
    registry = router._dependencies.registry
    count = registry.get_sample_value("reelway_ingress_foreign_features_total", {{"release": release[:12]}})
    return f"opened:{{count}}"

async def main():
    own, foreign = {own!r}, {foreign!r}
    print(await opened(own, foreign), await opened(foreign, own), await opened(foreign, foreign))

asyncio.run(main())
router.close()
"""
    environment = os.environ | {SECRET_VARIABLE: "a secret of the tests"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["opened:None", "IncompatibleReleaseError", "opened:1.0"]


@pytest.mark.ray
def test_router_that_ends_stops_its_threads_and_keeps_its_sample(tmp_path: Path) -> None:
    program = f"""
import threading, time
from pathlib import Path
from reelway.platform.features.vector_log import ServedVector
from reelway.platform.rollout.traffic.serving_options import RouterArgs
from reelway.serving.deployments.applications import RouterDeployment

folder = Path({str(tmp_path)!r})
router = RouterDeployment(RouterArgs(
    release_store="releases", release_cache=folder, public_keys=folder, events=str(folder / "events"),
    vector_log=(folder / "vectors").as_uri(), parity_ratio=1.0,
))
sample = router._dependencies.sample
sample.record(ServedVector(1, 7, 1.5, "tv", "abc", {{}}, []))
sample._thread.submit(int).result()  # the sample before it is written
running = {{thread.name for thread in threading.enumerate()}}
assert {{"takedowns", "vector-segments"}} <= running, running
router.close()
(takedowns,) = [thread for thread in threading.enumerate() if thread.name == "takedowns"] or [threading.Thread()]
if takedowns.ident:
    takedowns.join(30)
names = {{thread.name for thread in threading.enumerate()}}
assert not names & {{"takedowns", "vector-segments", "parity-sample_0"}}, names
print(sum(path.read_text().count("\\n") for path in folder.glob("vectors/*/*.jsonl")))
router.close()
"""
    environment = os.environ | {SECRET_VARIABLE: "a secret of the tests"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]


TRAILERS = """
import json, socket, threading, time
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
import reelway.serving.deployments.applications

async def answer(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    body = json.dumps([v.decode() for k, v in scope["headers"] if k == b"x-forwarded-for"]).encode() + b"!"
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})

listening = socket.create_server(("127.0.0.1", 0))
server = uvicorn.Server(uvicorn.Config(answer, http=HttpToolsProtocol, log_level="error", lifespan="off"))
thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
thread.start()
request = (
    b"POST / HTTP/1.1\\r\\nHost: x\\r\\nX-Forwarded-For: 198.51.100.1\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n"
    b"2\\r\\n{}\\r\\n0\\r\\nX-Forwarded-For: 127.0.0.1\\r\\n\\r\\n"
)
with socket.create_connection(listening.getsockname(), timeout=30) as connection:
    connection.sendall(2 * request)  # on one connection, so that the second follows the first one's trailer
    received = b""
    while received.count(b"!") < 2:
        received += connection.recv(4096)
server.should_exit = True
thread.join(10)
assert received.count(b'["198.51.100.1"]!') == 2, received
"""


def test_trailer_is_no_header() -> None:
    """A client cannot write an address behind the proxy's. uvicorn appends trailers to the headers."""
    done = subprocess.run([sys.executable, "-c", TRAILERS], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
