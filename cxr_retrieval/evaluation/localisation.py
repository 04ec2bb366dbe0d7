"""Does the crop that the network cuts hold the finding that an annotator boxed?

Boxes and crops are (x, y, width, height) in the same pixels, x and y at the upper left corner.

Shapes: N pairs of one annotated box and one crop.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cxr_retrieval.evaluation.intervals import paired_difference, patient_bootstrap

MEASURES = ("centre_in_crop", "iobb", "iou")


def localise(
    boxes_N4: Tensor,
    crops_N4: Tensor,
    size: float,
    findings_N: Sequence[str],
    patients_N: Tensor,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """How crops meet boxes on images of side `size`, over all boxes and over those of each finding, ready for JSON.

    Every box counts once; intervals are from a bootstrap over the patients (integer codes `[N]`), for whom one may have
    many. Keys, for all boxes and again under `findings` by name: `boxes` and `patients`; `crop_share`, the mean share
    of the image that the crops cover; the `MEASURES` of `crop_hits` of the `crop` and of the `centred_crop` of the same
    size (leaves as `Interval.figures`), and their paired `difference` (leaves as `Interval.differences`).

    Raises `ValueError` for no boxes, other shapes, rectangles without area and crops larger than the image.
    """
    crop, control = crop_hits(boxes_N4, crops_N4), crop_hits(boxes_N4, centred_crop(crops_N4, size))
    crop_NM, control_NM = (torch.stack([hits[name].double() for name in MEASURES], dim=1) for hits in (crop, control))
    share_N = crops_N4[:, 2:].double().prod(dim=1) / size**2

    def table(chosen_N: Tensor) -> dict[str, Any]:
        a, b, patients = crop_NM[chosen_N], control_NM[chosen_N], patients_N[chosen_N]
        cells = {
            "crop": patient_bootstrap(a, patients, draws=draws, seed=seed).figures(),
            "centred_crop": patient_bootstrap(b, patients, draws=draws, seed=seed).figures(),
            "difference": paired_difference(a, b, patients, draws=draws, seed=seed).differences(),
        }
        return {
            "boxes": len(patients),
            "patients": len(patients.unique()),
            "crop_share": float(share_N[chosen_N].mean()),
            **{name: dict(zip(MEASURES, columns, strict=True)) for name, columns in cells.items()},
        }

    each = {
        finding: table(torch.tensor([name == finding for name in findings_N])) for finding in sorted(set(findings_N))
    }
    return table(torch.ones(len(findings_N), dtype=torch.bool)) | {"findings": each}


def crop_hits(boxes_N4: Tensor, crops_N4: Tensor) -> dict[str, Tensor]:
    """How each crop meets its box.

    `centre_in_crop` (bool [N]): the box's centre lies in the crop, edges included. `iobb` (float64 [N], 0 to 1):
    intersection over the area of the *annotated* box, that is the share of the finding that the crop shows. (Wang
    et al. 2017 divide by the predicted box instead; a crop is meant to be larger than a finding, so that would
    measure its size.) `iou` (float64 [N], 0 to 1): intersection over union.

    Raises `ValueError` for other shapes and for boxes or crops without area.
    """
    boxes_N4, crops_N4 = _checked("boxes", boxes_N4), _checked("crops", crops_N4)
    if len(boxes_N4) != len(crops_N4):
        raise ValueError(f"one crop a box: got {len(boxes_N4)} boxes and {len(crops_N4)} crops")
    box_from_N2, box_to_N2 = boxes_N4[:, :2], boxes_N4[:, :2] + boxes_N4[:, 2:]
    crop_from_N2, crop_to_N2 = crops_N4[:, :2], crops_N4[:, :2] + crops_N4[:, 2:]
    centre_N2 = boxes_N4[:, :2] + boxes_N4[:, 2:] / 2
    overlap_N2 = (torch.minimum(box_to_N2, crop_to_N2) - torch.maximum(box_from_N2, crop_from_N2)).clamp(min=0)
    overlap_N = overlap_N2.prod(dim=1)
    box_area_N, crop_area_N = boxes_N4[:, 2:].prod(dim=1), crops_N4[:, 2:].prod(dim=1)
    return {
        "centre_in_crop": ((centre_N2 >= crop_from_N2) & (centre_N2 <= crop_to_N2)).all(dim=1),
        "iobb": (overlap_N / box_area_N).clamp(max=1),
        "iou": (overlap_N / (box_area_N + crop_area_N - overlap_N)).clamp(max=1),
    }


def centred_crop(crops_N4: Tensor, size: float) -> Tensor:
    """The control: crops of the same width and height, moved to the centre of a square image of side `size`.

    Same shape and area, so that only knowing *where* to look can beat it. float64 `[N, 4]`. Raises `ValueError`
    for a crop larger than the image.
    """
    crops_N4 = _checked("crops", crops_N4)
    if bool((crops_N4[:, 2:] > size).any()):
        raise ValueError(f"a crop is larger than the image of side {size}")
    extent_N2 = crops_N4[:, 2:]
    return torch.cat([(size - extent_N2) / 2, extent_N2], dim=1)


def _checked(name: str, rectangles_N4: Tensor) -> Tensor:
    if rectangles_N4.dim() != 2 or rectangles_N4.shape[1] != 4:
        raise ValueError(f"{name} must be [N, 4] (x, y, width, height), got {tuple(rectangles_N4.shape)}")
    rectangles_N4 = rectangles_N4.double()
    if not bool((rectangles_N4[:, 2:] > 0).all()):
        raise ValueError(f"{name} must have a positive width and height")
    return rectangles_N4
