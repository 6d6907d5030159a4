"""Why: what runs is one document that anybody can write again with a change, so it is made by a pure function.

The document is Serve's configuration (``PUT /api/serve/applications/`` here, ``serveConfigV2`` of a RayService on a
cluster). It knows no Ray. Nothing secret is in it: secrets are files or environment variables of the processes.

**A release is one entry of ``applications``**: ``name`` is the release's id and so is ``args["release"]``; nothing else
in the entry differs from one release to the next. So whoever has the document adds a release by copying another one's
entry and writing the new id in these two places. The routing is the ``user_config`` of the router's deployment
``Router``, and the only thing that changes between steps of a rollout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reelway.platform.rollout.traffic.routing import Routing
from reelway.serving.composition import Composition

ROUTER: Final = "router"
OUTCOMES: Final = "outcomes"
OUTCOMES_PREFIX: Final = "/v1/outcomes"
RELEASE_BUILDER: Final = "reelway.serving.deployments.applications:release"
ROUTER_BUILDER: Final = "reelway.serving.deployments.applications:router"
OUTCOMES_BUILDER: Final = "reelway.serving.deployments.applications:outcomes"
_QUIET: Final = {"log_level": "WARNING", "enable_access_log": False}
"""One log line per request and hop costs more than the hop's arithmetic; the metrics count them all."""


