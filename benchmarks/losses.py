"""CCLoss against the losses that it is compared with: one network, one budget, several seeds, paired over patients.

  python -m benchmarks.losses --archive DIR [--also DIR]
  python -m benchmarks.losses --phantoms 20600
  python -m benchmarks.losses --archive DIR --learner efficientnet_lite0 --steps 664 --name NAME

`--minutes` of one run become a number of steps, measured once with cross-entropy only and nothing beside it (or
`--steps` says it), and kept in `budget.json`; every loss and seed takes as many. A run leaves one JSON in
`benchmarks/results/losses/NAME`; one runs on each core, on a GPU as many as it holds. Run again, it does only what is
missing, and compares what is there; another archive, recipe or budget takes another name.

The learner is a half-width ResNet-18 from nothing at 64 pixels, or EfficientNet-Lite0 from ImageNet at 96, which takes
seven times as long.

`--archive` is split by patient: it is trained on, and its test patients are one of the sets that are judged; of
phantoms three quarters are test patients, 5,000 with 20,600 images. `--also` is another archive, all of whose patients
are judged only. Figures are of the gallery *all*, means over seeds. The interval of a figure is over patients. That of
a difference has the spread of the difference over seeds in it too (Student's t with Welch's degrees of freedom), and is
given from two seeds on; `detectable` is the true difference that 80% of such comparisons would find. None is corrected
for their number. CCLoss is called ahead where the whole interval of its difference from the best other loss is.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import ray
import torch
from scipy.stats import t as student_t
from torch import Tensor

from benchmarks import contest
from benchmarks.archive import phantom_archive
from benchmarks.claim import RESULTS, Claim, machine, publish
from benchmarks.contest import (
    CROP_FROM,
    CUTOFFS,
    EVALUATED,
    LEARNERS,
    SMALL,
    Centred,
    Contest,
    Nothing,
    Paired,
    Proxied,
    Rival,
)
from cxr_retrieval import evaluation, losses, network
from cxr_retrieval.config import CorpusSettings, LossSettings
from cxr_retrieval.console import Meter, say, show_table
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.corpus.splits import TEST, TRAIN, VALIDATION
from cxr_retrieval.evaluation.intervals import paired_difference, patient_bootstrap
from cxr_retrieval.losses import baselines
from cxr_retrieval.runtime import start_ray
from cxr_retrieval.training import augmentation, model, objective, optimisation

OURS, ALONE = "CCLoss", "cross-entropy only"
SIDE = 128
SETTINGS = LossSettings()
PHANTOM_SHARES = {"test_share": 0.74, "validation_share": 0.025}
OUT = RESULTS / "losses"
GPU_BYTES = 4 << 30  # of a run: a card is far from busy with one of the small network (docs/performance.md)
# Whose text decides what a run gives.
DECISIVE = (contest, losses, network, evaluation, augmentation, model, objective, optimisation)
Maker = Callable[[torch.device], Rival]


def rivals(settings: LossSettings, seed: int) -> dict[str, Maker]:
    """Every loss by its name.

    Weights beside the cross-entropy: CCLoss 0.1, and for the others what gives their gradient the length of CCLoss's at
    temperature 0.2, on random embeddings of the training labels (root mean square over batches; docs/experiments.md).
    """

    def paired(weight: float, loss: Callable[[Tensor, Tensor], Tensor]) -> Maker:
        return lambda _: Paired(weight, loss)

    return {
        OURS: lambda device: Centred(0.1, settings, seed, device),
        ALONE: lambda _: Nothing(),
        "all pairs": paired(0.1, partial(baselines.pair_contrast, margin=1.4)),
        "semi-hard triplets": paired(0.25, baselines.semi_hard_triplets),
        "multi-similarity": paired(0.55, baselines.multi_similarity),
        "supervised contrastive": paired(0.1, partial(baselines.supervised_contrast, temperature=0.5)),
        "proxy-anchor": lambda _: Proxied(0.004, baselines.ProxyAnchor),
        "multi-label proxies": lambda _: Proxied(0.02, baselines.MultiLabelProxies),
    }


def prepared(archives: list[str], size: int, shares: Mapping[str, float]) -> list[Corpus]:
    """The archives as corpora under benchmarks/results: the first split by patient, the others all test."""
    start_ray()
    found = []
    for number, archive in enumerate(archives):
        split: Any = "all_test" if number else "hash"
        corpus = CorpusSettings(archive=archive, name=f"losses-{number}", size=size, split=split, **shares)
        found.append(Corpus(prepare(corpus, str(RESULTS / "losses"))[0]))
    ray.shutdown()
    return found


_loaded: dict[str, Any] = {}


def _load(uris: list[str], learner: str) -> None:
    """What every run of a process uses; on a CPU each has one thread."""
    torch.set_num_threads(1)
    _loaded["learner"] = LEARNERS[learner]
    first, *others = [Corpus.open(uri) for uri in uris]
    _loaded["train"] = contest.read_images([first], TRAIN)
    _loaded["judged"] = {
        "validation": contest.read_images([first], VALIDATION),
        "test": contest.read_images([first], TEST),
    }
    if others:
        _loaded["judged"]["other"] = contest.read_images(others, TEST)
    _loaded["recipe"] = first.recipe


def _contest(seed: int, steps: int) -> Contest:
    return Contest(SETTINGS, seed, steps, _loaded["train"], _loaded["judged"], _loaded["recipe"], _loaded["learner"])


def _grow(seed: int, steps: int, trunk: str) -> None:
    _contest(seed, steps).grow_trunk(Path(trunk))


def _run(name: str, seed: int, steps: int, trunk: str, out: str, key: dict[str, Any]) -> None:
    entry = _contest(seed, steps).run(rivals(SETTINGS, seed)[name], Path(trunk))
    facts = {"loss": name, "seed": seed, "machine": machine()} | key | asdict(entry)
    waiting = Path(out + ".part")
    waiting.write_text(json.dumps(facts, separators=(",", ":")) + "\n")
    waiting.replace(out)


def _calibrated(minutes: float) -> int:
    """Steps that cross-entropy only takes in so many minutes."""
    untrained = _contest(0, 1_000)
    whole, both = (untrained.seconds_a_step(crop) for crop in (False, True))
    return max(20, round(60 * minutes / (CROP_FROM * whole + (1 - CROP_FROM) * both)))


def file_of(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(' ', '_')}-{seed}.json"


def run_all(
    folder: Path, corpora: list[Corpus], learner: str, names: list[str], seeds: int, asked: dict[str, float]
) -> None:
    """Run what is missing, seed by seed, so that what is there early can be compared.

    `asked` is the budget of a run: `{"minutes": M}` or `{"steps": N}`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    uris = [corpus.artifact.uri for corpus in corpora]
    at_once = os.cpu_count() or 1
    if torch.cuda.is_available():
        at_once = max(1, min(at_once, torch.cuda.get_device_properties(0).total_memory // GPU_BYTES))
    wanted = [(name, seed) for seed in range(seeds) for name in names]
    left = [(name, seed) for name, seed in wanted if not file_of(folder, name, seed).exists()]
    pool = ProcessPoolExecutor(at_once, get_context("spawn"), _load, (uris, learner))
    try:
        budget = _budget(folder, [corpus.artifact.input_id for corpus in corpora], learner, asked, pool)
        steps, trunks = budget["steps"], folder / "trunks"
        trunks.mkdir(exist_ok=True)
        trunk_of = {seed: trunks / f"{seed}.pt" for _, seed in left}
        growing = [pool.submit(_grow, seed, steps, str(file)) for seed, file in trunk_of.items() if not file.exists()]
        for grown in growing:
            grown.result()
        with Meter("losses", len(wanted), "runs") as meter:
            meter.advance(len(wanted) - len(left))
            waiting = {
                pool.submit(
                    _run, name, seed, steps, str(trunk_of[seed]), str(file_of(folder, name, seed)), budget
                ): f"{name}, seed {seed}"
                for name, seed in left
            }
            for ended in as_completed(waiting):
                ended.result()
                meter.advance(1, waiting[ended])
    finally:
        pool.shutdown(cancel_futures=True)


def _texts(part: ModuleType) -> list[Path]:
    """The file of a module, or those of a package."""
    file = Path(str(part.__file__))
    return sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]


def _budget(
    folder: Path, corpora: list[str], learner: str, asked: dict[str, float], pool: ProcessPoolExecutor
) -> dict[str, Any]:
    """What all runs of a folder have in common; results of another budget, learner, other images or another text of
    what decides them (see DECISIVE) are refused."""
    text = [inspect.getsource(rivals), *(file.read_text() for part in DECISIVE for file in _texts(part))]
    decided = [text, SETTINGS.model_dump(), LEARNERS[learner].network.model_dump()]
    digest = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:12]
    file, wanted = folder / "budget.json", asked | {"corpora": corpora, "learner": learner, "recipe": digest}
    if not file.exists():
        steps = asked["steps"] if "steps" in asked else pool.submit(_calibrated, asked["minutes"]).result()
        file.write_text(json.dumps(wanted | {"steps": steps}) + "\n")
    budget: dict[str, Any] = json.loads(file.read_text())
    if {name: budget.get(name) for name in wanted} != wanted:
        raise SystemExit(f"{file} is of {budget}, which is not {wanted}: choose another --name, or the same settings")
    return budget


