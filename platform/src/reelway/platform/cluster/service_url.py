"""URLs to which the operator sends Ray's token: Services of its namespace, and hosts that its settings trust.

::

    http[s]://service[.namespace.svc[.cluster.local]][:port][/path]

A Service's name is a DNS label of RFC 1035, as Kubernetes requires, and therefore neither a number nor an address. A
name of two labels, such as ``service.dev``, is rejected: a resolver that finds no such Service asks the public DNS.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

DNS_LABEL: Final = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"
"""RFC 1035, section 2.3.1, in lower case: the name of a Service or of a RayService."""

URL: Final = r"https?://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?(/[A-Za-z0-9._~-]*)*"
"""A URL without user name, query and fragment. Its groups are the host, the port with its colon, and the last step."""
_SERVICE: Final = re.compile(rf"{DNS_LABEL}(?P<qualified>\.(?P<namespace>[^.]+)\.svc(\.cluster\.local)?)?")


def trusted_url(url: str, namespace: str, trusted_hosts: Collection[str]) -> str:
    """Returns the URL of a Service of ``namespace`` or of a trusted host.

    A Service that is written without a namespace gets one, so that no search domain of the node completes its name.

    Raises:
        ValueError: if the URL has another form or another host; the message says what was expected.
    """
    parts = re.fullmatch(URL, url)
    if parts is None or not 1 <= int((parts[2] or ":80")[1:]) <= 65535:
        raise ValueError(f"saw {url!r}, expected http:// or https://, a host, and at most a port and a path")
    host = parts[1]
    if host.strip("[]") in trusted_hosts:
        return url
    service = _SERVICE.fullmatch(host)
    if service is None or (service["qualified"] and service["namespace"] != namespace):
        raise ValueError(
            f"host {host!r} is neither a Service of namespace {namespace} (service, service.{namespace}.svc or "
            f"service.{namespace}.svc.cluster.local) nor one of the operator's trusted hosts "
            f"({', '.join(trusted_hosts) or 'none'}); add it to ray.trusted_hosts in the operator's settings"
        )
    return url if service["qualified"] else f"{url[: parts.end(1)]}.{namespace}.svc{url[parts.end(1) :]}"
