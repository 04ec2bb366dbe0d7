"""Train the progressive network with CCLoss on a prepared corpus.

  python -m jobs.train --config jobs/configs/nih_small.yaml corpus.archive=DIR training.workers=2
  ray job submit --working-dir . -- python -m jobs.train --config FILE workspace=s3://bucket/prefix

The corpus is prepared first where it is not. Killed and run again, it goes on from its last checkpoint.
"""

import argparse

from cxr_retrieval import artifacts, command, console
from cxr_retrieval.artifacts import Artifact
from cxr_retrieval.config import Settings
from cxr_retrieval.corpus.preparation import find_prepared, prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.errors import UserError
from cxr_retrieval.runtime import start_ray
from cxr_retrieval.training.run import model_draft, train


def run(settings: Settings, _: argparse.Namespace) -> None:
    if settings.model is not None:
        raise UserError("model is set, but this job trains one: leave it out, or use jobs.evaluate or jobs.pipeline")
    start_ray(settings)
    corpus, _worked = prepare(settings.corpus, settings.workspace)
    model, worked = train(settings, Corpus(corpus))
    show_model(model, worked)


def show_model(model: Artifact, worked: bool) -> None:
    """Print where the model is and its figures on validation patients."""
    console.show_table(
        "Model" if worked else "Model (finished before, nothing to do)",
        ["training images", "validation images", "steps", "chosen embedding", "where"],
        [
            [
                *(model.counts[name] for name in ("train_images", "validation_images", "steps")),
                model.manifest["chosen"],
                model.uri,
            ]
        ],
    )


def plan(settings: Settings, _: argparse.Namespace) -> None:
    corpus = find_prepared(settings.corpus, settings.workspace)
    draft = model_draft(settings, Corpus(corpus))
    images = corpus.manifest["splits"]["train"]["images"]
    training = settings.training
    console.show_table(
        "Plan of train",
        ["training images", "epochs", "optimizer steps", "workers", "state", "where"],
        [
            [
                images,
                training.epochs,
                images // training.batch_size * training.epochs,
                training.workers,
                "finished" if artifacts.find(draft.uri) else "to do",
                draft.uri,
            ]
        ],
    )


if __name__ == "__main__":
    command.run("train", __doc__, run, plan)
