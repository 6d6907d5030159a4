"""A small complete release on disk for tests and benchmarks: ONNX graphs that run, a FAISS index, Arrow tables.

The graphs are not trained, but their results are meaningful. A viewer's embedding is the weighted mean of the watched
videos, so retrieval returns videos of the same topics. The ranker's outputs depend on every input. ``verify`` accepts
the folder as it accepts a built release.
"""

# Shapes: N videos, D embedding, B viewers, C candidates, L history, H hashes, K tasks

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnx
import pyarrow as pa
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tests.support.dimensions import DIMENSIONS

from reelway.platform.contracts import feature_names as names
from reelway.platform.contracts import manifest as files
from reelway.platform.contracts.blend import Blend
from reelway.platform.contracts.calibration import Calibration, CalibrationCurve
from reelway.platform.contracts.manifest import Manifest
from reelway.platform.contracts.release_files import (
    CREATORS_SCHEMA,
    NEIGHBOURS_PER_VIDEO,
    NEIGHBOURS_SCHEMA,
    POPULAR_SCHEMA,
    SIMILAR_CREATORS,
    VIDEOS_PER_CREATOR,
    videos_schema,
    with_dimensions,
)
from reelway.platform.features.hashing import category_codes, id_codes

F32 = NDArray[np.float32]

NOW_S = 1_718_000_000.0
"""Default creation time of the release: 2024-06-10 06:13:20 UTC."""
FEATURE_SERVICES = {names.TRAINING_SERVICE: "a" * 64, names.VIEWER_SERVICE: "b" * 64}
LANGUAGES = ("en", "de", "hi", "pt")
REGIONS = ("eu", "us")
OPSET = 17


class _OnnxGraphBuilder:
    """Nodes and constants of one ONNX graph under construction."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype=dtype), name))
        return name

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def dense(self, name: str, weights: F32) -> str:
        """Raw numbers, NaN for missing values -> signed logarithm -> linear layer."""
        known = self.op("Where", self.op("IsNaN", name), self.constant(0.0), name)
        log = self.op("Log", self.op("Add", self.op("Abs", known), self.constant(1.0)))
        return self.op("MatMul", self.op("Mul", self.op("Sign", known), log), self.constant(weights))

    def codes(self, name: str, table: F32) -> str:
        """Codes ``[..., F] -> [..., width]``: the mean of their rows."""
        rows = self.op("Gather", self.constant(table), name, axis=0)
        return self.op("ReduceMean", rows, axes=[-2], keepdims=0)

    def total(self, *terms: str, output: str) -> str:
        """Adds values that broadcast together."""
        return self.op("Sum", *terms, output=output)

    def save(self, path: Path, inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]) -> None:
        def value(name: str, shape: list[Any]) -> onnx.ValueInfoProto:
            integers = name.endswith(("_codes", "_categories"))
            return helper.make_tensor_value_info(name, TensorProto.INT64 if integers else TensorProto.FLOAT, shape)

        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [value(*item) for item in inputs.items()],
            [value(*item) for item in outputs.items()],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString())


def viewer_tower_inputs(batch: int | str = "viewers") -> dict[str, list[Any]]:
    """Input name -> shape of ``viewer_tower.onnx``."""
    return {
        "viewer_dense": [batch, len(DIMENSIONS.viewer_dense)],
        "viewer_categories": [batch, len(names.VIEWER_CATEGORIES)],
        "history_codes": [batch, DIMENSIONS.history_length, names.ID_HASHES],
        "history_weights": [batch, DIMENSIONS.history_length],
        "history_age_h": [batch, DIMENSIONS.history_length],
    }


def ranker_inputs(embedding: int, candidates: int | str = "candidates") -> dict[str, list[Any]]:
    """Input name -> shape of ``ranker.onnx``: the viewer's rows once per request, a row for each candidate."""
    return {
        "viewer_dense": [1, len(DIMENSIONS.viewer_dense)],
        "viewer_categories": [1, len(names.VIEWER_CATEGORIES)],
        "viewer_embedding": [1, embedding],
        "video_dense": [candidates, len(names.VIDEO_DENSE)],
        "video_categories": [candidates, len(names.VIDEO_CATEGORIES)],
        "creator_codes": [candidates, names.ID_HASHES],
        "video_embedding": [candidates, embedding],
    }


