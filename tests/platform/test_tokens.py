"""Impression tokens: round trips, tampering, key rotation, and the cost of signing."""

from __future__ import annotations

import base64
import hashlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.errors import ConfigError, TokenError
from reelway.platform.rollout.policy import Slice
from reelway.platform.tokens import ALL_SLICES, ROLLOUT_MAX_BYTES, SLICE_BITS, ImpressionToken, TokenSigner

SECRET = b"0123456789abcdef0123456789abcdef"
OTHER = b"another secret of enough length!"
SIGNER = TokenSigner(SECRET)
IDS = st.integers(0, MAX_ID)
TOKENS = st.builds(
    ImpressionToken,
    impression_id=IDS,
    request_id=IDS,
    viewer_id=IDS,
    video_id=IDS,
    position=st.integers(0, 999),
    release=st.one_of(
        st.text("0123456789abcdef", min_size=64, max_size=64),
        st.sampled_from(["none", "v1", "ü", "A" * 64, "ab " * 21 + "a", "z" * 64]),
    ),
    arm=st.sampled_from(list(Arm)),
    source=st.sampled_from(["ann", "popular", "trending", "fresh", "neighbours", ""]),
    propensity=st.floats(1e-9, 1.0),
    issued_at_s=st.floats(0, 4e9),
    rollout=st.one_of(st.just(""), st.from_regex(r"r-2026[01][0-9][0-3][0-9]-[0-9a-f]{4}", fullmatch=True), st.text()),
    weight=st.floats(0, 1, width=32),
    slices=st.integers(0, 7),
    duration_ms=st.integers(0, 2**32 - 1),
    creator_id=st.integers(-1, MAX_ID),
    topic=st.integers(-1, 2**31 - 1),
).filter(lambda token: len(token.rollout.encode()) <= ROLLOUT_MAX_BYTES)
TOKEN = ImpressionToken(1, 2, 3, 4, 5, "ab" * 32, Arm.CANARY, "ann", 0.25, 1_718_000_000.5)
IN_ROLLOUT = TOKEN._replace(rollout="r-20261121-7f3a", weight=0.75, slices=5, duration_ms=21_000, creator_id=6, topic=7)


@given(TOKENS)
def test_token_round_trips(token: ImpressionToken) -> None:
    assert SIGNER.read(SIGNER.sign(token)) == token


def test_token_of_another_version_is_rejected() -> None:
    body = b"\x01" + bytes(92)
    key = hashlib.blake2b(SECRET, digest_size=32, person=b"reelway-token-1").digest()
    text = base64.urlsafe_b64encode(body + hashlib.blake2b(body, digest_size=16, key=key).digest()).rstrip(b"=")
    with pytest.raises(TokenError, match="version 1, expected 2"):
        SIGNER.read(text.decode())


def test_every_slice_except_overall_has_its_own_bit() -> None:
    assert set(SLICE_BITS) == set(Slice) - {Slice.OVERALL}
    assert sorted(SLICE_BITS.values()) == [1 << i for i in range(len(SLICE_BITS))]
    assert ALL_SLICES == 7


@given(TOKENS, st.data())
def test_token_with_one_changed_character_is_rejected(token: ImpressionToken, data: st.DataObject) -> None:
    text = SIGNER.sign(token)
    index = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.sampled_from("ABCabc019-_=+/ \x00é").filter(lambda c: c != text[index]))
    with pytest.raises(TokenError):
        SIGNER.read(text[:index] + letter + text[index + 1 :])


@given(st.text(max_size=300))
def test_arbitrary_text_is_rejected_with_a_token_error(text: str) -> None:
    with pytest.raises(TokenError):
        SIGNER.read(text)


def test_truncated_or_extended_token_is_rejected() -> None:
    text = SIGNER.sign(TOKEN)
    for damaged in (text[:-4], text[:20], text + "AAAA", text + "=", ""):
        with pytest.raises(TokenError):
            SIGNER.read(damaged)


def test_token_signed_with_another_secret_is_rejected() -> None:
    with pytest.raises(TokenError, match="signed by none of the 1 accepted secrets"):
        SIGNER.read(TokenSigner(OTHER).sign(TOKEN))


def test_rotated_signer_signs_with_the_new_secret_only() -> None:
    rotated = TokenSigner(OTHER, SECRET)
    assert rotated.read(SIGNER.sign(TOKEN)) == TOKEN
    assert rotated.sign(TOKEN) == TokenSigner(OTHER).sign(TOKEN)
    with pytest.raises(TokenError):
        SIGNER.read(rotated.sign(TOKEN))


def test_missing_or_short_secret_is_rejected() -> None:
    with pytest.raises(ConfigError, match="no token secret"):
        TokenSigner()
    with pytest.raises(ConfigError, match="secret 1 has 5 bytes, expected at least 16"):
        TokenSigner(SECRET, b"short")


@pytest.mark.parametrize(
    "change",
    [
        {"viewer_id": -1}, {"position": 70_000}, {"arm": "west"}, {"release": "r" * 200}, {"video_id": "x"},
        {"rollout": "r" * 64}, {"rollout": None}, {"weight": 1.5}, {"weight": float("nan")}, {"slices": 8},
        {"slices": -1}, {"duration_ms": -1}, {"duration_ms": 2**32}, {"creator_id": 2**63}, {"topic": 2**31},
    ],
)  # fmt: skip
def test_signing_rejects_a_value_that_does_not_fit(change: dict[str, object]) -> None:
    with pytest.raises(TokenError, match="cannot sign"):
        SIGNER.sign(TOKEN._replace(**change))  # type: ignore[arg-type]


def test_token_is_short_url_safe_text() -> None:
    text = SIGNER.sign(IN_ROLLOUT)
    assert text.replace("-", "").replace("_", "").isalnum()
    assert len(SIGNER.sign(TOKEN)) < 176
    assert len(text) < 196


def test_signing_takes_less_than_10_microseconds_per_token() -> None:
    slate = [IN_ROLLOUT._replace(position=position) for position in range(20)]
    timings = []
    for _ in range(200):
        started = time.perf_counter()
        SIGNER.sign_many(slate)
        timings.append((time.perf_counter() - started) / len(slate))
    assert min(timings) < 10e-6, f"{min(timings) * 1e6:.1f} µs per token"
