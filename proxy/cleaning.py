"""Answers of team mode without the gateway's keys, whole or as they come."""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace

from .policy.errors import UpstreamError
from .policy.limiting import decoded
from .policy.masking import Stream, mask_of, shows_account_keys, without_account_keys
from .policy.members import Keys
from .policy.messages import Response, Rest, content_coding
from .policy.routing import Route

LARGEST = 64 * 1024 * 1024
"""Bytes of a held answer without its coding, beyond which it is not looked into, and so not passed on."""
PIECE = 256 * 1024
"""Bytes of a streamed answer that are inflated at once, at most."""


def cleaned(response: Response, route: Route, keys: Keys) -> Response:
    """The answer without any of these keys, and about accounts without any `api_key`. Same if there are no keys.

    As it was if there is nothing to take out, else without its coding. Raises UpstreamError for one that cannot be
    looked into.
    """
    if not keys:
        return response
    mask = mask_of(tuple(sorted(key.value for key in keys.values())))
    reason = mask.cover(response.reason.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")
    response = replace(response, headers=mask.headers(response.headers), reason=reason)
    if response.status == 401:
        return _of_the_gateway(response)
    accounts = shows_account_keys(route)
    if response.rest is not None:
        return _streamed(response, response.rest, Stream(mask), accounts=accounts)
    if not response.body:
        return response
    plain = decoded(response.headers, response.body, LARGEST)
    if response.status == 404 and plain is not None and b"Session expired" in plain:
        return _of_the_gateway(response)
    if plain is None and response.status == 429:
        return replace(_uncoded(response), body=b"")  # that it was refused must not be lost over its words
    if plain is None:
        raise _opaque()
    edited: bytes | None = mask.cover(plain)
    if accounts and edited is not None:
        edited = without_account_keys(edited)
    if edited is None:
        raise _opaque()
    if edited == plain:
        return response
    return replace(_uncoded(response), body=edited)


def _of_the_gateway(response: Response) -> Response:
    """What the vendor says of the gateway's key, which the stock CLI would take for its own and throw away."""
    if response.rest is not None:
        response.rest.close()
    told = {
        "success": False,
        "error": "gateway_key_refused",
        "msg": "Vast.ai does not accept the key that vast-proxy asks with; tell whoever runs it",
    }
    left_out = ("content-type", "www-authenticate")
    kept = tuple(item for item in _uncoded(response).headers if item[0].lower() not in left_out)
    headers, body = (*kept, ("Content-Type", "application/json")), json.dumps(told).encode()
    return Response(403, headers, body, redirected=response.redirected)


def _opaque() -> UpstreamError:
    return UpstreamError("the answer cannot be looked into for keys, and so is not passed on", sent=True)


def _uncoded(response: Response) -> Response:
    left_out = ("content-encoding", "content-length", "etag")
    return replace(response, headers=tuple(item for item in response.headers if item[0].lower() not in left_out))


def _streamed(response: Response, rest: Rest, stream: Stream, *, accounts: bool) -> Response:
    coding = content_coding(response.headers)
    if accounts or coding not in ("identity", "gzip", "x-gzip"):
        rest.close()
        raise _opaque()
    if coding == "identity":
        return replace(response, body=b"", rest=_Covered(response.body, rest, stream, None))
    covered = _Covered(response.body, rest, stream, zlib.decompressobj(31))
    return replace(_uncoded(response), body=b"", rest=covered)


class _Covered:
    """A large answer, without its coding where it has one, and without keys."""

    def __init__(self, first: bytes, rest: Rest, stream: Stream, inflater: zlib._Decompress | None) -> None:
        self._first = first
        self._rest = rest
        self._stream = stream
        self._inflater = inflater

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        """What can be passed on by now. Raises zlib.error."""
        if self._inflater is None:
            yield self._stream.feed(data)
            return
        while data:
            if self._inflater.eof:
                raise zlib.error("there is more after the end")
            yield self._stream.feed(self._inflater.decompress(data, PIECE))
            data = self._inflater.unconsumed_tail or self._inflater.unused_data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            first, self._first = self._first, b""
            for piece in self._pieces(first):
                if piece:
                    yield piece
            async for chunk in self._rest:
                for piece in self._pieces(chunk):
                    if piece:
                        yield piece
            last = self._stream.feed(self._inflater.flush()) if self._inflater is not None else b""
            if self._inflater is not None and not self._inflater.eof:
                raise UpstreamError("the answer broke off", sent=True)
        except zlib.error:
            raise UpstreamError("the answer is damaged", sent=True) from None
        finally:
            self._rest.close()
        if last := last + self._stream.end():
            yield last

    def on_close(self, callback: Callable[[], None]) -> None:
        self._rest.on_close(callback)

    def close(self) -> None:
        self._rest.close()