def read_entries(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The runs that are there, by loss, in the order of their seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in rivals(SETTINGS, 0):
        files = folder.glob(f"{name.replace(' ', '_')}-*.json")
        entries = sorted((json.loads(file.read_text()) for file in files), key=lambda entry: entry["seed"])
        if entries:
            found[name] = entries
    return found


def columns(figures: dict[str, Any]) -> np.ndarray:
    """Recall@2, 4, 6, 8, precision@8, mAP, nDCG@8 of every query, [Q, 7]."""
    recall = np.array([[int(hit) for hit in row] for row in figures["recall"]], float)
    others = [np.array(figures["hits_of_8"]) / 8, np.array(figures["ap"]), np.array(figures["ndcg_at_8"])]
    return np.column_stack([recall, *others])


NAMES = (*(f"Recall@{cutoff}" for cutoff in CUTOFFS), "precision@8", "mAP", "nDCG@8")
COMPARED = ("Recall@8", "precision@8", "mAP", "nDCG@8")


def compared(entries: dict[str, list[dict[str, Any]]], where: str, embedding: str) -> dict[str, Any]:
    """Figures of every loss, means over its seeds, what `time_to_equal` says of it, and its differences from CCLoss
    over the seeds that both have."""
    found: dict[str, Any] = {}
    of_seed = {
        name: {run["seed"]: columns(run["figures"][where][embedding]) for run in runs} for name, runs in entries.items()
    }
    ours, shares = of_seed.get(OURS, {}), time_to_equal(entries, embedding)
    for name, runs in entries.items():
        values = of_seed[name]
        patients = _codes(runs[0]["figures"][where][embedding]["patients"])
        mean = patient_bootstrap(torch.as_tensor(np.mean(list(values.values()), axis=0)), patients)
        by_seed = np.array([value.mean(axis=0) for value in values.values()])
        facts: dict[str, Any] = {
            "seeds": sorted(values),
            "queries": len(patients),
            "patients": int(patients.max()) + 1,
            "seconds": float(np.mean([run["seconds"] for run in runs])),
            "share_to_equal_map": shares.get(name),
            "figures": {
                column: {
                    "value": float(mean.mean[i]),
                    "low": float(mean.low[i]),
                    "high": float(mean.high[i]),
                    "spread_over_seeds": float(by_seed[:, i].std(ddof=1)) if len(by_seed) > 1 else None,
                }
                for i, column in enumerate(NAMES)
            },
            "macro_recall_at_8": float(np.mean([r["figures"][where][embedding]["macro_recall_at_8"] for r in runs])),
            "macro_map": float(np.mean([run["figures"][where][embedding]["macro_map"] for run in runs])),
        }
        both = sorted(set(values) & set(ours))
        if name != OURS and both:
            own_SQM, theirs_SQM = (np.stack([of[seed] for seed in both]) for of in (ours, values))
            facts["ccloss_minus_this"] = _apart(own_SQM, theirs_SQM, patients)
        found[name] = facts
    return found


def _apart(own_SQM: np.ndarray, theirs_SQM: np.ndarray, patients: Tensor) -> dict[str, Any]:
    """Differences with what patients and seeds leave open; with one seed nobody knows what another would have given."""
    own_QM, theirs_QM = (torch.as_tensor(values.mean(axis=0)) for values in (own_SQM, theirs_SQM))
    over_patients = paired_difference(own_QM, theirs_QM, patients)
    seeds, by_seed_SM = len(own_SQM), (own_SQM - theirs_SQM).mean(axis=1)
    people = int(patients.max()) + 1
    found = {}
    for i, column in enumerate(NAMES):
        difference = float(over_patients.mean[i])
        facts: dict[str, Any] = {"difference": difference, "by_seed": by_seed_SM[:, i].round(5).tolist()}
        if seeds > 1:
            spread = float(by_seed_SM[:, i].std(ddof=1))
            parts = [(float(over_patients.standard_error[i]) ** 2, people), (spread**2 / seeds, seeds)]
            error = math.sqrt(sum(variance for variance, _ in parts))
            freedom = error**4 / sum(variance**2 / (count - 1) for variance, count in parts) if error else math.inf
            reach = float(student_t.ppf(0.975, freedom)) * error
            facts |= {"low": difference - reach, "high": difference + reach, "spread_over_seeds": spread}
            facts["detectable"] = reach + float(student_t.ppf(0.8, freedom)) * error
        found[column] = facts
    return found


def _codes(patients: list[int]) -> Tensor:
    return torch.as_tensor(np.unique(patients, return_inverse=True)[1])


def time_to_equal(entries: dict[str, list[dict[str, Any]]], embedding: str) -> dict[str, float | None]:
    """Share of the steps after which the validation mAP of a loss, mean over the seeds that all have, stays above the
    end of cross-entropy only; None where it does not end there. Up to `START` all losses are one."""
    seeds = set.intersection(*({run["seed"] for run in runs} for runs in entries.values()))
    curves = {
        name: np.mean(
            [[(look["share"], look[embedding]) for look in run["curve"]] for run in runs if run["seed"] in seeds],
            axis=0,
        )
        for name, runs in entries.items()
    }
    if ALONE not in curves or not seeds:
        return {}
    goal = curves[ALONE][-1, 1]
    found: dict[str, float | None] = {}
    for name, looks in curves.items():
        below = [n for n, value in enumerate(looks[:, 1]) if value < goal]
        first = below[-1] + 1 if below else 0
        found[name] = float(looks[first, 0]) if first < len(looks) else None
    return found


def _percent(cell: dict[str, float], name: str = "value") -> str:
    return f"{100 * cell[name]:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"


def _difference(cell: dict[str, float]) -> str:
    if "low" not in cell:
        return f"{100 * cell['difference']:+.1f} (one seed)"
    return f"{_percent(cell, 'difference')}; {100 * cell['detectable']:.1f}"


def show(found: dict[str, Any], title: str) -> None:
    figures, differences = [], []
    for name, facts in found.items():
        cells, reached = facts["figures"], facts["share_to_equal_map"]
        figures.append(
            [
                *(name, len(facts["seeds"]), f"{facts['seconds']:.0f}"),
                *(f"{100 * cells[f'Recall@{cutoff}']['value']:.1f}" for cutoff in CUTOFFS),
                f"{100 * facts['macro_recall_at_8']:.1f}",
                *(_percent(cells[column]) for column in ("precision@8", "mAP")),
                f"{100 * cells['nDCG@8']['value']:.1f}",
                "-" if reached is None else f"{reached:.2f}",
            ]
        )
        if apart := facts.get("ccloss_minus_this"):
            differences.append([name, *(_difference(apart[column]) for column in COMPARED)])
    recalls = [f"R@{cutoff}" for cutoff in CUTOFFS]
    show_table(
        title,
        ["loss", "seeds", "seconds", *recalls, "macro R@8", "precision@8", "mAP", "nDCG@8", "share to equal mAP"],
        figures,
    )
    if differences:
        show_table(
            f"{OURS} minus the other: difference [interval]; what could have been detected",
            ["loss", *COMPARED],
            differences,
        )


def claims(found: dict[str, Any], where: str, embedding: str, steps: int) -> list[Claim]:
    """Ahead of all: CCLoss against the loss that is best in each figure, over the seeds that both have.

    It holds where the interval of the difference does, which one seed has none of.
    """
    made = []
    for column in ("precision@8", "mAP", "Recall@8"):
        others = {name: facts for name, facts in found.items() if "ccloss_minus_this" in facts}
        if not others:
            continue
        best = min(others, key=lambda name: others[name]["ccloss_minus_this"][column]["difference"])
        ours, apart = found[OURS]["figures"][column]["value"], others[best]["ccloss_minus_this"][column]
        claim = Claim.of(
            f"{column} of CCLoss, {embedding}, {where}, {steps:,} steps a run",
            f"{best}, the best of {len(others)} others",
            1.0,
            [ours / (ours - difference) for difference in apart["by_seed"]],
            ours=100 * ours,
            difference=100 * apart["difference"],
        )
        made.append(replace(claim, holds=apart.get("low", -1.0) > 0.0))
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", help="archive to train on and to judge by its test patients")
    parser.add_argument("--also", action="append", default=[], help="archive of other patients, to judge only")
    parser.add_argument("--phantoms", type=int, help="draw so many phantoms and use them as the archive")
    parser.add_argument("--learner", choices=LEARNERS, default=SMALL, help=f"network to train (default {SMALL})")
    parser.add_argument("--name", help="folder of the results; default: nih or phantoms")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=5.0, help="budget of one run (default 5)")
    budget.add_argument("--steps", type=int, help="budget of one run in optimizer steps instead")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each loss (default 3)")
    parser.add_argument("--only", action="append", default=[], help="run this loss only (may be repeated)")
    options = parser.parse_args(arguments)
    if bool(options.archive) == bool(options.phantoms):
        parser.error("give --archive or --phantoms")
    known = list(rivals(SETTINGS, 0))
    if unknown := set(options.only) - set(known):
        parser.error(f"unknown loss {min(unknown)!r}; one of: {', '.join(known)}")
    folder = OUT / (options.name or ("phantoms" if options.phantoms else "nih"))
    if options.phantoms:
        start_ray()
        options.archive = phantom_archive(options.phantoms, SIDE)
    corpora = prepared([options.archive, *options.also], SIDE, PHANTOM_SHARES if options.phantoms else {})
    asked = {"minutes": options.minutes} if options.steps is None else {"steps": options.steps}
    run_all(folder, corpora, options.learner, options.only or known, options.seeds, asked)
    report(folder)


def report(folder: Path) -> None:
    """Tables of what is there, `summary.json` beside the runs, and the claim."""
    entries = read_entries(folder)
    first = next(iter(entries.values()))[0]
    places = list(first["figures"])
    summary, made = {}, []
    for where in places:
        for embedding in EVALUATED:
            found = compared(entries, where, embedding)
            summary[f"{where}/{embedding}"] = found
            show(found, f"{where}, embedding {embedding}")
            if embedding == EVALUATED[0]:
                made += claims(found, where, embedding, first["steps"])
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    say(f"written: {folder}")
    publish(f"losses-{folder.name}", made)


if __name__ == "__main__":
    main()