class _Args(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReleaseShelf(_Args):
    """Where releases come from and whose signature is trusted."""

    release_store: str = Field(description="URL or path of the release store")
    release_cache: Path = Field(description="local folder; a release that it lacks is fetched from the store")
    public_keys: Path = Field(description="folder with *.public.pem, or one PEM file")
    overlay: str | None = Field(
        default=None,
        description="changelog that keeps releases' video features fresh: a path or fsspec URL; they stay as they were "
        "made where there is none",
    )

    def source_of(self, release: str, composition: Composition = "staged") -> ReleaseSource:
        """One release of this shelf."""
        return ReleaseSource(
            **self.model_dump(include=set(ReleaseShelf.model_fields)), release=release, composition=composition
        )


class ReleaseSource(ReleaseShelf):
    """Arguments of a release's application."""

    release: str = Field(min_length=1, description="full id; also the application's name")
    composition: Composition = "staged"
    ranker_address: str | None = Field(
        default=None,
        description="host:port of the gRPC server that ranks, with {release} for the first characters of the id; the "
        "graph ranks where there is none",
    )

    @model_validator(mode="after")
    def _waits_only_where_stages_are_deployments(self) -> ReleaseSource:
        if self.ranker_address and self.composition == "fused":
            raise ValueError(
                "ranker_address is set with composition fused, whose threads compute and never wait; use staged"
            )
        return self


class BudgetsMs(_Args):
    """How long a part may take before the path goes on without it, the hop included."""

    viewer_row: float = 250.0
    retrieval: float = 500.0
    ranking: float = 500.0
    reranking: float = 250.0

    @property
    def path(self) -> float:
        """All stages together, where they run as one."""
        return self.retrieval + self.ranking + self.reranking


class RouterArgs(ReleaseShelf):
    """Arguments of the router's application."""

    token_secrets: Path | None = Field(
        default=None, description="file of the token secrets; the environment variable goes before it"
    )
    features_dir: Path | None = Field(default=None, description="feature store; None serves everybody as unknown")
    vector_log: Path | None = Field(default=None, description="where the parity replay's sample is written")
    parity_ratio: float = Field(default=0.01, ge=0, le=1)
    budgets: BudgetsMs = BudgetsMs()
    composition: Composition = "staged"
    max_ongoing_requests: int = Field(
        default=64, ge=1, description="requests that one router has under way at a release; more are answered 429"
    )
    max_ongoing_sustained: int | None = Field(
        default=None, ge=1, description="the same where its queue has not been empty for 0.5 s; None: as many as ever"
    )
    outcomes: str | None = Field(
        default=None, description="application that is told what was shown, where there is one"
    )

    @model_validator(mode="after")
    def _a_queue_that_stands_is_not_longer(self) -> RouterArgs:
        if self.max_ongoing_sustained and self.max_ongoing_sustained > self.max_ongoing_requests:
            raise ValueError(
                f"max_ongoing_sustained {self.max_ongoing_sustained}: larger than max_ongoing_requests "
                f"{self.max_ongoing_requests}; lower it"
            )
        return self


class OutcomesArgs(_Args):
    """Arguments of the application that counts outcomes."""

    state: Path = Field(description="the file that it counts in; it belongs to one process")
    events: str | None = Field(
        default=None, description="event log that outcomes are appended to: a path, or kafka://host:port/topic"
    )
    token_secrets: Path | None = None


@dataclass(frozen=True)
class Replicas:
    """How many of each deployment. Outcomes are counted by one, whose file is its own.

    Fused, only the routers count: one for each core.
    """

    router: int = 1
    retrieval: int = 1
    ranking: int = 1
    reranking: int = 1


@dataclass(frozen=True)
class ServiceOptions:
    """One start of the service.

    ``metrics_dir`` belongs to this start alone; ``outcomes`` is the file that outcomes are counted in, None for a
    service without them; ``events`` is the event log that they are appended to as well; ``vector_log`` takes the share
    ``parity_ratio`` of what is served; ``port`` must be free.
    """

    shelf: ReleaseShelf
    metrics_dir: Path
    token_secrets: Path | None = None
    features_dir: Path | None = None
    vector_log: Path | None = None
    parity_ratio: float = 0.01
    outcomes: Path | None = None
    events: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: Replicas = field(default_factory=Replicas)
    budgets: BudgetsMs = field(default_factory=BudgetsMs)
    composition: Composition = "staged"
    max_ongoing_requests: int = 64
    max_ongoing_sustained: int | None = None
    ranker_address: str | None = None
    environment: dict[str, str] = field(default_factory=lambda: {"OMP_NUM_THREADS": "1"})
    num_cpus: float = 0.1
    """Of each replica. Small, so that all deployments of several releases fit on a laptop; a cluster sets its own."""


def serve_config(routing: Routing, options: ServiceOptions) -> dict[str, Any]:
    """The document: an application per release of the routing, the router over them, and the outcomes."""
    applications = [_release_application(release, options) for release in routing.releases]
    if options.outcomes:
        applications.append(_outcomes_application(options.outcomes, options))
    applications.append(_router_application(routing, options))
    return {
        "http_options": {"host": options.host, "port": options.port},
        "logging_config": dict(_QUIET),
        "applications": applications,
    }


def _release_application(release: str, options: ServiceOptions) -> dict[str, Any]:
    replicas = options.replicas
    counts = {"Retrieval": replicas.retrieval, "Ranking": replicas.ranking, "Reranking": replicas.reranking}
    if options.composition == "fused":
        counts = {"Release": 1}
    return {
        "name": release,
        "route_prefix": None,  # reached through the router only
        "import_path": RELEASE_BUILDER,
        "args": _source(release, options).model_dump(mode="json"),
        "deployments": [_deployment(name, count, options) for name, count in counts.items()],
        **_everywhere(options),
    }


def _source(release: str, options: ServiceOptions) -> ReleaseSource:
    source = options.shelf.source_of(release, options.composition)
    return ReleaseSource(**source.model_dump(exclude={"ranker_address"}), ranker_address=options.ranker_address)


def _router_application(routing: Routing, options: ServiceOptions) -> dict[str, Any]:
    args = RouterArgs(
        **options.shelf.model_dump(),
        token_secrets=options.token_secrets,
        features_dir=options.features_dir,
        vector_log=options.vector_log,
        parity_ratio=options.parity_ratio,
        budgets=options.budgets,
        composition=options.composition,
        max_ongoing_requests=options.max_ongoing_requests,
        max_ongoing_sustained=options.max_ongoing_sustained,
        outcomes=OUTCOMES if options.outcomes else None,
    )
    router = _deployment("Router", options.replicas.router, options)
    return {
        "name": ROUTER,
        "route_prefix": "/",
        "import_path": ROUTER_BUILDER,
        "args": args.model_dump(mode="json"),
        "deployments": [router | {"user_config": routing.model_dump(mode="json")}],
        **_everywhere(options),
    }


def _outcomes_application(state: Path, options: ServiceOptions) -> dict[str, Any]:
    args = OutcomesArgs(state=state, events=options.events, token_secrets=options.token_secrets)
    return {
        "name": OUTCOMES,
        "route_prefix": OUTCOMES_PREFIX,
        "import_path": OUTCOMES_BUILDER,
        "args": args.model_dump(mode="json"),
        "deployments": [_deployment("Outcomes", 1, options)],
        **_everywhere(options),
    }


def _deployment(name: str, replicas: int, options: ServiceOptions) -> dict[str, Any]:
    return {"name": name, "num_replicas": replicas, "ray_actor_options": {"num_cpus": options.num_cpus}}


def _everywhere(options: ServiceOptions) -> dict[str, Any]:
    environment = {**options.environment, "PROMETHEUS_MULTIPROC_DIR": str(options.metrics_dir)}
    return {"runtime_env": {"env_vars": environment}, "logging_config": dict(_QUIET)}
