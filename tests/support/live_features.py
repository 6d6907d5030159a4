"""Features that are updated while a simulated service runs, by the view functions of the batch job.

The closed-loop benchmark uses them, because its events arrive faster than a batch job would run. Views come from
``features.batch.entity_views``. The as-of rule is Feast's: the newest row at or before a time, within the TTL.
"""

# Shapes: B requested entities, M videos

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tests.support.dimensions import DIMENSIONS

from reelway.pipelines.datasets.store import read_dataset
from reelway.pipelines.features.batch import entity_views
from reelway.pipelines.features.labels import label_impressions, times_us
from reelway.pipelines.features.views import ViewSettings, video_content, viewer_profile
from reelway.platform.contracts.feature_names import VIEWER_VIEWS, VIEWS
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.run_directory import RunDirectory

I64 = NDArray[np.int64]


class LiveFeatures:
    """Features of viewers and videos at any time, computed from the events before it."""

    def __init__(self, run: RunDirectory, cut_s: float) -> None:
        dataset = read_dataset(run.dataset)
        store = open_feature_store(run.features)
        self._ttl_us = {name: round(store.get_feature_view(name).ttl.total_seconds() * 1e6) for name in VIEWS}
        self._settings = ViewSettings(DIMENSIONS)
        self._videos = dataset.videos.sort_by("video_id")
        self._creators = (dataset.creators, dataset.videos.select(["creator_id", "uploaded_at"]))
        self._static = {"viewer_profile": viewer_profile(dataset.viewers), "video_content": video_content(self._videos)}
        before = times_us(dataset.impressions["event_time"]) < cut_s * 1e6
        impressions = dataset.impressions.filter(pa.array(before))
        self.outcomes = dataset.outcomes.filter(
            pc.is_in(dataset.outcomes["impression_id"], value_set=impressions["impression_id"].combine_chunks())
        )
        self.labels = label_impressions(impressions, self.outcomes, self._videos)

    @property
    def video_ids(self) -> I64:
        ids: I64 = self._videos["video_id"].to_numpy()
        return ids

    def add(self, impressions: pa.Table, outcomes: pa.Table) -> None:
        """Adds later events."""
        new = label_impressions(impressions, outcomes, self._videos)
        self.labels = pa.concat_tables([self.labels, new])
        self.outcomes = pa.concat_tables([self.outcomes, outcomes.cast(self.outcomes.schema)])

    def viewers(self, viewer_ids: I64, at_s: float) -> pa.Table:
        """Returns the viewers' rows at a time, in the given order: ``viewer_id`` and the fields of the viewer views."""
        labels = self.labels.filter(pc.is_in(self.labels["viewer_id"], value_set=pa.array(np.unique(viewer_ids))))
        views = self._static | entity_views("viewer", labels, self._creators, self._settings, round(at_s * 1e6))
        columns = {"viewer_id": pa.chunked_array([pa.array(viewer_ids)])}
        for name in VIEWER_VIEWS:
            columns |= self._as_of(name, views[name], "viewer_id", viewer_ids, at_s)
        return pa.table(columns)

    def videos(self, at_s: float) -> pa.Table:
        """Returns the rows of all videos at a time. Later uploads are included; the caller excludes them."""
        at_us = round(at_s * 1e6)
        views = entity_views("video", self.labels, self._creators, self._settings, at_us)
        views |= entity_views("creator", self.labels, self._creators, self._settings, at_us)
        creator = self._videos["creator_id"].to_numpy()
        content = self._static["video_content"]
        columns = {"video_id": content["video_id"], "title": self._videos["title"]}
        columns |= {field: content[field] for field in VIEWS["video_content"]}
        columns |= self._as_of("video_engagement", views["video_engagement"], "video_id", self.video_ids, at_s)
        columns |= self._as_of("creator_statistics", views["creator_statistics"], "creator_key", creator, at_s)
        return pa.table(columns)

    def _as_of(self, name: str, view: pa.Table, key: str, wanted: I64, at_s: float) -> dict[str, pa.ChunkedArray]:
        at_us = round(at_s * 1e6)
        when_us = times_us(view["event_timestamp"])
        valid = np.flatnonzero((when_us <= at_us) & (when_us >= at_us - self._ttl_us[name]))
        entity = view[key].to_numpy()
        # index -1 in front stands for an entity without rows, so that every look-up has a result
        order = np.concatenate([[-1], valid[np.lexsort((when_us[valid], entity[valid]))]])
        last = order[np.searchsorted(entity[order[1:]], wanted, side="right")]
        known = (last >= 0) & (entity[last] == wanted) if len(entity) else np.zeros(len(wanted), dtype=np.bool_)
        rows = pa.array(np.where(known, last, 0), mask=~known)
        return {field: view[field].take(rows) for field in VIEWS[name]}
