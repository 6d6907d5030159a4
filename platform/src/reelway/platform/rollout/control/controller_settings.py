"""Settings that the operator and the local controller share: where evidence and alerts come from.

No setting contains a secret. A setting that ends in ``_file`` is the path of a mounted one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from reelway.platform.rollout.evidence_source import AlertSource
from reelway.platform.rollout.sources import MonitoringAccess, alert_source

HttpUrl = Annotated[str, StringConstraints(pattern=r"^https?://[^/\s]+")]
LabelName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]*$")]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SettingsGroup(BaseModel):
    """Base of all groups: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class WebhookSettings(SettingsGroup):
    """HTTP server for Alertmanager's webhook; the operator serves /metrics, /healthz and /readyz on it as well."""

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535, description="0 selects a free port")


class PrometheusSettings(SettingsGroup):
    """Prometheus as the source of evidence."""

    url: HttpUrl | None = Field(default=None, description="by default the router's metrics are scraped directly")
    token_file: Path | None = Field(default=None, description="bearer token, read on every request")
    ca_file: Path | None = Field(default=None, description="PEM certificates to verify the server; default: system's")
    labels: dict[LabelName, str] = Field(
        default_factory=dict, description="labels that select this cluster's series in a shared Prometheus"
    )

    def access(self, namespace: str | None = None) -> MonitoringAccess:
        """Returns credentials and label selectors.

        Args:
            namespace: selects the series of one namespace; the same release may be a canary in two namespaces.

        Raises:
            ConfigError: if ``ca_file`` cannot be read.
        """
        labels = {**self.labels, "namespace": namespace} if namespace else dict(self.labels)
        return MonitoringAccess(self.token_file, self.ca_file, labels)


class AlertmanagerSettings(SettingsGroup):
    """Alertmanager, polled for alerts in addition to its webhook."""

    url: HttpUrl | None = Field(default=None, description="by default nothing is polled")
    token_file: Path | None = Field(default=None, description="bearer token, read on every request")
    ca_file: Path | None = Field(default=None, description="PEM certificates to verify the server; default: system's")
    poll_interval_s: Seconds = 5.0

    def source(self, namespace: str | None = None) -> AlertSource | None:
        """Returns the poller, restricted to alerts of ``namespace``; None if no URL is set.

        Raises:
            ConfigError: if ``ca_file`` cannot be read.
        """
        labels = {"namespace": namespace} if namespace else {}
        access = MonitoringAccess(self.token_file, self.ca_file, labels)
        return alert_source(self.url, access) if self.url else None
