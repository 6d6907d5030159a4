"""Loads the stages of a release from its folder. Each stage loads only its own files.

``open_trusted`` verifies the release first, in every process that serves it. No other way leads a release to viewers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import faiss
import numpy as np

from reelway.platform.contracts.feature_names import RANKER_INPUTS, VIEWER_TOWER_INPUTS
from reelway.platform.contracts.ids import ReleaseId
from reelway.platform.contracts.manifest import (
    CONTENT_NEIGHBOURS_FILE,
    INDEX_FILE,
    NEIGHBOURS_FILE,
    RANKER_FILE,
    VIDEOS_FILE,
    VIEWER_TOWER_FILE,
    Manifest,
)
from reelway.platform.contracts.release_files import NEIGHBOURS_SCHEMA
from reelway.platform.errors import IncompatibleReleaseError
from reelway.platform.eventlog.live_lists_file import POPULAR, TRENDING
from reelway.platform.features.viewer_memory import ViewerMemory
from reelway.platform.release.cache import ReleaseCache, ReleaseUse
from reelway.platform.release.folder import read_manifest
from reelway.platform.release.signing import load_public_keys
from reelway.platform.release.store import ReleaseStore
from reelway.platform.release.verify import read_blend, read_calibration, verify_content, verify_manifest
from reelway.platform.rollout.traffic.serving_options import ReleaseArgs
from reelway.platform.tokens import TokenSigner
from reelway.serving.in_process import InProcessRecommender
from reelway.serving.live_lists import CurrentLists, start_list_follower
from reelway.serving.live_overlay import start_follower
from reelway.serving.metrics import IngressMetrics
from reelway.serving.onnx_model import OnnxModel
from reelway.serving.popular import open_popular_lists
from reelway.serving.request_path import LocalStages, RouterRelease
from reelway.serving.stages.creator_sources import (
    FollowedCreatorsSource,
    SimilarCreatorsSource,
    open_creator_videos,
)
from reelway.serving.stages.fresh_tier import AnnWithUploads, FreshWithUploads
from reelway.serving.stages.list_source import ListSource
from reelway.serving.stages.ranking import LocalRanker, Ranker, Ranking
from reelway.serving.stages.reranking import Reranking
from reelway.serving.stages.retrieval import Retrieval
from reelway.serving.stages.sources import AnnSource, FreshSource, NeighbourSource
from reelway.serving.takedown_follower import TakedownFollower
from reelway.serving.video_table import Rows, VideoTable, open_record_batch, open_video_table


def open_trusted(source: ReleaseArgs, takedowns: TakedownFollower | None = None) -> ReleaseLoader:
    """Returns the loader of a release and fetches the release if the cache lacks it.

    The release is in use until its video table is garbage; unused releases are removed from the cache. Blocks. Several
    processes may call this function for the same cache. All checks of ``verify`` apply, except for the feature
    services, which the routers check, because they alone open the feature store.

    Args:
        takedowns: hides what is taken down in the release's video table.

    Raises:
        ReleaseNotFoundError: if the store does not have the release.
        StorageError: if the release cannot be fetched.
        DigestMismatchError: if the fetched files are not those of the release.
        SignatureError: if no trusted key has signed the release.
        GateFailedError: if a quality gate failed and is not waived.
        IncompatibleReleaseError: if the files disagree with each other or with this version of Reelway.
    """
    keys = load_public_keys(source.public_keys)
    cache, release = ReleaseCache(source.release_cache), ReleaseId(source.release)
    cache.prune()
    use = cache.hold(release)  # ends with the object, also if the release is rejected
    folder = ReleaseStore(source.release_store).fetch(release, source.release_cache, public_keys=keys)
    manifest = read_manifest(folder)
    verify_manifest(manifest, public_keys=keys, expected_id=release)
    verify_content(folder, manifest)
    return ReleaseLoader(folder, overlay=source.overlay, takedowns=takedowns, use=use)


@dataclass(frozen=True)
class ReleaseLoader:
    """Loads the parts of one release folder.

    Args:
        folder: the folder that ``ReleaseStore.fetch`` returned and ``verify`` accepted.
        threads: number of threads of one model call and of one index search.
        overlay: folder or URL of the overlay that the video table follows; None: the table stays as it was built.
        takedowns: hides what is taken down in the video table; None: nothing is hidden. The first use of the table
            waits until the takedowns are read, and raises ``StorageError`` if they cannot be read.
        clock: Unix seconds; the age of the live lists is measured by it.
        use: keeps the release in the node's cache.

    Every method raises ``IncompatibleReleaseError`` if a file does not have its format.
    """

    folder: Path
    threads: int = 1
    overlay: str | None = None
    takedowns: TakedownFollower | None = None
    clock: Callable[[], float] = time.time
    use: ReleaseUse | None = None

    def manifest(self) -> Manifest:
        """Returns the manifest of the release."""
        return read_manifest(self.folder)

    def release_id(self) -> str:
        """Returns the full id of the release."""
        return self.manifest().release_id

    def table(self) -> VideoTable:
        """Returns ``videos.arrow``, memory-mapped; all parts of this loader share one table."""
        return self._table

    @cached_property
    def _table(self) -> VideoTable:
        table = open_video_table(self.folder / VIDEOS_FILE)
        table.release_use = self.use
        if self.overlay:
            start_follower(table, self.overlay, self.release_id())
        if self.takedowns:
            self.takedowns.hide_in(table)
        return table

    def lists(self) -> CurrentLists:
        """Returns the popular and trending lists; all parts of this loader share them."""
        return self._lists

    @cached_property
    def _lists(self) -> CurrentLists:
        table = self.table()
        lists = CurrentLists(open_popular_lists(self.folder, table), self.clock)
        if self.overlay:
            start_list_follower(lists, table, self.overlay, self.release_id())
        return lists

    def router_release(self) -> RouterRelease:
        """Returns the parts of the release that a router holds."""
        table, manifest = self.table(), self.manifest()
        return RouterRelease(
            manifest.release_id,
            table,
            self.lists(),
            manifest.config.get("video_features_as_of_s"),
            read_blend(self.folder).retrieval,
        )

    def retrieval(self) -> Retrieval:
        """Loads the viewer tower, the index and the lists."""
        settings = read_blend(self.folder).retrieval
        table = self.table()
        lists = self.lists()
        creators = open_creator_videos(self.folder, table)
        return Retrieval(
            OnnxModel(self.folder / VIEWER_TOWER_FILE, inputs=VIEWER_TOWER_INPUTS, threads=self.threads),
            {
                "ann": AnnWithUploads(
                    AnnSource(self._index(table), table.embedding.base, settings.index_probes), table
                ),
                "popular": ListSource(lists, POPULAR),
                "trending": ListSource(lists, TRENDING),
                "fresh": FreshWithUploads(FreshSource(table, settings.fresh_hours), table, settings.fresh_hours),
                "neighbours": NeighbourSource(self._neighbours(table, NEIGHBOURS_FILE)),
                "content": NeighbourSource(self._neighbours(table, CONTENT_NEIGHBOURS_FILE)),
                "followed_creators": FollowedCreatorsSource(creators),
                "similar_creators": SimilarCreatorsSource(creators),
            },
            settings,
            table,
        )

    def ranking(self, ranker: Ranker | None = None) -> Ranking:
        """Loads the ranker, the video table and the calibration.

        Args:
            ranker: a ranker that runs in another process; the model of the release is not loaded then.
        """
        if ranker is None:
            ranker = LocalRanker(OnnxModel(self.folder / RANKER_FILE, inputs=RANKER_INPUTS, threads=self.threads))
        return Ranking(ranker, self.table(), read_calibration(self.folder), read_blend(self.folder).ranking)

    def reranking(self) -> Reranking:
        """Loads the video table."""
        return Reranking(self.table(), read_blend(self.folder).reranking)

    def stages(self) -> LocalStages:
        """Loads all three stages into this process."""
        return LocalStages(self.retrieval(), self.ranking(), self.reranking())

    def in_process_recommender(
        self, signer: TokenSigner, metrics: IngressMetrics | None = None, memory: ViewerMemory | None = None
    ) -> InProcessRecommender:
        """Loads the whole request path into this process; see ``InProcessRecommender``."""
        return InProcessRecommender(self.router_release(), self.stages(), signer, metrics, memory)

    def _index(self, table: VideoTable) -> faiss.Index:
        path = self.folder / INDEX_FILE
        faiss.omp_set_num_threads(self.threads)
        try:
            # Memory-mapped. The older IO_FLAG_MMAP starts up to 32 read-ahead threads in every search.
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise IncompatibleReleaseError(
                f"{path}: FAISS cannot read the index: {error}; rebuild the release"
            ) from error
        actual, expected = (index.d, index.ntotal), (table.embedding.shape[1], len(table))
        if actual != expected:
            raise IncompatibleReleaseError(
                f"{path}: has (dimension, videos) {actual}, expected {expected} of {VIDEOS_FILE}; rebuild the release"
            )
        return index

    def _neighbours(self, table: VideoTable, name: str) -> Rows:
        path = self.folder / name
        batch = open_record_batch(path)
        if not batch.schema.equals(NEIGHBOURS_SCHEMA):
            raise IncompatibleReleaseError(
                f"{path} has schema\n{batch.schema}\nexpected\n{NEIGHBOURS_SCHEMA}\nrebuild the release"
            )
        if not np.array_equal(batch.column("video_id").to_numpy(), table.video_id.base):
            raise IncompatibleReleaseError(
                f"{path}: the videos differ from those of {VIDEOS_FILE}; rebuild the release"
            )
        rows = batch.column("rows")
        matrix: Rows = rows.flatten().to_numpy().reshape(len(rows), rows.type.list_size)
        return matrix
