"""An index as one HTML file: what was built and why, recall and latency by probes, how even its lists are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cxr_retrieval.report.charts import Dimension, Plane, choice_axis, number_axis, percent_axis, plane
from cxr_retrieval.report.pages import render

_SIZE = (640.0, 380.0)
_FILES = {
    ".faiss": "codes and lists, for FAISS",
    ".npy": "rows, float16: what distances are of",
    ".thumbnails.parquet": "thumbnails",
    ".parquet": "sidecars: what a hit shows and a filter needs",
    ".safetensors": "model",
}


@dataclass(frozen=True)
class _Line:
    """A line of a plot in pixels: its corners as text and one by one, and how it is drawn."""

    name: str
    corners: tuple[tuple[float, float], ...]
    faint: bool

    @property
    def points(self) -> str:
        return " ".join(f"{x},{y}" for x, y in self.corners)


@dataclass(frozen=True)
class _Chart:
    """A plot by probes. `chosen` is the pixel column of the recorded setting, `target` the pixel row of the target."""

    label: str
    plane: Plane
    lines: tuple[_Line, ...]
    chosen: float
    target: float | None


@dataclass(frozen=True)
class _Bars:
    label: str
    plane: Plane
    bars: tuple[tuple[float, float, float, str], ...]
    """x of the middle, y of the top, height, and what it says."""
    wide: float


def write_index_page(name: str, build: str, facts: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """The page of a built index, from the facts of its `index.json` and the bytes of its files by path."""
    proof, plan = facts["proof"], facts["plan"]
    curve = proof["curve"]
    chosen = next(setting for setting in curve if setting["probes"] == proof["probes"])
    return render(
        "index.html.j2",
        title=f"Index {name}",
        facts=[
            ("Rows", facts["rows"]),
            ("Dimensions", facts["dimensions"]),
            ("Kind", facts["factory"]),
            ("Shards", facts["shards"]),
            ("Rows of the largest shard", plan["shard_rows"]),
            ("Bytes of a vector's code", plan["vector_bytes"]),
            ("All files", _size(sum(sizes.values()))),
            ("Embedding", facts["embedding"]),
            ("Names", "pseudonyms" if facts["pseudonymised"] else "as in the archive"),
            ("Build", build),
            ("Corpus", facts["corpus"]),
            ("Model", facts["model"]),
        ],
        chosen=chosen,
        proof=proof,
        lists=facts["lists"],
        candidates=facts["candidates"],
        why=plan["why"],
        planned_ms=plan["latency_ms"],
        charts=_charts(curve, chosen, proof["target"]) if len(curve) > 1 else [],
        bars=_list_sizes(facts["list_sizes"]) if facts["lists"] else None,
        files=_files(sizes),
    )


def _charts(curve: Sequence[Mapping[str, float]], chosen: Mapping[str, float], target: float) -> list[_Chart]:
    probes = number_axis("probes", "lists that a search reads", [setting["probes"] for setting in curve], log=True)
    recalls = percent_axis("recall@10", [target, *(setting["recall"] for setting in curve)])
    times = [setting[key] for setting in curve for key in ("p50_ms", "p95_ms")]
    return [
        _chart("Recall against exact search", probes, recalls, curve, chosen, {"recall": "recall@10"}, target),
        _chart(
            "Time of one search",
            probes,
            number_axis("milliseconds", "one query at a time", [0.0, *times]),
            curve,
            chosen,
            {"p50_ms": "median", "p95_ms": "95 of 100 are faster"},
        ),
    ]


def _chart(
    label: str,
    x: Dimension,
    y: Dimension,
    curve: Sequence[Mapping[str, float]],
    chosen: Mapping[str, float],
    keys: Mapping[str, str],
    target: float | None = None,
) -> _Chart:
    area = plane(x, y, *_SIZE)
    lines = tuple(
        _Line(name, tuple((area.at_x(setting["probes"]), area.at_y(setting[key])) for setting in curve), number > 0)
        for number, (key, name) in enumerate(keys.items())
    )
    return _Chart(label, area, lines, area.at_x(chosen["probes"]), None if target is None else area.at_y(target))


def _list_sizes(counts: Sequence[int]) -> _Bars:
    """Bars of how many lists have how many rows, each bar twice the one before, from the first that is not empty."""
    first = next(place for place, count in enumerate(counts) if count)
    names = [_rows_of(place) for place in range(first, len(counts))]
    x = choice_axis("rows of a list", "all shards together", names)
    area = plane(x, number_axis("lists", "", [0.0, *map(float, counts)]), *_SIZE)
    ground = area.at_y(0.0)
    bars = tuple(
        (area.at_x(n), area.at_y(count), round(ground - area.at_y(count), 2), f"{name} rows: {count:,} lists")
        for n, (name, count) in enumerate(zip(names, counts[first:], strict=True))
    )
    return _Bars("How many rows the lists have", area, bars, round(0.8 * (area.at_x(1) - area.at_x(0)), 2))


def _rows_of(place: int) -> str:
    low, high = 2**place // 2, 2**place - 1
    return str(high) if low >= high else f"{low}-{high}"


def _files(sizes: Mapping[str, int]) -> list[tuple[str, int, str]]:
    """What the files are, how many, and their size, largest first."""
    found: dict[str, list[int]] = {}
    for path, size in sizes.items():
        kind = next((text for ending, text in _FILES.items() if path.endswith(ending)), "facts of model and index")
        found.setdefault(kind, []).append(size)
    rows = sorted(found.items(), key=lambda row: -sum(row[1]))
    return [(kind, len(mine), _size(sum(mine))) for kind, mine in rows]


def _size(count: float) -> str:
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(len(units) - 1, max(int(count).bit_length() - 1, 0) // 10)
    return f"{count / 1024**power:.4g} {units[power]}"
