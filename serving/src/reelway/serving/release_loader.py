"""A release, made into stages. Each stage loads only its own files, so a replica holds what it needs.

Refuses what a trusted key did not sign and anything outside the release's folder. Whether a release may be served at
all is ``verify``'s to say, before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import faiss
import numpy as np

from reelway.platform.contracts.features import RANKER_INPUTS, VIEWER_TOWER_INPUTS
from reelway.platform.contracts.ids import ReleaseId
from reelway.platform.contracts.manifest import (
    INDEX_FILE,
    NEIGHBOURS_FILE,
    RANKER_FILE,
    VIDEOS_FILE,
    VIEWER_TOWER_FILE,
)
from reelway.platform.contracts.release_files import NEIGHBOURS_SCHEMA
from reelway.platform.errors import IncompatibleReleaseError
from reelway.platform.release.folder import read_manifest
from reelway.platform.release.signing import check_signature, load_public_keys
from reelway.platform.release.store import ReleaseStore
from reelway.platform.release.verify import read_blend, read_calibration
from reelway.platform.rollout.traffic.serving_options import ReleaseArgs
from reelway.platform.tokens import TokenSigner
from reelway.serving.graph import LocalStages, RecommendationGraph, ReleaseEdge
from reelway.serving.live_overlay import follow
from reelway.serving.metrics import IngressMetrics
from reelway.serving.popular import open_popular_lists
from reelway.serving.sessions import Graph
from reelway.serving.stages.ranking import Ranker, RankerHere, Ranking
from reelway.serving.stages.reranking import Reranking
from reelway.serving.stages.retrieval import Retrieval
from reelway.serving.stages.sources import AnnSource, FreshSource, ListSource, NeighbourSource
from reelway.serving.video_table import Rows, VideoTable, open_one_batch, open_video_table


def open_trusted(source: ReleaseArgs) -> ReleaseLoader:
    """The release, fetched where the cache lacks it. Safe between processes; blocks.

    Raises:
        ReleaseNotFoundError: the store does not have it.
        StorageError: it cannot be fetched.
        DigestMismatchError: what arrived is not that release.
        SignatureError: it is signed by nobody who is trusted here.
    """
    folder = ReleaseStore(source.release_store).fetch(ReleaseId(source.release), source.release_cache)
    check_signature(read_manifest(folder), load_public_keys(source.public_keys))
    return ReleaseLoader(folder, overlay=source.overlay)


@dataclass(frozen=True)
class ReleaseLoader:
    """Loads the parts of one release folder.

    Args:
        folder: as ``ReleaseStore.fetch`` returned and ``verify`` accepted it.
        threads: of one model call, and of one index search.
        overlay: changelog that the table's live numbers follow, where there is one.

    Every method raises ``IncompatibleReleaseError`` when a file is not what its format says.
    """

    folder: Path
    threads: int = 1
    overlay: str | None = None

    def release_id(self) -> str:
        """The full id."""
        return read_manifest(self.folder).release_id

    def table(self) -> VideoTable:
        """``videos.arrow``, memory-mapped; one for all parts that are loaded here."""
        return self._table

    @cached_property
    def _table(self) -> VideoTable:
        table = open_video_table(self.folder / VIDEOS_FILE)
        if self.overlay:
            follow(table, self.overlay)
        return table

    def edge(self) -> ReleaseEdge:
        """What a router holds."""
        table, manifest = self.table(), read_manifest(self.folder)
        return ReleaseEdge(
            manifest.release_id,
            table,
            open_popular_lists(self.folder, table),
            manifest.config.get("video_features_as_of_s"),
        )

    def retrieval(self) -> Retrieval:
        """Viewer tower, index and lists."""
        settings = read_blend(self.folder).retrieval
        table = self.table()
        lists = open_popular_lists(self.folder, table)
        return Retrieval(
            Graph(self.folder / VIEWER_TOWER_FILE, inputs=VIEWER_TOWER_INPUTS, threads=self.threads),
            {
                "ann": AnnSource(self._index(table), table.embedding, settings.index_probes),
                "popular": ListSource(lists.popular),
                "trending": ListSource(lists.trending, lists.trending_in),
                "fresh": FreshSource(table, settings.fresh_hours),
                "neighbours": NeighbourSource(self._neighbours(table)),
            },
            settings,
        )

    def ranking(self, ranker: Ranker | None = None) -> Ranking:
        """Ranker, video table, calibration. A ranker that is given runs elsewhere, and none is loaded here."""
        here = ranker or RankerHere(Graph(self.folder / RANKER_FILE, inputs=RANKER_INPUTS, threads=self.threads))
        return Ranking(here, self.table(), read_calibration(self.folder), read_blend(self.folder).ranking)

    def reranking(self) -> Reranking:
        """Video table only."""
        return Reranking(self.table(), read_blend(self.folder).reranking)

    def stages(self) -> LocalStages:
        """All three in this process."""
        return LocalStages(self.retrieval(), self.ranking(), self.reranking())

    def graph(self, signer: TokenSigner, metrics: IngressMetrics | None = None) -> RecommendationGraph:
        """The whole path in this process."""
        return RecommendationGraph(self.edge(), self.stages(), signer, metrics)

    def _index(self, table: VideoTable) -> faiss.Index:
        path = self.folder / INDEX_FILE
        faiss.omp_set_num_threads(self.threads)
        try:
            # Mapped as it lies. (The older IO_FLAG_MMAP starts up to 32 threads in every search, to read ahead.)
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise IncompatibleReleaseError(f"{path}: FAISS cannot read it: {error}") from error
        seen, expected = (index.d, index.ntotal), (table.embedding.shape[1], len(table))
        if seen != expected:
            raise IncompatibleReleaseError(
                f"{path}: has (dimension, videos) {seen}, expected {expected} as in {VIDEOS_FILE}; rebuild the release"
            )
        return index

    def _neighbours(self, table: VideoTable) -> Rows:
        path = self.folder / NEIGHBOURS_FILE
        batch = open_one_batch(path)
        if not batch.schema.equals(NEIGHBOURS_SCHEMA):
            raise IncompatibleReleaseError(f"{path} has schema\n{batch.schema}\nexpected\n{NEIGHBOURS_SCHEMA}")
        if not np.array_equal(batch.column("video_id").to_numpy(), table.video_id):
            raise IncompatibleReleaseError(f"{path}: its videos are not those of {VIDEOS_FILE}; rebuild the release")
        rows = batch.column("rows")
        matrix: Rows = rows.flatten().to_numpy().reshape(len(rows), rows.type.list_size)
        return matrix
