"""The tree of all errors that Reelway raises deliberately.

::

    ReelwayError                     exit 1
    ├── CommandFailedError           its code a child command failed
    ├── ConfigError                  exit 2   a setting, flag or policy is wrong
    ├── DataError                    exit 3   input data
    │   ├── MalformedFileError                a file does not match its format (file, row, column, value)
    │   ├── EmptyDatasetError                 no rows to work on
    │   └── TooManyBadRowsError               more rows failed the checks than the limit allows
    ├── FeatureError                 exit 4   feature store and feature computation
    │   └── ParityError                       a served value differs from the recomputed one
    ├── TrainingError                exit 5   training cannot start or continue
    ├── ReleaseError                 exit 6   a release is rejected
    │   ├── ReleaseNotFoundError
    │   ├── DigestMismatchError               a file or the manifest differs from what was signed
    │   ├── SignatureError                    no signature, or none by a trusted key
    │   ├── IncompatibleReleaseError          dimensions, feature service or schema differ
    │   └── GateFailedError                   a quality gate fails
    ├── StorageError                 exit 7   disk full, no permission, store unreachable
    │   └── KubernetesError                   the API server is unreachable or rejects a request
    ├── ServingError                 exit 8   the service cannot start or answer
    │   ├── OverloadedError                   more concurrent requests than can be answered in time
    │   └── TokenError                        an impression token that this service did not sign
    ├── RolloutError                 exit 9   a rollout cannot start or be changed as requested
    └── JobError                     exit 13  a job on a cluster did not start, or did not finish

A message names the object, the problem and the fix. The CLI prints the message without a traceback and exits with the
code. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class ReelwayError(Exception):
    exit_code = 1


class CommandFailedError(ReelwayError):
    """A child command failed. It has already printed its own message."""

    def __init__(self, command: Sequence[str], code: int) -> None:
        super().__init__(f"`{' '.join(command)}` ended with exit code {code}; see its message above")
        self.exit_code = code if 0 < code < 128 else 1


class ConfigError(ReelwayError):
    exit_code = 2


class DataError(ReelwayError):
    exit_code = 3


class MalformedFileError(DataError):
    """A file does not match its format."""

    def __init__(
        self, path: object, expected: str, *, seen: object, row: int | None = None, column: str | None = None
    ) -> None:
        where = f"{path}"
        if row is not None:
            where += f", row {row}"
        if column is not None:
            where += f", column {column!r}"
        super().__init__(f"{where}: saw {seen!r}, expected {expected}")
        self.path, self.row, self.column, self.seen, self.expected = path, row, column, seen, expected


class EmptyDatasetError(DataError):
    pass


class TooManyBadRowsError(DataError):
    pass


class FeatureError(ReelwayError):
    exit_code = 4


class ParityError(FeatureError):
    pass


class TrainingError(ReelwayError):
    exit_code = 5


class ReleaseError(ReelwayError):
    exit_code = 6


class ReleaseNotFoundError(ReleaseError):
    pass


class DigestMismatchError(ReleaseError):
    pass


class SignatureError(ReleaseError):
    pass


class IncompatibleReleaseError(ReleaseError):
    pass


class GateFailedError(ReleaseError):
    pass


class StorageError(ReelwayError):
    exit_code = 7


class KubernetesError(StorageError):
    pass


class ServingError(ReelwayError):
    exit_code = 8


class OverloadedError(ServingError):
    """More concurrent requests than can be answered in time. The rejected request was not started."""


class TokenError(ServingError):
    pass


class RolloutError(ReelwayError):
    exit_code = 9


class JobError(ReelwayError):
    exit_code = 13
