"""Who may ask, and the line that every query leaves.

On this machine's own address nobody is asked for anything, but a browser that was led here under another name is turned
away. Beyond it, a token and TLS are needed. The token is the password of HTTP's basic authentication, with any user
name, which browsers ask for by themselves; or a bearer token.
"""

import base64
import datetime
import hmac
import ipaddress
import json
import os

from fastapi import Request

from cxr_retrieval import console
from cxr_retrieval.config import ServeSettings
from cxr_retrieval.errors import UserError

TOKEN_VARIABLE = "CXR_SERVE_TOKEN"
LEAST_TOKEN = 16
OPEN_PATHS = ("/healthz", "/readyz")  # what a cluster asks without a token; they tell nothing of a patient
AUDITED = ("/v1/search", "/v1/images/")  # what is asked here is answered with what the index holds of patients


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
        except ValueError:  # no base64, or no UTF-8
            return None
    elif scheme.lower() != "bearer":
        return None
    return user if hmac.compare_digest(given.encode(), token.encode()) else None


def audit(request: Request, status: int) -> None:
    """One line of JSON to standard error about a request for images: who asked what of which version, and the answer's
    status. Never names the image. A request that was refused before anything was asked has no version.

    `asked`, `version` and `hits` are what the route left in the request's state.
    """
    if not request.url.path.startswith(AUDITED):
        return
    route, state = request.scope.get("route"), request.state
    line = {
        "audit": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "client": request.client.host if request.client else None,
        "user": getattr(state, "user", None),
        "method": request.method,
        "path": route.path if route is not None else None,
        "version": getattr(state, "version", None),
        "asked": getattr(state, "asked", None),
        "status": status,
        "hits": getattr(state, "hits", None),
    }
    console.say(json.dumps(line, default=str))
