"""Does the proxy on this machine answer? What the health check of a container asks: `vast-proxy health`."""

from __future__ import annotations

import http.client
import ssl

PATIENCE = 2.0
"""Seconds for a connection, and for each further step."""
PATH = "/_proxy/health"


class Unwell(Exception):
    """It does not answer as it should. The text says how."""


def ask(host: str, port: int) -> str:
    """Ask it, by https if it speaks no http. The URL that it answered at. Raises Unwell."""
    # What it speaks is not looked up in the settings: until it is restarted, these may say something else.
    try:
        return _ask("http", http.client.HTTPConnection(host, port, timeout=PATIENCE))
    except (http.client.BadStatusLine, ConnectionResetError):  # a listener for TLS, which hangs up, or tells by TLS
        pass
    except (OSError, http.client.HTTPException) as error:
        raise Unwell(_told(host, port, error)) from None
    # Not verified: whose name the certificate has is for clients. Nothing is told here, and nothing believed.
    any_certificate = ssl._create_unverified_context()  # noqa: S323, SLF001
    try:
        return _ask("https", http.client.HTTPSConnection(host, port, timeout=PATIENCE, context=any_certificate))
    except (OSError, http.client.HTTPException) as error:
        raise Unwell(_told(host, port, error)) from None


def _ask(scheme: str, connection: http.client.HTTPConnection) -> str:
    url = f"{scheme}://{_authority(connection.host, connection.port)}"
    try:
        connection.request("GET", PATH, headers={"Host": "localhost"})  # a name that always counts, unlike `listen`'s
        status = connection.getresponse().status
    finally:
        connection.close()
    if status != http.client.OK:
        raise Unwell(f"{url}{PATH} answers {status}")
    return url


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _told(host: str, port: int, error: Exception) -> str:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return f"no answer from {_authority(host, port)}: {reason[:1].lower()}{reason[1:]}"
