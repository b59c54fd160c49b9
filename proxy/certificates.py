"""The proxy's own certificate: what clients that speak TLS are shown."""

from __future__ import annotations

import ssl
from pathlib import Path


def context(cert: Path, key: Path) -> ssl.SSLContext:
    """For a listener. Raises ValueError with a sentence."""
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    made.set_alpn_protocols(["http/1.1"])
    renew(made, cert, key)
    return made


def renew(live: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Show this certificate to every client that connects from now on. Raises ValueError, and then nothing changes."""
    # In a context of its own first: a certificate whose key is wrong would already be in the live one.
    for target in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), live):
        try:
            target.load_cert_chain(cert, key, password="")  # nobody is there to type one
        except ssl.SSLError as error:
            what = (
                "do not belong together"
                if error.reason == "KEY_VALUES_MISMATCH"
                else "are not a usable pair of PEM files"
            )
            raise ValueError(f"{cert} and {key} {what}") from None
        except OSError as error:
            wrong = next((file for file in (cert, key) if not _is_readable(file)), cert)
            raise ValueError(f"{wrong} cannot be read: {error.strerror}") from None


def _is_readable(file: Path) -> bool:
    try:
        with file.open("rb"):
            return True
    except OSError:
        return False
