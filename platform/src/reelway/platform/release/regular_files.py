"""Opens and copies the files of a release, which an untrusted writer may have replaced.

A symbolic link, a pipe or a device is never opened for reading, and no file is read beyond its expected size.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from reelway.platform.contracts.manifest import FileEntry
from reelway.platform.errors import DigestMismatchError

_CHUNK_BYTES: Final = 4 << 20


class ByteStream(Protocol):
    """A file of any file system, open for reading."""

    def read(self, size: int, /) -> bytes: ...


class ByteSink(Protocol):
    """A file that is open for writing."""

    def write(self, content: bytes, /) -> object: ...


def open_regular_file(path: Path) -> BinaryIO:
    """Opens a regular file; does not follow a symbolic link and never waits.

    Raises:
        DigestMismatchError: if the path is anything but a regular file.
        OSError: if the file cannot be opened, such as ``FileNotFoundError``.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
            raise _not_regular(path) from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _not_regular(path)
    return os.fdopen(fd, "rb")


def read_at_most(source: ByteStream, limit_bytes: int, where: str) -> bytes:
    """Reads a whole file.

    Raises:
        DigestMismatchError: if the file has more bytes; no more than one of them is read.
    """
    chunks, left = list[bytes](), limit_bytes + 1
    while left and (chunk := source.read(left)):
        chunks.append(chunk)
        left -= len(chunk)
    if not left:
        raise DigestMismatchError(f"{where} has more than {limit_bytes} bytes; it is not what Reelway writes")
    return b"".join(chunks)


def copy_bounded(source: ByteStream, sink: ByteSink | None, size_bytes: int, where: str) -> FileEntry:
    """Reads a file to its end, writes it to ``sink``, and returns its size and digest.

    Raises:
        DigestMismatchError: if the file has more than ``size_bytes``; nothing beyond them is written.
    """
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(min(_CHUNK_BYTES, size_bytes - size + 1)):
        size += len(chunk)
        if size > size_bytes:
            raise DigestMismatchError(
                f"{where} has more than {size_bytes} bytes, which the manifest says; it was changed, fetch the release "
                "again"
            )
        digest.update(chunk)
        if sink is not None:
            sink.write(chunk)
    return FileEntry(sha256=digest.hexdigest(), size_bytes=size)


def _not_regular(path: Path) -> DigestMismatchError:
    return DigestMismatchError(
        f"{path} is a link, a folder or a special file, expected a regular file; copy the release again"
    )
