"""The feature dimensions of tests that do not care about them: those of simulated data sets."""

from __future__ import annotations

from typing import Final

from reelway.platform.contracts.feature_dimensions import FeatureDimensions

DIMENSIONS: Final = FeatureDimensions(visual=32, audio=16, text=32, topics=32)
