"""Prepare an archive of chest X-rays for training.

  python -m jobs.prepare corpus.archive=DIR
  ray job submit --working-dir . -- python -m jobs.prepare --config FILE workspace=s3://bucket/prefix

Every image is checked and decoded once and written to Parquet shards in WORKSPACE/corpora. What cannot be used is
quarantined with its reason. Run again, it does only what is missing. Writes a page of the corpus to
WORKSPACE/reports/corpus.
"""

import argparse
from collections import Counter
from collections.abc import Mapping

import pyarrow.compute as pc

from cxr_retrieval import command, console, storage
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.config import Settings
from cxr_retrieval.corpus.archive import ignored_text
from cxr_retrieval.corpus.census import Example
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.parts import task_memory
from cxr_retrieval.corpus.preparation import plan_corpus, prepare
from cxr_retrieval.corpus.reading import Corpus, pixels_of
from cxr_retrieval.corpus.splits import SPLITS
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.report.corpus import Film, left_out, write_corpus
from cxr_retrieval.report.gallery import Case
from cxr_retrieval.runtime import start_ray

FILM_COLUMNS = ["image_id", "patient_id", "view", "sex", "age_years", "findings", "boxes", "pixels"]
SHOWN = 10  # of findings in the archive's own words; the manifest has all
LOOKED_AT = 5  # images in quarantine for each reason that the page tells
DUPLICATES_LOOKED_AT = 20


def run(settings: Settings, _: argparse.Namespace) -> None:
    Pseudonyms.of(settings.privacy)  # before any work: the page needs the key, and a missing one is known at once
    start_ray(settings)
    corpus, worked = prepare(settings.corpus, settings.workspace, settings.privacy)
    show_corpus(corpus, worked)
    warn_of_corpus(corpus)
    console.say(f"report: {corpus_report(settings, corpus)}")


def show_corpus(corpus: Artifact, worked: bool) -> None:
    """Print how every image of the archive is accounted for, and who is in which split."""
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
    if rows := left_out(corpus.manifest):
        console.show_table("Images that are not prepared", ["what", "why", "images"], rows)
    console.show_table(
        "Splits: no patient is in two",
        ["split", "patients", "images"],
        [[split, *(corpus.manifest["splits"][split][what] for what in ("patients", "images"))] for split in SPLITS],
    )
    say_other_findings(corpus.manifest["other_findings"])


def say_other_findings(counts: Mapping[str, int]) -> None:
    """One line about findings in the archive's own words, if there are any: the most frequent, and how many more."""
    if counts:
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        told = ", ".join(f"{name} {count:,}" for name, count in ordered[:SHOWN])
        more = f", and {len(ordered) - SHOWN} more in the corpus's manifest" if len(ordered) > SHOWN else ""
        console.say(f"images with findings that are none of the {len(FINDINGS)}: {told}{more}")


def warn_of_corpus(corpus: Artifact) -> None:
    """A line each about files of other kinds in the archive, boxes that are left out, images with text in them and
    images of two patients, if there are any."""
    if ignored := corpus.manifest["ignored_files"]:
        console.say(ignored_text(ignored))
    if any((boxes := corpus.manifest["boxes_left_out"]).values()):
        console.say(
            f"boxes that are left out: {boxes['unknown_finding']:,} whose finding is none of the {len(FINDINGS)},"
            f" {boxes['not_in_labels']:,} of a finding that their image does not have"
        )
    if burned_in := corpus.manifest["burned_in"]:
        console.say(
            f"warning: images that hold burned-in text, by what their headers say (BurnedInAnnotation): {burned_in:,};"
            " it may name patients, and is shown wherever searches and evaluations show the images;"
            " corpus.burned_in=exclude leaves them out"
        )
    if across := corpus.manifest["duplicates_across_patients"]:
        console.say(
            f"warning: images whose pixels another patient's image has too: {across:,}; one of each is kept, and one"
            " person under two names may be in two splits"
        )


def corpus_report(settings: Settings, prepared: Artifact) -> str:
    """Write the page of a corpus where there is none yet; returns where it is. Other names make another page: those of
    another key, or of the archive. Under pseudonyms it shows no film whose header says that text is burned in.

    Raises UserError where pseudonyms are wanted and there is no key.
    """
    pseudonyms = Pseudonyms.of(settings.privacy)
    names = pseudonyms.key is None
    file = f"{prepared.input_id}.{pseudonyms.key_id or 'named'}.html"
    page = storage.join(settings.workspace, "reports", "corpus", file)
    if storage.exists(page) and (names or not prepared.manifest["burned_in"]):  # one of before may show such films
        return page
    corpus = Corpus(prepared)
    census = corpus.census()
    films = {
        finding: [_film(corpus, finding, example, names) for example in examples if names or not example.burned_in]
        for finding, examples in census.examples.items()
    }
    quarantined, duplicates = corpus.quarantined(LOOKED_AT), corpus.across_patients(DUPLICATES_LOOKED_AT)
    html = write_corpus(settings.corpus.name, prepared.manifest, census, films, quarantined, duplicates, pseudonyms)
    storage.write_bytes(page, html.encode())
    return page


def _film(corpus: Corpus, finding: str, example: Example, names: bool) -> Film:
    """An example with its boxes. One row group is read, and given back before the next."""
    size = corpus.recipe.size
    table = corpus.take(corpus.places_of(example.part, [example.place]), FILM_COLUMNS)
    (known,) = table.drop_columns("pixels").to_pylist()
    case = Case.of_row(known, pixels_of(table, size)[0], size, names)
    return Film(case, [(box["x"], box["y"], box["w"], box["h"]) for box in known["boxes"] if box["finding"] == finding])


def plan(settings: Settings, _: argparse.Namespace) -> None:
    planned = plan_corpus(settings.corpus, settings.workspace, settings.privacy)
    corpus, pixels = settings.corpus, settings.corpus.size**2
    known: Counter[tuple[str, str]] = Counter()
    for rows in planned.archive.partitions():
        for what, column in (("quarantined", "reason"), ("excluded", "excluded")):
            known.update((what, why) for why in pc.drop_null(rows[column]).to_pylist())
    images = planned.archive.rows
    to_read = images - known.total()
    console.show_table(
        "Plan of prepare",
        ["images", "shards", "images to read", "bytes of pixels", "memory of a task (bytes)"],
        [[images, len(planned.parts), to_read, to_read * pixels, task_memory(corpus)]],
    )
    if planned.archive.unscanned:
        console.say(
            f"files whose headers tell whether they are images: {planned.archive.unscanned:,}; none is read yet"
        )
    if known:
        console.show_table(
            "Known before an image is read",
            ["what", "why", "images"],
            [[what, why.replace("_", " "), count] for (what, why), count in sorted(known.items())],
        )
    if corpus.source_side is not None:
        console.say(f"corpus.source_side={corpus.source_side} is told by each image's header, when it is read")
    if corpus.burned_in == "exclude":
        console.say("corpus.burned_in=exclude is told by each image's header, when it is read")


if __name__ == "__main__":
    command.run("prepare", __doc__, run, plan)
