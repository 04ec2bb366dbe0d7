"""Publish a built index as an immutable version and move an alias to it.

  python -m jobs.publish --config FILE corpus.archive=DIR publish.to=s3://bucket/indexes/chest publish.alias=latest
  ray job submit --working-dir . -- python -m jobs.publish --config FILE workspace=s3://bucket/prefix

Killed at any moment, it leaves the old version serving; run again, it uploads only what is missing.
"""

import argparse

from cxr_retrieval import command, console, storage
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.config import Settings
from cxr_retrieval.index.files import files_of
from cxr_retrieval.index.versions import Published, publish
from cxr_retrieval.progress import Progress
from jobs.index import built_index, finished_index


def run(settings: Settings, _: argparse.Namespace) -> None:
    build, _worked = built_index(settings)
    show_published(published_build(settings, build), destination(settings))


def published_build(settings: Settings, build: Artifact) -> Published:
    """Publish a built index where the settings say, told to `jobs.status` as it goes."""
    to, alias = destination(settings), settings.publish.alias
    work, size = f"publish-{build.input_id}-{alias}", sum(file.entry.size for file in files_of(build).values())
    with Progress(settings.workspace, work, f"{to}@{alias}", "publish", size, "bytes") as progress:
        return publish(build, to, alias, progress, settings.workspace)


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
    files = files_of(finished_index(settings))
    console.show_table(
        "Plan of publish",
        ["objects", "bytes", "to", "alias"],
        [[len(files), sum(file.entry.size for file in files.values()), destination(settings), settings.publish.alias]],
    )


if __name__ == "__main__":
    command.run("publish", __doc__, run, plan, writes=["workspace", "publish.to"])
