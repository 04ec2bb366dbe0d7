"""What is published, and what happens to it: list, verify, promote, roll back, drop, collect.

  python -m jobs.versions list --index URI
  python -m jobs.versions verify --index URI@VERSION
  python -m jobs.versions promote VERSION --index URI@alias workspace=DIR      refused when its figures are worse
  python -m jobs.versions rollback --index URI@alias                           to the version served before
  python -m jobs.versions drop VERSION --index URI                             its manifest; gc takes the rest
  python -m jobs.versions gc --index URI --delete                              objects that no version names
  python -m jobs.versions gc --purge --delete --index URI --config FILE        what holds patients who were removed

Needs no cluster. `promote` compares precision@8 and mAP of both versions by the evaluations in the workspace, those of
`jobs.evaluate`; `--without-gate` does not. `gc` only says what it would delete unless it is told `--delete`; with
`--purge` these are versions and everything in the workspace that hold patients whom `jobs.forget` has removed; it needs
the privacy key that they were removed under, so give it the same settings. In a bucket that keeps versions, a purge
deletes all of what it deletes; plain `gc` and `drop` leave them.
"""

import argparse
import json
from collections.abc import Callable

from cxr_retrieval import artifacts, command, console, storage
from cxr_retrieval.assessment import EVALUATION_FILE, KIND
from cxr_retrieval.config import Settings
from cxr_retrieval.embedding.stream import embeddings_id
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.aliases import list_aliases, listing
from cxr_retrieval.index.lifecycle import (
    Evaluations,
    Figure,
    Moved,
    collect,
    drop_version,
    embedded_by,
    garbage,
    promote,
    rollback,
)
from cxr_retrieval.index.removal import published_holdings, published_in, purge, under_other_keys, workspace_holdings
from cxr_retrieval.index.versions import Version, list_versions, resolve, split_reference, verify
from cxr_retrieval.tombstones import NO_TOMBSTONES, RemovedPatients

EVALUATED_GALLERY = "all"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", required=True, metavar="URI[@NAME]", help="published index, and an alias or version")
    parser.add_argument("--without-gate", action="store_true", help="promote whatever the figures are")
    parser.add_argument("--delete", action="store_true", help="gc: delete, instead of saying what would be deleted")
    parser.add_argument("--purge", action="store_true", help="gc: what still holds patients who were removed")
    parser.add_argument("--grace-days", type=float, default=30.0, help="gc: spare objects younger than this (30)")


def run(settings: Settings, options: argparse.Namespace) -> None:
    to, name = split_reference(options.index)
    verbs: dict[str, tuple[int, Callable[..., None]]] = {
        "list": (0, lambda: show_versions(to)),
        "verify": (0, lambda: show_problems(to, name)),
        "promote": (
            1,
            lambda version: show_moved(
                to, promote(to, version, name, None if options.without_gate else evaluations_in(settings.workspace))
            ),
        ),
        "rollback": (0, lambda: show_moved(to, rollback(to, name))),
        "drop": (1, lambda version: show_dropped(to, *drop_version(to, version))),
        "gc": (
            0,
            lambda: (
                show_purged(settings, to, options.delete)
                if options.purge
                else show_garbage(to, options.grace_days, options.delete)
            ),
        ),
    }
    verb, *words = options.rest or [""]
    if verb not in verbs:
        raise UserError(f"cannot do {verb!r}: one of {', '.join(verbs)}")
    wanted, act = verbs[verb]
    if len(words) != wanted:
        raise UserError(f"{verb} takes {'one version' if wanted else 'no version'}: see --help")
    act(*words)


def show_versions(to: str) -> None:
    aliases = list_aliases(to)
    rows: list[list[object]] = []
    for version in list_versions(to):
        served = ", ".join(name for name, alias in sorted(aliases.items()) if alias.version == version)
        try:
            found = resolve(to, version)
        except UserError as error:  # damaged, or dropped meanwhile
            rows.append([version, served, "-", str(error), "-", "-"])
            continue
        counts = found.facts["counts"]
        rows.append(
            [version, served, f"{counts['indexed']:,}", found.facts["factory"], len(found.objects), found.bytes]
        )
    console.show_table(to, ["version", "aliases", "rows", "index", "objects", "bytes"], rows)


def show_problems(to: str, name: str) -> None:
    """Raises UserError where an object is missing or damaged."""
    if problems := verify(to, name):
        raise UserError("; ".join(problems))
    console.say(f"{to}@{name}: every object is there and hashes to its name")


def show_moved(to: str, moved: Moved) -> None:
    if not moved.moved:
        console.say(f"{to}@{moved.alias} serves version {moved.version} already")
        return
    if moved.compared:
        console.show_table(
            "What the gate let pass: figures in percent, with 95% intervals over patients",
            ["judged on", "figure", f"{moved.version}, serves now", f"{moved.before}, before"],
            [[each.judged_on, each.name, _percent(each.ours), _percent(each.theirs)] for each in moved.compared],
        )
    instead = f", not {moved.before}" if moved.before else ""
    console.say(f"{to}@{moved.alias} serves version {moved.version} now (generation {moved.generation}){instead}")


