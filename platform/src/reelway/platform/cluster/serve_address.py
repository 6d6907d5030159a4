"""Where a rollout's backend is: the URLs of its Ray dashboard and router, checked before Ray's token is sent there."""

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
            router, dashboard = (settings.url_of(which, name, namespace) for which in ("router_url", "dashboard_url"))
        else:
            assert backend.serve is not None, "a backend is a RayService or a Serve endpoint"
            router, dashboard = (
                trusted_url(url, namespace, settings.trusted_hosts) for url in (backend.serve.url, backend.serve.api)
            )
    except ValueError as error:
        raise RolloutError(f"spec.backend: {error}") from error
    return ServeAddress(router, dashboard, settings.token_file)
