"""Example queries of an evaluation with their first hits, as a template draws them."""

from collections.abc import Mapping
from typing import Any

from cxr_retrieval.report.films import data_uri
from cxr_retrieval.report.gallery import Case, described

_MEANINGS = {
    "best": "The highest of all queries.",
    "typical": "The middle of all queries: half do better, half do worse.",
    "worst": "The lowest of all queries, shown on purpose: what fails is not hidden.",
}


def examples(kinds: Mapping[str, Any], cases: Mapping[int, Case]) -> dict[str, Any] | None:
    """The rows of examples, or None where there is none to show.

    `kinds` is `examples` of an `evaluation.json`: {kind: queries}, images named by the `row` that `cases` has them by.
    `films` are the images as data URIs by row, each once, however many queries it answers, drawn at side `size`.
    """
    if not cases:
        return None
    rows = [
        {"name": name, "meaning": _MEANINGS[name], "queries": [_query(query, cases) for query in queries]}
        for name, queries in kinds.items()
        if queries
    ]
    if not rows:
        return None
    size = next(iter(cases.values())).image_size
    return {"kinds": rows, "size": size, "films": {row: data_uri(case.pixels) for row, case in cases.items()}}


def _query(query: Mapping[str, Any], cases: Mapping[int, Case]) -> dict[str, Any]:
    own = cases[query["row"]].findings
    hits = [
        _look(hit, cases, f"Hit {rank}")
        | {
            "rank": rank,
            "distance": f"{hit['distance']:.3f}",
            "shared": [name for name in cases[hit["row"]].findings if name in own],
        }
        for rank, hit in enumerate(query["hits"], start=1)
    ]
    figures = {key: query[key] for key in ("precision", "chance_precision", "ap", "chance_ap")}
    sharing = sum(bool(hit["shared"]) for hit in hits)
    return {"look": _look(query, cases, "Query"), "hits": hits, "sharing": sharing, **figures}


def _look(image: Mapping[str, Any], cases: Mapping[int, Case], role: str) -> dict[str, Any]:
    """An image with its crop, whose longer side is as long as the whole image is drawn."""
    x, y, w, h = image["crop"]
    return described(cases[image["row"]], role) | {
        "row": image["row"],
        "crop": {"x": x, "y": y, "w": w, "h": h, "width": round(100 * min(1.0, w / h), 2)},
    }
