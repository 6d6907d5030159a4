"""How large and how lively the simulated service is. Refuses sizes that could not fill a slate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from reelway.platform.errors import ConfigError

DAY_S: Final = 86_400.0


@dataclass(frozen=True)
class SimulationConfig:
    """Everything that, with a seed, decides the simulated service."""

    viewers: int = 5_000
    videos: int = 5_000
    creators: int = 400
    days: int = 14
    impressions: int = 300_000
    slate: int = 10
    start_s: float = 1_736_121_600.0
    """Unix time at which the log begins: Monday 2025-01-06, 00:00 UTC."""

    # Who is there when the log begins; the others arrive evenly while it runs.
    viewers_at_start_ratio: float = 0.65
    videos_at_start_ratio: float = 0.45

    # What is known of a video.
    missing_visual_ratio: float = 0.03
    missing_audio_ratio: float = 0.25
    missing_text_ratio: float = 0.12
    poor_embedding_ratio: float = 0.15
    """Share of embeddings that are mostly noise."""

    # How the log was made: shares of the logging policy's sources. They sum to 1.
    popular_share: float = 0.35
    topic_share: float = 0.35
    explore_share: float = 0.2
    fresh_share: float = 0.1
    policy_period_s: float = 3 * 3600.0
    """How often the logging policy sees new uploads and new counts."""
    fresh_s: float = 2 * DAY_S

    def __post_init__(self) -> None:
        for name, least in (("viewers", 1), ("creators", 1), ("days", 1), ("slate", 1), ("impressions", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"simulation: {name} is {getattr(self, name)}, expected at least {least}")
        if self.videos * self.videos_at_start_ratio < 3 * self.slate:
            raise ConfigError(
                f"simulation: {self.videos} videos of which {self.videos_at_start_ratio:.0%} are there at the start "
                f"cannot fill slates of {self.slate} with a choice; expected at least "
                f"{int(3 * self.slate / self.videos_at_start_ratio) + 1} videos"
            )
        total = self.popular_share + self.topic_share + self.explore_share + self.fresh_share
        if abs(total - 1.0) > 1e-9:
            raise ConfigError(f"simulation: the shares of the logging policy sum to {total:g}, expected 1")

    @property
    def end_s(self) -> float:
        """Unix time at which the log ends."""
        return self.start_s + self.days * DAY_S
