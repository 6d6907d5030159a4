"""Settings that the operator and the local controller share: where evidence and alerts come from.

No setting contains a secret. A setting that ends in ``_file`` is the path of a mounted one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from reelway.platform.rollout.evidence_source import AlertSource
from reelway.platform.rollout.sources import MonitoringAccess, alert_source
from reelway.platform.tls import ServerCertificate, TlsSettings, check_token_is_encrypted

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
    cert_file: Path | None = Field(default=None, description="PEM certificate of the server; by default plain HTTP")
    key_file: Path | None = Field(default=None, description="PEM private key of cert_file")

    @model_validator(mode="after")
    def _check_pair(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("saw one of cert_file and key_file, expected both (HTTPS) or neither (HTTP)")
        return self

    def certificate(self) -> ServerCertificate | None:
        """Returns the server's certificate; None if it serves plain HTTP."""
        return ServerCertificate(self.cert_file, self.key_file) if self.cert_file and self.key_file else None


class MonitoringServerSettings(TlsSettings):
    """A monitoring server and the credentials for it."""

    url: HttpUrl | None = None

    @model_validator(mode="after")
    def _check_token_is_encrypted(self) -> Self:
        if self.url is not None:
            check_token_is_encrypted(self.url, self.token_file)
        return self

    def _tls(self) -> TlsSettings:
        return TlsSettings(**{name: getattr(self, name) for name in TlsSettings.model_fields})


class PrometheusSettings(MonitoringServerSettings):
    """Prometheus as the source of evidence."""

    url: HttpUrl | None = Field(default=None, description="by default the router's metrics are scraped directly")
    labels: dict[LabelName, str] = Field(
        default_factory=dict, description="labels that select this cluster's series in a shared Prometheus"
    )

    def access(self, namespace: str | None = None) -> MonitoringAccess:
        """Returns credentials and label selectors.

        Args:
            namespace: selects the series of one namespace; the same release may be a canary in two namespaces.

        Raises:
            ConfigError: if a certificate file cannot be read.
        """
        labels = {**self.labels, "namespace": namespace} if namespace else dict(self.labels)
        return MonitoringAccess(self._tls(), labels, "prometheus")


class AlertmanagerSettings(MonitoringServerSettings):
    """Alertmanager, polled for alerts in addition to its webhook."""

    url: HttpUrl | None = Field(default=None, description="by default nothing is polled")
    poll_interval_s: Seconds = 5.0

    def source(self, namespace: str | None = None) -> AlertSource | None:
        """Returns the poller, restricted to alerts of ``namespace``; None if no URL is set.

        Raises:
            ConfigError: if a certificate file cannot be read.
        """
        labels = {"namespace": namespace} if namespace else {}
        access = MonitoringAccess(self._tls(), labels, "alertmanager")
        return alert_source(self.url, access) if self.url else None
