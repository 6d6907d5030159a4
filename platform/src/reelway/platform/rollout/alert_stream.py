"""Parses alerts while they arrive, so that neither their number nor the size of a body decides which alerts are seen.

Alerts that name no release of a rollout here are dropped one by one. What remains in memory is bounded: the relevant
alerts up to ``MAX_RELEVANT``, one alert of at most ``MAX_MEMBERS`` members, and one value of about ``MAX_VALUE_BYTES``.

``ijson`` splits the text into tokens. Its parser replaces a lone high surrogate by a question mark, which is not JSON
(RFC 8259 leaves it open, `request_body.parse_json` rejects it), so that escapes are checked here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Final

import ijson
from pydantic import ValidationError

from reelway.platform.errors import DataError
from reelway.platform.rollout.alerts import (
    RELEASE_LABEL,
    Alert,
    KnownAlert,
    PayloadHead,
    Relevance,
    known_alert,
    omission,
    polled_alert,
)

MAX_DEPTH: Final = 64
"""Nested lists and objects; Alertmanager nests four."""
MAX_MEMBERS: Final = 10_000
"""Members of one alert, or of everything beside the alerts."""
MAX_VALUE_BYTES: Final = 1 << 20
MAX_RELEVANT: Final = 1_000
"""Relevant alerts that are kept of one body. One that fires is enough for a rollback; more count as omitted."""
_SHOWN_CHARACTERS: Final = 100
"""Longest part of a field's path in an error: the name of a label is part of the path."""
_ESCAPE: Final = re.compile(
    rb"\\(?:(?P<pair>u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|(?P<lone>u[dD][89a-fA-F])|.)", re.DOTALL
)
_ESCAPE_BYTES: Final = 12
"""Length of a pair of surrogates, the longest match."""
_OPENING: Final = ("start_map", "start_array")
_CLOSING: Final = ("end_map", "end_array")


class JsonListStream:
    """Splits a JSON document into the items of one list and the members beside it.

    Args:
        list_member: name of the list in the document, which is an object; empty if the document is the list.
        on_item: called with the index and the value of each item as soon as it is complete.

    Raises:
        DataError: by ``feed`` and ``close``, if the text is not JSON, nests too deep or has too large a value.
    """

    def __init__(self, list_member: str, on_item: Callable[[int, Any], None]) -> None:
        self._list_member, self._on_item = list_member, on_item
        self.members: dict[str, Any] = {}
        """Members of the document beside the list, whose own value is an empty tuple."""
        self.items = 0
        self._events = ijson.sendable_list()
        self._tokens = ijson.basic_parse_coro(self._events, use_float=True)
        self._depth, self._in_list = 0, False
        self._key = ""
        self._builder: Any = None
        self._built = self._members_beside = self._unfinished_bytes = 0
        self._unchecked = b""

    def feed(self, piece: bytes) -> None:
        """Parses the next piece of the document."""
        self._check_escapes(piece)
        self._parse(lambda: self._tokens.send(piece))
        self._unfinished_bytes = 0 if self._handle_events() else self._unfinished_bytes + len(piece.strip())
        if self._unfinished_bytes > MAX_VALUE_BYTES:
            raise DataError(f"a value has more than {MAX_VALUE_BYTES} bytes")

    def close(self) -> None:
        """Ends the document."""
        self._check_escapes(b"", last=True)
        self._parse(self._tokens.close)
        self._handle_events()

    def _parse(self, call: Callable[[], object]) -> None:
        try:
            call()
        except (ijson.JSONError, ValueError, OverflowError, StopIteration) as error:
            text = error.args[0] if isinstance(error, ijson.JSONError) else str(error)
            text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
            raise DataError(f"not JSON: {text.partition(chr(10))[0][:_SHOWN_CHARACTERS]}") from error

    def _check_escapes(self, piece: bytes, *, last: bool = False) -> None:
        """Rejects lone surrogates. The end of a piece is checked with the next one."""
        text = self._unchecked + piece
        end = len(text) if last else max(0, len(text) - _ESCAPE_BYTES + 1)
        checked = end
        if b"\\" in text:
            for escape in _ESCAPE.finditer(text):
                if escape.start() >= end:
                    break
                if escape.group("lone"):
                    raise DataError("not JSON: a lone surrogate in a string")
                checked = max(end, escape.end())
        self._unchecked = text[checked:]

    def _handle_events(self) -> bool:
        """Handles the tokens of a piece. Returns whether there were any."""
        seen = bool(self._events)
        for event, value in self._events:
            self._handle(event, value)
        del self._events[:]
        return seen

    def _handle(self, event: str, value: Any) -> None:
        opens, closes = event in _OPENING, event in _CLOSING
        if opens and self._depth >= MAX_DEPTH:
            raise DataError(f"not JSON of the expected kind: nested deeper than {MAX_DEPTH} levels")
        list_depth = 1 if self._list_member else 0
        if self._builder is not None:
            self._build(event, value, ends=closes and self._depth == (list_depth + 2 if self._in_list else 2))
        elif self._depth == 0 and event != ("start_map" if self._list_member else "start_array"):
            expected = "an object" if self._list_member else "a list"
            raise DataError(f"not JSON of the expected kind: (body): saw {_kind(event, value)}, expected {expected}")
        elif self._in_list and closes:
            self._in_list = False
        elif self._in_list or (self._depth == 1 and not closes and event != "map_key"):
            self._begin(event, value, opens=opens)
        elif self._depth == 0 and not self._list_member:
            self._in_list = True
        elif event == "map_key":
            self._key = value
        self._depth += opens - closes

    def _begin(self, event: str, value: Any, *, opens: bool) -> None:
        """Begins an item of the list or a member beside it."""
        if not self._in_list and self._key == self._list_member:
            if event != "start_array":
                raise DataError(f"{self._key}: saw {_kind(event, value)}, expected a list")
            self._in_list, self.members[self._key] = True, ()
            return
        self._built = 0 if self._in_list else self._members_beside
        self._builder = ijson.ObjectBuilder()
        self._build(event, value, ends=not opens)

    def _build(self, event: str, value: Any, *, ends: bool) -> None:
        self._built += 1
        if self._built > MAX_MEMBERS:
            where = f"{self._list_member}.{self.items}".strip(".") if self._in_list else "(body)"
            raise DataError(f"{where}: more than {MAX_MEMBERS} members")
        self._builder.event(event, value)
        if not ends:
            return
        built, self._builder = self._builder.value, None
        if self._in_list:
            self._on_item(self.items, built)
            self.items += 1
        else:
            self._members_beside = self._built
            self.members[self._key] = built


