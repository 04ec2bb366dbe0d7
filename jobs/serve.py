"""Serve a published index over HTTP: a search page and an API.

  python -m jobs.serve --index URI@alias
  python -m jobs.serve --index URI@alias serve.port=8080

Listens on this machine's own address, 127.0.0.1, unless `serve.host` says otherwise, which takes a token
(CXR_SERVE_TOKEN) and TLS (`serve.certificate`, `serve.certificate_key`). When the alias moves, the new version is
served without a restart. The API describes itself at /openapi.json; /metrics is for Prometheus.

Needs no cluster. Where RAY_ADDRESS names one, Ray Serve replicas on its nodes hold the shards (`serve.groups`,
`serve.replicas`): this process has the model and the lists, and asks them.
"""

import argparse
import os
import socket
from collections.abc import Callable
from functools import partial

import uvicorn
from fastapi import FastAPI

from cxr_retrieval import command, console
from cxr_retrieval.config import ServeSettings, Settings
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.search import Retriever
from cxr_retrieval.index.versions import split_reference
from cxr_retrieval.serve.access import token_for
from cxr_retrieval.serve.api import create_app
from cxr_retrieval.serve.live import LiveIndex

STOP_SECONDS = 20  # told to stop, for requests under way to end


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--index", required=True, metavar="URI@alias", help="published index, and an alias or version of it"
    )


def run(settings: Settings, options: argparse.Namespace) -> None:
    serve = settings.serve
    token_for(serve)  # before the index is opened, which may take minutes
    with listening(serve) as taken, LiveIndex(options.index, serve.poll_seconds, opener(serve, options.index)) as live:
        answering = server(create_app(live, serve), serve)
        host, port = taken.getsockname()[:2]
        scheme = "https" if serve.certificate else "http"
        console.say(f"index: {live.retriever.images:,} images, version {live.retriever.version.version.id}")
        console.say(f"search page: {scheme}://{f'[{host}]' if ':' in host else host}:{port}/  (stop with Ctrl-C)")
        answering.run(sockets=[taken])


def server(app: FastAPI, serve: ServeSettings) -> uvicorn.Server:
    """What answers by an application. Raises UserError where the certificate or its key cannot be read."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # paths name images; the audit line does not
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS,
        ssl_certfile=serve.certificate,
        ssl_keyfile=serve.certificate_key,
    )
    try:
        config.load()
    except OSError as error:  # of ssl too
        raise UserError(f"serve.certificate={serve.certificate}: it or its key cannot be read ({error})") from None
    return uvicorn.Server(config)


def opener(serve: ServeSettings, reference: str) -> Callable[[str], Retriever]:
    """What opens a version: its shards are held by the nodes of the cluster that RAY_ADDRESS names, else here."""
    if not os.environ.get("RAY_ADDRESS"):
        return Retriever.open
    from cxr_retrieval.index.spread import Spread  # Ray is imported where there is a cluster
    from cxr_retrieval.runtime import require_readable, start_ray

    start_ray()
    require_readable("--index", split_reference(reference)[0])
    return partial(Retriever.open, hold=partial(Spread, groups=serve.groups, replicas=serve.replicas))


def listening(serve: ServeSettings) -> socket.socket:
    """A socket that listens where the settings say. Raises UserError where it cannot."""
    family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
    try:
        return socket.create_server((serve.host, serve.port), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise UserError(
            f"serve.host={serve.host} serve.port={serve.port}: cannot listen there ({reason}): choose another"
        ) from None


def plan(settings: Settings, options: argparse.Namespace) -> None:
    retriever = Retriever.open(options.index)
    console.show_table(
        "Plan of serve",
        ["address", "images", "shards", "version"],
        [
            [
                f"{settings.serve.host}:{settings.serve.port}",
                retriever.images,
                retriever.facts["shards"],
                retriever.version.version.id,
            ]
        ],
    )


if __name__ == "__main__":
    command.run("serve", __doc__, run, plan, arguments, on_cluster=False)
