"""Feast definitions: entities, sources, feature views, the on-demand view and the two feature services.

Declarations only; the arithmetic is in ``reelway.pipelines.features`` and ``reelway.platform.features``. Names come
from ``contracts.feature_names`` and widths from ``schema.json`` of the run's features. ``REELWAY_FEATURES_DIR`` is
the folder with the schema and the Parquet files that the sources read. ``reelway features`` sets it; set it
yourself to call ``feast apply``.
"""

import os
from datetime import timedelta
from pathlib import Path

import pandas as pd
from feast import Entity, FeatureService, FeatureView, Field, FileSource, RequestSource, ValueType
from feast.data_format import ParquetFormat
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Float32, Float64, Int64, String

from reelway.platform.contracts import feature_names as names
from reelway.platform.contracts.feature_dimensions import SCHEMA_FILE, FeatureDimensions

FEATURES_DIR = Path(os.environ["REELWAY_FEATURES_DIR"]).absolute()
DIMENSIONS = FeatureDimensions.from_json((FEATURES_DIR / SCHEMA_FILE).read_bytes())

viewer = Entity(name="viewer", join_keys=["viewer_id"], value_type=ValueType.INT64)
video = Entity(name="video", join_keys=["video_id"], value_type=ValueType.INT64)
# Not "creator_id": video_content has a field with this name, and the training service joins both in one call.
creator = Entity(name="creator", join_keys=["creator_key"], value_type=ValueType.INT64)

# Other fields are Float32: counts, ratios, rates and means.
TYPES = {
    "region": String,
    "language": String,
    "segment": String,
    "video_language": String,
    "created_at_s": Float64,
    "uploaded_at_s": Float64,
    "creator_id": Int64,
    "topic": Int64,
    "history_videos": Array(Int64),
    "history_weights": Array(Float32),
    "history_times_s": Array(Float64),
    "topic_affinity": Array(Float32),
    "visual": Array(Float32),
    "audio": Array(Float32),
    "text": Array(Float32),
}

# Age after which a row no longer counts. A view with a heartbeat (a row per day while a window holds an event) expires
# after two days: by then either a whole window has no events, or the batch job has stopped.
FOREVER = timedelta(days=3650)
TTLS = {
    "viewer_profile": FOREVER,
    "viewer_activity": timedelta(days=2),
    "viewer_history": timedelta(days=90),
    "viewer_topic_affinity": timedelta(days=2),
    "video_content": FOREVER,
    "video_engagement": timedelta(days=2),
    "creator_statistics": timedelta(days=365),
}
ENTITIES = {
    **dict.fromkeys(names.VIEWER_VIEWS, viewer),
    "video_content": video,
    "video_engagement": video,
    "creator_statistics": creator,
}


def _field(name: str) -> Field:
    # The width of a list is part of the feature service's digest: a model fits lists of one width only.
    width = DIMENSIONS.list_width(name)
    return Field(name=name, dtype=TYPES.get(name, Float32), tags={"width": str(width)} if width else {})


def _view(name: str) -> FeatureView:
    entity = ENTITIES[name]
    return FeatureView(
        name=name,
        entities=[entity],
        ttl=TTLS[name],
        schema=[
            Field(name=entity.join_key, dtype=Int64),
            *(_field(field) for field in names.VIEWS[name]),
        ],
        source=FileSource(
            name=f"{name}_rows",
            path=f"{FEATURES_DIR}/views/{name}/*.parquet",
            file_format=ParquetFormat(),
            timestamp_field="event_timestamp",
            created_timestamp_column="created_timestamp",
        ),
        # Video features are served from the release's video table, not from the online store.
        online=name in names.VIEWER_VIEWS,
    )


viewer_profile = _view("viewer_profile")
viewer_activity = _view("viewer_activity")
viewer_history = _view("viewer_history")
viewer_topic_affinity = _view("viewer_topic_affinity")
video_content = _view("video_content")
video_engagement = _view("video_engagement")
creator_statistics = _view("creator_statistics")

request = RequestSource(name="request", schema=[Field(name="request_time_s", dtype=Float64)])


@on_demand_feature_view(
    sources=[request, viewer_profile[["created_at_s"]], video_content[["uploaded_at_s"]]],
    schema=[Field(name=field, dtype=Float64) for field in names.REQUEST_CONTEXT],
    mode="pandas",
)
def request_context(inputs: pd.DataFrame) -> pd.DataFrame:
    """Applies ``platform.features.on_demand`` to Feast's columns."""
    # Feast stores this function's source in the registry and runs it alone, so it must import what it uses.
    import numpy as np
    import pandas as pd

    from reelway.platform.features import on_demand

    columns = (inputs[name].to_numpy(np.float64) for name in ("request_time_s", "created_at_s", "uploaded_at_s"))
    return pd.DataFrame(on_demand.request_context(*columns))


viewer_row = FeatureService(
    name=names.VIEWER_SERVICE,
    features=[viewer_profile, viewer_activity, viewer_history, viewer_topic_affinity],
    description="Row of one viewer that the router reads online.",
)
training_row = FeatureService(
    name=names.TRAINING_SERVICE,
    features=[
        viewer_profile,
        viewer_activity,
        viewer_history,
        viewer_topic_affinity,
        video_content,
        video_engagement,
        creator_statistics,
        request_context,
    ],
    description="All features of one impression as of its request.",
)
