"""Draw an archive of phantom radiographs: no patient, no licence, ground truth for every sign.

  python -m jobs.phantom --images 600 --out DIR
  ray job submit --working-dir . -- python -m jobs.phantom --images 100000 --out s3://bucket/phantoms

The archive has NIH ChestX-ray14's layout, so every other job reads it.
"""

import argparse

from cxr_retrieval import command, console
from cxr_retrieval.config import Settings
from cxr_retrieval.corpus.phantom.archive import PhantomArchive, write_phantom_archive
from cxr_retrieval.runtime import start_ray


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, help="radiographs to draw (phantom.images)")
    parser.add_argument("--out", metavar="URI", help="folder or s3:// prefix to write to (phantom.out)")


def implied(options: argparse.Namespace) -> list[str]:
    given = {"phantom.images": options.images, "phantom.out": options.out}
    return [f"{key}={value}" for key, value in given.items() if value is not None]


def run(settings: Settings, _: argparse.Namespace) -> None:
    start_ray(settings)
    show_archive(*write_phantom_archive(settings.phantom))


def show_archive(archive: PhantomArchive, worked: bool) -> None:
    console.show_table(
        "Phantom archive" if worked else "Phantom archive (drawn before, nothing to do)",
        ["images", "patients", "where"],
        [[archive.images, archive.patients, archive.uri]],
    )


def plan(settings: Settings, _: argparse.Namespace) -> None:
    phantom = settings.phantom
    console.show_table(
        "Plan of phantom",
        ["images", "side in pixels", "where"],
        [[phantom.images, phantom.size, phantom.out or "phantom.out?"]],
    )


if __name__ == "__main__":
    command.run("phantom", __doc__, run, plan, arguments, implied=implied, writes=["phantom.out"])