def write_viewer_tower(path: Path, codes_NH: NDArray[np.int64], embedding_ND: F32, rng: np.random.Generator) -> None:
    """Writes a tower whose output is the mean of the watched videos' embeddings, weighted by recency and outcome."""
    width = embedding_ND.shape[1]
    table = np.zeros((DIMENSIONS.id_buckets, width), dtype=np.float32)
    for hashed in range(names.ID_HASHES):
        np.add.at(table, codes_NH[:, hashed], embedding_ND)
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-6)
    graph = _OnnxGraphBuilder()
    decay = graph.op("Exp", graph.op("Mul", "history_age_h", graph.constant(-1 / 720)))
    weight_BL = graph.op("Mul", "history_weights", decay)
    weight_BL1 = graph.op("Unsqueeze", weight_BL, graph.constant([2], np.int64))
    watched_BLD = graph.op("Mul", graph.codes("history_codes", table), weight_BL1)
    watched_BD = graph.op("ReduceSum", watched_BLD, graph.constant([1], np.int64), keepdims=0)
    profile_BD = graph.dense("viewer_dense", _normal(rng, len(DIMENSIONS.viewer_dense), width, scale=0.02))
    words_BD = graph.codes("viewer_categories", _normal(rng, DIMENSIONS.category_buckets, width, scale=0.1))
    sum_BD = graph.total(watched_BD, profile_BD, words_BD, output="before_norm")
    graph.op("LpNormalization", sum_BD, output="viewer_embedding", axis=-1, p=2)
    graph.save(path, viewer_tower_inputs(), {"viewer_embedding": ["viewers", width]})


def video_tower_inputs(batch: int | str = "videos") -> dict[str, list[Any]]:
    """Input name -> shape of ``video_tower.onnx``."""
    return {
        "video_codes": [batch, names.ID_HASHES],
        "creator_codes": [batch, names.ID_HASHES],
        "video_categories": [batch, len(names.VIDEO_CATEGORIES)],
        "video_static_dense": [batch, len(names.VIDEO_STATIC_DENSE)],
        **{name: [batch, width] for name, width in DIMENSIONS.content.items()},
    }


def write_video_tower(path: Path, width: int) -> None:
    """Writes a tower that is linear in every input, so that any changed value changes the embedding."""
    rng = np.random.default_rng(width)
    graph = _OnnxGraphBuilder()
    parts = [
        graph.codes("video_codes", _normal(rng, DIMENSIONS.id_buckets, width, scale=0.2)),
        graph.codes("creator_codes", _normal(rng, DIMENSIONS.id_buckets, width, scale=0.2)),
        graph.codes("video_categories", _normal(rng, DIMENSIONS.category_buckets, width, scale=1.0)),
        graph.dense("video_static_dense", _normal(rng, len(names.VIDEO_STATIC_DENSE), width, scale=0.1)),
        *(
            graph.op("MatMul", name, graph.constant(_normal(rng, size, width, scale=0.3)))
            for name, size in DIMENSIONS.content.items()
        ),
    ]
    graph.op("LpNormalization", graph.total(*parts, output="before_norm"), output="video_embedding", axis=-1, p=2)
    graph.save(path, video_tower_inputs(), {"video_embedding": ["videos", width]})


