"""``reelway viewer-key`` and ``reelway viewer-token``: proofs of identity, to test a service that demands them."""

from __future__ import annotations

from pathlib import Path

import typer

from reelway.platform.cli.terminal import print_status
from reelway.platform.viewer_assertions import TOKEN_LIFETIME_S

KEY = typer.Option(..., "--key", help="Private key file in PEM format (Ed25519).")


def register(app: typer.Typer) -> None:
    """Adds ``reelway viewer-key`` and ``reelway viewer-token``."""
    app.command(name="viewer-key")(viewer_key)
    app.command(name="viewer-token")(viewer_token)


def viewer_key(key: Path = KEY) -> None:
    """Create a key that signs viewers' tokens, and its public key beside it, to test authentication without an issuer.

    In production an identity provider signs the tokens, and the service reads its public keys.

    \b
    Example:
      reelway viewer-key --key viewers.pem
    """
    from reelway.platform.viewer_assertions import create_viewer_key

    public = create_viewer_key(key)
    print_status(
        f"viewer key: {key}; name its public key {public} as jwt.keys_file in the file of `reelway serve --auth`"
    )


def viewer_token(
    viewer: int = typer.Option(..., min=0, help="Viewer id that the token proves."),
    key: Path = KEY,
    audience: str = typer.Option(..., help="Audience of the token: jwt.audience of the service."),
    issuer: str | None = typer.Option(None, help="Issuer of the token: jwt.issuer of the service. By default none."),
    lifetime_s: int = typer.Option(TOKEN_LIFETIME_S, "--lifetime", min=1, help="Lifetime of the token in seconds."),
) -> None:
    """Print a JSON Web Token that proves a viewer's identity, to test a service that demands one.

    \b
    Example:
      reelway viewer-token --viewer 123 --key viewers.pem --audience reelway > viewer.jwt
      reelway recommend --viewer 123 --token-file viewer.jwt
    """
    from reelway.platform.viewer_assertions import ViewerTokenSigner, read_viewer_key

    signer = ViewerTokenSigner(read_viewer_key(key), audience=audience, issuer=issuer, lifetime_s=lifetime_s)
    typer.echo(signer.sign(viewer))
