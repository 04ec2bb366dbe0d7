"""Train the progressive network with CCLoss on a prepared corpus.

  python -m jobs.train --config jobs/configs/nih_small.yaml corpus.archive=DIR training.workers=2
  ray job submit --working-dir . -- python -m jobs.train --config FILE workspace=s3://bucket/prefix

The corpus is prepared first where it is not. Killed and run again, it goes on from its last checkpoint.
"""

import argparse
import json

import safetensors.numpy

from cxr_retrieval import artifacts, command, console, storage
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.config import Settings
from cxr_retrieval.corpus.findings import NO_FINDING
from cxr_retrieval.corpus.preparation import find_prepared, prepare
from cxr_retrieval.corpus.reading import Corpus, pixels_of
from cxr_retrieval.errors import UserError
from cxr_retrieval.report.training import Example, write_training
from cxr_retrieval.runtime import start_ray
from cxr_retrieval.training.examples import example_places
from cxr_retrieval.training.model import CENTRES, MODEL_FILE, WEIGHTS_FILE
from cxr_retrieval.training.run import epoch_steps, model_draft, train, training_images


def run(settings: Settings, _: argparse.Namespace) -> None:
    if settings.model is not None:
        raise UserError("model is set, but this job trains one: leave it out, or use jobs.evaluate or jobs.pipeline")
    start_ray(settings)
    corpus, _worked = prepare(settings.corpus, settings.workspace, settings.privacy)
    model, worked = train(settings, Corpus(corpus))
    show_model(model, worked)
    console.say(f"report: {training_report(settings, model, Corpus(corpus))}")


def training_report(settings: Settings, model: Artifact, corpus: Corpus) -> str:
    """Write the page of a training run; returns where it is."""
    facts = json.loads(model.read(MODEL_FILE))
    centres = safetensors.numpy.load(model.read(WEIGHTS_FILE))[CENTRES]
    classes = [*facts["findings"], NO_FINDING][: centres.shape[1]]
    learnt = [n for n, name in enumerate(classes) if name in facts.get("learnt", classes)]  # others never moved
    examples = []
    if len(places := example_places(corpus, settings.training.unseen)):
        table = corpus.take(places, ["pixels", "findings"])
        pixels = pixels_of(table, corpus.recipe.size)
        examples = [
            Example(pixels[n], findings, [record["crops"][n] for record in facts["history"]])
            for n, findings in enumerate(table["findings"].to_pylist())
        ]
    page = storage.join(settings.workspace, "reports", "training", f"{model.input_id}.html")
    storage.write_bytes(
        page, write_training(facts, centres[:, learnt], [classes[n] for n in learnt], examples).encode()
    )
    return page


def show_model(model: Artifact, worked: bool) -> None:
    """Print where the model is, and the figures of its chosen embedding on validation patients beside chance."""
    chosen = model.manifest["chosen"]
    figures = json.loads(model.read(MODEL_FILE))["validation"][chosen]
    measures = {"mAP": "map", "precision@8": "precision_at_8", "Recall@8": "recall_at_8"}
    console.show_table(
        "Model" if worked else "Model (finished before, nothing to do)",
        ["training images", "validation images", "steps", "chosen embedding", "where"],
        [
            [
                *(model.counts[name] for name in ("train_images", "validation_images", "steps")),
                chosen,
                model.uri,
            ]
        ],
    )
    chance = [figures.get(f"chance_{key}") for key in measures.values()]  # older models kept that of mAP only
    console.show_table(
        "Retrieval among validation patients, who chose epoch and embedding, percent",
        ["embedding", *measures],
        [
            [chosen, *(100.0 * figures[key] for key in measures.values())],
            ["chance", *("-" if level is None else 100.0 * level for level in chance)],
        ],
    )


def plan(settings: Settings, _: argparse.Namespace) -> None:
    corpus = Corpus(find_prepared(settings.corpus, settings.workspace, settings.privacy))
    draft = model_draft(settings, corpus)
    training = settings.training
    console.show_table(
        "Plan of train",
        ["training images", "epochs", "pretraining", "optimizer steps", "workers", "state", "where"],
        [
            [
                training_images(settings, corpus),
                training.epochs,
                training.pretraining,
                epoch_steps(settings, corpus) * (training.pretraining + training.epochs),
                training.workers,
                "finished" if artifacts.find(draft.uri) else "to do",
                draft.uri,
            ]
        ],
    )


if __name__ == "__main__":
    command.run("train", __doc__, run, plan)