def write_ranker(path: Path, width: int, rng: np.random.Generator) -> None:
    """Writes a ranker that is linear in every input and in the viewer-video similarity; ``skip`` has the other sign."""
    tasks = len(names.RANKER_TASKS)
    direction = np.ones(tasks, dtype=np.float32)
    direction[names.RANKER_TASKS.index("skip")] = -1.0
    base = np.array([0.0, -2.5, -4.0, -3.5, -4.0, -4.0, -1.0, 2.0], dtype=np.float32)
    graph = _OnnxGraphBuilder()
    product_CD = graph.op("Mul", "viewer_embedding", "video_embedding")
    similarity_C1 = graph.op("ReduceSum", product_CD, graph.constant([-1], np.int64), keepdims=1)
    scores_CK = [
        graph.op("Mul", similarity_C1, graph.constant(2.0 * direction[None])),
        graph.dense("viewer_dense", _normal(rng, len(DIMENSIONS.viewer_dense), tasks, scale=0.02)),
        graph.codes("viewer_categories", _normal(rng, DIMENSIONS.category_buckets, tasks, scale=0.1)),
        graph.op("MatMul", "viewer_embedding", graph.constant(_normal(rng, width, tasks, scale=0.1))),
        graph.dense("video_dense", _normal(rng, len(names.VIDEO_DENSE), tasks, scale=0.05)),
        graph.codes("video_categories", _normal(rng, DIMENSIONS.category_buckets, tasks, scale=0.1)),
        graph.codes("creator_codes", _normal(rng, DIMENSIONS.id_buckets, tasks, scale=0.3)),
        graph.op("MatMul", "video_embedding", graph.constant(_normal(rng, width, tasks, scale=0.1))),
    ]
    graph.total(graph.constant(base[None]), *scores_CK, output="outputs")
    graph.save(path, ranker_inputs(width), {"outputs": ["candidates", tasks]})


def _normal(rng: np.random.Generator, *shape: int, scale: float) -> F32:
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def _fixed(matrix: NDArray[Any], kind: pa.DataType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1), kind), matrix.shape[1])


