"""CCLoss against the losses that it is compared with: one network, one budget, several seeds, paired over patients.

  python -m benchmarks.losses --archive DIR [--also DIR]
  python -m benchmarks.losses --phantoms 16000

Every run of a loss and a seed trains for `--minutes` and leaves one JSON in `docs/results/losses/NAME`; two run side by
side on a core each (one on a GPU). Run again, it does only what is missing, and compares what is there.

`--archive` is split by patient: it is trained on, and its test patients are one of the sets that are judged. `--also`
is another archive, all of whose patients are judged only. Figures are of the gallery *all*, means over seeds; intervals
are over patients (of the mean over seeds), `detectable` is the difference that 80% of such comparisons would find.
"""

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from benchmarks import contest
from benchmarks.archive import phantom_archive
from benchmarks.claim import RESULTS, Claim, machine, publish
from benchmarks.contest import CUTOFFS, EVALUATED, Centred, Nothing, Paired, Proxied, Rival
from cxr_retrieval.config import CorpusSettings, LossSettings
from cxr_retrieval.console import Meter, say, show_table
from cxr_retrieval.corpus.preparation import prepare
from cxr_retrieval.corpus.reading import Corpus
from cxr_retrieval.corpus.splits import TEST, TRAIN, VALIDATION
from cxr_retrieval.evaluation.intervals import detectable_difference, paired_difference, patient_bootstrap
from cxr_retrieval.losses import baselines
from cxr_retrieval.runtime import start_ray

OURS, ALONE = "CCLoss", "cross-entropy only"
SIDE = 128
OUT = Path(__file__).parents[1] / "docs" / "results" / "losses"
Maker = Callable[[int, torch.device], Rival]


def rivals(settings: LossSettings, seed: int) -> dict[str, Maker]:
    """Every loss by its name.

    Weights beside the cross-entropy: CCLoss 0.1, and for the others what gives their gradient the same length on random
    embeddings of the training labels (root mean square over batches; docs/experiments.md).
    """

    def centred(classes: int, device: torch.device) -> Rival:
        return Centred(0.1, classes, seed, settings.centre_rate, device)

    def paired(weight: float, loss: Callable[[Tensor, Tensor], Tensor]) -> Maker:
        return lambda *_: Paired(weight, loss)

    return {
        OURS: centred,
        ALONE: lambda *_: Nothing(),
        "all pairs": paired(0.1, partial(baselines.pair_contrast, margin=1.4)),
        "semi-hard triplets": paired(0.25, baselines.semi_hard_triplets),
        "multi-similarity": paired(0.55, baselines.multi_similarity),
        "supervised contrastive": paired(0.1, partial(baselines.supervised_contrast, temperature=0.5)),
        "proxy-anchor": lambda classes, _: Proxied(0.004, baselines.ProxyAnchor, classes),
        "multi-label proxies": lambda classes, _: Proxied(0.02, baselines.MultiLabelProxies, classes),
    }


def prepared(archives: list[str], size: int) -> list[Corpus]:
    """The archives as corpora under benchmarks/results: the first split by patient, the others all test."""
    start_ray()
    found = []
    for number, archive in enumerate(archives):
        split: Any = "all_test" if number else "hash"
        corpus = CorpusSettings(archive=archive, name=f"losses-{number}", size=size, split=split)
        found.append(Corpus(prepare(corpus, str(RESULTS / "losses"))[0]))
    ray.shutdown()
    return found


_loaded: dict[str, Any] = {}


def _load(uris: list[str]) -> None:
    """What every run of a process uses; on a CPU each has one thread."""
    torch.set_num_threads(1)
    first, *others = [Corpus.open(uri) for uri in uris]
    _loaded["train"] = contest.read_images([first], TRAIN)
    _loaded["judged"] = {
        "validation": contest.read_images([first], VALIDATION),
        "test": contest.read_images([first], TEST),
    }
    if others:
        _loaded["judged"]["other"] = contest.read_images(others, TEST)
    _loaded["recipe"] = first.recipe


def _run(name: str, seed: int, minutes: float, out: str) -> None:
    settings = LossSettings()
    entry = contest.run(
        rivals(settings, seed)[name], settings, seed, minutes, _loaded["train"], _loaded["judged"], _loaded["recipe"]
    )
    facts = {"loss": name, "seed": seed, "minutes": minutes, "machine": machine()} | asdict(entry)
    waiting = Path(out + ".part")
    waiting.write_text(json.dumps(facts, separators=(",", ":")) + "\n")
    waiting.replace(out)


