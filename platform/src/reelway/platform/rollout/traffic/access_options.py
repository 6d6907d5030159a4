"""Options of who may ask the service: the proof of a viewer's identity, and request rates.

The keys that proofs are verified with are files or a URL, never values of options.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

AuthMode = Literal["off", "jwt", "gateway"]
Algorithm = Literal["EdDSA", "ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"]
"""Signature algorithms with a public key. None of them accepts a public key as the secret of a MAC."""


def _network(value: Any) -> IPv4Network | IPv6Network:
    """Returns the network of an address with a prefix length, such as 10.1.2.3/8."""
    try:
        return ip_network(value, strict=False)
    except ValueError:
        raise ValueError(f"saw {value!r}, expected a network such as 10.1.0.0/16 or fd00::/8") from None


Network = Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)]


class _AccessOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JwtOptions(_AccessOptions):
    """Verification of JSON Web Tokens (RFC 7519), sent as ``Authorization: Bearer``."""

    audience: str = Field(min_length=1, description="expected in the claim `aud`")
    issuer: str | None = Field(default=None, min_length=1, description="expected in the claim `iss`; by default any")
    jwks_url: str | None = Field(
        default=None, pattern=r"^https?://", description="URL of the issuer's key set (JWKS); alternative to keys_file"
    )
    keys_file: Path | None = Field(
        default=None,
        description="file with a key set (JWKS) or public keys in PEM format; alternative to jwks_url",
    )
    ca_file: Path | None = Field(default=None, description="certificates that jwks_url is verified with")
    viewer_claim: str = Field(default="sub", min_length=1, description="claim with the viewer id")
    algorithms: tuple[Algorithm, ...] = Field(
        default=("EdDSA", "ES256", "RS256"), min_length=1, description="accepted signature algorithms"
    )
    leeway_s: float = Field(default=30.0, ge=0, le=300, description="accepted difference of the clocks in seconds")
    refresh_s: float = Field(default=300.0, ge=1, description="seconds after which the keys are read again")

    @model_validator(mode="after")
    def _one_source_of_keys(self) -> Self:
        if (self.jwks_url is None) == (self.keys_file is None):
            raise ValueError("jwks_url, keys_file: exactly one of them is needed; set the other to null")
        return self


class GatewayOptions(_AccessOptions):
    """Verification of the header ``Reelway-Viewer``, which a gateway signs after it has authenticated the viewer."""

    keys_file: Path = Field(description="file with the shared secrets, one per line; each of them is accepted")
    max_age_s: float = Field(default=60.0, gt=0, le=3600, description="age in seconds at which a header expires")
    leeway_s: float = Field(default=30.0, ge=0, le=300, description="accepted difference of the clocks in seconds")
    refresh_s: float = Field(default=60.0, ge=1, description="seconds after which the file is read again")


class RateLimit(_AccessOptions):
    """A token bucket. Every router process has buckets of its own, so N routers together allow N times the rate."""

    per_second: float = Field(ge=0, description="requests per second; 0 turns the limit off")
    burst: int = Field(ge=1, description="requests that may come at once after a rest")


_LOOPBACK: tuple[IPv4Network | IPv6Network, ...] = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))


class AccessOptions(_AccessOptions):
    """Who may ask, and how often."""

    mode: AuthMode = Field(default="off", description="proof of the viewer's identity")
    jwt: JwtOptions | None = None
    gateway: GatewayOptions | None = None
    per_viewer: RateLimit = Field(
        default=RateLimit(per_second=20, burst=100), description="limit of each proven viewer; unused with mode off"
    )
    per_address: RateLimit = Field(
        default=RateLimit(per_second=200, burst=1000), description="limit of each client address"
    )
    trusted_proxies: int = Field(
        default=0, ge=0, le=10, description="proxies before the service that append to X-Forwarded-For"
    )
    unlimited_networks: tuple[Network, ...] = Field(
        default=_LOOPBACK, description="networks whose addresses have no limit"
    )

    @property
    def on(self) -> bool:
        """Whether a viewer must prove its identity."""
        return self.mode != "off"

    @field_validator("mode", mode="before")
    @classmethod
    def _off_without_quotes(cls, mode: Any) -> Any:
        return "off" if mode is False else mode  # YAML 1.1 reads off as a boolean

    @model_validator(mode="after")
    def _mode_has_options(self) -> Self:
        for name, options in (("jwt", self.jwt), ("gateway", self.gateway)):
            if self.mode == name and options is None:
                raise ValueError(f"{name}: missing, and mode is {name!r}; set the options of {name}")
            if self.mode != name and options is not None:
                raise ValueError(f"{name}: set, and mode is {self.mode!r}; set mode to {name!r} or remove {name}")
        return self