def write_arrow(path: Path, table: pa.Table) -> None:
    """Writes one uncompressed record batch in the IPC file format."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_batch(table.combine_chunks().to_batches()[0])


def _videos(videos: int, embedding: int, now_s: float, rng: np.random.Generator) -> pa.Table:
    video_id = 1_000 + np.cumsum(rng.integers(1, 4, videos))
    creator_id = rng.integers(0, max(videos // 8, 1), videos)
    topic = rng.integers(0, DIMENSIONS.topics, videos)
    uploaded_at_s = now_s - rng.uniform(0, 30 * 86_400, videos)
    topics_TD = _normal(rng, DIMENSIONS.topics, embedding, scale=1.0)
    embedding_ND = topics_TD[topic] + _normal(rng, videos, embedding, scale=0.7)
    embedding_ND /= np.linalg.norm(embedding_ND, axis=1, keepdims=True)
    static = np.column_stack([rng.uniform(5, 60, videos), (rng.random((videos, 3)) < 0.9).astype(np.float32)])
    live = rng.gamma(1.0, 2.0, (videos, len(names.VIDEO_LIVE_DENSE))).astype(np.float32)
    live[rng.random(live.shape) < 0.05] = np.nan
    language = np.asarray(LANGUAGES)[rng.integers(0, len(LANGUAGES), videos)]
    categories = np.column_stack([topic + 1, category_codes(language.tolist(), DIMENSIONS.category_buckets)])
    titles = np.char.add("Video ", video_id.astype(str))
    columns = [
        pa.array(video_id, pa.int64()),
        pa.array(creator_id, pa.int64()),
        pa.array(topic, pa.int32()),
        pa.array(uploaded_at_s, pa.float64()),
        pa.array(titles.tolist(), pa.string()),
        _fixed(id_codes(creator_id, DIMENSIONS.id_buckets), pa.int64()),
        _fixed(categories, pa.int64()),
        _fixed(static.astype(np.float32), pa.float32()),
        _fixed(live, pa.float32()),
        _fixed(embedding_ND.astype(np.float32), pa.float32()),
    ]
    return pa.Table.from_arrays(columns, schema=with_dimensions(videos_schema(embedding), DIMENSIONS))


def _popular(video_id: NDArray[np.int64], rng: np.random.Generator) -> pa.Table:
    """Returns lists of up to 200 videos in random order."""
    lists = ["popular", "trending", *(f"trending:{region}" for region in REGIONS)]
    length = min(200, len(video_id))
    chosen = np.concatenate([rng.permutation(video_id)[:length] for _ in lists])
    rank = np.tile(np.arange(length), len(lists))
    return pa.Table.from_arrays(
        [
            pa.array(np.repeat(lists, length).tolist(), pa.string()),
            pa.array(rank, pa.int32()),
            pa.array(chosen, pa.int64()),
            pa.array((1.0 / (rank + 1)).astype(np.float32), pa.float32()),
        ],
        schema=POPULAR_SCHEMA,
    )


def _neighbours(video_id: NDArray[np.int64], topic: NDArray[np.int32]) -> pa.Table:
    """Returns the next videos of the same topic for each video, padded with -1."""
    order = np.argsort(topic, kind="stable")
    padded = np.concatenate([order, np.full(NEIGHBOURS_PER_VIDEO, -1)])
    rows = np.empty((len(order), NEIGHBOURS_PER_VIDEO), dtype=np.int32)
    rows[order] = padded[np.arange(len(order))[:, None] + np.arange(1, NEIGHBOURS_PER_VIDEO + 1)]
    rows[(rows >= 0) & (topic[rows] != topic[:, None])] = -1
    return pa.Table.from_arrays([pa.array(video_id, pa.int64()), _fixed(rows, pa.int32())], schema=NEIGHBOURS_SCHEMA)


def _content_neighbours(video_id: NDArray[np.int64]) -> pa.Table:
    """Returns the following videos for each video, the first after the last, padded with -1."""
    count = min(NEIGHBOURS_PER_VIDEO, len(video_id) - 1)
    rows = np.full((len(video_id), NEIGHBOURS_PER_VIDEO), -1, dtype=np.int32)
    rows[:, :count] = (np.arange(len(video_id))[:, None] + np.arange(1, count + 1)) % len(video_id)
    return pa.Table.from_arrays([pa.array(video_id, pa.int64()), _fixed(rows, pa.int32())], schema=NEIGHBOURS_SCHEMA)


def _creators(creator_id: NDArray[np.int64]) -> pa.Table:
    """Returns the following creators as similar ones, and the first videos of each creator as the best ones."""
    creators, code = np.unique(creator_id, return_inverse=True)
    count = min(SIMILAR_CREATORS, len(creators) - 1)
    similar = np.full((len(creators), SIMILAR_CREATORS), -1, dtype=np.int32)
    similar[:, :count] = (np.arange(len(creators))[:, None] + np.arange(1, count + 1)) % len(creators)
    order = np.argsort(code, kind="stable")
    rank = np.arange(len(order)) - np.searchsorted(code[order], code[order], side="left")
    selected = rank < VIDEOS_PER_CREATOR
    best = np.full((len(creators), VIDEOS_PER_CREATOR), -1, dtype=np.int32)
    best[code[order][selected], rank[selected]] = order[selected]
    columns = [pa.array(creators, pa.int64()), _fixed(similar, pa.int32()), _fixed(best, pa.int32())]
    return pa.Table.from_arrays(columns, schema=CREATORS_SCHEMA)


def _index(embedding_ND: F32) -> faiss.Index:
    factory = "Flat" if len(embedding_ND) < 20_000 else "IVF256,Flat"
    index = faiss.index_factory(embedding_ND.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    index.train(embedding_ND[:: max(len(embedding_ND) // 20_000, 1)])
    index.add(embedding_ND)
    return index


def describe_files(folder: Path) -> dict[str, files.FileEntry]:
    """Returns size and digest of every file of a release folder."""
    return {
        name: files.FileEntry(
            sha256=hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            size_bytes=(folder / name).stat().st_size,
        )
        for name in files.RELEASE_FILES
    }


def make_release_folder(
    path: Path,
    videos: int = 200,
    embedding: int = 16,
    seed: int = 0,
    *,
    now_s: float = NOW_S,
    blend: Blend | None = None,
    key: Ed25519PrivateKey | None = None,
    **overrides: Any,
) -> Manifest:
    """Writes a complete release into ``path``, ``manifest.json`` included, and returns its manifest.

    The same arguments give the same bytes.

    Args:
        path: the folder.
        videos: N; 50,000 take a few seconds.
        embedding: D.
        seed: random seed of the content.
        now_s: creation time; uploads are in the 30 days before it.
        blend: content of ``blend.yaml``; None writes the defaults.
        key: signing key; None leaves the release unsigned.
        **overrides: fields of the manifest to set after the files are written.
    """
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    table = _videos(videos, embedding, now_s, rng)
    video_id = table.column("video_id").to_numpy()
    embedding_ND = table.column("embedding").combine_chunks().flatten().to_numpy().reshape(videos, embedding)
    write_viewer_tower(path / files.VIEWER_TOWER_FILE, id_codes(video_id, DIMENSIONS.id_buckets), embedding_ND, rng)
    write_video_tower(path / files.VIDEO_TOWER_FILE, embedding)
    write_ranker(path / files.RANKER_FILE, embedding, rng)
    faiss.write_index(_index(embedding_ND), str(path / files.INDEX_FILE))
    write_arrow(path / files.VIDEOS_FILE, table)
    write_arrow(path / files.POPULAR_FILE, _popular(video_id, rng))
    write_arrow(path / files.NEIGHBOURS_FILE, _neighbours(video_id, table.column("topic").to_numpy()))
    write_arrow(path / files.CONTENT_NEIGHBOURS_FILE, _content_neighbours(video_id))
    write_arrow(path / files.CREATORS_FILE, _creators(table.column("creator_id").to_numpy()))
    (path / files.BLEND_FILE).write_text(yaml.safe_dump((blend or Blend()).model_dump(mode="json"), sort_keys=False))
    curve = CalibrationCurve(method="platt", probability=(0.0, 0.5, 1.0), rate=(0.0, 0.4, 1.0))
    calibration = Calibration(curves={"long_watch": curve, "like": curve})
    (path / files.CALIBRATION_FILE).write_text(calibration.model_dump_json(indent=2))

    fields: dict[str, Any] = {
        "name": "test",
        "created_at": datetime.fromtimestamp(now_s, UTC),
        "code_version": "0.1.0",
        "seed": seed,
        "training_window": {
            "start": datetime.fromtimestamp(now_s - 30 * 86_400, UTC),
            "end": datetime.fromtimestamp(now_s, UTC),
        },
        "feature_services": [{"name": name, "digest": digest} for name, digest in FEATURE_SERVICES.items()],
        "dimensions": {
            "features": DIMENSIONS,
            "embedding": embedding,
            "viewer_dense": len(DIMENSIONS.viewer_dense),
            "video_dense": len(names.VIDEO_DENSE),
            "videos": videos,
            "tasks": names.RANKER_TASKS,
        },
        "metrics": {"recall_at_50": 0.4, "ndcg_at_10": 0.25},
        "gates": [{"name": "recall_at_50", "value": 0.4, "bound": 0.3, "comparison": ">=", "passed": True}],
        "files": describe_files(path),
    }
    manifest = Manifest.model_validate(fields | overrides)
    if key is not None:
        manifest = sign_manifest(manifest, key)
    write_manifest(path, manifest)
    return manifest


def sign_manifest(manifest: Manifest, key: Ed25519PrivateKey) -> Manifest:
    """Returns the manifest with the key's signature over its canonical bytes."""
    return manifest.model_copy(update={"signature": base64.b64encode(key.sign(manifest.canonical_bytes())).decode()})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes ``manifest.json`` into a release folder."""
    (folder / files.MANIFEST_FILE).write_text(json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True))
