"""Malformed and hostile requests to the router's endpoints, and the shape of the errors that answer them."""

from __future__ import annotations

import json

from tests.support.hostile_requests import HostileRequest, too_long

from reelway.platform.contracts.api import MAX_OUTCOMES, ErrorResponse
from reelway.serving.http_api import MAX_OUTCOMES_BYTES, MAX_RECOMMEND_BYTES, MAX_REPORTED

VIEWER = b'{"viewer_id": 1}'
LIKE = b'{"outcomes": [{"token": "t", "type": "like"}]}'


def check_error(body: bytes) -> None:
    response = ErrorResponse.model_validate_json(body)
    assert set(json.loads(body)) == {"error", "fields"}
    assert response.error
    assert len(response.fields) <= MAX_REPORTED


def unknown_keys(count: int) -> bytes:
    return json.dumps({f"k{i}": 1 for i in range(count)}).encode()


def outcomes_with(member: str) -> bytes:
    return f'{{"outcomes": [{{"token": "t", "type": "watch", {member}}}]}}'.encode()


RECOMMEND = [
    *too_long(MAX_RECOMMEND_BYTES),
    *(
        HostileRequest(f"viewer_id {value[:20]}", body=f'{{"viewer_id": {value}}}'.encode())
        for value in ("-1", "1e3", "1e999", "-1e999", "1.5", "true", "null", '"1"', "[1]", "{}", "9" * 4_300,
                      str(2**53), str(2**64), "1" + "0" * 400 + ".5", '"' + "9" * 10_000 + '"')
    ),
    *(
        HostileRequest(f"count {value}", body=f'{{"viewer_id": 1, "count": {value}}}'.encode())
        for value in ("0", "101", "-1", "1e999", "2.5", '"5"', "[]")
    ),
    *(
        HostileRequest(f"context {value[:40]}", body=f'{{"viewer_id": 1, "context": {value}}}'.encode())
        for value in ('"phone"', "[]", '{"device": 1}', '{"device": {"a": 1}}', '{"region": "%s"}' % ("x" * 65),
                      '{"time": "2024-06-10T06:00:00"}', '{"time": 1e999}', '{"time": "99999-01-01T00:00:00Z"}',
                      '{"time": [[[[[[]]]]]]}', '{"a\\u0000b": 1}')
    ),
    HostileRequest("150 nested lists", body=b'{"viewer_id": %b1%b}' % (b"[" * 150, b"]" * 150)),
    HostileRequest("16 unknown keys", body=unknown_keys(16)),
    HostileRequest("1,200 unknown keys", body=unknown_keys(1_200)),
    HostileRequest("a key of 10,000 characters", body=json.dumps({"viewer_id": 1, "k" * 10_000: 1}).encode()),
    HostileRequest("no content type", headers={"Content-Type": None}, body=VIEWER),
    HostileRequest("text", headers={"Content-Type": "text/plain"}, body=VIEWER),
    HostileRequest("a form", headers={"Content-Type": "application/x-www-form-urlencoded"}, body=b"viewer_id=1"),
    HostileRequest("parts", headers={"Content-Type": "multipart/form-data; boundary=a"}, body=b"--a\r\n\r\n1\r\n--a--"),
]  # fmt: skip
OUTCOME = [
    *too_long(MAX_OUTCOMES_BYTES),
    HostileRequest("no outcome", body=b'{"outcomes": []}'),
    HostileRequest("too many outcomes", body=b'{"outcomes": [%b{}]}' % (b"{}," * MAX_OUTCOMES)),
    HostileRequest("340,000 empty outcomes", body=b'{"outcomes": [%b{}]}' % (b"{}," * 340_000)),
    HostileRequest("500,000 numbers", body=b'{"outcomes": [%b1]}' % (b"1," * 500_000)),
    HostileRequest("outcomes in an object", body=b'{"outcomes": {"a": 1}}'),
    HostileRequest("70,000 keys in the request", body=unknown_keys(70_000)),
    HostileRequest("70,000 keys in an outcome", body=b'{"outcomes": [%b]}' % unknown_keys(70_000)),
    HostileRequest("16 keys in 1,000 outcomes", body=b'{"outcomes": [%b{}]}' % ((unknown_keys(16) + b", ") * 999)),
    HostileRequest("an unknown type", body=b'{"outcomes": [{"token": "t", "type": "love"}]}'),
    HostileRequest("a token that is a list", body=b'{"outcomes": [{"token": ["t"], "type": "like"}]}'),
    *(
        HostileRequest(f"{member[:40]}", body=outcomes_with(member))
        for member in ('"value": -1', '"value": 1e999', '"value": -1e999', '"value": "five"', '"value": [1]',
                       '"value": 1e300', f'"value": {"9" * 4_300}', '"event_time": "2024-06-10T06:00:00"',
                       '"event_time": 1e999', '"event_time": "yesterday"', '"vpn": true')
    ),
]  # fmt: skip
