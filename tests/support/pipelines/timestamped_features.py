"""Feature values that show for which entity and at which time they were read."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from reelway.platform.contracts.feature_names import VIEWS


def timestamped_features(view: str, entities: np.ndarray, at_us: np.ndarray) -> pa.Table:
    value = pa.array(entities * 1000.0 + (at_us // 1_000_000) % 997)
    return pa.table(dict.fromkeys(VIEWS[view], value))
