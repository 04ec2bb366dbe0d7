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
from cxr_retrieval.assessment import EVALUATION_FILE, REPORT_FILE, evaluate, headline, localisation_rows, unseen_rows
from cxr_retrieval.config import Settings
from cxr_retrieval.corpus.preparation import find_prepared, prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.embedding.stream import embed
from cxr_retrieval.runtime import start_ray
from cxr_retrieval.training.model import MODEL_FILE
from cxr_retrieval.training.run import model_of


def run(settings: Settings, _: argparse.Namespace) -> None:
    start_ray(settings)
    settings, model = model_of(settings)
    corpus = Corpus(prepare(settings.corpus, settings.workspace, settings.privacy)[0])
    warn_of_overlap(settings, model, corpus)
    embedded, _worked = embed(settings.embedding, settings.workspace, model.uri, corpus)
    evaluation, worked = evaluate(
        settings.evaluation, settings.workspace, model.uri, corpus, embedded, names=not settings.privacy.pseudonymise
    )
    show_evaluation(evaluation, worked)


def warn_of_overlap(settings: Settings, model: Artifact, corpus: Corpus) -> None:
    """Say so where an archive that is all test data is the one that the model learnt from."""
    learnt_from = json.loads(model.read(MODEL_FILE)).get("label_tables")
    if settings.corpus.split == "all_test" and learnt_from == corpus.label_tables:
        console.say(
            "warning: the model was trained on patients of this very archive, and all of them are test data here:"
            " for held-out figures give the training run's config instead of model=URI"
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
    if rows := unseen_rows(figures):
        console.show_table(
            "Findings that training never saw, each asked for alone, percent",
            ["finding", "queries", "embedding", "precision@8", "chance", "mAP", "chance"],
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
