"""Why: what people write and read of a rollout on Kubernetes, as types; the CRDs are generated from them (``crds``).

No I/O. Names at the top of ``spec`` and ``status`` are Kubernetes' camelCase; what is a policy, a state, a history
entry or a sighting keeps the names it has everywhere else, so that one file, one JSON and one document say the same.

``spec`` is a person's and ``status`` the operator's. Commands are part of ``spec`` (``spec.commands``, each with an
id), not annotations and not the status: the right to pause is then the right to patch rollouts, never the right to
write what was judged; the schema checks them; and a command that was written twice has one id. A state is read as the
recorded one with every command in it that it has not seen, so that asking needs one write and none is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from reelway.platform.errors import ConfigError
from reelway.platform.rollout.alerts import KnownAlert
from reelway.platform.rollout.policy import RolloutPolicy, parse_policy
from reelway.platform.rollout.records import HistoryEntry, Sighting
from reelway.platform.rollout.state import REMEMBERED_COMMANDS, Command, RolloutState

GROUP: Final = "reelway.dev"
VERSION: Final = "v1alpha1"
ROLLOUT_KIND: Final = "ReleaseRollout"
ROLLOUTS: Final = "releaserollouts"
RELEASE_KIND: Final = "Release"
RELEASES: Final = "releases"
FINALIZER: Final = "reelway.dev/traffic-on-stable"

COMMANDS_LIMIT: Final = REMEMBERED_COMMANDS // 2
"""In a spec. Less than a state remembers, so that none that is still there is ever taken for a new one."""
HISTORY_LIMIT: Final = 100
"""Entries in a status, newest kept; an object of etcd must stay well under a mebibyte."""
EVIDENCE_LIMIT: Final = 10
"""Of them, how many keep the evidence that was judged: the newest, and those that ended the ramp."""
ALERTS_LIMIT: Final = 100

ReleaseId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="digest of a release's manifest")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True, alias_generator=to_camel)

    def document(self) -> dict[str, Any]:
        """As the API server takes it."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class PolicyReference(_Model):
    """A policy file in a ConfigMap of the same namespace. Read once, when the rollout begins."""

    name: Annotated[str, Field(min_length=1, max_length=253)]
    key: Annotated[str, Field(min_length=1, max_length=253)] = "policy.yaml"


class RayServiceReference(_Model):
    """A KubeRay RayService of the same namespace."""

    name: Annotated[str, Field(min_length=1, max_length=47)]


class ServeEndpoint(_Model):
    """A Ray Serve that no operator looks after. It is told Ray's token only if its host is of this namespace."""

    api: Annotated[str, Field(pattern=r"^https?://", max_length=512, description="base URL of the Ray dashboard")]
    url: Annotated[str, Field(pattern=r"^https?://", max_length=512, description="base URL of the router")]


class Backend(_Model):
    """Where the traffic is; one of them. Rollouts of one backend take turns."""

    ray_service: RayServiceReference | None = None
    serve: ServeEndpoint | None = None

    @property
    def key(self) -> str:
        """What makes two backends the same."""
        return f"rayservice/{self.ray_service.name}" if self.ray_service else f"serve/{self.serve and self.serve.api}"


class AskedCommand(_Model):
    """A person's command. ``actor`` is what they say of themselves; the API server's audit log knows better."""

    id: Annotated[str, Field(min_length=1, max_length=64, description="asking twice with one id is asking once")]
    verb: Literal["pause", "resume", "promote", "rollback"]
    actor: Annotated[str, Field(max_length=128)] = "unknown"
    force: bool = Field(default=False, description="promote although evidence is missing")
    note: Annotated[str, Field(max_length=1024, description="why, for those who read the history")] = ""

    @property
    def command(self) -> Command:
        return Command(**self.model_dump())


class ReleaseRolloutSpec(_Model):
    """All but ``commands`` is fixed once it is written."""

    release: ReleaseId
    stable_release: ReleaseId | None = Field(
        default=None,
        description="the release that it is meant to replace: refused where another one is live; the live one when "
        "absent",
    )
    policy: RolloutPolicy | None = Field(
        default=None,
        description="the default policy when this and policyRef are absent; a null in it is dropped by `kubectl apply` "
        "without --server-side, and the field then has its default: use --server-side, create, or policyRef",
    )
    policy_ref: PolicyReference | None = None
    backend: Backend
    force: bool = Field(default=False, description="past a cooldown, and past the release's own rollback")
    note: Annotated[str, Field(max_length=1024)] = ""
    commands: Annotated[tuple[AskedCommand, ...], Field(max_length=COMMANDS_LIMIT)] = ()


