"""Impression tokens: exact round trips, no tampering, key rotation, and a price that a slate can pay."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.errors import ConfigError, TokenError
from reelway.platform.tokens import ImpressionToken, TokenSigner

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
)
TOKEN = ImpressionToken(1, 2, 3, 4, 5, "ab" * 32, Arm.CANARY, "ann", 0.25, 1_718_000_000.5)


@given(TOKENS)
def test_a_token_is_read_exactly_as_it_was_signed(token: ImpressionToken) -> None:
    assert SIGNER.read(SIGNER.sign(token)) == token


@given(TOKENS, st.data())
def test_a_token_with_any_changed_character_is_refused(token: ImpressionToken, data: st.DataObject) -> None:
    text = SIGNER.sign(token)
    place = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.sampled_from("ABCabc019-_=+/ \x00é").filter(lambda c: c != text[place]))
    with pytest.raises(TokenError):
        SIGNER.read(text[:place] + letter + text[place + 1 :])


@given(st.text(max_size=300))
def test_text_that_is_no_token_is_refused_and_never_crashes(text: str) -> None:
    with pytest.raises(TokenError):
        SIGNER.read(text)


def test_a_token_cut_short_or_extended_is_refused() -> None:
    text = SIGNER.sign(TOKEN)
    for damaged in (text[:-4], text[:20], text + "AAAA", text + "=", ""):
        with pytest.raises(TokenError):
            SIGNER.read(damaged)


def test_a_token_by_another_secret_is_refused_and_the_message_says_so() -> None:
    with pytest.raises(TokenError, match="signed by none of the 1 accepted secrets"):
        SIGNER.read(TokenSigner(OTHER).sign(TOKEN))


def test_after_a_rotation_the_new_secret_signs_and_the_old_one_is_still_accepted() -> None:
    rotated = TokenSigner(OTHER, SECRET)
    assert rotated.read(SIGNER.sign(TOKEN)) == TOKEN
    assert rotated.sign(TOKEN) == TokenSigner(OTHER).sign(TOKEN)
    with pytest.raises(TokenError):
        SIGNER.read(rotated.sign(TOKEN))


def test_a_missing_or_short_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="no token secret"):
        TokenSigner()
    with pytest.raises(ConfigError, match="secret 1 has 5 bytes, expected at least 16"):
        TokenSigner(SECRET, b"short")


@pytest.mark.parametrize(
    "change", [{"viewer_id": -1}, {"position": 70_000}, {"arm": "west"}, {"release": "r" * 200}, {"video_id": "x"}]
)
def test_a_value_that_a_token_cannot_carry_is_refused_when_signing(change: dict[str, object]) -> None:
    with pytest.raises(TokenError, match="cannot sign"):
        SIGNER.sign(TOKEN._replace(**change))  # type: ignore[arg-type]


def test_a_token_travels_in_a_url_and_is_compact() -> None:
    text = SIGNER.sign(TOKEN)
    assert text.replace("-", "").replace("_", "").isalnum()
    assert len(text) < 160


def test_signing_a_slate_costs_less_than_ten_microseconds_a_token() -> None:
    slate = [TOKEN._replace(position=position) for position in range(20)]
    timings = []
    for _ in range(200):
        started = time.perf_counter()
        SIGNER.sign_many(slate)
        timings.append((time.perf_counter() - started) / len(slate))
    assert min(timings) < 10e-6, f"{min(timings) * 1e6:.1f} µs per token"
