"""Why: every backend has a controller of its own, the same one as on a laptop; here it is put together.

A lane is one backend: its store, its evidence, its alerts, its controller in a thread. It decides nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from reelway.platform.cluster.inference_service import InferenceServices, RankedApart, read_template
from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.ray_service import RayServiceBackend
from reelway.platform.cluster.resources import Backend, Resource
from reelway.platform.cluster.rollout_store import KubeRolloutStore
from reelway.platform.cluster.serve_config_reconciler import ServeConfigReconciler
from reelway.platform.cluster.shelf import Shelf
from reelway.platform.errors import RolloutError
from reelway.platform.rollout.control.alert_book import AlertBook
from reelway.platform.rollout.control.controller import Controller
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.records import HistoryEntry
from reelway.platform.rollout.sources import Access, ReadEvidence, alert_source
from reelway.platform.rollout.sources.direct_scrape import DirectScrape
from reelway.platform.rollout.sources.heard_series import SeriesReader
from reelway.platform.rollout.sources.parity_report import ParityReport
from reelway.platform.rollout.sources.parity_store import ParityInStore
from reelway.platform.rollout.sources.prometheus_reader import PrometheusReader
from reelway.platform.rollout.traffic.serve_rest import ServeAddress, ServeRestBackend

log = logging.getLogger(__name__)

HEAD_URL: Final = "http://{name}-head-svc.{namespace}.svc:8265"
ROUTER_URL: Final = "http://{name}-serve-svc.{namespace}.svc:8000"
"""Services that KubeRay makes for a RayService."""


@dataclass(frozen=True)
class LaneSettings:
    """What all lanes of an operator have in common."""

    interval_s: float = 2.0
    """Seconds between two looks; commands and alerts do not wait for them."""
    prometheus_url: str | None = None
    """Asked for evidence; None scrapes the router directly, which is right for one router only."""
    alertmanager_url: str | None = None
    """Polled for alerts besides the webhook; None polls nothing."""
    prometheus_access: Access = field(default_factory=Access)
    """How it is asked, and labels of its series besides their namespace, which is always this one."""
    alertmanager_access: Access = field(default_factory=Access)
    """The same of Alertmanager. An alert of another namespace is not ours."""
    poll_s: float = 5.0
    """Seconds between two polls."""
    ray_token_file: Path | None = None
    """Ray's token, from a Secret; None for a Ray without authentication."""
    parity: str | None = None
    """Path or URL of the feature replay's findings; None leaves parity unknown, and who asks for it holds."""
    head_url: str = HEAD_URL
    """Of a RayService's dashboard; {name} and {namespace} are filled in."""
    router_url: str = ROUTER_URL
    """Of its routers."""
    ranker_template: Path | None = None
    """InferenceService of a release's ranker, where KServe runs it; None leaves ranking to the graph."""
    trusted_hosts: tuple[str, ...] = ()
    """Hosts outside the namespace that Ray's token may be sent to."""


class Lane:
    """One backend and its controller.

    Raises:
        RolloutError: the backend is one that may not be talked to.
        KubernetesError: what is known of its alerts could not be read.
    """

    def __init__(
        self,
        api: KubeApi,
        shelf: Shelf,
        backend: Backend,
        settings: LaneSettings,
        metrics: ControllerMetrics,
        told: Callable[[Resource, HistoryEntry], None],
    ) -> None:
        address = address_of(backend, api.namespace, settings)
        self.key = backend.key
        self.store = KubeRolloutStore(api, shelf, backend=backend.key, made_for=backend, told=told)
        serve = ServeRestBackend(address)
        name = backend.ray_service.name if backend.ray_service else ""
        self.backend: RayServiceBackend | ServeRestBackend = serve
        self.serve_config: ServeConfigReconciler | None = None
        rankers = _rankers(api, settings)
        if name:
            self.backend = RayServiceBackend(api, name, serve)
            self.serve_config = ServeConfigReconciler(api, self.backend, rankers)
        url = address.url.rstrip("/")
        reader: SeriesReader
        if settings.prometheus_url:
            access = _within(api.namespace, settings.prometheus_access)
            reader = PrometheusReader(settings.prometheus_url, access=access)
        else:
            reader = DirectScrape(lambda: url)
        self._parity = ParityInStore(settings.parity) if settings.parity else None
        self._source = ReadEvidence(reader, self._parity.report if self._parity else _no_parity)
        self.book = AlertBook(self.store)
        self.wake = threading.Event()
        self._stop = threading.Event()
        alerts = settings.alertmanager_url
        controller = Controller(
            self.store,
            RankedApart(self.backend, rankers) if rankers else self.backend,
            self._source,
            self.book,
            alert_source=alert_source(alerts, _within(api.namespace, settings.alertmanager_access)) if alerts else None,
            poll_s=settings.poll_s,
            metrics=metrics,
        )
        self._thread = threading.Thread(
            target=controller.run, args=(self._stop, self.wake, settings.interval_s), name=f"lane {self.key}"
        )

    def start(self) -> None:
        """Begin to look."""
        log.info("looking after %s", self.key)
        self._thread.start()

    @property
    def lives(self) -> bool:
        """Whether its controller still runs."""
        return self._thread.is_alive()

    def gone(self) -> bool:
        """Whether there is nothing left whose traffic could be moved. Raises KubernetesError: nobody could say."""
        return isinstance(self.backend, RayServiceBackend) and not self.backend.exists()

    def stop(self) -> None:
        """Finish what is under way, and end."""
        self._stop.set()
        self.wake.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._source.close()
        if self._parity is not None:
            self._parity.close()
        self.backend.close()


def _no_parity() -> ParityReport:
    return ParityReport(problem="nobody said where the feature replay leaves its findings; start with --parity URL")


def _within(namespace: str, access: Access) -> Access:
    """One Prometheus serves many namespaces, and the same release may be a canary in two of them."""
    return replace(access, labels={**access.labels, "namespace": namespace})


def _rankers(api: KubeApi, settings: LaneSettings) -> InferenceServices | None:
    return InferenceServices(api, read_template(settings.ranker_template)) if settings.ranker_template else None


def address_of(backend: Backend, namespace: str, settings: LaneSettings) -> ServeAddress:
    """Where a backend's Serve is.

    Raises:
        RolloutError: its host is neither of this namespace nor trusted, so that Ray's token would leave it.
    """
    if backend.ray_service is not None:
        names = {"name": backend.ray_service.name, "namespace": namespace}
        return ServeAddress(
            settings.router_url.format(**names), settings.head_url.format(**names), settings.ray_token_file
        )
    assert backend.serve is not None, "a backend is one of them"
    for url in (backend.serve.api, backend.serve.url):
        host = urlsplit(url).hostname or ""
        own = "." not in host or host.endswith(
            (f".{namespace}", f".{namespace}.svc", f".{namespace}.svc.cluster.local")
        )
        if not (own or host in settings.trusted_hosts):
            raise RolloutError(
                f"spec.backend.serve names host {host!r}, expected a Service of namespace {namespace}, or a host that "
                f"the operator was told to trust ({', '.join(settings.trusted_hosts) or 'none'})"
            )
    return ServeAddress(backend.serve.url, backend.serve.api, settings.ray_token_file)
