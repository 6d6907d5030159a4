"""Release keys and signatures."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from tests.support.release_files import make_release_folder

from reelway.platform.errors import ConfigError, SignatureError, StorageError
from reelway.platform.release.signing import (
    check_signature,
    create_keys,
    load_private_key,
    load_public_keys,
    sign,
)


def test_signature_verifies_with_an_unchanged_release_id(tmp_path: Path) -> None:
    pair = create_keys(tmp_path / "keys")
    manifest = make_release_folder(tmp_path / "release", videos=40, embedding=8)
    signed = sign(manifest, load_private_key(pair.private))
    keys = load_public_keys(pair.public)
    assert check_signature(signed, keys) == keys[0]
    assert signed.release_id == manifest.release_id


def test_private_key_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    pair = create_keys(tmp_path)
    assert stat.S_IMODE(pair.private.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release.private.pem", "release.public.pem"]


def test_existing_private_key_is_never_overwritten(tmp_path: Path) -> None:
    before = create_keys(tmp_path).private.read_bytes()
    with pytest.raises(ConfigError, match="exists and is never overwritten"):
        create_keys(tmp_path)
    assert (tmp_path / "release.private.pem").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_unwritable_folder_raises_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "keys"):
        with pytest.raises(StorageError, match=r"cannot write .*file"):
            create_keys(folder)


def test_only_public_keys_of_a_folder_are_loaded(tmp_path: Path) -> None:
    for name in ("a", "b"):
        create_keys(tmp_path / name).public.rename(tmp_path / f"{name}.public.pem")
    (tmp_path / "a" / "release.private.pem").rename(tmp_path / "release.private.pem")
    (tmp_path / "._a.public.pem").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    assert len(load_public_keys(tmp_path)) == 2


@pytest.mark.parametrize(
    "content", [b"", b"not a key", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"]
)
def test_error_names_a_file_that_is_not_a_key(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.public.pem"
    path.write_bytes(content)
    with pytest.raises(SignatureError, match=r"x\.public\.pem"):
        load_public_keys(path)
    with pytest.raises(SignatureError, match=r"x\.public\.pem"):
        load_private_key(path)


def test_key_of_another_algorithm_is_rejected(tmp_path: Path) -> None:
    rsa = generate_private_key(public_exponent=65537, key_size=2048)
    path = tmp_path / "rsa.pem"
    path.write_bytes(
        rsa.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    with pytest.raises(SignatureError, match="RSAPrivateKey, expected an Ed25519"):
        load_private_key(path)


def test_missing_key_error_names_the_command_that_creates_keys(tmp_path: Path) -> None:
    for load in (load_private_key, load_public_keys):
        with pytest.raises(SignatureError, match="reelway release keys"):
            load(tmp_path / "nothing.pem")  # type: ignore[operator]
    with pytest.raises(SignatureError, match="reelway release keys"):
        load_public_keys(tmp_path)