class Condition(_Model):
    """As ``kubectl wait --for=condition=...`` reads it."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""
    last_transition_time: str
    observed_generation: int = 0


class EvidenceSummary(_Model):
    """What was judged last, in sentences; the numbers are in ``sighting`` and ``history``."""

    viewers: int = 0
    impressions: int = 0
    age_s: float | None = None
    outcomes: tuple[str, ...] = ()
    guardrails: tuple[str, ...] = ()


class ReleaseRolloutStatus(_Model):
    """All that is known of a rollout. ``state`` and ``policy`` are what is decided on; the rest is drawn from them."""

    observed_generation: int = 0
    version: int = Field(default=0, ge=0, description="writes of the state")
    phase: str = Field(default="", description="Waiting and Refused before it began; then the state's")
    release: str = Field(default="", description="first characters of the release's id")
    step: str = Field(default="", description="2 of 5")
    weight: str = Field(default="", description="the release's share of the viewers")
    weights: dict[str, int] = Field(default_factory=dict, description="basis points by arm")
    verdict: str = Field(default="", description="ok, bad, insufficient, telemetry_down: the worst of the last look")
    reason: str = Field(default="", description="of the last decision, word for word")
    waits_for: str = Field(default="", description="what the last look found to be missing")
    evidence: EvidenceSummary | None = None
    conditions: tuple[Condition, ...] = ()
    state: RolloutState | None = Field(default=None, description="absent before it began")
    policy: RolloutPolicy | None = Field(default=None, description="as it is judged, every default filled in")
    history: tuple[HistoryEntry, ...] = ()
    sighting: Sighting | None = None
    alerts: tuple[KnownAlert, ...] = ()
    superseded_by: str = Field(
        default="",
        description="the rollout that began after it: this one is followed no longer, even if that one is deleted",
    )


class ReleaseSpec(_Model):
    """Where a release lies. What is in it is said by its manifest, and nowhere twice."""

    id: ReleaseId
    store: Annotated[str, Field(min_length=1, max_length=1024, description="URL of the release store")]
    parent: ReleaseId | None = None
    note: Annotated[str, Field(max_length=1024)] = ""


class ReleaseStatus(_Model):
    """What its manifest says, and whether the store still has it: written by the operator, judged by nobody here."""

    name: str = Field(default="", description="what people call it: the run that it came from")
    made_at: str = ""
    gates: str = Field(default="", description="hold, waived (by a named person) or failed")
    failed_gates: tuple[str, ...] = ()
    metrics: dict[str, str] = Field(default_factory=dict, description="of the evaluation, as text")
    conditions: tuple[Condition, ...] = ()


class Resource(BaseModel):
    """A ReleaseRollout as the API server gave it."""

    model_config = ConfigDict(frozen=True)

    name: str
    namespace: str
    uid: str
    resource_version: str
    generation: int
    created_at: str
    deleting: bool
    finalizers: tuple[str, ...]
    spec: ReleaseRolloutSpec
    policy_problem: str = ""
    """Why ``spec.policy`` is none, in words for a person: a schema cannot say all that a policy must be."""
    status: ReleaseRolloutStatus

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Resource:
        """Read one. Raises pydantic's ValidationError: it is of another version of the CRD."""
        metadata, spec, problem = document["metadata"], dict(document["spec"]), ""
        if spec.get("policy") is not None:
            try:
                parse_policy(yaml.safe_dump(spec["policy"]), source="spec.policy")
            except ConfigError as error:
                problem = str(error)
                del spec["policy"]
        return cls(
            name=metadata["name"],
            namespace=metadata["namespace"],
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            generation=metadata.get("generation", 1),
            created_at=str(metadata["creationTimestamp"]),
            deleting="deletionTimestamp" in metadata,
            finalizers=tuple(metadata.get("finalizers", ())),
            spec=ReleaseRolloutSpec.model_validate(spec),
            policy_problem=problem,
            status=ReleaseRolloutStatus.model_validate(document.get("status") or {}),
        )

    @property
    def rollout_id(self) -> str:
        """Never used twice, unlike a name: it salts the buckets and labels what is counted."""
        return f"{self.name}-{self.uid[:8]}"

    @property
    def version(self) -> int:
        """Grows with every write of the state and of the spec."""
        return self.status.version + self.generation
