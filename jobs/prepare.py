"""Prepare an archive of chest X-rays for training.

  python -m jobs.prepare corpus.archive=DIR
  ray job submit --working-dir . -- python -m jobs.prepare --config FILE workspace=s3://bucket/prefix

Every image is checked and decoded once and written to Parquet shards in WORKSPACE/corpora. What cannot be used is
quarantined with its reason. Run again, it does only what is missing.
"""

import argparse
import math
from collections.abc import Mapping

from cxr_retrieval import command, console
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.config import Settings
from cxr_retrieval.corpus.archive import Archive, ignored_text
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.runtime import start_ray

SHOWN = 10  # of findings in the archive's own words; the manifest has all


def run(settings: Settings, _: argparse.Namespace) -> None:
    start_ray(settings)
    corpus, worked = prepare(settings.corpus, settings.workspace, settings.privacy)
    counts = corpus.counts
    console.show_table(
        "Prepared corpus" if worked else "Prepared corpus (finished before, nothing to do)",
        ["archive", "prepared", "quarantined", "excluded", "duplicates", "labels without image", "where"],
        [
            [
                *(counts[name] for name in ("archive", "prepared", "quarantined", "excluded", "duplicates")),
                corpus.manifest["labels_without_image"],
                corpus.uri,
            ]
        ],
    )
    for reason, count in sorted(corpus.manifest["quarantine_reasons"].items()):
        console.say(f"quarantined {count:,}: {reason}")
    say_other_findings(corpus.manifest["other_findings"])
    say_what_was_left_alone(corpus)


def say_other_findings(counts: Mapping[str, int]) -> None:
    """One line about findings in the archive's own words, if there are any: the most frequent, and how many more."""
    if counts:
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        told = ", ".join(f"{name} {count:,}" for name, count in ordered[:SHOWN])
        more = f", and {len(ordered) - SHOWN} more in the corpus's manifest" if len(ordered) > SHOWN else ""
        console.say(f"images with findings that are none of the {len(FINDINGS)}: {told}{more}")


def say_what_was_left_alone(corpus: Artifact) -> None:
    """One line about the archive's files of other kinds, if there are any."""
    if ignored := corpus.manifest.get("ignored_files"):
        console.say(ignored_text(ignored))


def plan(settings: Settings, _: argparse.Namespace) -> None:
    corpus = settings.corpus
    rows = Archive(corpus).rows
    pixels = corpus.size**2
    console.show_table(
        "Plan of prepare",
        ["images", "shards", "bytes of pixels", "memory of a task (bytes)"],
        [[rows, math.ceil(rows / corpus.partition_images), rows * pixels, 2 * corpus.partition_images * pixels]],
    )


if __name__ == "__main__":
    command.run("prepare", __doc__, run, plan)
