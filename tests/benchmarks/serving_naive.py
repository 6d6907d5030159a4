"""The naive composition: a service as the guides of Ray Serve, Feast and torch suggest it.

- Each stage is a deployment with Serve's defaults; the ingress is FastAPI with a response model.
- Candidates are passed as lists of dictionaries; ``get_online_features`` reads their features from the online store.
- The models are the torch modules in inference mode.

Catalogue, index, model classes, model sizes and online store are those of the other variants.
"""

# No postponed annotations: Serve and FastAPI evaluate them in another process.

import json
import sys
from typing import Any

import faiss
import numpy as np
import ray
import torch
from fastapi import FastAPI
from numpy.typing import NDArray
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle
from tests.benchmarks.serving_fixture import VIEWERS, ServingFixture
from tests.benchmarks.serving_release import RANKER, TOWER
from tests.support.dimensions import DIMENSIONS
from tests.support.release_files import NOW_S

from reelway.pipelines.models.ranker import Ranker
from reelway.pipelines.models.two_tower import TwoTower
from reelway.platform.contracts import feature_names as names
from reelway.platform.contracts.manifest import INDEX_FILE
from reelway.platform.features.assembly import (
    assemble_videos,
    assemble_viewers,
    columns_from_row,
    columns_from_table,
)
from reelway.platform.features.feast_store import open_feature_store
from reelway.serving.free_ports import find_free_port

CANDIDATES = 500
VIEWER_FEATURES = [f"{view}:{field}" for view in names.VIEWER_VIEWS for field in names.VIEWS[view]]
VIDEO_FIELDS = ("topic", "video_language", "duration_s", "uploaded_at_s", *names.VIDEO_LIVE_DENSE)
VIDEO_FEATURES = [
    *(f"video_content:{field}" for field in VIDEO_FIELDS[:4]),
    *(f"video_engagement:{field}" for field in names.VIDEO_ENGAGEMENT),
    *(f"creator_statistics:{field}" for field in names.CREATOR_STATISTICS),
]


class Ask(BaseModel):
    viewer_id: int
    count: int = 20
    context: dict[str, Any] = {}


class Video(BaseModel):
    video_id: int
    score: float


class Answer(BaseModel):
    viewer_id: int
    degraded: list[str] = []
    videos: list[Video]


def read_videos(store: Any, video_ids: list[int]) -> Any:
    """Reads the candidates' features as in Feast's guide. The benchmark keys creators by video."""
    keys = [{"video_id": video, "creator_key": video} for video in video_ids]
    return store.get_online_features(features=VIDEO_FEATURES, entity_rows=keys).to_arrow()


@serve.deployment
class Retrieval:
    def __init__(self, fixture: ServingFixture) -> None:
        self._store = open_feature_store(fixture.features)
        self._index = faiss.read_index(str(fixture.release_folder / INDEX_FILE))
        table = fixture.loader().table()
        self._ids, self._embedding = table.video_id.base, np.array(table.embedding)
        self._tower = TwoTower(TOWER, DIMENSIONS).eval()

    def retrieve(self, viewer_id: int) -> dict[str, Any]:
        answer = self._store.get_online_features(features=VIEWER_FEATURES, entity_rows=[{"viewer_id": viewer_id}])
        row = {name: values[0] for name, values in answer.to_dict().items() if values[0] is not None}
        viewer = assemble_viewers(columns_from_row(row), np.array([NOW_S]), ["unknown"], DIMENSIONS)
        with torch.inference_mode():
            embedding = self._tower.viewer_tower(
                *(torch.from_numpy(one) for one in viewer.as_inputs().values())
            ).numpy()
        scores, rows = self._index.search(embedding, CANDIDATES)
        return {
            "viewer": {"dense": viewer.viewer_dense, "categories": viewer.viewer_categories, "embedding": embedding},
            "candidates": [
                {"video_id": int(self._ids[row]), "score": float(score), "embedding": self._embedding[row]}
                for row, score in zip(rows[0], scores[0], strict=True)
            ],
        }


@serve.deployment
class Ranking:
    def __init__(self, fixture: ServingFixture) -> None:
        self._store = open_feature_store(fixture.features)
        self._ranker = Ranker(RANKER, TOWER.dim, DIMENSIONS).eval()

    def rank(self, viewer: dict[str, Any], candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
        table = read_videos(self._store, [one["video_id"] for one in candidates])
        videos = assemble_videos(columns_from_table(table), np.full(table.num_rows, NOW_S), DIMENSIONS)
        embedding = np.stack([one["embedding"] for one in candidates])
        given = [
            viewer["dense"], viewer["categories"], viewer["embedding"], videos.video_dense, videos.video_categories,
            videos.creator_codes, embedding,
        ]  # fmt: skip
        with torch.inference_mode():
            outputs = torch.sigmoid(self._ranker(*(torch.from_numpy(one) for one in given)))
        value = outputs.sum(dim=1).tolist()
        return [one | {"score": score} for one, score in zip(candidates, value, strict=True)]


@serve.deployment
class Reranking:
    def rerank(self, candidates: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        left = sorted(candidates, key=lambda one: one["score"], reverse=True)[:100]
        chosen: list[dict[str, Any]] = []
        while left and len(chosen) < count:
            worth = [
                0.85 * one["score"] - 0.15 * max((float(one["embedding"] @ c["embedding"]) for c in chosen), default=0)
                for one in left
            ]
            chosen.append(left.pop(int(np.argmax(worth))))
        return [{"video_id": one["video_id"], "score": one["score"]} for one in chosen]


api = FastAPI()


@serve.deployment
@serve.ingress(api)
class Ingress:
    def __init__(self, retrieval: DeploymentHandle, ranking: DeploymentHandle, reranking: DeploymentHandle) -> None:
        self._retrieval, self._ranking, self._reranking = retrieval, ranking, reranking

    @api.post("/v1/recommend")
    async def recommend(self, ask: Ask) -> Answer:
        retrieved = await self._retrieval.retrieve.remote(ask.viewer_id)
        ranked = await self._ranking.rank.remote(retrieved["viewer"], retrieved["candidates"])
        slate = await self._reranking.rerank.remote(ranked, ask.count)
        return Answer(viewer_id=ask.viewer_id, videos=[Video(**one) for one in slate])


def naive_candidates(fixture: ServingFixture) -> NDArray[np.int32]:
    """Returns the rows of all videos that retrieval returns for any viewer of the benchmark."""
    retrieval = Retrieval.func_or_class(fixture)
    table = fixture.loader().table()
    video_ids = {one["video_id"] for viewer in range(VIEWERS) for one in retrieval.retrieve(viewer)["candidates"]}
    return table.rows_of(np.array(sorted(video_ids)))


def serve_naive(fixture: ServingFixture) -> None:
    """Serves the naive composition, prints its address and stops at the end of standard input."""
    port = find_free_port("127.0.0.1")
    ray.init(address="local", log_to_driver=False, logging_level="error", include_dashboard=False, num_cpus=8)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        torch.manual_seed(0)
        app = Ingress.bind(Retrieval.bind(fixture), Ranking.bind(fixture), Reranking.bind())
        serve.run(app, name="naive")
        print(json.dumps({"url": f"http://127.0.0.1:{port}"}), flush=True)
        sys.stdin.read()
    finally:
        serve.shutdown()
        ray.shutdown()
