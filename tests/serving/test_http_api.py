"""The HTTP API without Ray and models: rejected requests, and the schema in /openapi.json."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from fastapi.testclient import TestClient
from tests.support.serving.caller_access import INTERNAL, open_access
from tests.support.serving.one_video_service import OneVideoService

from reelway.platform.contracts.api import RecommendResponse
from reelway.platform.rollout.traffic.routing import Routing
from reelway.serving.http_api import build_http_api


@pytest.fixture
def service() -> OneVideoService:
    return OneVideoService()


@pytest.fixture
def client(service: OneVideoService) -> TestClient:
    return TestClient(build_http_api(service, open_access()), raise_server_exceptions=False)


VALID: dict[str, Any] = {"viewer_id": 1}


def test_valid_request_is_answered(client: TestClient, service: OneVideoService) -> None:
    context = {"device": "phone", "region": "eu", "time": "2024-06-10T06:00:00Z"}
    answer = client.post("/v1/recommend", json={"viewer_id": 5, "count": 3, "context": context})
    assert answer.status_code == 200
    assert RecommendResponse.model_validate(answer.json()).viewer_id == 5
    assert service.requests[0].context.device == "phone"
    assert service.done_after == [1]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"viewer_id": -1}, "viewer_id"),
        ({"viewer_id": 2**53}, "viewer_id"),
        ({"viewer_id": "1"}, "viewer_id"),
        ({"viewer_id": 1.5}, "viewer_id"),
        ({"viewer_id": True}, "viewer_id"),
        ({"viewer_id": None}, "viewer_id"),
        ({"count": 0}, "count"),
        ({"count": 101}, "count"),
        ({"count": "20"}, "count"),
        ({"context": "phone"}, "context"),
        ({"context": {"device": 5}}, "context.device"),
        ({"context": {"region": "x" * 65}}, "context.region"),
        ({"context": {"time": "yesterday"}}, "context.time"),
        ({"context": {"time": "2024-06-10T06:00:00"}}, "context.time"),  # without a time zone
        ({"context": {"vpn": True}}, "context.vpn"),
        ({"users": [1]}, "users"),
    ],
)
def test_invalid_field_is_named_in_the_422_response(
    client: TestClient, service: OneVideoService, change: dict[str, Any], field: str
) -> None:
    answer = client.post("/v1/recommend", json=VALID | change)
    assert answer.status_code == 422
    assert [one["field"] for one in answer.json()["fields"]] == [field]
    assert field in answer.json()["error"]
    assert service.refused == 1
    assert service.requests == []


def test_422_response_names_all_invalid_fields(client: TestClient) -> None:
    answer = client.post("/v1/recommend", json={"viewer_id": -3, "count": 1000})
    assert {one["field"]: one["value"] for one in answer.json()["fields"]} == {"viewer_id": -3, "count": 1000}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"nonsense", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"viewer_id": NaN}']
)
def test_malformed_body_is_rejected(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/recommend", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["fields"]


def test_long_value_is_not_echoed(client: TestClient) -> None:
    answer = client.post("/v1/recommend", json={"viewer_id": "9" * 10_000})
    assert answer.status_code == 422
    assert len(answer.content) < 1000


def test_unexpected_error_is_503_without_internals(client: TestClient, service: OneVideoService) -> None:
    service.breaks = True
    answer = client.post("/v1/recommend", json=VALID)
    assert answer.status_code == 503
    assert "a bug" not in answer.text
    assert answer.headers["retry-after"] == "1"


def test_openapi_schema_describes_requests_and_responses(client: TestClient) -> None:
    schema = client.get("/openapi.json", headers=INTERNAL).json()
    operation = schema["paths"]["/v1/recommend"]["post"]
    parts = schema["components"]["schemas"]
    assert "HTTPValidationError" not in json.dumps(operation)

    def resolved(content: dict[str, Any]) -> dict[str, Any]:
        name = content["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        schema = parts[name] | {"components": {"schemas": parts}}
        jsonschema.Draft202012Validator.check_schema(schema)
        return schema

    jsonschema.validate({"viewer_id": 1, "count": 3}, resolved(operation["requestBody"]))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"viewer_id": -1}, resolved(operation["requestBody"]))
    jsonschema.validate(client.post("/v1/recommend", json=VALID).json(), resolved(operation["responses"]["200"]))
    jsonschema.validate(client.post("/v1/recommend", json={}).json(), resolved(operation["responses"]["422"]))


def test_other_routes_answer(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok", "authentication": "off"}
    assert client.get("/v1/releases/current", headers=INTERNAL).json() == {
        "rollout": "",
        "salt": "reelway",
        "routing": Routing.single_release("r").model_dump(mode="json"),
        "releases": [{"release": "r", "arm": "stable", "weight_basis_points": 10_000}],
        "open": ["r"],
        "faults": {},
    }
    assert client.get("/metrics", headers=INTERNAL).headers["content-type"].startswith("text/plain")
