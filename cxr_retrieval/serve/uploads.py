"""The largest request that is read."""

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class UploadLimit:
    """Answers 413 to a request of more than `limit` bytes: at once where its length is told, else when they have come.

    Starlette's own limit does the same, without a word on what to do.
    """

    def __init__(self, app: ASGIApp, limit: int, text: str) -> None:
        self._app, self._limit, self._text = app, limit, text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        came = 0

        async def limited() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self._limit:
                raise HTTPException(413, self._text)
            return message

        told = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        if told.isdecimal() and int(told) > self._limit:
            await JSONResponse({"detail": self._text}, 413)(scope, receive, send)
        else:
            await self._app(scope, limited, send)
