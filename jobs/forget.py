"""Remove patients: from now on no search shows them, and no corpus or index is made with them.

  python -m jobs.forget PATIENT... --config FILE corpus.archive=DIR publish.to=URI
  python -m jobs.index --config FILE ...                  then build without them, with the same model if you like
  python -m jobs.publish --config FILE ...                and put the new version in front
  python -m jobs.versions gc --purge --delete --index URI workspace=DIR      then delete what still holds them

PATIENT is the name that the archive gives. Needs no cluster. Servers see it when they look next
(`serve.poll_seconds`). The archive itself is not touched: what lies there is left out wherever it is prepared.
"""

import argparse

from cxr_retrieval import command, console
from cxr_retrieval.config import Settings
from cxr_retrieval.errors import UserError
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.tombstones import remove
from jobs.publish import destination


def run(settings: Settings, options: argparse.Namespace) -> None:
    if not options.rest:
        raise UserError("whom to forget? Name patients as the archive does: python -m jobs.forget PATIENT...")
    pseudonyms = Pseudonyms.of(settings.privacy)
    places = [settings.workspace, destination(settings)]
    rows = []
    for patient in options.rest:
        name = pseudonyms.name("patient", patient)
        # Where people search first: a kill between the two leaves nobody visible.
        put = [remove(place, name) for place in reversed(places)]
        rows.append([patient, "removed" if any(put) else "removed before"])
    console.show_table(f"Removed from {places[0]} and {places[1]}", ["patient", "state"], rows)
    console.say("their images are still stored: build and publish an index, then jobs.versions gc --purge (see --help)")


def plan(settings: Settings, options: argparse.Namespace) -> None:
    console.show_table(
        "Plan of forget",
        ["patients", "no more in workspace", "no more found in"],
        [[len(options.rest), settings.workspace, destination(settings)]],
    )


if __name__ == "__main__":
    command.run("forget", __doc__, run, plan, words="patient", on_cluster=False, writes=("workspace", "publish.to"))
