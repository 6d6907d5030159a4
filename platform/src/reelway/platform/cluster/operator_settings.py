"""Settings of ``reelway operator``: one YAML file, with environment variables over it.

The chart mounts the file from a ConfigMap. The variable ``REELWAY_OPERATOR_PROMETHEUS__URL`` replaces the setting
``prometheus.url``; lists and mappings are written as JSON. Secrets are not settings: ``*_file`` is the path of one.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from reelway.platform.cluster.inference_service import read_template
from reelway.platform.cluster.service_url import trusted_url
from reelway.platform.listen_address import EVERYWHERE
from reelway.platform.rollout.control.controller_settings import (
    AlertmanagerSettings,
    PrometheusSettings,
    Seconds,
    SettingsGroup,
    WebhookSettings,
)


def _check_url_template(text: str) -> str:
    try:
        url = text.format(name="name", namespace="namespace")
    except (KeyError, IndexError, ValueError, AttributeError):
        url = ""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"saw {text!r}, expected a URL with no placeholders but {{name}} and {{namespace}}")
    return text


UrlTemplate = Annotated[str, AfterValidator(_check_url_template)]


class OperatorWebhookSettings(WebhookSettings):
    host: str = EVERYWHERE
    port: int = Field(default=8080, ge=0, le=65535, description="0 selects a free port")
    token_file: Path = Field(
        default=Path("/etc/reelway/tokens/webhook"), description="bearer token that Alertmanager sends"
    )


class LeaseSettings(SettingsGroup):
    """The Lease that makes one replica the active one."""

    name: str = Field(default="reelway-operator", min_length=1)
    duration_s: Seconds = Field(
        default=10.0, ge=1, description="another replica can take over this long after the last renewal"
    )


class RaySettings(SettingsGroup):
    """How the operator reaches Ray Serve. ``{name}`` and ``{namespace}`` are those of the RayService."""

    token_file: Path | None = Field(default=None, description="Ray's token; None if Ray runs without authentication")
    service: str = Field(
        default="", description="RayService whose Serve config is composed from the chart's options; empty for none"
    )
    dashboard_url: UrlTemplate = "http://{name}-head-svc.{namespace}.svc:8265"
    internal_url: UrlTemplate = "http://{name}-head-svc.{namespace}.svc:8001"
    trusted_hosts: tuple[str, ...] = Field(
        default=(), description="hosts to which Ray's token may be sent although they are no Services of the namespace"
    )

    @model_validator(mode="after")
    def _templates_name_trusted_hosts(self) -> Self:
        templates: tuple[Literal["dashboard_url", "internal_url"], ...] = ("dashboard_url", "internal_url")
        for name in templates:
            try:
                self.url_of(name, "name", "namespace")
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return self

    def url_of(self, template: Literal["dashboard_url", "internal_url"], name: str, namespace: str) -> str:
        """Returns the URL that a template gives for a RayService.

        Raises:
            ValueError: if Ray's token must not be sent there; see ``trusted_url``.
        """
        url: str = getattr(self, template).format(name=name, namespace=namespace)
        return trusted_url(url, namespace, self.trusted_hosts)


class OperatorSettings(BaseSettings):
    """All settings of the operator."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix="REELWAY_OPERATOR_",
        env_nested_delimiter="__",
        env_ignore_empty=True,
    )

    identity: str = Field(
        default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}",
        min_length=1,
        description="name of this process in the Lease and in Events: the pod's name",
    )
    interval_s: Seconds = Field(
        default=2.0, description="pause between two reconciles; commands and alerts are handled at once"
    )
    webhook: OperatorWebhookSettings = OperatorWebhookSettings()
    prometheus: PrometheusSettings = PrometheusSettings()
    alertmanager: AlertmanagerSettings = AlertmanagerSettings()
    lease: LeaseSettings = LeaseSettings()
    ray: RaySettings = RaySettings()
    release_store: str | None = Field(
        default=None, description="path or URL of the release store; its releases are recorded as Release resources"
    )
    public_keys: Path | None = Field(
        default=None,
        description="trusted public keys (PEM file or folder with *.public.pem); a rollout starts only if one of them "
        "signed the release and its gates hold. None leaves this check to the serving processes",
    )
    parity_findings: str | None = Field(
        default=None,
        description="path or URL of the file that `reelway features parity --report` writes; without it the default "
        "policy does not require parity",
    )
    ranker_template: Path | None = Field(
        default=None, description="InferenceService template of a release's ranker; None if Serve runs the ranker"
    )

    def check_files(self) -> None:
        """Reads the certificates and the template, so that a wrong file fails at startup.

        Raises:
            ConfigError: if a file cannot be read or has the wrong content.
        """
        self.prometheus.access()
        self.alertmanager.source()
        if self.ranker_template is not None:
            read_template(self.ranker_template)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings
