"""How long the stores keep data about viewers: settings with defaults, from environment variables."""

from __future__ import annotations

from typing import Final

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from reelway.platform.settings import load_settings

DAY_S: Final = 86_400.0
HOUR_S: Final = 3_600.0


class Retention(BaseSettings):
    """Ages from which data may be deleted. ``REELWAY_RETENTION_<NAME>`` sets a field.

    Topics of Kafka have their own setting, see ``kafka_topics.TopicSizes``.
    """

    model_config = SettingsConfigDict(env_prefix="REELWAY_RETENTION_", extra="forbid", frozen=True)

    event_hours: int = Field(default=168, ge=24, description="exposures and outcomes in SQLite files")
    online_row_days: int = Field(default=90, ge=1, description="rows of the online store since they were written")
    collector_days: int = Field(default=30, ge=2, description="totals per viewer since the rollout's last exposure")
    parity_hours: int = Field(default=24, ge=1, description="sampled features of the parity log")
    parked_days: int = Field(default=30, ge=1, description="records that the stream could not read")


def retention() -> Retention:
    """Returns the settings of the environment.

    Raises:
        ConfigError: if a variable has a wrong value.
    """
    return load_settings(Retention, None)
