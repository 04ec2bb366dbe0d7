"""What happens to published versions afterwards: promoted behind a gate, rolled back, and collected.

An alias moves by one conditional write, and only what no version names is deleted. Storage has no lock over both, so a
publish that finds an object there and names it while it is being deleted looks once more at its end. What is deleted
even later, `verify` tells, and publishing again mends it.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from cxr_retrieval import storage
from cxr_retrieval.artifacts import content_id
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.aliases import check_alias, known, list_aliases, read_alias
from cxr_retrieval.index.files import MODEL
from cxr_retrieval.index.shards import INDEX_FILE
from cxr_retrieval.index.versions import (
    OBJECTS,
    VERSIONS,
    Version,
    list_versions,
    named_objects,
    named_version,
    put_in_front,
    read_file,
    resolve,
)

GATE_FIGURES = ("precision@8", "mAP")
DAY_S = 86_400.0


@dataclass(frozen=True)
class Figure:
    """A figure of an evaluation with its 95% interval over patients; shares in 0 to 1."""

    value: float
    low: float
    high: float


Evaluations = Mapping[str, Mapping[str, Figure]]
"""What evaluations say of the embedding that a version holds, by what they were judged on (a corpus and a split, since
figures of different ones do not compare) and by name of the figure."""


@dataclass(frozen=True)
class Compared:
    """A figure of a version beside that of the one which served before it, on what both were judged on."""

    judged_on: str
    name: str
    ours: Figure
    theirs: Figure


@dataclass(frozen=True)
class Moved:
    """Where an alias points now; `moved` is False where it pointed there already, `compared` what a gate let pass."""

    alias: str
    version: str
    before: str | None
    generation: int
    moved: bool
    compared: tuple[Compared, ...] = ()


@dataclass(frozen=True)
class Garbage:
    """A stored file that no version names, with its age in days."""

    path: str
    size: int
    days: float


def promote(to: str, name: str, alias: str, evaluations: Callable[[Version], Evaluations] | None) -> Moved:
    """Point `alias` to the version that `name` (an id, or another alias) means.

    Given `evaluations` of a version, one is refused whose precision@8 or mAP lies below the interval of that of the
    version which the alias serves now, on anything that both were judged on. Versions of one model and embedding differ
    in their images only: nothing to judge. Raises UserError for a refusal, where they were judged on nothing in common,
    and as `put_in_front` does.
    """
    to = storage.canonical(to)
    check_alias(alias)
    wanted = resolve(to, name)
    seen = read_alias(to, alias)
    serving = seen[0].version if seen[0] else None
    compared: tuple[Compared, ...] = ()
    if evaluations and serving and serving != wanted.id:
        now = resolve(to, serving)
        if embedded_by(now) != embedded_by(wanted):
            compared = _pass_gate(evaluations(wanted), evaluations(now), wanted.id, serving)
    generation, moved = put_in_front(wanted, alias, *seen)
    return Moved(alias, wanted.id, serving, generation, moved, compared)


def embedded_by(version: Version) -> tuple[str, str]:
    """The content id of the model that a version was embedded by, and the name of its embedding.

    The model counts by its bytes, as for embeddings: trained anew under the same settings it may be another.
    """
    own = [entry for path, entry in version.files.items() if path.startswith(MODEL)]
    model = content_id([replace(entry, path=entry.path.removeprefix(MODEL)) for entry in own])
    return model, json.loads(read_file(version, INDEX_FILE))["embedding"]


def rollback(to: str, alias: str) -> Moved:
    """Point `alias` back to the version that it served before. No gate: going back must always be possible.

    Done twice, it is where it was. Raises UserError where there is no alias or nothing before, and as `put_in_front`
    does.
    """
    to = storage.canonical(to)
    check_alias(alias)
    seen = read_alias(to, alias)
    if seen[0] is None:
        raise UserError(f"{to}: there is no alias {alias!r} to roll back")
    if seen[0].predecessor is None:
        raise UserError(f"{to}: alias {alias!r} has served one version only: there is nothing to roll back to")
    before = resolve(to, seen[0].predecessor)
    generation, moved = put_in_front(before, alias, *seen)
    return Moved(alias, before.id, seen[0].version, generation, moved)


def garbage(to: str, grace_days: float) -> list[Garbage]:
    """Objects that no version names and that are older than `grace_days`: those of publishes that never ended, and what
    of one was half written.

    A publish uploads before it names; the days keep one that is under way from losing what it has uploaded, but not
    what is older and it found there.
    """
    to = storage.canonical(to)
    # Objects first: a version that is written meanwhile is then seen, and what it names is kept.
    found = [(file, (time.time() - file.modified) / DAY_S) for file in _objects(to)]
    named = named_objects(to)
    return [Garbage(f.path, f.size, days) for f, days in found if f.path not in named and days > grace_days]


def collect(to: str, grace_days: float) -> list[Garbage]:
    """Delete what `garbage` finds, but for what a version names by then, and say what it was.

    A version that is written after that last look, of objects that were there, lacks them: its publish says so where it
    ends after they are deleted. Raises UserError where the right to delete is missing.
    """
    to = storage.canonical(to)
    found = garbage(to, grace_days)
    named = named_objects(to)
    found = [each for each in found if each.path not in named]
    for each in found:
        storage.delete(storage.join(to, OBJECTS, each.path))
    return found


def drop_version(to: str, version: str) -> tuple[str, list[str]]:
    """Delete a version's manifest, also a damaged one, so that `collect` takes the objects that only it names.

    Returns its id, and the aliases that would have rolled back to it: they have nothing to roll back to until they are
    moved again. Raises UserError for a version that an alias serves.
    """
    to = storage.canonical(to)
    found = named_version(to, version)
    if found not in list_versions(to):
        raise UserError(f"{to}: there is no version {found}; {known(to)}")
    aliases = list_aliases(to)
    for name, alias in aliases.items():
        if found == alias.version:
            raise UserError(f"{to}: version {found} is in use: alias {name!r} serves it; promote another one first")
    storage.delete(storage.join(to, VERSIONS, f"{found}.json"))
    return found, sorted(name for name, alias in aliases.items() if found == alias.predecessor)


def _objects(to: str) -> Iterator[storage.StoredFile]:
    folder = storage.join(to, OBJECTS)
    try:
        yield from storage.list_files(folder)
    except FileNotFoundError:
        return  # nothing was ever published there
    yield from storage.list_scratch(folder)


def _pass_gate(wanted: Evaluations, serving: Evaluations, wanted_id: str, serving_id: str) -> tuple[Compared, ...]:
    common = sorted(set(wanted) & set(serving))
    if not common:
        raise UserError(
            f"version {wanted_id} was evaluated on {_listed(wanted)}, and {serving_id}, which serves now, on"
            f" {_listed(serving)}: evaluate both models on the same corpus, or promote without the gate"
        )
    compared = tuple(
        Compared(judged_on, name, wanted[judged_on][name], serving[judged_on][name])
        for judged_on in common
        for name in GATE_FIGURES
    )
    for each in compared:
        if each.ours.value < each.theirs.low:
            raise UserError(
                f"version {wanted_id} is refused: its {each.name} on {each.judged_on} is {100 * each.ours.value:.1f},"
                f" below the interval [{100 * each.theirs.low:.1f}, {100 * each.theirs.high:.1f}] of {serving_id},"
                " which serves now"
            )
    return compared


def _listed(evaluations: Evaluations) -> str:
    return ", ".join(sorted(evaluations)) or "nothing"