class WebhookStream:
    """Parses one delivery of Alertmanager's webhook (version 4).

    Raises:
        DataError: by ``feed`` and ``close``, if the body is something else; the message has the field's path.
    """

    def __init__(self, is_relevant: Relevance) -> None:
        self._is_relevant = is_relevant
        self._relevant: list[Alert] = []
        self._skipped = 0
        self._document = JsonListStream("alerts", self._keep)

    @property
    def alerts(self) -> int:
        """Number of alerts, relevant or not."""
        return self._document.items

    def feed(self, piece: bytes) -> None:
        """Parses the next piece of the body."""
        _with_prefix(lambda: self._document.feed(piece))

    def close(self) -> list[KnownAlert]:
        """Ends the body. Returns its relevant alerts, and the omission of its group, resolved if nothing is omitted.

        A group whose own labels name another release has no omission of interest.
        """
        _with_prefix(self._document.close)
        head = self._head()
        labels = head.group_labels
        omitted = head.truncated_alerts if self._is_relevant(labels) or RELEASE_LABEL not in labels else 0
        found = [known_alert(alert, head.group_key) for alert in self._relevant]
        return [*found, omission(head.group_key, omitted + self._skipped)]

    def _keep(self, index: int, item: Any) -> None:
        try:
            alert = Alert.model_validate(item)
        except ValidationError as error:
            raise DataError(_payload_problem(error, "alerts", index)) from error
        if not self._is_relevant(alert.labels):
            return
        if len(self._relevant) >= MAX_RELEVANT:
            self._skipped += 1
            return
        self._relevant.append(alert)

    def _head(self) -> PayloadHead:
        members = self._document.members
        try:
            head = PayloadHead.model_validate(members)
        except ValidationError as error:
            raise DataError(f"alert webhook: {_payload_problem(error)}") from error
        if "alerts" not in members:
            raise DataError("alert webhook: not an Alertmanager version 4 payload: alerts: Field required")
        return head


class AlertListStream:
    """Parses the answer of Alertmanager's ``GET /api/v2/alerts``. ``found`` are its relevant alerts so far.

    Raises:
        DataError: by ``feed`` and ``close``, if the answer is something else.
    """

    def __init__(self, is_relevant: Relevance) -> None:
        self._is_relevant = is_relevant
        self.found: list[KnownAlert] = []
        self.skipped = 0
        """Relevant alerts beyond ``MAX_RELEVANT``."""
        self._document = JsonListStream("", self._keep)

    def feed(self, piece: bytes) -> None:
        """Parses the next piece of the answer."""
        self._document.feed(piece)

    def close(self) -> None:
        """Ends the answer."""
        self._document.close()

    def _keep(self, _: int, item: Any) -> None:
        alert = polled_alert(item)
        if not self._is_relevant(dict(alert.labels)):
            return
        if len(self.found) >= MAX_RELEVANT:
            self.skipped += 1
            return
        self.found.append(alert)


def _with_prefix(call: Callable[[], None]) -> None:
    """Calls ``call`` and names the webhook in its DataError."""
    try:
        call()
    except DataError as error:
        raise DataError(f"alert webhook: {error}") from error


def _payload_problem(error: ValidationError, *where: str | int) -> str:
    problems = "; ".join(f"{_path((*where, *p['loc'])) or '(body)'}: {p['msg']}" for p in error.errors()[:5])
    return f"not an Alertmanager version 4 payload: {problems}"


def _path(location: Iterable[str | int]) -> str:
    return ".".join(str(part)[:_SHOWN_CHARACTERS] for part in location)


def _kind(event: str, value: Any) -> str:
    kinds = {"start_map": "dict", "start_array": "list"}
    return kinds.get(event, type(value).__name__)
