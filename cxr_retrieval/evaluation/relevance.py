"""When a gallery image is a good answer to a query.

Labels are `int8 [*, C]`: 1 present, 0 absent, -1 unknown (uncertain, or not assessed by the archive).
The relevance of a pair is graded: the number of findings present in both. A pair that shares none, but where a
finding present in one image is unknown in the other, is *undecided*: it is neither hit nor miss.

Shapes: Q queries, G gallery images, C findings.
"""

import torch
from torch import Tensor

PRESENT, ABSENT, UNKNOWN = 1, 0, -1


def check_labels(*label_matrices: Tensor) -> None:
    """Refuse label matrices that are not `[*, C]` with one C and values -1, 0, 1 (`ValueError`)."""
    for labels in label_matrices:
        if labels.dim() != 2 or labels.shape[1] != label_matrices[0].shape[1]:
            shapes = [tuple(each.shape) for each in label_matrices]
            raise ValueError(f"labels must be [images, findings] with the same findings, got shapes {shapes}")
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels must be integers (1 present, 0 absent, -1 unknown), got {labels.dtype}")
        if labels.numel() and not bool(((labels >= UNKNOWN) & (labels <= PRESENT)).all()):
            raise ValueError("labels must be 1 (present), 0 (absent) or -1 (unknown)")


def has_finding(labels_NC: Tensor) -> Tensor:
    """Images with at least one finding present, `bool [N]`: the possible queries, and the *findings* gallery."""
    return (labels_NC == PRESENT).any(dim=1)


def has_unknown(labels_NC: Tensor) -> Tensor:
    """Images with at least one unknown finding, `bool [N]`."""
    return (labels_NC == UNKNOWN).any(dim=1)


def shared_findings(query_QC: Tensor, gallery_GC: Tensor) -> Tensor:
    """Number of findings present in both images, `uint8 [Q, G]`, 0 to C (C at most 255)."""
    if query_QC.shape[1] > 255:
        raise ValueError(f"at most 255 findings, got {query_QC.shape[1]}")
    return _count_pairs(query_QC == PRESENT, gallery_GC == PRESENT).to(torch.uint8)


def undecided(query_QC: Tensor, gallery_GC: Tensor) -> Tensor:
    """Pairs that share no finding, but might: a finding present in one is unknown in the other. `bool [Q, G]`.

    A finding unknown in both images says nothing about the pair and does not make it undecided.
    """
    query_unknown_QC, gallery_unknown_GC = query_QC == UNKNOWN, gallery_GC == UNKNOWN
    undecided_QG = torch.zeros(len(query_QC), len(gallery_GC), dtype=torch.bool, device=query_QC.device)
    # Archives without unknown labels (NIH) should not pay for three more products.
    if bool(gallery_unknown_GC.any()):
        undecided_QG |= _count_pairs(query_QC == PRESENT, gallery_unknown_GC) > 0
    if bool(query_unknown_QC.any()):
        undecided_QG |= _count_pairs(query_unknown_QC, gallery_GC == PRESENT) > 0
    if bool(undecided_QG.any()):
        undecided_QG &= shared_findings(query_QC, gallery_GC) == 0
    return undecided_QG


def exact_match(query_QC: Tensor, gallery_GC: Tensor) -> Tensor:
    """Pairs with the same set of present findings and nothing unknown in either image, `bool [Q, G]`.

    An image with an unknown finding matches nothing exactly: its set of findings is not known.
    """
    shared_QG = shared_findings(query_QC, gallery_GC)
    return exact_from_shared(shared_QG, query_QC, gallery_GC)


def exact_from_shared(shared_QG: Tensor, query_QC: Tensor, gallery_GC: Tensor) -> Tensor:
    """`exact_match` for a caller that already holds `shared_findings`: sets are equal if both are all shared."""
    # 256 and 257 are no possible counts and differ, so that a row with an unknown finding equals nothing.
    query_size_Q = (query_QC == PRESENT).sum(dim=1).masked_fill(has_unknown(query_QC), 256)
    gallery_size_G = (gallery_GC == PRESENT).sum(dim=1).masked_fill(has_unknown(gallery_GC), 257)
    return (shared_QG == query_size_Q[:, None].to(torch.int16)) & (shared_QG == gallery_size_G.to(torch.int16))


def _count_pairs(left_QC: Tensor, right_GC: Tensor) -> Tensor:
    """Number of columns true in both rows of a pair, `float32 [Q, G]`; whole numbers this small are exact."""
    return left_QC.float() @ right_GC.float().T