def file_of(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(' ', '_')}-{seed}.json"


def run_all(folder: Path, corpora: list[Corpus], names: list[str], seeds: int, minutes: float) -> None:
    """Run what is missing, seed by seed, so that what is there early can be compared."""
    wanted = [(name, seed) for seed in range(seeds) for name in names]
    left = [(name, seed) for name, seed in wanted if not file_of(folder, name, seed).exists()]
    folder.mkdir(parents=True, exist_ok=True)
    at_once = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    uris = [corpus.artifact.uri for corpus in corpora]
    with (
        ProcessPoolExecutor(at_once, get_context("spawn"), _load, (uris,)) as pool,
        Meter("losses", len(wanted), "runs") as meter,
    ):
        meter.advance(len(wanted) - len(left))
        waiting = {
            pool.submit(_run, name, seed, minutes, str(file_of(folder, name, seed))): f"{name}, seed {seed}"
            for name, seed in left
        }
        for ended in as_completed(waiting):
            ended.result()
            meter.advance(1, waiting[ended])


def read_entries(folder: Path, minutes: float) -> dict[str, list[dict[str, Any]]]:
    """The runs that are there, by loss, in the order of their seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in rivals(LossSettings(), 0):
        files = sorted(folder.glob(f"{name.replace(' ', '_')}-*.json"))
        entries = [entry for file in files if (entry := json.loads(file.read_text()))["minutes"] == minutes]
        if entries:
            found[name] = entries
    return found


def columns(figures: dict[str, Any]) -> np.ndarray:
    """Recall@2, 4, 6, 8, precision@8, mAP, nDCG@8 of every query, [Q, 7]."""
    recall = np.array([[int(hit) for hit in row] for row in figures["recall"]], float)
    others = [np.array(figures["hits_of_8"]) / 8, np.array(figures["ap"]), np.array(figures["ndcg_at_8"])]
    return np.column_stack([recall, *others])


NAMES = (*(f"Recall@{cutoff}" for cutoff in CUTOFFS), "precision@8", "mAP", "nDCG@8")


def compared(entries: dict[str, list[dict[str, Any]]], where: str, embedding: str) -> dict[str, Any]:
    """Figures of every loss, means over its seeds, and their differences from CCLoss over the seeds that both have."""
    found: dict[str, Any] = {}
    for name, runs in entries.items():
        ours = {run["seed"]: run for run in entries.get(OURS, [])}
        values = {run["seed"]: columns(run["figures"][where][embedding]) for run in runs}
        patients = _codes(runs[0]["figures"][where][embedding]["patients"])
        mean = patient_bootstrap(torch.as_tensor(np.mean(list(values.values()), axis=0)), patients)
        by_seed = np.array([value.mean(axis=0) for value in values.values()])
        facts: dict[str, Any] = {
            "seeds": sorted(values),
            "queries": len(patients),
            "patients": int(patients.max()) + 1,
            "steps": float(np.mean([run["steps"] for run in runs])),
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
            theirs = np.mean([values[seed] for seed in both], axis=0)
            own = np.mean([columns(ours[seed]["figures"][where][embedding]) for seed in both], axis=0)
            apart = paired_difference(torch.as_tensor(own), torch.as_tensor(theirs), patients)
            detectable = detectable_difference(apart.standard_error)
            facts["ccloss_minus_this"] = {
                column: {
                    "difference": float(apart.mean[i]),
                    "low": float(apart.low[i]),
                    "high": float(apart.high[i]),
                    "detectable": float(detectable[i]),
                }
                for i, column in enumerate(NAMES)
            }
        found[name] = facts
    return found


def _codes(patients: list[str]) -> Tensor:
    return torch.as_tensor(np.unique(patients, return_inverse=True)[1])


def time_to_equal(entries: dict[str, list[dict[str, Any]]], embedding: str) -> dict[str, float | None]:
    """Seconds until the validation mAP of a loss, mean over seeds, reaches where cross-entropy alone ends."""
    means = {
        name: np.mean([[(look["seconds"], look[embedding]) for look in run["curve"]] for run in runs], axis=0)
        for name, runs in entries.items()
    }
    if ALONE not in means:
        return {}
    goal = means[ALONE][-1, 1]
    return {name: next((float(s) for s, value in looks if value >= goal), None) for name, looks in means.items()}


def _percent(cell: dict[str, float], name: str = "value") -> str:
    return f"{100 * cell[name]:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"


def show(found: dict[str, Any], title: str, seconds: dict[str, float | None]) -> None:
    figures, differences = [], []
    for name, facts in found.items():
        cells, reached = facts["figures"], seconds.get(name)
        figures.append(
            [
                *(name, len(facts["seeds"]), f"{facts['steps']:.0f}"),
                *(f"{100 * cells[f'Recall@{cutoff}']['value']:.1f}" for cutoff in CUTOFFS),
                f"{100 * facts['macro_recall_at_8']:.1f}",
                *(_percent(cells[column]) for column in ("precision@8", "mAP")),
                f"{100 * cells['nDCG@8']['value']:.1f}",
                "-" if reached is None else f"{reached:.0f}",
            ]
        )
        if apart := facts.get("ccloss_minus_this"):
            columns = [apart[column] for column in ("Recall@8", "precision@8", "mAP")]
            differences.append(
                [name, *(f"{_percent(cell, 'difference')}; {100 * cell['detectable']:.1f}" for cell in columns)]
            )
    recalls = [f"R@{cutoff}" for cutoff in CUTOFFS]
    show_table(
        title,
        ["loss", "seeds", "steps", *recalls, "macro R@8", "precision@8", "mAP", "nDCG@8", "s to equal mAP"],
        figures,
    )
    if differences:
        show_table(
            f"{OURS} minus the other: difference [interval]; what could have been detected",
            ["loss", "Recall@8", "precision@8", "mAP"],
            differences,
        )


def claims(found: dict[str, Any], where: str, embedding: str, minutes: float) -> list[Claim]:
    """Ahead of all: CCLoss over the best of the others, by figure."""
    made = []
    for column in ("precision@8", "mAP", "Recall@8"):
        others = {name: facts["figures"][column]["value"] for name, facts in found.items() if name != OURS}
        if OURS not in found or not others:
            continue
        best = max(others, key=lambda name: others[name])
        ours = found[OURS]["figures"][column]["value"]
        made.append(
            Claim.of(
                f"{column} of CCLoss, {embedding}, {where}, {minutes:g} minutes a run",
                f"{best}, the best of {len(others)} others",
                1.0,
                [ours / others[best]],
                ours=100 * ours,
                best_other=100 * others[best],
            )
        )
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", help="archive to train on and to judge by its test patients")
    parser.add_argument("--also", action="append", default=[], help="archive of other patients, to judge only")
    parser.add_argument("--phantoms", type=int, help="draw so many phantoms and use them as the archive")
    parser.add_argument("--name", help="folder of the results; default: nih or phantoms")
    parser.add_argument("--minutes", type=float, default=5.0, help="budget of one run (default 5)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each loss (default 3)")
    parser.add_argument("--only", action="append", default=[], help="run this loss only (may be repeated)")
    options = parser.parse_args(arguments)
    if bool(options.archive) == bool(options.phantoms):
        parser.error("give --archive or --phantoms")
    known = list(rivals(LossSettings(), 0))
    if unknown := set(options.only) - set(known):
        parser.error(f"unknown loss {min(unknown)!r}; one of: {', '.join(known)}")
    folder = OUT / (options.name or ("phantoms" if options.phantoms else "nih"))
    if options.phantoms:
        start_ray()
        options.archive = phantom_archive(options.phantoms, SIDE)
    corpora = prepared([options.archive, *options.also], SIDE)
    run_all(folder, corpora, options.only or known, options.seeds, options.minutes)
    report(folder, options.minutes)


def report(folder: Path, minutes: float) -> None:
    """Tables of what is there, `summary.json` beside the runs, and the claim."""
    entries = read_entries(folder, minutes)
    places = list(next(iter(entries.values()))[0]["figures"])
    summary, made = {}, []
    for where in places[1:]:  # validation is for looking while training
        for embedding in EVALUATED:
            found = compared(entries, where, embedding)
            summary[f"{where}/{embedding}"] = found
            show(found, f"{where}, embedding {embedding}", time_to_equal(entries, embedding))
            if embedding == EVALUATED[0]:
                made += claims(found, where, embedding, minutes)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    say(f"written: {folder}")
    publish("losses", made)


if __name__ == "__main__":
    main()
