"""What is finished, running or failed in a workspace, how far it is and how fast, from any terminal.

  python -m jobs.status workspace=DIR
  python -m jobs.status workspace=s3://bucket/prefix --json

A step that is silent has not been heard of for a minute: its driver was killed, or its machine is gone. The same
command again goes on from where it stopped.
"""

import argparse
import json
from dataclasses import asdict

from cxr_retrieval import command, console
from cxr_retrieval.config import Settings
from cxr_retrieval.errors import UserError
from cxr_retrieval.progress import Status, statuses

STUCK_S = 600.0  # longer than any unit of work should take


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the states as JSON")


def run(settings: Settings, options: argparse.Namespace) -> None:
    found = list(statuses(settings.workspace))
    if options.json:
        console.out.print_json(json.dumps([{"state": status.state(), **asdict(status)} for status in found]))
        return
    if not found:
        raise UserError(f"{settings.workspace}: no job has worked in this workspace yet; check workspace=")
    console.show_table(
        settings.workspace,
        ["step", "state", "done", "of", "unit", "a second", "took", "left", "what is known"],
        [_row(status) for status in found],
    )


def _row(status: Status) -> list[object]:
    state = status.state()
    known = status.error if state == "failed" else status.note
    if state == "silent":
        known = f"nothing heard for {_span(status.silent_for())}: run the same command again, it goes on"
    elif state == "running" and status.stuck_for() > STUCK_S:
        known = f"nothing has moved for {_span(status.stuck_for())}: look at the job's log"
    left = _span(status.seconds_left) if state == "running" and status.seconds_left is not None else ""
    return [
        status.step,
        state,
        f"{status.done:,}",
        f"{status.total:,}",
        status.unit,
        f"{status.rate:,.1f}",
        _span(status.seconds),
        left,
        known or status.uri,
    ]


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def plan(settings: Settings, options: argparse.Namespace) -> None:
    run(settings, options)  # it changes nothing


if __name__ == "__main__":
    command.run("status", __doc__, run, plan, arguments, writes=())
