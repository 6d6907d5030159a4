"""The service behind the HTTP API, without Ray and models."""

from __future__ import annotations

from reelway.platform.contracts.api import OutcomesRequest, OutcomesResponse, RecommendRequest, RecommendResponse
from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.traffic.routing import Routing
from reelway.serving.http_api import CurrentReleases, PendingResponse, ServedRelease


class OneVideoService:
    """Returns one video for every viewer, or raises."""

    def __init__(self) -> None:
        self.breaks = False
        self.refused = 0
        self.denied: list[str] = []
        self.proven: list[object] = []
        self.requests: list[RecommendRequest] = []
        self.done_after: list[int] = []

    async def recommend(self, request: RecommendRequest, *, authenticated: bool) -> PendingResponse:
        self.requests.append(request)
        self.proven.append(authenticated)
        if self.breaks:
            raise ValueError("a bug")
        video = {
            "video_id": 1,
            "creator_id": 2,
            "position": 0,
            "score": 0.5,
            "source": "ann",
            "reason": "x",
            "token": "t",
        }
        response = RecommendResponse.model_validate(
            {"request_id": 3, "viewer_id": request.viewer_id, "release": "r", "arm": "stable", "videos": [video]}
        )
        return PendingResponse(response, self.afterwards)

    async def afterwards(self) -> None:
        self.done_after.append(len(self.requests))

    def current_releases(self) -> CurrentReleases:
        return CurrentReleases(
            rollout="",
            salt="reelway",
            routing=Routing.single_release("r"),
            releases=[ServedRelease(release="r", arm=Arm.STABLE, weight_basis_points=10_000)],
            open=["r"],
        )

    async def metrics_text(self) -> bytes:
        return b"reelway_ingress_requests_total 1\n"

    def record_rejected(self, kind: str) -> None:
        assert kind in ("invalid", "not_found")
        self.refused += kind == "invalid"

    def record_denied(self, reason: str) -> None:
        self.denied.append(reason)

    def shed_before_read(self) -> None:
        """Never rejects a request."""

    async def report_outcomes(self, request: OutcomesRequest, viewer_id: int | None) -> OutcomesResponse:
        self.proven.append(viewer_id)
        return OutcomesResponse(accepted=len(request.outcomes))

    def close(self) -> None:
        """Has nothing to write."""
