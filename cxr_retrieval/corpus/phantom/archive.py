"""Writing a phantom archive in NIH ChestX-ray14's own file layout, drawn in parallel by Ray Data.

Patients are drawn in groups, each group by one task; the label table goes in last, so an archive that has one is whole.
"""

import json
from dataclasses import dataclass

import cv2
import ray

from cxr_retrieval import storage
from cxr_retrieval.config import PhantomSettings
from cxr_retrieval.console import Meter
from cxr_retrieval.corpus.archive import PHANTOM_PLAN
from cxr_retrieval.corpus.phantom.cohort import film_count
from cxr_retrieval.corpus.phantom.radiographs import (
    bbox_header,
    bbox_rows,
    data_entry_header,
    data_entry_row,
    draw_patient,
    patients_for,
)
from cxr_retrieval.errors import UserError

IMAGES = "images"
TABLE_FILE, BOXES_FILE = "Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"
PATIENTS_AT_ONCE = 8


@dataclass(frozen=True)
class PhantomArchive:
    """Where the archive is and how many images and patients it has."""

    uri: str
    images: int
    patients: int


def write_phantom_archive(settings: PhantomSettings) -> tuple[PhantomArchive, bool]:
    """Draw the archive at `phantom.out`, and say whether anything had to be done.

    The same settings give the same bytes. Raises UserError where other phantoms, or other files, stand there.
    """
    if settings.out is None:
        raise UserError("phantom.out is not set: give the folder or s3:// prefix that the archive is written to")
    uri = storage.canonical(settings.out)
    patients = patients_for(settings.images, settings.seed)
    archive = PhantomArchive(uri, settings.images, len(patients))
    wanted = json.dumps(settings.model_dump(exclude={"out"}), sort_keys=True).encode()
    plan, whole = storage.read_tagged(storage.join(uri, PHANTOM_PLAN)), storage.exists(storage.join(uri, TABLE_FILE))
    if plan is None and _holds_files(uri):
        raise UserError(f"{uri} holds files that are not of phantoms: choose another phantom.out")
    if plan is not None and plan[0] != wanted:
        raise UserError(f"{uri} holds phantoms of other settings: choose another phantom.out")
    if whole:
        return archive, False
    storage.write_bytes(storage.join(uri, PHANTOM_PLAN), wanted)
    surplus = sum(film_count(patient, settings.seed) for patient in patients) - settings.images
    tasks = [
        {
            "patients": patients[start : start + PATIENTS_AT_ONCE],
            "uri": uri,
            "seed": settings.seed,
            "size": settings.size,
        }
        for start in range(0, len(patients), PATIENTS_AT_ONCE)
    ]
    tasks[-1]["surplus"] = surplus
    rows: list[str] = []
    boxes: list[str] = []
    with Meter("draw", settings.images) as meter:
        drawn = ray.data.from_items([{"task": json.dumps(task)} for task in tasks], override_num_blocks=len(tasks))
        for result in drawn.map(_draw).iter_rows():
            group = json.loads(result["rows"])
            if "error" in group:
                raise UserError(group["error"])
            storage.add_retries(group["retries"])
            rows += group["rows"]
            boxes += group["boxes"]
            meter.advance(len(group["rows"]))
    storage.write_bytes(storage.join(uri, BOXES_FILE), _csv([bbox_header(), *sorted(boxes)]))
    storage.write_bytes(storage.join(uri, TABLE_FILE), _csv([data_entry_header(), *sorted(rows)]))
    return archive, True


def _holds_files(uri: str) -> bool:
    try:
        return next(storage.list_files(uri), None) is not None
    except FileNotFoundError:
        return False


def _draw(item: dict[str, str]) -> dict[str, str]:
    """Draw a group of patients and store their films, without the last patient's surplus. Runs in a Ray Data task."""
    cv2.setNumThreads(1)  # tasks run side by side, one a core
    before = storage.retries()
    task = json.loads(item["task"])
    images = [image for patient in task["patients"] for image in draw_patient(patient, task["seed"], task["size"])]
    images = images[: len(images) - task.get("surplus", 0)]
    try:
        for image in images:
            done, data = cv2.imencode(".png", image.pixels)
            assert done, "an 8-bit grey image always encodes"
            storage.write_bytes(storage.join(task["uri"], IMAGES, image.image_id), bytes(data))
    except UserError as error:  # returned: Ray Data keeps the text of what is raised, and loses what it was
        return {"rows": json.dumps({"error": str(error)})}
    boxes = [line for image in images for line in bbox_rows(image)]
    rows = [data_entry_row(image) for image in images]
    return {"rows": json.dumps({"rows": rows, "boxes": boxes, "retries": storage.retries() - before})}


def _csv(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()
