"""Are phantoms neither trivial nor hopeless: what a small network tells of films of patients whom it has not seen.

  python -m benchmarks.phantom_auc

5,000 phantoms of 128 pixels, a fifth of the patients for testing; the network and recipe of
`benchmarks.losses` with cross-entropy only, for as many steps as ten minutes of two quiet cores take. The area under
the ROC curve of each finding is of the test patients' films, by the mean of both passes' logits.
"""

import numpy as np
from scipy.stats import rankdata

from benchmarks import claim
from benchmarks.archive import phantom_archive
from benchmarks.claim import Claim, publish
from benchmarks.contest import Contest, Nothing, read_images
from benchmarks.losses import SETTINGS
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.console import show_table
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.corpus.splits import TEST, TRAIN, VALIDATION
from cxr_retrieval.runtime import start_ray

IMAGES, SIDE, STEPS, VALIDATION_SHARE = 5_000, 128, 2_400, 0.02
LOWEST, HIGHEST = 0.75, 0.95


def area_under_curve(scores_N: np.ndarray, present_N: np.ndarray) -> float:
    """The share of pairs of a film with the finding and one without that the scores put in order; NaN without pairs."""
    positives, negatives = int(present_N.sum()), int((~present_N).sum())
    if not positives or not negatives:
        return float("nan")
    ranks = float(rankdata(scores_N)[present_N].sum())
    return (ranks - positives * (positives + 1) / 2) / (positives * negatives)


def main() -> None:
    start_ray()
    settings = CorpusSettings(
        archive=phantom_archive(IMAGES, SIDE), name="phantom-auc", size=SIDE, validation_share=VALIDATION_SHARE
    )
    corpus = Corpus(prepare(settings, str(claim.RESULTS / "phantom-auc"))[0])
    train, validation, test = (read_images([corpus], split) for split in (TRAIN, VALIDATION, TEST))
    contest = Contest(SETTINGS, 0, STEPS, train, {"validation": validation}, corpus.recipe)
    contest.advance(Nothing(), STEPS)
    scores_NC = contest.outputs(test.pixels).joint_PBC.mean(0).numpy()
    present_NC = test.labels.numpy() == 1
    areas = [area_under_curve(scores_NC[:, k], present_NC[:, k]) for k in range(len(FINDINGS))]
    rows = [[FINDINGS[k], int(present_NC[:, k].sum()), round(areas[k], 3)] for k in range(len(FINDINGS))]
    show_table(f"{len(test.labels):,} test films", ["finding", "films", "AUC"], rows)
    mean = float(np.nanmean(areas))
    of = f"mean AUC of the findings, phantoms of {SIDE} pixels, {len(train.labels):,} train films, {STEPS:,} steps"
    extremes = {"least": 100 * float(np.nanmin(areas)), "most": 100 * float(np.nanmax(areas))}
    publish(
        "phantom_auc",
        [
            Claim.of(f"{of}: not hopeless", f"{LOWEST}", 1.0, [mean / LOWEST], mean=100 * mean, **extremes),
            Claim.of(f"{of}: not trivial", f"{HIGHEST}", 1.0, [HIGHEST / mean], mean=100 * mean, **extremes),
        ],
    )


if __name__ == "__main__":
    main()
