"""Refuses a request whose body is too large while it is being read, whoever reads it.

Starlette's own limit (`RequestBodyLimitMiddleware`) answers and closes at once: a client that is
still sending sees a broken connection instead of the reason.
"""

import asyncio
import time

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Clients that send all before they listen get the answer only if the rest is read too: it is
# dropped, up to these.
DROPPED_BYTES = 1 << 30
DROPPED_SECONDS = 10.0
READING_SECONDS = 60.0


class BodyLimit:
    """Passes requests on; a body that is too large is 413, one that does not come 408.

    Nothing is read of a body whose stated length is too large if the client waits to be told to
    send it (`Expect: 100-continue`). Of any other the rest is dropped as it arrives, so memory
    holds no more than `limit` bytes of it.
    """

    def __init__(self, app: ASGIApp, limit: int):
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        stated = headers.get(b"content-length", b"")
        if stated.isdigit() and int(stated) > self.limit:
            if headers.get(b"expect", b"").lower() != b"100-continue":
                await _drop(receive)
            answer = JSONResponse({"error": self._sentence(f"{int(stated):,}")}, 413)
            await answer(scope, receive, send)
            return
        seen, ended = 0, False
        until = time.monotonic() + READING_SECONDS

        async def limited() -> Message:
            nonlocal seen, ended
            if ended:  # what comes now is the end of the connection
                return await receive()
            try:
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"expected a whole request within {READING_SECONDS:g} seconds, found less"
                ) from None
            seen += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if seen > self.limit:
                if not ended:
                    await _drop(receive)
                    ended = True
                raise HTTPException(413, self._sentence("more"))
            return message

        await self.app(scope, limited, send)

    def _sentence(self, found: str) -> str:
        return f"expected a request of at most {self.limit:,} bytes, found {found}"


async def _drop(receive: Receive) -> None:
    dropped = 0
    try:
        async with asyncio.timeout(DROPPED_SECONDS):
            while dropped < DROPPED_BYTES:
                message = await receive()
                dropped += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return
