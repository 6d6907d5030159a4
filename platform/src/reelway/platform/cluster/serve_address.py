"""The URLs of a backend's Ray dashboard and internal API, checked before Ray's token is sent there."""

from __future__ import annotations

from reelway.platform.cluster.operator_settings import RaySettings
from reelway.platform.cluster.resources import Backend
from reelway.platform.cluster.service_url import trusted_url
from reelway.platform.errors import RolloutError
from reelway.platform.rollout.traffic.serve_rest import ServeAddress


def serve_address(backend: Backend, namespace: str, settings: RaySettings) -> ServeAddress:
    """Returns the address of a backend's Serve.

    Raises:
        RolloutError: if a host is neither a Service of this namespace nor trusted: Ray's token would be sent there.
    """
    try:
        if backend.ray_service is not None:
            name = backend.ray_service.name
            internal_url = settings.url_of("internal_url", name, namespace)
            dashboard_url = settings.url_of("dashboard_url", name, namespace)
        else:
            assert backend.serve is not None, "a backend is a RayService or a Serve endpoint"
            internal_url = trusted_url(backend.serve.url, namespace, settings.trusted_hosts)
            dashboard_url = trusted_url(backend.serve.api, namespace, settings.trusted_hosts)
    except ValueError as error:
        raise RolloutError(f"spec.backend: {error}") from error
    return ServeAddress(internal_url, dashboard_url, settings.token_file)
