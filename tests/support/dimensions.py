"""Feature dimensions for tests that do not depend on their values: those of simulated data sets."""

from __future__ import annotations

from typing import Final

from reelway.platform.contracts.feature_dimensions import FeatureDimensions

DIMENSIONS: Final = FeatureDimensions(visual=32, audio=16, text=32, topics=32)