def _percent(figure: Figure) -> str:
    return f"{100 * figure.value:.1f} [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"


def show_dropped(to: str, dropped: str, unmoored: list[str]) -> None:
    console.say(f"{to}: version {dropped} is dropped; gc takes the objects that only it named")
    for alias in unmoored:
        console.say(f"{to}@{alias} was to roll back to it, and has nothing to roll back to until it is moved again")


def show_garbage(to: str, grace_days: float, delete: bool) -> None:
    found = collect(to, grace_days) if delete else garbage(to, grace_days)
    rows = [[each.path, each.size, f"{each.days:.1f}"] for each in found]
    console.show_table("Deleted" if delete else "Would be deleted by --delete", ["object", "bytes", "days old"], rows)


def show_purged(settings: Settings, to: str, delete: bool) -> None:
    """What holds removed patients where an index is published and in the workspace; deleted, if so told. Other indexes
    of the workspace that hold them are named."""
    to = storage.canonical(to)
    indexes = published_in(settings.workspace)
    removed = RemovedPatients.of(settings.workspace, settings.privacy)
    found = {
        to: published_holdings(to, removed.tombstones if to in indexes else NO_TOMBSTONES),
        settings.workspace: workspace_holdings(settings.workspace, removed),
    }
    keeping = {storage.versioned_bucket(place) for place in found if delete}  # before anything is deleted
    if delete:
        found = {place: purge(holdings) for place, holdings in found.items()}
    rows = [
        [place, len(holdings.versions), len(holdings.artifacts), len(holdings.files), holdings.bytes]
        for place, holdings in found.items()
    ]
    title = "Purged of removed patients" if delete else "Holds removed patients; would be deleted by --delete"
    console.show_table(title, ["where", "versions", "artifacts", "files", "bytes"], rows)
    learnt = [uri for holdings in found.values() for uri in holdings.learnt]
    if learnt:
        console.say(f"stays, learnt from their images among others; training anew removes it: {', '.join(learnt)}")
    for bucket in sorted(filter(None, keeping)):
        console.say(
            f"{bucket}: the bucket keeps old versions: none is left of what is purged now, but what gc or drop deleted"
            " before, or was overwritten, stays readable until a lifecycle rule (NoncurrentVersionExpiration) or the"
            " bucket's owner deletes it"
        )
    if unfinished := {file.uri for holdings in found.values() for file in holdings.unfinished}:
        console.say(f"stay, somebody may be writing them: {len(unfinished):,} half-written files; purge again in a day")
    if any(holdings.versions or holdings.artifacts for holdings in found.values()):
        console.say(
            "copies that readers, and machines that built from S3, have fetched stay in their caches (CXR_CACHE) until"
            " they are deleted there"
        )
    for other in indexes:
        if other != to and (holding := published_holdings(other, removed.tombstones).versions):
            console.say(
                f"{other}: {len(holding)} published versions hold removed patients too, and stay: do the same with"
                f" --index {other}"
            )
    for place in dict.fromkeys([to, *indexes]) if removed.tombstones else ():
        if others := under_other_keys(place, removed.pseudonyms):
            console.say(
                f"{place}: not looked into, built under another privacy key, and may hold removed patients: versions"
                f" {', '.join(others)}; publish one of this key, then jobs.versions drop each of these"
            )


def evaluations_in(workspace: str) -> Callable[[Version], Evaluations]:
    """The evaluations in a workspace of the embedding that a version holds.

    What an evaluation was of is told by its input, the embeddings, which know their model by its bytes.
    """
    folder = storage.join(workspace, "reports", "evaluation")

    def evaluations(version: Version) -> Evaluations:
        model, embedding = embedded_by(version)
        found: dict[str, dict[str, Figure]] = {}
        for path in listing(folder):
            if path.rpartition("/")[2] != artifacts.MANIFEST:
                continue  # only what is finished
            evaluation = artifacts.load(storage.parent(storage.join(folder, path)), KIND)
            figures = json.loads(evaluation.read(EVALUATION_FILE))
            if evaluation.manifest["inputs"] != [embeddings_id(model, figures["corpus"])]:
                continue  # of another model, though it may be of the same settings
            cells = figures["embeddings"][embedding][EVALUATED_GALLERY]
            chosen = {"precision@8": cells["precision_at"]["8"], "mAP": cells["map"]}
            if any(cell["low"] is None for cell in chosen.values()):
                continue  # too few patients for an interval decide nothing
            judged_on = ", ".join(
                [f"the {figures['split']} patients of corpus {figures['corpus']}", *figures.get("drawn", [])]
            )
            found[judged_on] = {name: Figure(cell["value"], cell["low"], cell["high"]) for name, cell in chosen.items()}
        return found

    return evaluations


def plan(_: Settings, options: argparse.Namespace) -> None:
    """Nothing here is long: what is there is what there is to plan with."""
    show_versions(split_reference(options.index)[0])


if __name__ == "__main__":
    command.run("versions", __doc__, run, plan, arguments, words="verb", on_cluster=False, writes=())
