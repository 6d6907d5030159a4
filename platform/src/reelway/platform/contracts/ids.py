"""Identifiers, so that a viewer can never be passed where a video is expected.

All entity and event ids are non-negative 63-bit integers below 2**53, so that they survive JSON in every
client. Importers that meet string ids map them once (see ``reelway import --help``).
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
    """The beginning of a release id: what people read and type, and the value of ``release`` labels."""
    return release[:SHORT_RELEASE_CHARACTERS]
