"""Distinct types for ids, so that a viewer id cannot be passed where a video id is expected.

All entity and event ids are non-negative 63-bit integers below 2**53, so that they survive JSON in every
client. Importers map string ids to integers once (see ``reelway import --help``).
"""

from typing import Final, NewType

ViewerId = NewType("ViewerId", int)
VideoId = NewType("VideoId", int)
CreatorId = NewType("CreatorId", int)
RequestId = NewType("RequestId", int)
ImpressionId = NewType("ImpressionId", int)
OutcomeId = NewType("OutcomeId", int)
ReleaseId = NewType("ReleaseId", str)

MAX_ID = 2**53 - 1

SHORT_RELEASE_CHARACTERS: Final = 12


def short_id(release: str) -> str:
    """Returns the beginning of a release id: the form that users read and type, and that ``release`` labels contain."""
    return release[:SHORT_RELEASE_CHARACTERS]
