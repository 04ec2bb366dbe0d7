"""The largest request that is read, and how long is waited for one that stalls."""

import asyncio

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class UploadLimit:
    """Answers 413 to a request of more than `limit` bytes: at once where its length is told, else when they have come;
    and 408, with the end of its connection, to one of which nothing comes for `seconds` before it is complete.

    Starlette's own limit does the first, without a word on what to do; nothing else does the second.
    """

    def __init__(self, app: ASGIApp, limit: int, text: str, seconds: float) -> None:
        self._app, self._limit, self._text, self._seconds = app, limit, text, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        came, complete = 0, False

        async def limited() -> Message:
            nonlocal came, complete
            try:
                async with asyncio.timeout(None if complete else self._seconds):
                    message = await receive()
            except TimeoutError:
                text = f"nothing of the upload came for {self._seconds:g} seconds: send it again"
                raise HTTPException(408, text, {"Connection": "close"}) from None
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
