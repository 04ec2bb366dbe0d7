"""The largest request that is read, and how long is waited for it."""

import asyncio

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class UploadLimit:
    """Answers 413 to a request of more than `limit` bytes: at once where its length is told, else when they have come;
    and 408, with the end of its connection, to one of which nothing comes for `stalled` seconds before it is complete,
    or that is not complete after `slowest` seconds.

    Starlette's own limit does the first, without a word on what to do; nothing else does the others.
    """

    def __init__(self, app: ASGIApp, limit: int, text: str, stalled: float, slowest: float) -> None:
        self._app, self._limit, self._text, self._stalled, self._slowest = app, limit, text, stalled, slowest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        came, complete = 0, False
        end = asyncio.get_running_loop().time() + self._slowest

        async def limited() -> Message:
            nonlocal came, complete
            now = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout_at(None if complete else min(now + self._stalled, end)):
                    message = await receive()
            except TimeoutError:
                slow = now + self._stalled > end
                what = f"was not whole after {self._slowest:g}" if slow else f"stood still for {self._stalled:g}"
                raise HTTPException(408, f"the upload {what} seconds: send it again", {"Connection": "close"}) from None
            complete = not message.get("more_body", False)
            came += len(message.get("body", b""))
            if came > self._limit:
                raise HTTPException(413, self._text)
            return message

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = Headers(scope=scope).get("content-length", "")
        if told.isdecimal() and int(told) > self._limit:
            await JSONResponse({"detail": self._text}, 413)(scope, receive, send)
        else:
            await self._app(scope, limited, send)
