"""``reelway release keys|list|show|verify|fetch``: signing keys, and the releases of a store.

``reelway release build`` and ``rehearse`` are in pipelines, which has the models. ``verify`` and ``fetch --verify``
exit with code 6 and the reason if a release is rejected.
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

from reelway.platform.cli.terminal import print_status, stdout_console
from reelway.platform.contracts.ids import short_id
from reelway.platform.contracts.manifest import MANIFEST_FILE, FeatureServiceRef, Manifest
from reelway.platform.errors import ConfigError
from reelway.platform.release.folder import read_manifest
from reelway.platform.release.signing import create_keys, fingerprint, load_public_keys
from reelway.platform.release.store import LATEST, ReleaseStore
from reelway.platform.release.verify import VerifiedRelease, verify
from reelway.platform.run_directory import RunDirectory

GROUP_NAME = "release"
RUN = typer.Option(Path("runs/default"), "--run", help="Run directory.")
STORE = typer.Option(
    None, "--store", help="Path or URL of the release store (file://, s3://, gs://). Default: releases/ of the run."
)
RELEASE = typer.Argument(LATEST, help="Release id, unique prefix of an id, or 'latest'.")


class TableOrJson(StrEnum):
    TABLE = "table"
    JSON = "json"


OUTPUT = typer.Option(TableOrJson.TABLE, "-o", "--output", help="Output format: table or json.")


def release_group(app: typer.Typer) -> typer.Typer:
    """Returns the ``release`` group of ``app``. The first member that needs the group creates it."""
    for group in app.registered_groups:
        if group.name == GROUP_NAME and group.typer_instance is not None:
            return group.typer_instance
    releases = typer.Typer(no_args_is_help=True)
    app.add_typer(releases, name=GROUP_NAME, help="Build, verify, fetch and show releases.")
    return releases


def register(app: typer.Typer) -> None:
    """Adds ``reelway release keys|list|show|verify|fetch``."""
    group = release_group(app)
    group.command("keys")(keys)
    group.command("list")(list_releases)
    group.command("show")(show)
    group.command("verify")(verify_release)
    group.command("fetch")(fetch_release)


def keys(
    run: Path = RUN,
    folder: Path | None = typer.Option(None, help="Folder for the key pair. Default: keys/ of the run."),
) -> None:
    """Create an Ed25519 key pair. The private key signs releases; the public key verifies them.

    An existing private key is never overwritten.

    Example: reelway release keys --folder ~/.reelway/keys
    """
    pair = create_keys(folder or RunDirectory(run).keys)
    print_status(f"private key {pair.private} (keep it secret)")
    print_status(f"public key {pair.public}, fingerprint {fingerprint(load_public_keys(pair.public)[0])}")


def list_releases(run: Path = RUN, store: str | None = STORE, output: TableOrJson = OUTPUT) -> None:
    """List the releases of a store, newest first.

    Example: reelway release list --store s3://models/releases -o json
    """
    releases = _store(run, store).list()
    if output is TableOrJson.JSON:
        typer.echo(json.dumps([asdict(release) for release in releases], default=str, indent=2))
        return
    table = Table("release", "name", "made at (UTC)", "signed", "gates", "size", "parent")
    for release in releases:
        table.add_row(
            short_id(release.release_id),
            release.name,
            f"{release.created_at:%Y-%m-%d %H:%M:%S}",
            "yes" if release.signed else "no",
            "hold" if release.gates_passed else f"{release.gates_waived} WAIVED" if release.gates_waived else "FAILED",
            f"{release.size_bytes / 1e6:.1f} MB",
            (release.parent or "-")[:12],
        )
    stdout_console.print(table)


def show(release: str = RELEASE, run: Path = RUN, store: str | None = STORE, output: TableOrJson = OUTPUT) -> None:
    """Show a release's manifest: its origin, metrics, gates and files.

    Example: reelway release show 3f9c -o json
    """
    releases = _store(run, store)
    release_id = releases.resolve(release)
    manifest = releases.manifest(release_id)
    if output is TableOrJson.JSON:
        typer.echo(json.dumps({"release_id": release_id, **manifest.model_dump(mode="json")}, indent=2))
        return
    _print_manifest(manifest)


def verify_release(
    release: str = typer.Argument(LATEST, help="Release id, unique prefix of an id, 'latest', or a release folder."),
    run: Path = RUN,
    store: str | None = STORE,
    public_keys: Path | None = typer.Option(
        None, help="Trusted public key (PEM file) or folder with *.public.pem. Default: keys/ of the run."
    ),
    features: Path | None = typer.Option(
        None, help="Folder of the feature store to check against. Default: features/ of the run."
    ),
) -> None:
    """Check that a release is complete, consistent, signed by a trusted key and passed its gates.

    Exits with code 6 and the reason if the release is rejected.

    Examples:

      reelway release verify --run runs/demo

      reelway release verify 3f9c --store s3://models/releases --public-keys trusted/
    """
    directory = RunDirectory(run)
    trusted = load_public_keys(public_keys or directory.keys)
    features_dir = features or directory.features

    def verify_folder(folder: Path, expected_id: str | None) -> VerifiedRelease:
        services = services_of_run(features_dir, read_manifest(folder).feature_services, required=features is not None)
        return verify(folder, public_keys=trusted, feature_services=services, expected_id=expected_id)

    if (Path(release) / MANIFEST_FILE).is_file():
        verified = verify_folder(Path(release), None)
    else:
        source = _store(run, store)
        release_id = source.resolve(release)
        with tempfile.TemporaryDirectory(prefix="reelway-verify-") as temporary:
            verified = verify_folder(source.fetch(release_id, Path(temporary), public_keys=trusted), release_id)
    _print_waivers(verified)
    table = Table("check", "result", title=f"release {short_id(verified.manifest.release_id)} may take traffic")
    for check in verified.checks:
        table.add_row(check.name, check.detail)
    stdout_console.print(table)


def fetch_release(
    release: str = RELEASE,
    release_store: str = typer.Option(..., help="Path or URL of the release store (file://, s3://, gs://)."),
    to: Path = typer.Option(..., help="Folder for fetched releases. The release becomes its subfolder `<id>`."),
    verify_it: bool = typer.Option(
        False, "--verify", help="Verify the release as `reelway release verify` does, without a feature store."
    ),
    public_keys: Path | None = typer.Option(
        None, help="Trusted public key (PEM file) or folder with *.public.pem. Required by --verify."
    ),
) -> None:
    """Fetch a release into a local folder and print the folder. The digest of each file is always checked.

    A release that is complete in the folder is not fetched again. Exits with code 6 and the reason if the release is
    rejected.

    Example:

      reelway release fetch 3f9c --release-store s3://models/releases --to /var/cache/releases --verify
      --public-keys trusted/
    """
    if verify_it != (public_keys is not None):
        raise ConfigError("--verify and --public-keys: one is missing; give both or neither")
    source = ReleaseStore(release_store)
    release_id = source.resolve(release)
    keys = load_public_keys(public_keys) if public_keys else None
    folder = source.fetch(release_id, to, public_keys=keys)
    if keys is not None:
        verified = verify(folder, public_keys=keys, feature_services=None, expected_id=release_id)
        print_status(f"release {short_id(release_id)} verified: {len(verified.checks)} checks passed")
        _print_waivers(verified)
    typer.echo(folder)


def fetch_verified(run: RunDirectory, release: str) -> VerifiedRelease:
    """Fetches a release of the run's store to the folder from which the stages load it, and verifies it.

    Waived gates are printed.

    Raises:
        ReleaseError: if the release does not exist or is rejected.
    """
    store = ReleaseStore(str(run.release_store))
    release_id = store.resolve(release)
    keys = load_public_keys(run.keys)
    folder = store.fetch(release_id, run.path / "serving" / "releases", public_keys=keys)
    services = services_of_run(run.features, read_manifest(folder).feature_services, required=False)
    verified = verify(folder, public_keys=keys, feature_services=services, expected_id=release_id)
    print_status(f"release {short_id(release_id)} verified: {len(verified.checks)} checks passed")
    _print_waivers(verified)
    return verified


def _print_waivers(verified: VerifiedRelease) -> None:
    for waiver in verified.manifest.waivers:
        print_status(
            f"[bold yellow]WAIVED:[/] gate {escape(waiver.gate)} failed; {escape(waiver.by)}: {escape(waiver.reason)}"
        )


def services_of_run(
    features_dir: Path, expected: tuple[FeatureServiceRef, ...], *, required: bool
) -> dict[str, str] | None:
    """Returns the digests of the ``wanted`` feature services that the feature store has, by name.

    Args:
        required: whether a folder without a feature store is an error. Otherwise the result is ``None`` then.

    Raises:
        FeatureError: if the store cannot be opened.
    """
    from reelway.platform.features.feast_store import CONFIG_FILE, open_feature_store, registered_services

    if not required and not (features_dir / CONFIG_FILE).exists():
        return None
    return registered_services(open_feature_store(features_dir), [service.name for service in expected])


def _store(run: Path, store: str | None) -> ReleaseStore:
    return ReleaseStore(store or str(RunDirectory(run).release_store.absolute()))


def _print_manifest(manifest: Manifest) -> None:
    stdout_console.print(f"release {manifest.release_id}", soft_wrap=True)  # on one line, so that it can be copied
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
    stdout_console.print(facts)
    gates = Table("gate", "value", "bound", "result", title="Gates")
    waived = {waiver.gate: f"WAIVED by {waiver.by}: {waiver.reason}" for waiver in manifest.waivers}
    for gate in manifest.gates:
        bound = f"{gate.comparison} {gate.bound:.4g}"
        result = "holds" if gate.passed else waived.get(gate.name, "FAILED")
        gates.add_row(gate.name, f"{gate.value:.4g}", bound, escape(result))
    stdout_console.print(gates)
    metrics = Table("metric", "value", title="Metrics")
    for name, metric in sorted(manifest.metrics.items()):
        metrics.add_row(name, f"{metric:.4g}")
    stdout_console.print(metrics)
    files = Table("file", "bytes", "SHA-256", title="Files")
    for name, entry in manifest.files.items():
        files.add_row(name, f"{entry.size_bytes:,}", entry.sha256[:12])
    stdout_console.print(files)
