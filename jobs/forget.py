"""Remove patients: from now on no search shows them, and no corpus or index is made with them.

  python -m jobs.forget PATIENT... --config FILE corpus.archive=DIR publish.to=URI
  python -m jobs.index --config FILE ...                  then build without them, with the same model if you like
  python -m jobs.publish --config FILE ...                and put the new version in front
  python -m jobs.versions gc --purge --delete --index URI --config FILE      then delete what still holds them

PATIENT is the name that the archive gives (`--patient NAME` where it has a `=`); a name that no image has is refused,
unless told `--anyway`: that is for a patient whose images are yet to come. Needs no cluster. Servers see it when they
look next (`serve.poll_seconds`). The archive itself is not touched: what it has of them is left out wherever it is
prepared.

Removed are they from the workspace, from every index that is published in it, and from the one that `publish.to` names.
An index that is published elsewhere goes on showing them until it is named too: once more, with its own `publish.to=`.

All of this goes by the privacy key: under another one than the workspace's patients were removed under it is refused,
and versions that were built under another one are named, since they may go on showing them.
"""

import argparse
import itertools

from cxr_retrieval import command, console
from cxr_retrieval.config import Settings
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.removal import images_of, listed_images, published_in, shared_images, under_other_keys
from cxr_retrieval.index.versions import list_versions
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.tombstones import RemovedPatients, Tombstones, remove
from jobs.publish import destination


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--patient", action="append", default=[], metavar="NAME", help="a patient whose name has a =; repeatable"
    )
    parser.add_argument("--anyway", action="store_true", help="also patients of whom there is no image, or not yet")


def patients_of(options: argparse.Namespace) -> list[str]:
    """Whom the command line names."""
    return [*options.rest, *options.patient]


def run(settings: Settings, options: argparse.Namespace) -> None:
    if not (patients := patients_of(options)):
        raise UserError("whom to forget? Name patients as the archive does: python -m jobs.forget PATIENT...")
    pseudonyms = Pseudonyms.of(settings.privacy)
    RemovedPatients.of(settings.workspace, settings.privacy)  # refuses another key
    indexes = indexes_of(settings)
    places = [*indexes, settings.workspace]  # where people search first: a kill in between leaves fewer visible
    listed = listed_images(patients, settings.workspace)
    images, damaged = images_of(listed, indexes, pseudonyms)
    stones = [Tombstones.at(place) for place in places]
    for patient, theirs in images.items():
        known = theirs or any(pseudonyms.name("patient", patient) in there for there in stones)
        if not (known or damaged or options.anyway):
            raise UserError(
                f"patient {patient!r} has no image in {' or '.join(reversed(places))}, so nobody was removed: give the"
                " name that the archive gives, or --anyway for a patient whose images are yet to come"
            )
    rows = []
    for patient, theirs in images.items():
        put = [remove(place, patient, pseudonyms) for place in places]
        rows.append([patient, "removed" if any(put) else "removed before", f"hides {len(theirs):,} images"])
    # A publish to a new place takes the tombstones along before its version is seen, unless it did so before
    # they lay there: then the version is there by now.
    late = [place for place in indexes_of(settings) if place not in indexes]
    for place, patient in itertools.product(late, images):
        remove(place, patient, pseudonyms)
    console.show_table(f"Removed from {settings.workspace}", ["patient", "state", "images"], rows)
    for place in [*indexes, *late]:
        console.say(f"{place}: {_shown(place, pseudonyms)}")
    if shared := shared_images(listed, settings.workspace):
        console.say(
            f"{len(shared):,} of their images have the pixels of an image of somebody else, which stays: if that is the"
            f" same person, forget that name too; {min(shared.values())} names both images"
        )
    for text in damaged:
        console.say(f"not looked into: {text}")
    console.say("their images are still stored: build and publish an index, then jobs.versions gc --purge (see --help)")


def _shown(place: str, pseudonyms: Pseudonyms) -> str:
    """What of the patients is shown where an index is published, after they were marked there."""
    versions = len(list_versions(place))
    if not versions:
        return "marked, but nothing is published there: name an index published elsewhere by publish.to="
    if others := under_other_keys(place, pseudonyms):
        return (
            f"marked, but versions built under another privacy key may go on showing them: {', '.join(others)}; publish"
            " one of this key, then jobs.versions drop each of these"
        )
    return f"marked; of the {versions:,} versions published there none shows them"


def indexes_of(settings: Settings) -> list[str]:
    """Where indexes are published that have to be marked: where the settings say, and all those in the workspace."""
    return list(dict.fromkeys([destination(settings), *published_in(settings.workspace)]))


def plan(settings: Settings, options: argparse.Namespace) -> None:
    console.show_table(
        "Plan of forget",
        ["patients", "no more in"],
        [[len(patients_of(options)), place] for place in (settings.workspace, *indexes_of(settings))],
    )


if __name__ == "__main__":
    command.run(
        "forget", __doc__, run, plan, arguments, words="patient", on_cluster=False, writes=("workspace", "publish.to")
    )
