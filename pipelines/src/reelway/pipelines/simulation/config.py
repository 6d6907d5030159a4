"""Configuration of the simulated service: its size, missing data and logging policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from reelway.platform.errors import ConfigError

DAY_S: Final = 86_400.0


@dataclass(frozen=True)
class SimulationConfig:
    """Configuration that together with a seed determines the simulated service."""

    viewers: int = 5_000
    videos: int = 5_000
    creators: int = 400
    days: int = 14
    impressions: int = 300_000
    slate: int = 10
    start_s: float = 1_736_121_600.0
    """Unix time at which the log starts: Monday 2025-01-06, 00:00 UTC."""

    # Shares that exist when the log starts; the others arrive uniformly during the log.
    viewers_at_start_ratio: float = 0.65
    videos_at_start_ratio: float = 0.45

    # Quality of the video embeddings.
    missing_visual_ratio: float = 0.03
    missing_audio_ratio: float = 0.25
    missing_text_ratio: float = 0.12
    poor_embedding_ratio: float = 0.15
    """Share of embeddings that are mostly noise."""

    # Shares of the logging policy's sources; they sum to 1.
    popular_share: float = 0.35
    topic_share: float = 0.35
    explore_share: float = 0.2
    fresh_share: float = 0.1
    policy_period_s: float = 3 * 3600.0
    """Interval at which the logging policy reads new uploads and counts."""
    fresh_s: float = 2 * DAY_S

    def __post_init__(self) -> None:
        for name, least in (("viewers", 1), ("creators", 1), ("days", 1), ("slate", 1), ("impressions", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"simulation: {name} is {getattr(self, name)}, expected at least {least}")
        if self.videos * self.videos_at_start_ratio < 3 * self.slate:
            raise ConfigError(
                f"simulation: {self.videos} videos, {self.videos_at_start_ratio:.0%} of them at the start, are too few "
                f"for slates of {self.slate}; expected at least "
                f"{int(3 * self.slate / self.videos_at_start_ratio) + 1} videos"
            )
        total = self.popular_share + self.topic_share + self.explore_share + self.fresh_share
        if abs(total - 1.0) > 1e-9:
            raise ConfigError(f"simulation: the shares of the logging policy sum to {total:g}, expected 1")

    @property
    def end_s(self) -> float:
        """Unix time at which the log ends."""
        return self.start_s + self.days * DAY_S
