"""``calibration.json``: a monotone curve per binary head, from the model's probability to the observed rate."""

from __future__ import annotations

import itertools

from pydantic import BaseModel, ConfigDict, model_validator

from reelway.platform.contracts.feature_names import BINARY_TASKS


class CalibrationCurve(BaseModel):
    """A piecewise linear, non-decreasing curve. Isotonic and Platt fits are both stored as points."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str  # isotonic | platt | identity
    probability: tuple[float, ...]
    rate: tuple[float, ...]

    @model_validator(mode="after")
    def _monotone(self) -> CalibrationCurve:
        if len(self.probability) != len(self.rate) or len(self.probability) < 2:
            raise ValueError(
                f"a curve needs equally many probabilities and rates, at least 2; got {len(self.probability)} "
                f"and {len(self.rate)}"
            )
        for name, values in (("probability", self.probability), ("rate", self.rate)):
            if any(b < a for a, b in itertools.pairwise(values)):
                raise ValueError(f"{name} decreases; expected a non-decreasing curve")
            if values[0] < 0 or values[-1] > 1:
                raise ValueError(f"{name} is outside 0..1: {values[0]:g}..{values[-1]:g}")
        return self


class Calibration(BaseModel):
    """One curve per binary head. A head without a curve is not calibrated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    curves: dict[str, CalibrationCurve]

    @model_validator(mode="after")
    def _curves_are_heads(self) -> Calibration:
        if unknown := sorted(set(self.curves) - set(BINARY_TASKS)):
            raise ValueError(f"curves for {unknown}, expected names among {list(BINARY_TASKS)}")
        return self
