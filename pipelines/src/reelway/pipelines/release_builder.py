"""Builds a release from trained models: export, tables, manifest, signature, verification, store.

A release is built if all gates passed, or if each failed gate is waived by name and with a reason; the waivers are part
of the signed manifest. The release is verified before it enters the store, so the store holds no release that serving
would reject. A failure leaves no files.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from pydantic import ValidationError

from reelway.pipelines import content_tables, search_index
from reelway.pipelines import release_tables as parts
from reelway.pipelines.features.training_rows import LABELS_FILE, video_snapshot, viewer_snapshot
from reelway.platform.contracts import manifest as names
from reelway.platform.contracts.blend import Blend
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.contracts.feature_names import RANKER_TASKS, TRAINING_SERVICE, VIDEO_DENSE, VIEWER_SERVICE
from reelway.platform.contracts.ids import ReleaseId
from reelway.platform.contracts.manifest import (
    Dimensions,
    FeatureServiceRef,
    GateResult,
    Manifest,
    TrainingWindow,
    Waiver,
)
from reelway.platform.errors import EmptyDatasetError, MalformedFileError, ReelwayError, ReleaseError, StorageError
from reelway.platform.features.assembly import (
    VideoArrays,
    ViewerArrays,
    assemble_videos,
    assemble_viewers,
    columns_from_table,
)
from reelway.platform.features.feast_store import feature_service_digest, open_feature_store
from reelway.platform.release.folder import describe_files, first_validation_error, write_manifest
from reelway.platform.release.signing import sign
from reelway.platform.release.store import ReleaseStore
from reelway.platform.release.verify import check_gates, verify
from reelway.platform.run_directory import RunDirectory

if TYPE_CHECKING:
    from reelway.pipelines.training.artifacts import TrainedModels

EVALUATION_FILE: Final = "evaluation.json"
SAMPLE_VIEWERS: Final = 64
SAMPLE_VIDEOS: Final = 256
GRID_S: Final = 3600.0

ProgressCallback = Callable[[str], None]


@dataclass(frozen=True)
class EvaluationSummary:
    """Result of ``reelway evaluate``: finite metrics, names of undefined metrics, gates."""

    metrics: dict[str, float]
    undefined: list[str]
    gates: tuple[GateResult, ...]


def _ignore_progress(_: str) -> None:
    return None


def build_release(
    run: RunDirectory,
    *,
    name: str,
    key: Ed25519PrivateKey,
    store: ReleaseStore | None = None,
    parent: str | None = None,
    blend: Blend | None = None,
    index: str = search_index.AUTO_INDEX,
    waivers: Sequence[Waiver] = (),
    on_progress: ProgressCallback = _ignore_progress,
) -> ReleaseId:
    """Builds, signs, verifies and stores a release of a run that was trained and evaluated.

    Args:
        name: display name; the id is the digest of the manifest.
        key: signing key.
        store: release store; by default the run's.
        parent: id of the release that this one replaces.
        blend: content of ``blend.yaml``; by default the defaults of ``Blend``.
        index: FAISS factory string, or ``auto`` (by the number of videos).
        waivers: waivers of failed gates.
        on_progress: callback that receives the name of each step.

    Returns:
        The id of the release.

    Raises:
        GateFailedError: if a gate failed and is not waived; nothing is written.
        ReleaseError: if an exported graph differs from its model, or ``verify`` rejects the release.
        StorageError: if the disk is full; no partial release is visible.
    """
    evaluation = read_evaluation(run.evaluation / EVALUATION_FILE)
    check_gates(evaluation.gates, waivers)
    from reelway.pipelines.training.artifacts import load_models

    models = load_models(run.models)
    services = required_feature_services(run.features)
    store = store or ReleaseStore(str(run.release_store.absolute()))
    with staging_directory(run.path) as folder:
        facts = _write_tables_and_models(folder, run, models, blend or Blend(), index, on_progress)
        manifest = Manifest(
            name=name,
            parent=parent,
            created_at=datetime.now(UTC),
            code_version=version("reelway-platform"),
            seed=models.info.seed,
            training_window=_window(models, facts.until_s),
            feature_services=services,
            dimensions=facts.dimensions,
            metrics=evaluation.metrics,
            gates=evaluation.gates,
            waivers=tuple(waivers),
            files=describe_files(folder),
            config={
                "training": models.info.config,
                "notes": models.info.notes,
                "index": facts.index,
                "index_recall": facts.index_recall,
                "video_features_as_of_s": facts.until_s,
                "undefined_metrics": evaluation.undefined,
            },
        )
        on_progress("verifying")
        return sign_verify_and_store(folder, manifest, key, store)


def sign_verify_and_store(folder: Path, manifest: Manifest, key: Ed25519PrivateKey, store: ReleaseStore) -> ReleaseId:
    """Signs a release folder, verifies it and writes it to the store.

    Raises:
        ReleaseError: if ``verify`` rejects the release; it does not enter the store.
    """
    signed = sign(manifest, key)
    write_manifest(folder, signed)
    verify(
        folder,
        public_keys=[key.public_key()],
        feature_services={service.name: service.digest for service in manifest.feature_services},
        expected_id=signed.release_id,
    )
    return store.write(folder, signed)


def read_evaluation(path: Path) -> EvaluationSummary:
    """Reads metrics and gates of a finished evaluation.

    Raises:
        ReleaseError: if the file does not exist.
        MalformedFileError: if ``reelway evaluate`` did not write the file.
    """
    try:
        body = json.loads(path.read_text())
        gates = tuple(GateResult.model_validate(gate) for gate in body["gates"])
        metrics: dict[str, Any] = dict(body["metrics"])
        undefined = sorted(name for name, value in metrics.items() if value is None or not math.isfinite(value))
    except FileNotFoundError:
        raise ReleaseError(
            f"{path} does not exist; run `reelway evaluate --run {path.parent.parent}` before building a release"
        ) from None
    except ValidationError as error:
        raise MalformedFileError(
            path, "gates as `reelway evaluate` writes them", seen=first_validation_error(error)
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise MalformedFileError(path, "an object with 'metrics' and 'gates'", seen=repr(error)) from error
    return EvaluationSummary(
        {name: float(value) for name, value in metrics.items() if name not in undefined}, undefined, gates
    )


def load_blend_file(path: Path) -> Blend:
    """Reads a blend from a YAML file.

    Raises:
        MalformedFileError: if the file is not YAML or not a valid blend.
    """
    try:
        return Blend.model_validate(yaml.safe_load(path.read_text()) or {})
    except ValidationError as error:
        raise MalformedFileError(
            path, "a blend (see contracts/blend.py)", seen=first_validation_error(error)
        ) from error
    except (OSError, yaml.YAMLError) as error:
        raise MalformedFileError(path, "a YAML file", seen=str(error)) from error


def required_feature_services(features_dir: Path) -> tuple[FeatureServiceRef, ...]:
    """Returns the feature services that a release depends on, with their present digests."""
    store = open_feature_store(features_dir)
    return tuple(
        FeatureServiceRef(name=name, digest=feature_service_digest(store, name))
        for name in (TRAINING_SERVICE, VIEWER_SERVICE)
    )


@dataclass(frozen=True)
class _TablesSummary:
    """Manifest values that are known once the files are written."""

    dimensions: Dimensions
    index: str
    index_recall: float | None  # relative to the exact search; None if the index is exact
    until_s: float


def _write_tables_and_models(
    folder: Path, run: RunDirectory, models: TrainedModels, blend: Blend, index: str, on_progress: ProgressCallback
) -> _TablesSummary:
    from reelway.pipelines.training.inference import embed_videos, embed_viewers

    on_progress("reading the videos")
    labels = _read_columns(
        run.features / LABELS_FILE, ["viewer_id", "video_id", "event_time", "outcome_time", "long_watch"]
    )
    viewers = _read_columns(run.dataset / "viewers.parquet", ["viewer_id", "region"])
    if not labels.num_rows:
        raise EmptyDatasetError(
            f"{run.features / LABELS_FILE} has no impressions; run `reelway features` on a data set with impressions"
        )
    until_s = _snapshot_time_s(labels)
    snapshot = video_snapshot(run.features, until_s)
    if not snapshot.num_rows:
        raise EmptyDatasetError(f"{run.features} has no video that was uploaded before the last event; import videos")
    video_id = snapshot["video_id"].to_numpy()
    videos = assemble_videos(columns_from_table(snapshot), np.full(len(video_id), until_s), models.dimensions)
    embedding_ND = embed_videos(models.two_tower, videos)
    parts.write_videos(folder / names.VIDEOS_FILE, snapshot, videos, embedding_ND, models.dimensions)

    on_progress("building the index")
    searchable = search_index.make_index(embedding_ND, index)

    on_progress("ranking what is popular and what goes together")
    watches = parts.LongWatches.from_labels(labels, viewers, video_id)
    parts.write_popular(folder / names.POPULAR_FILE, video_id, parts.popular_lists(watches, len(video_id)))
    together_NK = parts.neighbours(embedding_ND, searchable, watches)
    parts.write_neighbours(folder / names.NEIGHBOURS_FILE, video_id, together_NK)
    _write_content_tables(folder, video_id, snapshot, videos, embedding_ND, watches)

    sample = _sample_viewers(run, labels, until_s, models.dimensions)
    recall = search_index.tune_probes(
        searchable, embedding_ND, embed_viewers(models.two_tower, sample), blend.retrieval.candidates
    )
    search_index.write_index(folder / names.INDEX_FILE, searchable)

    on_progress("exporting the models")
    _export(folder, models, sample, columns_from_table(snapshot.slice(0, SAMPLE_VIDEOS)), embedding_ND, until_s)
    (folder / names.BLEND_FILE).write_text(yaml.safe_dump(blend.model_dump(mode="json"), sort_keys=False))
    (folder / names.CALIBRATION_FILE).write_text(models.calibration.model_dump_json(indent=2) + "\n")
    dimensions = Dimensions(
        features=models.dimensions,
        embedding=embedding_ND.shape[1],
        viewer_dense=len(models.dimensions.viewer_dense),
        video_dense=len(VIDEO_DENSE),
        videos=len(video_id),
        tasks=RANKER_TASKS,
    )
    return _TablesSummary(
        dimensions, search_index.index_factory(len(video_id), embedding_ND.shape[1], index), recall, until_s
    )


def _write_content_tables(
    folder: Path,
    video_id: NDArray[np.int64],
    snapshot: pa.Table,
    videos: VideoArrays,
    embedding_ND: NDArray[np.float32],
    watches: parts.LongWatches,
) -> None:
    """Writes the tables of the sources by content and by creator."""
    content_NV = content_tables.content_vectors([videos.visual, videos.audio, videos.text])
    similar_NK = content_tables.content_neighbours(content_NV)
    parts.write_neighbours(folder / names.CONTENT_NEIGHBOURS_FILE, video_id, similar_NK)
    creator_N = pc.fill_null(snapshot["creator_id"], -1).to_numpy().astype(np.int64)
    creators = np.unique(creator_N[creator_N >= 0])
    uploaded_at_s = snapshot["uploaded_at_s"].to_numpy()
    watches_N = np.bincount(watches.row, minlength=len(video_id)).astype(np.float64)
    content_tables.write_creators(
        folder / names.CREATORS_FILE,
        creators,
        content_tables.similar_creators(embedding_ND, creator_N, creators),
        content_tables.best_videos(creator_N, watches_N, uploaded_at_s, creators),
    )


def _export(
    folder: Path,
    models: TrainedModels,
    viewers: ViewerArrays,
    video_columns: Any,
    embedding_ND: NDArray[np.float32],
    until_s: float,
) -> None:
    """Exports all graphs and compares each with its model on real rows."""
    from reelway.pipelines.training.export import export_ranker, export_video_tower, export_viewer_tower
    from reelway.pipelines.training.inference import embed_viewers, ranker_inputs

    export_viewer_tower(models.two_tower, folder / names.VIEWER_TOWER_FILE, viewers)
    viewer = ViewerArrays(**{name: values[:1] for name, values in vars(viewers).items()})
    rows = min(SAMPLE_VIDEOS, len(embedding_ND))
    videos = assemble_videos(video_columns, np.full(rows, until_s), models.dimensions)
    export_video_tower(models.two_tower, folder / names.VIDEO_TOWER_FILE, videos)
    inputs = ranker_inputs(viewer, embed_viewers(models.two_tower, viewer), videos, embedding_ND[:rows])
    export_ranker(models.ranker, folder / names.RANKER_FILE, inputs)


def _sample_viewers(run: RunDirectory, labels: pa.Table, until_s: float, dimensions: FeatureDimensions) -> ViewerArrays:
    """Returns the inputs of the latest viewers at the end of the data."""
    latest = labels["viewer_id"].to_numpy()[::-1][: 100 * SAMPLE_VIEWERS]
    chosen = np.unique(latest)[:SAMPLE_VIEWERS]
    table = viewer_snapshot(run.features, chosen, until_s)
    devices = ["unknown"] * len(chosen)
    return assemble_viewers(columns_from_table(table), np.full(len(chosen), until_s), devices, dimensions)


def _snapshot_time_s(labels: pa.Table) -> float:
    """Returns the first full hour at which all events are known; feature views are computed on this grid."""
    last_us = max(int(labels[name].cast(pa.int64()).to_numpy().max()) for name in ("event_time", "outcome_time"))
    return math.ceil((last_us + 1) / 1e6 / GRID_S) * GRID_S


def _window(models: TrainedModels, until_s: float) -> TrainingWindow:
    start_s, end_s = models.info.window_start_s, models.info.window_end_s
    end_s = end_s if math.isfinite(end_s) else until_s
    return TrainingWindow(start=datetime.fromtimestamp(start_s, UTC), end=datetime.fromtimestamp(end_s, UTC))


def _read_columns(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(columns))
    except FileNotFoundError:
        raise MalformedFileError(
            path, "a file of an earlier step; run `reelway features`", seen="no such file"
        ) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise MalformedFileError(path, f"a Parquet file with {list(columns)}", seen=str(error)) from error


@contextmanager
def staging_directory(parent: Path) -> Iterator[Path]:
    """Yields a temporary folder that is removed afterwards; an ``OSError`` within becomes a ``StorageError``."""
    try:
        with tempfile.TemporaryDirectory(prefix=".release.", dir=parent) as name:
            yield Path(name)
    except ReelwayError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write a release under {parent}: {error.strerror or error}; no partial files are left"
        ) from error
