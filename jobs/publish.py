"""Publish a built index as an immutable version and move an alias to it.

  python -m jobs.publish --config FILE corpus.archive=DIR publish.to=s3://bucket/indexes/chest publish.alias=latest
  ray job submit --working-dir . -- python -m jobs.publish --config FILE workspace=s3://bucket/prefix

Killed at any moment, it leaves the old version serving; run again, it uploads only what is missing.
"""

import argparse

from cxr_retrieval import command, console, storage
from cxr_retrieval.config import Settings
from cxr_retrieval.console import Meter
from cxr_retrieval.index.versions import Published, publish
from jobs.index import built_index, finished_index


def run(settings: Settings, _: argparse.Namespace) -> None:
    build, _worked = built_index(settings)
    with Meter("publish", sum(entry.size for entry in build.files), "bytes") as meter:
        published = publish(build, destination(settings), settings.publish.alias, meter)
    show_published(published, destination(settings))


def destination(settings: Settings) -> str:
    """Where the index is published: `publish.to`, or the workspace."""
    return storage.canonical(settings.publish.to or storage.join(settings.workspace, "indexes", settings.index.name))


def show_published(published: Published, to: str) -> None:
    console.show_table(
        "Published version" if published.moved else "Published version (served before, nothing to do)",
        ["version", "alias", "generation", "objects uploaded", "there already", "search with"],
        [
            [
                published.version,
                published.alias,
                published.generation,
                published.uploaded,
                published.reused,
                f"{to}@{published.alias}",
            ]
        ],
    )


def plan(settings: Settings, _: argparse.Namespace) -> None:
    build = finished_index(settings)
    console.show_table(
        "Plan of publish",
        ["objects", "bytes", "to", "alias"],
        [[len(build.files), sum(entry.size for entry in build.files), destination(settings), settings.publish.alias]],
    )


if __name__ == "__main__":
    command.run("publish", __doc__, run, plan)
