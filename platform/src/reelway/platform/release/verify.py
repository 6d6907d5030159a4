"""Decides whether a release may take traffic, by the same checks in local mode and on a cluster.

A release is rejected if it was changed, no trusted key signed it, its files or dimensions disagree, the feature store
lacks its feature services, or a gate failed and is not waived.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ValidationError

from reelway.platform.contracts.blend import Blend
from reelway.platform.contracts.calibration import Calibration
from reelway.platform.contracts.feature_names import RANKER_TASKS, VIDEO_DENSE
from reelway.platform.contracts.ids import short_id
from reelway.platform.contracts.manifest import (
    BLEND_FILE,
    CALIBRATION_FILE,
    Dimensions,
    FeatureServiceRef,
    GateResult,
    Manifest,
    Waiver,
)
from reelway.platform.errors import DigestMismatchError, GateFailedError, IncompatibleReleaseError
from reelway.platform.release.dimensions import DimensionReader, dimension_mismatches, read_dimensions
from reelway.platform.release.folder import check_files, first_validation_error, read_manifest
from reelway.platform.release.signing import check_signature, fingerprint
from reelway.platform.release.tables import check_tables

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class PassedCheck:
    """One line of the report: name and result of a check."""

    name: str
    detail: str


@dataclass(frozen=True)
class VerifiedRelease:
    """A release that passed all checks."""

    manifest: Manifest
    folder: Path
    checks: tuple[PassedCheck, ...]


def verify(
    folder: Path,
    *,
    public_keys: Sequence[Ed25519PublicKey],
    feature_services: Mapping[str, str] | None,
    expected_id: str | None = None,
    read_dimensions: DimensionReader = read_dimensions,
) -> VerifiedRelease:
    """Checks a release folder completely, cheap and decisive checks first.

    Args:
        folder: local folder from ``ReleaseStore.fetch``.
        public_keys: trusted keys; one of them must have signed the release.
        feature_services: name -> digest in the feature store; None if there is no store, which the report then states.
        expected_id: id of the requested release.
        read_dimensions: reader of graphs and index; replaced where their libraries are not installed.

    Raises:
        DigestMismatchError: if the id, a file, or the set of files is not what was signed.
        SignatureError: if there is no signature, or none by a trusted key.
        GateFailedError: if a quality gate failed and is not waived.
        IncompatibleReleaseError: if schema version, tables, graphs, index, blend, calibration or feature services
            disagree.
        ReleaseNotFoundError: if the folder has no manifest.
    """
    manifest = read_manifest(folder)
    checks = list(verify_manifest(manifest, public_keys=public_keys, expected_id=expected_id))

    def passed(name: str, detail: str) -> None:
        checks.append(PassedCheck(name, detail))

    check_files(folder, manifest)
    size_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    passed("files", f"{len(manifest.files)} with their digests, {size_bytes / 1e6:.1f} MB")
    if feature_services is None:
        passed("feature services", "not checked: no feature store was given")
    else:
        check_feature_services(manifest.feature_services, feature_services)
        passed("feature services", ", ".join(service.name for service in manifest.feature_services))
    checks += verify_content(folder, manifest, read_dimensions)
    return VerifiedRelease(manifest, folder, tuple(checks))


def verify_content(
    folder: Path, manifest: Manifest, read_dimensions: DimensionReader = read_dimensions
) -> tuple[PassedCheck, ...]:
    """Checks tables, graphs, index, blend and calibration of a folder whose digests were checked.

    Raises:
        IncompatibleReleaseError: if one of them disagrees with the manifest's dimensions or with another one.
    """
    declared = manifest.dimensions
    check_tables(folder, declared)
    if problems := dimension_mismatches(declared, read_dimensions(folder)):
        raise IncompatibleReleaseError(
            f"release {short_id(manifest.release_id)}: {'; '.join(problems)}; build it again"
        )
    read_blend(folder)
    read_calibration(folder)
    return (
        PassedCheck("tables", f"{declared.videos} videos"),
        PassedCheck("dimensions", f"embedding {declared.embedding}, {len(declared.tasks)} tasks"),
        PassedCheck("blend and calibration", "valid"),
    )


def verify_manifest(
    manifest: Manifest, *, public_keys: Sequence[Ed25519PublicKey], expected_id: str | None = None
) -> tuple[PassedCheck, ...]:
    """Checks what the manifest alone shows: id, signature, gates, and that this version can serve the release.

    The operator calls it before a rollout starts, ``verify`` before it reads the files.

    Raises:
        DigestMismatchError: if the id is another one.
        SignatureError: if there is no signature, or none by a trusted key.
        GateFailedError: if a quality gate failed and is not waived.
        IncompatibleReleaseError: if this version of Reelway assembles other inputs.
    """
    check_id(manifest, expected_id)
    key = check_signature(manifest, public_keys)
    waived = check_gates(manifest.gates, manifest.waivers)
    check_contract(manifest.dimensions)
    return (
        PassedCheck("manifest", f"{manifest.name}, id {short_id(manifest.release_id)}"),
        PassedCheck("signature", f"by key {fingerprint(key)}"),
        PassedCheck(
            "gates", f"{len(manifest.gates) - len(waived)} hold" + (f", {len(waived)} WAIVED" if waived else "")
        ),
        *(PassedCheck("WAIVED", f"gate {waiver.gate}, by {waiver.by}: {waiver.reason}") for waiver in waived),
    )


def read_blend(folder: Path) -> Blend:
    """Reads ``blend.yaml`` of a release folder.

    Raises:
        IncompatibleReleaseError: if the file is not YAML or not a valid blend.
    """
    return _read_model(folder / BLEND_FILE, Blend, yaml.safe_load)


def read_calibration(folder: Path) -> Calibration:
    """Reads ``calibration.json`` of a release folder.

    Raises:
        IncompatibleReleaseError: if the file is not JSON or not a valid calibration.
    """
    return _read_model(folder / CALIBRATION_FILE, Calibration, json.loads)


def check_id(manifest: Manifest, expected_id: str | None) -> None:
    """Checks the id of the manifest.

    Raises:
        DigestMismatchError: if the ids differ.
    """
    if expected_id is not None and manifest.release_id != expected_id:
        raise DigestMismatchError(
            f"the manifest has id {short_id(manifest.release_id)}..., expected {short_id(expected_id)}...; "
            "it was changed, or the folder holds another release"
        )


def check_gates(gates: Sequence[GateResult], waivers: Sequence[Waiver] = ()) -> tuple[Waiver, ...]:
    """Checks that every gate passed or is waived, and that a passed gate's value is within its bound.

    Returns:
        The waivers, each of a failed gate.

    Raises:
        GateFailedError: if a gate failed and is not waived, or a waiver names a gate that did not fail.
    """
    waived = {waiver.gate for waiver in waivers}
    failing = [gate for gate in gates if not gate.passed or not _gate_holds(gate)]
    if idle := sorted(waived - {gate.name for gate in failing}):
        raise GateFailedError(
            f"waivers of gates that did not fail: {', '.join(idle)}; failed gates: "
            f"{', '.join(gate.name for gate in failing) or 'none'}"
        )
    if failed := [gate for gate in failing if gate.name not in waived]:
        listed = "; ".join(
            f"{gate.name} is {gate.value:g}, expected {gate.comparison} {gate.bound:g}"
            + (f" ({gate.detail})" if gate.detail else "")
            for gate in failed
        )
        raise GateFailedError(f"{len(failed)} of {len(gates)} gates failed: {listed}")
    return tuple(waivers)


def check_feature_services(required: Sequence[FeatureServiceRef], present: Mapping[str, str]) -> None:
    """Checks that the feature store has the feature services that the release was trained on.

    Raises:
        IncompatibleReleaseError: if a service is missing, or its views, fields, types or widths differ.
    """
    for service in required:
        if service.name not in present:
            raise IncompatibleReleaseError(
                f"the feature store has no feature service {service.name!r}, which the release needs; it has "
                f"{', '.join(sorted(present)) or 'none'}; register it with `reelway features`"
            )
        if present[service.name] != service.digest:
            raise IncompatibleReleaseError(
                f"feature service {service.name!r} has digest {present[service.name][:12]}... in the store, the "
                f"release was trained with {service.digest[:12]}...; its views, fields, types or widths "
                "changed: train again"
            )


def check_contract(declared: Dimensions) -> None:
    """Checks that this version of Reelway assembles the inputs that the release's graphs take.

    Raises:
        IncompatibleReleaseError: if the number of features or the tasks differ.
    """
    for name, actual, expected in (
        ("viewer_dense", declared.viewer_dense, len(declared.features.viewer_dense)),
        ("video_dense", declared.video_dense, len(VIDEO_DENSE)),
        ("tasks", declared.tasks, RANKER_TASKS),
    ):
        if actual != expected:
            raise IncompatibleReleaseError(
                f"the release has {name} {actual}, this version of Reelway expects {expected}; build it again with it"
            )


def _gate_holds(gate: GateResult) -> bool:
    return gate.value >= gate.bound if gate.comparison == ">=" else gate.value <= gate.bound


def _read_model(path: Path, model: type[Model], parse: Callable[[str], object]) -> Model:
    try:
        return model.model_validate(parse(path.read_text()))
    except ValidationError as error:
        raise IncompatibleReleaseError(f"{path} is invalid: {first_validation_error(error)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise IncompatibleReleaseError(f"{path} cannot be read: {error}") from error
