"""Who may ask, and the line that every query leaves.

On this machine's own address nobody is asked for anything, but a browser that was led here under another name is turned
away. Beyond it, a token and TLS are needed. The token is the password of HTTP's basic authentication, with any user
name, which browsers ask for by themselves; or a bearer token.
"""

import base64
import binascii
import datetime
import hmac
import ipaddress
import json
import os
from typing import Any

from fastapi import Request

from cxr_retrieval import console
from cxr_retrieval.config import ServeSettings
from cxr_retrieval.errors import UserError

TOKEN_VARIABLE = "CXR_SERVE_TOKEN"
LEAST_TOKEN = 16
OPEN_PATHS = ("/healthz", "/readyz")  # what a cluster asks without a token; they tell nothing of a patient


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_for(settings: ServeSettings) -> str | None:
    """The token that clients must show; None on this machine's own address.

    Raises UserError where the server would listen beyond this machine without a token or without TLS.
    """
    if is_loopback(settings.host):
        return None
    token = os.environ.get(TOKEN_VARIABLE, "")
    if len(token) < LEAST_TOKEN:
        raise UserError(
            f"serve.host={settings.host} is reached from other machines: set {TOKEN_VARIABLE} to a token of"
            f" {LEAST_TOKEN} characters or more, or serve on 127.0.0.1"
        )
    if settings.certificate is None or settings.certificate_key is None:
        raise UserError(
            f"serve.host={settings.host} is reached from other machines: set serve.certificate and"
            " serve.certificate_key for TLS, or serve on 127.0.0.1"
        )
    return token


def user_of(request: Request, token: str) -> str | None:
    """The name that a client with the right token gives itself, "token" for a bearer; None without the right token."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    user = "token"
    if scheme.lower() == "basic":
        try:
            user, _, given = base64.b64decode(given, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
    elif scheme.lower() != "bearer":
        return None
    return user if hmac.compare_digest(given.encode(), token.encode()) else None


def audit(request: Request, version: str, asked: dict[str, Any], hits: int) -> None:
    """One line of JSON about a query to standard error: who asked what of which version. Never names the image."""
    line = {
        "audit": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "client": request.client.host if request.client else None,
        "user": getattr(request.state, "user", None),
        "path": request.scope["route"].path,
        "version": version,
        "asked": asked,
        "hits": hits,
    }
    console.say(json.dumps(line, default=str))
