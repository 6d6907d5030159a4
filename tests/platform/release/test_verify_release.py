"""``verify`` accepts a valid release and rejects every kind of damage with its own message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.support.dimensions import DIMENSIONS
from tests.support.release_files import (
    FEATURE_SERVICES,
    describe_files,
    make_release_folder,
    write_arrow,
    write_ranker,
    write_video_tower,
)

from reelway.platform.contracts import manifest as files
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.contracts.feature_names import VIDEO_DENSE
from reelway.platform.contracts.manifest import Manifest, Waiver
from reelway.platform.contracts.release_files import (
    CREATORS_SCHEMA,
    NEIGHBOURS_SCHEMA,
    POPULAR_SCHEMA,
    videos_schema,
    with_dimensions,
)
from reelway.platform.errors import (
    DigestMismatchError,
    GateFailedError,
    IncompatibleReleaseError,
    ReleaseError,
    ReleaseNotFoundError,
    SignatureError,
)
from reelway.platform.release.dimensions import read_dimensions
from reelway.platform.release.folder import read_manifest, write_manifest
from reelway.platform.release.signing import sign
from reelway.platform.release.verify import VerifiedRelease, verify

KEY = Ed25519PrivateKey.generate()
STRANGER = Ed25519PrivateKey.generate()
EMBEDDING = 8


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "original"
    make_release_folder(folder, videos=64, embedding=EMBEDDING, key=KEY)
    return folder


@pytest.fixture
def release(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "release"))


def verify_folder(folder: Path, **changes: Any) -> VerifiedRelease:
    arguments: dict[str, Any] = {"public_keys": [KEY.public_key()], "feature_services": FEATURE_SERVICES}
    return verify(folder, **(arguments | changes))


def rebuilt(folder: Path, *, key: Ed25519PrivateKey | None = KEY, **changes: Any) -> Manifest:
    """Describes and signs the folder again, as a faulty builder would."""
    body = read_manifest(folder).model_dump() | {"files": describe_files(folder), "signature": None} | changes
    manifest = Manifest.model_validate(body)
    manifest = sign(manifest, key) if key else manifest
    write_manifest(folder, manifest)
    return manifest


def dimensions(folder: Path, **changes: Any) -> dict[str, Any]:
    return read_manifest(folder).dimensions.model_dump() | changes


def test_valid_release_passes_all_checks(release: Path) -> None:
    verified = verify_folder(release, expected_id=read_manifest(release).release_id)
    assert verified.folder == release
    assert verified.manifest.dimensions.videos == 64
    assert [check.name for check in verified.checks] == [
        "manifest", "signature", "gates", "files", "feature services", "tables", "dimensions", "blend and calibration",
    ]  # fmt: skip


@pytest.mark.parametrize("name", files.RELEASE_FILES)
def test_flipped_bit_in_any_file_is_rejected(release: Path, name: str) -> None:
    content = bytearray((release / name).read_bytes())
    content[len(content) // 2] ^= 1
    (release / name).write_bytes(content)
    with pytest.raises(DigestMismatchError, match=f"{name} has SHA-256"):
        verify_folder(release)


@pytest.mark.parametrize("name", files.RELEASE_FILES)
def test_truncated_file_is_rejected(release: Path, name: str) -> None:
    content = (release / name).read_bytes()
    (release / name).write_bytes(content[:-1])
    with pytest.raises(DigestMismatchError, match=f"{name} has {len(content) - 1} bytes"):
        verify_folder(release)


@pytest.mark.parametrize("name", files.RELEASE_FILES)
def test_missing_file_is_rejected(release: Path, name: str) -> None:
    (release / name).unlink()
    with pytest.raises(DigestMismatchError, match=f"lacks {name}"):
        verify_folder(release)


def test_additional_file_is_rejected(release: Path) -> None:
    (release / "ranker.onnx.data").write_text("more weights")
    with pytest.raises(DigestMismatchError, match=r"has ranker\.onnx\.data, which no release has"):
        verify_folder(release)


def test_additional_folder_is_rejected(release: Path) -> None:
    (release / "more").mkdir()
    with pytest.raises(DigestMismatchError, match="has more, which no release has"):
        verify_folder(release)


def test_folder_without_manifest_is_no_release(release: Path) -> None:
    (release / files.MANIFEST_FILE).unlink()
    with pytest.raises(ReleaseNotFoundError, match=r"no manifest\.json"):
        verify_folder(release)


def test_unsigned_release_is_rejected(release: Path) -> None:
    rebuilt(release, key=None)
    with pytest.raises(SignatureError, match="is not signed"):
        verify_folder(release)


def test_release_with_an_untrusted_signature_is_rejected(release: Path) -> None:
    rebuilt(release, key=STRANGER)
    with pytest.raises(SignatureError, match="signed by none of the trusted keys"):
        verify_folder(release)


def test_release_is_accepted_from_any_trusted_key(release: Path) -> None:
    rebuilt(release, key=STRANGER)
    verify_folder(release, public_keys=[KEY.public_key(), STRANGER.public_key()])


def test_empty_list_of_trusted_keys_accepts_no_release(release: Path) -> None:
    with pytest.raises(SignatureError, match="no public key was given"):
        verify_folder(release, public_keys=[])


def test_manifest_changed_after_signing_is_rejected(release: Path) -> None:
    signed = read_manifest(release)
    write_manifest(release, signed.model_copy(update={"metrics": {"recall_at_50": 0.9}}))
    with pytest.raises(SignatureError, match="its manifest was changed"):
        verify_folder(release)


def test_signature_must_be_base64(release: Path) -> None:
    write_manifest(release, read_manifest(release).model_copy(update={"signature": "no signature!"}))
    with pytest.raises(SignatureError, match="not base64"):
        verify_folder(release)


def test_release_with_another_id_is_rejected(release: Path) -> None:
    with pytest.raises(DigestMismatchError, match="expected 000000000000"):
        verify_folder(release, expected_id="0" * 64)


def test_missing_feature_service_is_rejected(release: Path) -> None:
    with pytest.raises(IncompatibleReleaseError, match="no feature service 'training_row_v1'"):
        verify_folder(release, feature_services={"viewer_row_v1": "b" * 64})


def test_feature_service_with_other_fields_is_rejected(release: Path) -> None:
    with pytest.raises(IncompatibleReleaseError, match="'viewer_row_v1' has digest cccccccccccc"):
        verify_folder(release, feature_services=FEATURE_SERVICES | {"viewer_row_v1": "c" * 64})


def test_report_states_that_no_feature_store_was_given(release: Path) -> None:
    checks = {check.name: check.detail for check in verify_folder(release, feature_services=None).checks}
    assert checks["feature services"].startswith("not checked")


def test_failed_gate_is_rejected_with_its_value(release: Path) -> None:
    gates = [
        {"name": "recall_at_50", "value": 0.1, "bound": 0.3, "comparison": ">=", "passed": False},
        {"name": "ece_like", "value": 0.2, "bound": 0.05, "comparison": "<=", "passed": False, "detail": "100 rows"},
        {"name": "coverage", "value": 0.5, "bound": 0.3, "comparison": ">=", "passed": True},
    ]
    rebuilt(release, gates=gates)
    with pytest.raises(GateFailedError) as error:
        verify_folder(release)
    assert str(error.value) == (
        "2 of 3 gates failed: recall_at_50 is 0.1, expected >= 0.3; ece_like is 0.2, expected <= 0.05 (100 rows)"
    )


FAILED_GATE = {"name": "recall_at_50", "value": 0.1, "bound": 0.3, "comparison": ">=", "passed": False}
GOOD_GATE = {"name": "coverage", "value": 0.5, "bound": 0.3, "comparison": ">=", "passed": True}
WAIVER = {"gate": "recall_at_50", "reason": "first week, few events", "by": "ines"}


def test_waived_gate_passes_with_a_warning(release: Path) -> None:
    rebuilt(release, gates=[FAILED_GATE, GOOD_GATE], waivers=[WAIVER])
    checks = [(check.name, check.detail) for check in verify_folder(release).checks]
    assert ("gates", "1 hold, 1 WAIVED") in checks
    assert ("WAIVED", "gate recall_at_50, by ines: first week, few events") in checks


def test_waiver_covers_its_failed_gate_only(release: Path) -> None:
    other = FAILED_GATE | {"name": "ndcg_at_10"}
    rebuilt(release, gates=[FAILED_GATE, other], waivers=[WAIVER])
    with pytest.raises(GateFailedError, match=r"^1 of 2 gates failed: ndcg_at_10 is 0\.1"):
        verify_folder(release)
    rebuilt(release, gates=[GOOD_GATE], waivers=[WAIVER | {"gate": "coverage"}])
    with pytest.raises(GateFailedError, match="did not fail: coverage"):
        verify_folder(release)


def test_waiver_added_after_signing_is_rejected(release: Path) -> None:
    rebuilt(release, gates=[FAILED_GATE])
    body = json.loads((release / "manifest.json").read_text())
    (release / "manifest.json").write_text(json.dumps(body | {"waivers": [WAIVER]}))
    with pytest.raises(SignatureError):
        verify_folder(release)


@pytest.mark.parametrize("field", ["gate", "reason", "by"])
def test_waiver_needs_a_reason(release: Path, field: str) -> None:
    body = json.loads((release / "manifest.json").read_text())
    (release / "manifest.json").write_text(json.dumps(body | {"waivers": [WAIVER | {field: ""}]}))
    with pytest.raises(IncompatibleReleaseError, match=rf"waivers\.0\.{field}"):
        verify_folder(release)


def test_empty_waivers_do_not_change_the_id(release: Path) -> None:
    manifest = read_manifest(release)
    assert b"waivers" not in manifest.canonical_bytes()
    assert manifest.model_copy(update={"waivers": (Waiver(**WAIVER),)}).release_id != manifest.release_id


def test_gate_that_contradicts_its_value_is_rejected(release: Path) -> None:
    rebuilt(release, gates=[{"name": "auc", "value": 0.4, "bound": 0.5, "comparison": ">=", "passed": True}])
    with pytest.raises(GateFailedError, match=r"auc is 0\.4"):
        verify_folder(release)


def test_unknown_schema_version_is_rejected(release: Path) -> None:
    body = json.loads((release / files.MANIFEST_FILE).read_text()) | {"schema_version": 2, "new_field": 1}
    (release / files.MANIFEST_FILE).write_text(json.dumps(body))
    with pytest.raises(IncompatibleReleaseError, match="schema version 2, this version of Reelway reads 1"):
        verify_folder(release)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"schema_version": 1}'])
def test_invalid_manifest_is_rejected(release: Path, content: str) -> None:
    (release / files.MANIFEST_FILE).write_text(content)
    with pytest.raises(ReleaseError, match=r"manifest\.json"):
        verify_folder(release)


def test_manifest_with_an_outside_path_is_rejected(release: Path) -> None:
    body = json.loads((release / files.MANIFEST_FILE).read_text())
    body["files"]["../secret"] = body["files"][files.BLEND_FILE]
    (release / files.MANIFEST_FILE).write_text(json.dumps(body))
    with pytest.raises(DigestMismatchError, match=r"\.\./secret, which no release has"):
        verify_folder(release)


def _vectors(folder: Path, count: int, width: int) -> None:
    index = faiss.IndexFlatIP(width)
    index.add(np.eye(count, width, dtype=np.float32))
    faiss.write_index(index, str(folder / files.INDEX_FILE))


def _euclidean(folder: Path) -> None:
    index = faiss.IndexFlatL2(EMBEDDING)
    index.add(np.eye(64, EMBEDDING, dtype=np.float32))
    faiss.write_index(index, str(folder / files.INDEX_FILE))


def _other_tower(folder: Path) -> None:
    make_release_folder(folder.parent / "wide", videos=64, embedding=12)
    shutil.copyfile(folder.parent / "wide" / files.VIEWER_TOWER_FILE, folder / files.VIEWER_TOWER_FILE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: _vectors(folder, 63, EMBEDDING), "number of vectors is 63, the manifest says 64"),
        (lambda folder: _vectors(folder, 64, 16), "width of its vectors is 16, the manifest says 8"),
        (_euclidean, "another distance than the inner product"),
        (_other_tower, "width of its output is 12, the manifest says 8"),
        (
            lambda folder: shutil.copyfile(folder / files.VIEWER_TOWER_FILE, folder / files.VIDEO_TOWER_FILE),
            "video_tower.onnx does not take .*video_codes",
        ),
        (
            lambda folder: write_video_tower(folder / files.VIDEO_TOWER_FILE, 4),
            "video_tower.onnx: width of its output is 4, the manifest says 8",
        ),
        (
            lambda folder: write_ranker(folder / files.RANKER_FILE, 4, np.random.default_rng(0)),
            "width of viewer_embedding is 4, the manifest says 8",
        ),
        (
            lambda folder: shutil.copyfile(folder / files.VIEWER_TOWER_FILE, folder / files.RANKER_FILE),
            "does not take .*video_dense",
        ),
        (lambda folder: (folder / files.RANKER_FILE).write_text("no graph"), "not a graph that ONNX Runtime can open"),
        (lambda folder: (folder / files.INDEX_FILE).write_text("no index"), "not an index that FAISS can open"),
    ],
)
def test_graphs_that_contradict_the_manifest_are_rejected(
    release: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(release)
    rebuilt(release)
    with pytest.raises(IncompatibleReleaseError, match=message):
        verify_folder(release)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": 16}, "'embedding' is fixed_size_list.*8"),
        ({"videos": 65}, "videos.arrow has 64 rows, the manifest says 65"),
        ({"features": replace(DIMENSIONS, text=512)}, "was written with .*text=32.*the manifest says .*text=512"),
        ({"viewer_dense": 3}, "has viewer_dense 3, this version of Reelway expects"),
        ({"video_dense": len(VIDEO_DENSE) + 1}, "has video_dense"),
        ({"tasks": ("long_watch",)}, "has tasks"),
    ],
)
def test_dimensions_that_contradict_the_files_are_rejected(release: Path, change: dict[str, Any], message: str) -> None:
    rebuilt(release, dimensions=dimensions(release, **change))
    with pytest.raises(IncompatibleReleaseError, match=message):
        verify_folder(release)


def test_history_length_that_contradicts_the_tower_is_rejected(release: Path) -> None:
    with_features(release, replace(DIMENSIONS, history_length=20))
    with pytest.raises(IncompatibleReleaseError, match="width of history_weights is 50, the manifest says 20"):
        verify_folder(release)


def test_topics_that_contradict_the_inputs_are_rejected(release: Path) -> None:
    with_features(release, replace(DIMENSIONS, topics=40))
    with pytest.raises(IncompatibleReleaseError, match="has viewer_dense 57, this version of Reelway expects 65"):
        verify_folder(release)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("id_buckets", 100, r"column creator_codes: value \d+ is outside 0\.\.99"),
        ("category_buckets", 3, r"column video_categories \(language\): value \d+ is outside 0\.\.2"),
    ],
)
def test_code_outside_its_vocabulary_is_rejected(release: Path, field: str, value: int, message: str) -> None:
    with_features(release, replace(DIMENSIONS, **{field: value}))
    with pytest.raises(IncompatibleReleaseError, match=message):
        verify_folder(release)


def with_features(folder: Path, features: FeatureDimensions) -> None:
    """Records other feature dimensions in the video table and the manifest; all other files are unchanged."""
    table = _table(folder, files.VIDEOS_FILE)
    write_arrow(folder / files.VIDEOS_FILE, table.cast(with_dimensions(videos_schema(EMBEDDING), features)))
    rebuilt(folder, dimensions=dimensions(folder, features=features))


def _table(folder: Path, name: str) -> pa.Table:
    return pa.ipc.open_file(folder / name).read_all()


def _drop_title(folder: Path) -> None:
    write_arrow(folder / files.VIDEOS_FILE, _table(folder, files.VIDEOS_FILE).drop_columns(["title"]))


def _wider_rank(folder: Path) -> None:
    table = _table(folder, files.POPULAR_FILE)
    write_arrow(
        folder / files.POPULAR_FILE, table.cast(POPULAR_SCHEMA.set(1, pa.field("rank", pa.int64(), nullable=False)))
    )


def _backwards(folder: Path) -> None:
    table = _table(folder, files.VIDEOS_FILE)
    write_arrow(folder / files.VIDEOS_FILE, table.take(np.arange(table.num_rows)[::-1]))


def _unknown_popular(folder: Path) -> None:
    table = _table(folder, files.POPULAR_FILE)
    ids = pa.array(np.full(table.num_rows, 999_999), pa.int64())
    write_arrow(folder / files.POPULAR_FILE, table.set_column(2, POPULAR_SCHEMA.field("video_id"), ids))


def _far_neighbour(folder: Path, name: str = files.NEIGHBOURS_FILE) -> None:
    table = _table(folder, name)
    kind = NEIGHBOURS_SCHEMA.field("rows").type
    rows = pa.FixedSizeListArray.from_arrays(pa.array(np.full(64 * kind.list_size, 64), pa.int32()), kind.list_size)
    write_arrow(folder / name, table.set_column(1, NEIGHBOURS_SCHEMA.field("rows"), rows))


def _far_creator_video(folder: Path) -> None:
    table = _table(folder, files.CREATORS_FILE)
    field = CREATORS_SCHEMA.field("best")
    size = field.type.list_size
    rows = pa.FixedSizeListArray.from_arrays(pa.array(np.full(table.num_rows * size, 64), pa.int32()), size)
    write_arrow(folder / files.CREATORS_FILE, table.set_column(2, field, rows))


def _missing_creator(folder: Path) -> None:
    write_arrow(folder / files.CREATORS_FILE, _table(folder, files.CREATORS_FILE).slice(1))


def _long_embedding(folder: Path) -> None:
    table = _table(folder, files.VIDEOS_FILE)
    doubled = pa.FixedSizeListArray.from_arrays(pa.array(np.full(64 * EMBEDDING, 2.0), pa.float32()), EMBEDDING)
    place = table.schema.get_field_index("embedding")
    write_arrow(
        folder / files.VIDEOS_FILE, table.set_column(place, videos_schema(EMBEDDING).field("embedding"), doubled)
    )


def _two_batches(folder: Path) -> None:
    table = _table(folder, files.VIDEOS_FILE)
    with (
        pa.OSFile(str(folder / files.VIDEOS_FILE), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_title, "column 'title' is missing"),
        (_wider_rank, "column 'rank' is int64"),
        (_backwards, "video_id does not ascend"),
        (_unknown_popular, "lists video 999999"),
        (_far_neighbour, r"neighbours.arrow points to rows 64\.\.64, expected -1\.\.63"),
        (
            lambda folder: _far_neighbour(folder, files.CONTENT_NEIGHBOURS_FILE),
            r"content_neighbours.arrow points to rows 64\.\.64, expected -1\.\.63",
        ),
        (_far_creator_video, r"creators.arrow points to rows 64\.\.64, expected -1\.\.63"),
        (_missing_creator, "creators.arrow does not list the creators"),
        (_long_embedding, "embedding has length"),
        (_two_batches, "has 2 record batches"),
        (lambda folder: (folder / files.VIDEOS_FILE).write_text("no table"), "not an Arrow IPC file"),
    ],
)
def test_invalid_tables_are_rejected(release: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(release)
    rebuilt(release)
    with pytest.raises(IncompatibleReleaseError, match=message):
        verify_folder(release)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (files.BLEND_FILE, "retrieval: {quotas: {ann: 0.5}}", "quotas sum to 0.5, expected 1"),
        (files.BLEND_FILE, "retrieval: [", r"blend\.yaml cannot be read"),
        (files.BLEND_FILE, "rankin: {}", r"rankin"),
        (
            files.CALIBRATION_FILE,
            '{"curves": {"like": {"method": "platt", "probability": [0, 1], "rate": [0.5, 0.1]}}}',
            "rate decreases",
        ),
        (files.CALIBRATION_FILE, "{", r"calibration\.json cannot be read"),
    ],
)
def test_invalid_blend_or_calibration_is_rejected(release: Path, name: str, content: str, message: str) -> None:
    (release / name).write_text(content)
    rebuilt(release)
    with pytest.raises(IncompatibleReleaseError, match=message):
        verify_folder(release)


def test_verify_accepts_another_reader_of_dimensions(release: Path) -> None:
    elsewhere = read_dimensions(release)
    assert verify_folder(release, read_dimensions=lambda _: elsewhere).manifest == read_manifest(release)


def test_missing_runtime_error_names_the_package(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ReleaseError, match=r"onnxruntime is not installed; install it with .*\[verify\]"):
        verify_folder(release)
