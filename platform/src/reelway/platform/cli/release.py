"""``reelway release``: keys, what is in the store, and whether it may take traffic. Building is the pipelines' part.

Nothing here changes a release; ``verify`` says why one is refused and exits with 6.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from reelway.platform.cli.terminal import out, say
from reelway.platform.contracts.manifest import MANIFEST_FILE, FeatureServiceRef, Manifest
from reelway.platform.errors import FeatureError
from reelway.platform.release.folder import read_manifest
from reelway.platform.release.signing import create_keys, fingerprint, load_public_keys
from reelway.platform.release.store import LATEST, ReleaseStore
from reelway.platform.release.verify import VerifiedRelease, verify
from reelway.platform.runs import RunDirectory

GROUP_NAME = "release"
RUN = typer.Option(Path("runs/default"), "--run", help="Run directory.")
STORE = typer.Option(None, "--store", help="Release store as a URL (file://, s3://, gs://); the run's when absent.")
RELEASE = typer.Argument(LATEST, help="Id, unique beginning of an id, or 'latest'.")


class Output(StrEnum):
    """How a result is printed."""

    TABLE = "table"
    JSON = "json"


OUTPUT = typer.Option(Output.TABLE, "-o", "--output", help="For people, or for programs.")


def release_group(app: typer.Typer) -> typer.Typer:
    """The ``release`` group of ``app``, made by whichever member asks first, so that loading order does not matter."""
    for group in app.registered_groups:
        if group.name == GROUP_NAME and group.typer_instance is not None:
            return group.typer_instance
    made = typer.Typer(no_args_is_help=True)
    app.add_typer(made, name=GROUP_NAME, help="Build, verify and look at releases.")
    return made


def register(app: typer.Typer) -> None:
    """Add ``reelway release keys|list|show|verify``."""
    group = release_group(app)
    group.command("keys")(keys)
    group.command("list")(list_releases)
    group.command("show")(show)
    group.command("verify")(verify_release)


def keys(
    run: Path = RUN,
    folder: Path | None = typer.Option(None, help="Where to write the pair; the run's keys/ when absent."),
) -> None:
    """Make an Ed25519 pair: the private half signs releases, the public half goes to whoever verifies them.

    An existing private key is never overwritten.

    Example: reelway release keys --folder ~/.reelway/keys
    """
    pair = create_keys(folder or RunDirectory(run).keys)
    say(f"private key {pair.private} (keep it secret)")
    say(f"public key {pair.public}, fingerprint {fingerprint(load_public_keys(pair.public)[0])}")


def list_releases(run: Path = RUN, store: str | None = STORE, output: Output = OUTPUT) -> None:
    """List the releases of a store, the newest first.

    Example: reelway release list --store s3://models/releases -o json
    """
    releases = _store(run, store).list()
    if output is Output.JSON:
        typer.echo(json.dumps([asdict(release) for release in releases], default=str, indent=2))
        return
    table = Table("release", "name", "made at (UTC)", "signed", "gates", "size", "parent")
    for release in releases:
        table.add_row(
            release.release_id[:12],
            release.name,
            f"{release.created_at:%Y-%m-%d %H:%M:%S}",
            "yes" if release.signed else "no",
            "hold" if release.gates_passed else f"{release.gates_waived} WAIVED" if release.gates_waived else "FAILED",
            f"{release.size_bytes / 1e6:.1f} MB",
            (release.parent or "-")[:12],
        )
    out.print(table)


def show(release: str = RELEASE, run: Path = RUN, store: str | None = STORE, output: Output = OUTPUT) -> None:
    """Show one release's manifest: from what it was made, its metrics, its gates and its files.

    Example: reelway release show 3f9c -o json
    """
    place = _store(run, store)
    release_id = place.resolve(release)
    manifest = place.manifest(release_id)
    if output is Output.JSON:
        typer.echo(json.dumps({"release_id": release_id, **manifest.model_dump(mode="json")}, indent=2))
        return
    _print_manifest(manifest)


def verify_release(
    release: str = typer.Argument(LATEST, help="Id, unique beginning of an id, 'latest', or a release folder."),
    run: Path = RUN,
    store: str | None = STORE,
    public_keys: Path | None = typer.Option(
        None, help="Trusted public key (PEM), or a folder of *.public.pem; the run's keys/ when absent."
    ),
    features: Path | None = typer.Option(
        None, help="Folder of the feature store to check against; the run's features/ when absent."
    ),
) -> None:
    """Check that a release is whole, signed by a trusted key, fits together and passed its gates.

    Exits with 6 and the reason when it is refused.

    Examples:

      reelway release verify --run runs/demo

      reelway release verify 3f9c --store s3://models/releases --public-keys trusted/
    """
    directory = RunDirectory(run)
    trusted = load_public_keys(public_keys or directory.keys)
    place = features or directory.features

    def look(folder: Path, expected_id: str | None) -> VerifiedRelease:
        services = registered_services(place, read_manifest(folder).feature_services, required=features is not None)
        return verify(folder, public_keys=trusted, feature_services=services, expected_id=expected_id)

    if (Path(release) / MANIFEST_FILE).is_file():
        verified = look(Path(release), None)
    else:
        source = _store(run, store)
        release_id = source.resolve(release)
        with tempfile.TemporaryDirectory(prefix="reelway-verify-") as aside:
            verified = look(source.fetch(release_id, Path(aside)), release_id)
    _say_waivers(verified)
    table = Table("check", "result", title=f"release {verified.manifest.release_id[:12]} may take traffic")
    for check in verified.checks:
        table.add_row(check.name, check.detail)
    out.print(table)


def fetch_verified(run: RunDirectory, release: str) -> VerifiedRelease:
    """A release of the run's store that may take traffic, where the stages read it. Waived gates are said.

    Raises:
        ReleaseError: it is not there, or it is refused.
    """
    store = ReleaseStore(str(run.release_store))
    release_id = store.resolve(release)
    folder = store.fetch(release_id, run.path / "serving" / "releases")
    services = registered_services(run.features, read_manifest(folder).feature_services, required=False)
    keys = load_public_keys(run.keys)
    verified = verify(folder, public_keys=keys, feature_services=services, expected_id=release_id)
    say(f"release {release_id[:12]} verified: {len(verified.checks)} checks passed")
    _say_waivers(verified)
    return verified


def _say_waivers(verified: VerifiedRelease) -> None:
    for waiver in verified.manifest.waivers:
        say(f"[bold yellow]WAIVED:[/] gate {escape(waiver.gate)} failed; {escape(waiver.by)}: {escape(waiver.reason)}")


def registered_services(
    features_dir: Path, wanted: tuple[FeatureServiceRef, ...], *, required: bool
) -> dict[str, str] | None:
    """Name -> digest of those ``wanted`` feature services that the feature store has.

    Args:
        required: a folder that is no feature store is an error; otherwise it is ``None``, "there is none to ask".

    Raises:
        FeatureError: the store cannot be opened.
    """
    from reelway.platform.features.store import CONFIG_FILE, feature_service_digest, open_feature_store

    if not required and not (features_dir / CONFIG_FILE).exists():
        return None
    feature_store = open_feature_store(features_dir)
    present = {}
    for service in wanted:
        try:
            present[service.name] = feature_service_digest(feature_store, service.name)
        except FeatureError:
            continue  # absent: the comparison refuses it by name
    return present


def _store(run: Path, store: str | None) -> ReleaseStore:
    return ReleaseStore(store or str(RunDirectory(run).release_store.absolute()))


def _print_manifest(manifest: Manifest) -> None:
    out.print(f"release {manifest.release_id}", soft_wrap=True)  # whole, to be copied
    facts = Table(show_header=False, box=None)
    window = manifest.training_window
    rows: dict[str, Any] = {
        "name": manifest.name,
        "parent": manifest.parent or "-",
        "made at": f"{manifest.created_at:%Y-%m-%d %H:%M:%S} UTC by Reelway {manifest.code_version}",
        "trained on": f"{window.start:%Y-%m-%d %H:%M} to {window.end:%Y-%m-%d %H:%M} UTC, seed {manifest.seed}",
        "signed": "yes (check it with `reelway release verify`)" if manifest.signature else "no",
        "videos": f"{manifest.dimensions.videos}, embedding {manifest.dimensions.embedding}",
        **{f"feature service {one.name}": f"{one.digest[:12]}..." for one in manifest.feature_services},
    }
    for name, value in rows.items():
        facts.add_row(name, str(value))
    out.print(facts)
    gates = Table("gate", "value", "bound", "result", title="Gates")
    waived = {waiver.gate: f"WAIVED by {waiver.by}: {waiver.reason}" for waiver in manifest.waivers}
    for gate in manifest.gates:
        bound = f"{gate.comparison} {gate.bound:.4g}"
        result = "holds" if gate.passed else waived.get(gate.name, "FAILED")
        gates.add_row(gate.name, f"{gate.value:.4g}", bound, escape(result))
    out.print(gates)
    metrics = Table("metric", "value", title="Metrics")
    for name, metric in sorted(manifest.metrics.items()):
        metrics.add_row(name, f"{metric:.4g}")
    out.print(metrics)
    files = Table("file", "bytes", "SHA-256", title="Files")
    for name, entry in manifest.files.items():
        files.add_row(name, f"{entry.size_bytes:,}", entry.sha256[:12])
    out.print(files)
