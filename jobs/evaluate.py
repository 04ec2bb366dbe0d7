"""Evaluate a model on the held-out patients of a corpus.

  python -m jobs.evaluate --config FILE corpus.archive=DIR                the model that these settings train
  python -m jobs.evaluate model=URI corpus.archive=DIR                    a finished model on another archive, all of it
  ray job submit --working-dir . -- python -m jobs.evaluate --config FILE workspace=s3://bucket/prefix

With `model=URI` the archive is prepared by the model's own decode recipe and every image of it is test data, unless
`corpus.split` says otherwise. Writes `evaluation.json` and `evaluation.html`.
"""

import argparse
import json

from cxr_retrieval import command, console, storage
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.assessment import EVALUATION_FILE, REPORT_FILE, apart_rows, evaluate, headline, localisation_rows
from cxr_retrieval.config import Settings
from cxr_retrieval.corpus.preparation import find_prepared, prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.corpus.splits import TEST
from cxr_retrieval.embedding.stream import embed
from cxr_retrieval.runtime import start_ray
from cxr_retrieval.training.model import MODEL_FILE
from cxr_retrieval.training.run import learnt_from, model_of


def run(settings: Settings, _: argparse.Namespace) -> None:
    start_ray(settings)
    settings, model = model_of(settings)
    corpus = Corpus(prepare(settings.corpus, settings.workspace, settings.privacy)[0])
    if settings.model is not None:  # another run's: of a model of these settings the split is the same
        warn_of_overlap(settings, model, corpus)
    embedded, _worked = embed(settings.embedding, settings.workspace, model.uri, corpus)
    evaluation, worked = evaluate(
        settings.evaluation, settings.workspace, model.uri, corpus, embedded, names=not settings.privacy.pseudonymise
    )
    show_evaluation(evaluation, worked)


def warn_of_overlap(settings: Settings, model: Artifact, corpus: Corpus) -> None:
    """Say so where the archive is the one that the model learnt from and the split is not known to be the same.

    It is known by its place, or by any of its label tables: it may have grown since. Which patients test is decided
    before which validate.
    """
    facts, here = json.loads(model.read(MODEL_FILE)), learnt_from(settings.corpus, corpus)
    in_common = set(facts.get("label_tables", ())) & set(here["label_tables"])
    splits = [dict(learnt["split"]) if "split" in learnt else None for learnt in (facts, here)]
    if settings.evaluation.split == TEST:
        for split in filter(None, splits):
            split.pop("validation_share", None)
    if (in_common or facts.get("archive") == here["archive"]) and splits[0] != splits[1]:
        console.say(
            "warning: the model was trained on this very archive by another split, so patients that it was trained on"
            " may be queries here: for held-out figures give the training run's config instead of model=URI, or its"
            " corpus.split, split_seed and shares"
        )


def show_evaluation(evaluation: Artifact, worked: bool) -> None:
    """Print Recall@k, precision and mAP of every embedding beside floors and chance, and how crops meet boxes."""
    figures = json.loads(evaluation.read(EVALUATION_FILE))
    state = "" if worked else " (finished before, nothing to do)"
    for gallery in ("all", "findings"):
        console.show_table(
            f"Retrieval among {gallery}: {figures['queries']:,} {figures['split']} queries, percent{state}",
            ["embedding", "Recall@2", "@4", "@6", "@8", "precision@8", "mAP"],
            headline(figures, gallery),
        )
    if rows := localisation_rows(figures):
        console.show_table(
            "Crops and annotated boxes: how often the crop holds a box's centre, and mean IoU, percent; centred: a crop"
            " of the same size in the centre of the image",
            ["finding", "boxes", "patients", "centre in crop", "centred", "difference", "IoU", "centred", "difference"],
            rows,
        )
    if rows := apart_rows(figures):
        console.show_table(
            "Findings each asked for alone, percent",
            ["finding", "in training", "queries", "embedding", "precision@8", "chance", "mAP", "chance"],
            rows,
        )
    for drawn in figures["drawn"]:
        console.say(f"evaluated on {drawn}: evaluation.max_images")
    console.say(f"chosen on validation patients: {figures['chosen']}")
    console.say(f"report: {storage.join(evaluation.uri, REPORT_FILE)}")


def plan(settings: Settings, _: argparse.Namespace) -> None:
    settings, model = model_of(settings)
    corpus = find_prepared(settings.corpus, settings.workspace, settings.privacy)
    console.show_table(
        "Plan of evaluate",
        ["images to embed", "shards", "split of the queries", "model"],
        [[corpus.counts["prepared"], len(corpus.manifest["parts"]), settings.evaluation.split, model.uri]],
    )


if __name__ == "__main__":
    command.run("evaluate", __doc__, run, plan)
