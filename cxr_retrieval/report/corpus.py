"""A prepared corpus as one HTML file: every image accounted for, what is in it, who is in which split, examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cxr_retrieval.corpus.census import AGE_BANDS, NOT_KNOWN, Census, Tally
from cxr_retrieval.corpus.findings import FINDINGS, NO_FINDING
from cxr_retrieval.corpus.splits import SPLITS
from cxr_retrieval.privacy import Pseudonyms
from cxr_retrieval.report.charts import Dimension, Matrix, Plane, choice_axis, matrix, number_axis, plane
from cxr_retrieval.report.films import data_uri
from cxr_retrieval.report.gallery import Case, described
from cxr_retrieval.report.pages import finding_label, render

_AGES_SIZE = (900.0, 340.0)
_AGE_STEP_YEARS = 5
_FILM_SIDE = 320
_MOST_OTHER = 40  # findings in the archive's own words that are listed
_TITLES = {"view": "View", "sex": "Sex", "age": "Age in years"}


@dataclass(frozen=True)
class Film:
    """An image that stands for a finding, and its boxes of that finding (x, y, w, h in prepared pixels)."""

    case: Case
    boxes: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class _Bar:
    """A part of a stacked bar of the ages, in pixels from its upper left corner."""

    x: float
    y: float
    tall: float
    shade: int
    text: str


@dataclass(frozen=True)
class _Ages:
    plane: Plane
    bars: tuple[_Bar, ...]
    wide: float
    sexes: tuple[str, ...]


def write_corpus(
    name: str,
    manifest: Mapping[str, Any],
    census: Census,
    films: Mapping[str, Sequence[Film]],
    quarantined: Sequence[Mapping[str, str]],
    duplicates: Sequence[Mapping[str, str]],
    pseudonyms: Pseudonyms,
) -> str:
    """The page of a prepared corpus, from its manifest, the census of its rows and examples of each finding.

    `quarantined` are examples with `image_id`, `reason` and `text`; `duplicates` those of images that another patient
    has too, with `image_id` and `kept_image_id`. Images are named by their `pseudonyms`; with a key the `text` of an
    error, which can hold a file's name, is not told.
    """
    counts, recipe, key_id = manifest["counts"], manifest["decode_recipe"], pseudonyms.key_id
    return render(
        "corpus.html.j2",
        title=f"Corpus {name}",
        facts=[
            ("Images prepared", counts["prepared"]),
            ("Patients", sum(facts["patients"] for facts in manifest["splits"].values())),
            ("Side in pixels", recipe["size"]),
            ("Names", f"pseudonyms by the key {key_id}" if key_id else "as in the archive"),
            ("Corpus", manifest["input_id"]),
            ("Content", manifest["content_id"]),
        ],
        counts=counts,
        label_rows=manifest["label_rows"],
        labels_without_image=manifest["labels_without_image"],
        ignored=sorted(manifest["ignored_files"].items()),
        boxes_left_out=sum(manifest["boxes_left_out"].values()),
        left_out=left_out(manifest),
        findings=_findings(census),
        images=census.all.images,
        splits={split: manifest["splits"][split] for split in SPLITS},  # a manifest's keys are sorted
        split_equation=manifest["split_equation"],
        ages=_ages(census),
        groups=[_group(title, census.groups[group], group) for group, title in _TITLES.items()],
        together=_together(census),
        other=census.other.most_common(_MOST_OTHER),
        other_kinds=len(census.other),
        examples=_examples(films),
        size=recipe["size"],
        across=manifest["duplicates_across_patients"],
        burned_in=manifest["burned_in"],
        quarantined=[
            (pseudonyms.name("image", row["image_id"]), row["reason"], "" if key_id else row["text"])
            for row in quarantined
        ],
        duplicates=[
            [pseudonyms.name("image", row[column]) for column in ("image_id", "kept_image_id")] for row in duplicates
        ],
        names=not key_id,
        recipe=recipe,
        recipe_id=manifest["decode_recipe_id"],
        label_tables=sorted(manifest["label_tables"].items()),
    )


def left_out(manifest: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """What became of the images that are not prepared, why, and how many, the most frequent first in each kind."""
    across = manifest["duplicates_across_patients"]
    same = manifest["counts"]["duplicates"] - across
    kinds = {
        "quarantined": manifest["quarantine_reasons"],
        "excluded": manifest["exclusion_rules"],
        "duplicate": {"of the same patient": same, "of another patient": across},
    }
    return [
        (kind, why.replace("_", " "), count)
        for kind, numbers in kinds.items()
        for why, count in sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
        if count
    ]


def _findings(census: Census) -> list[dict[str, Any]]:
    """One row a finding by falling number, then the images that have none: how many in each split, and unknown."""
    splits = [census.groups["split"][split] for split in SPLITS]
    order = np.argsort(-census.all.present_C, kind="stable").tolist()
    rows = [
        {
            "name": FINDINGS[place],
            "present": int(census.all.present_C[place]),
            "unknown": int(census.all.unknown_C[place]),
            "splits": [int(tally.present_C[place]) for tally in splits],
            "split_unknown": [int(tally.unknown_C[place]) for tally in splits],
        }
        for place in order
    ]
    rows.append(
        {
            "name": NO_FINDING,
            "present": census.all.without,
            "unknown": census.all.without_unknown,
            "splits": [tally.without for tally in splits],
            "split_unknown": [tally.without_unknown for tally in splits],
        }
    )
    longest = max([1, *(row["present"] + row["unknown"] for row in rows[:-1])])
    for row in rows:
        # Images without a finding are most of an archive: on their scale nothing else could be seen.
        row["bars"] = (
            None if row["name"] == NO_FINDING else [round(100 * count / longest, 2) for count in row["splits"]]
        )
        row["unknown_bar"] = round(100 * row["unknown"] / longest, 2)
    return rows


def _group(title: str, tallies: Mapping[str, Tally], group: str) -> dict[str, Any]:
    """A table of findings by the values of a group, the most frequent value first; age bands as they follow."""
    bands = [name for name, _ in AGE_BANDS]
    by_number = sorted(tallies, key=lambda value: (value == NOT_KNOWN, -tallies[value].images, value))
    values = [band for band in (*bands, NOT_KNOWN) if band in tallies] if group == "age" else by_number
    columns = [tallies[value] for value in values]
    rows = [
        {
            "name": finding,
            "cells": [_cell(tally, int(tally.present_C[n]), int(tally.unknown_C[n])) for tally in columns],
        }
        for n, finding in enumerate(FINDINGS)
    ]
    rows.append(
        {"name": NO_FINDING, "cells": [_cell(tally, tally.without, tally.without_unknown) for tally in columns]}
    )
    return {"title": title, "values": values, "images": [tally.images for tally in columns], "rows": rows}


def _cell(tally: Tally, present: int, unknown: int) -> dict[str, Any]:
    return {"present": present, "unknown": unknown, "share": present / tally.images}


def _ages(census: Census) -> _Ages | None:
    """Bars of the ages, five years each, stacked by sex; None where no age is known."""
    if not census.ages:
        return None
    sexes = tuple(sorted({sex for sex, _ in census.ages}))
    last = max(years for _, years in census.ages) // _AGE_STEP_YEARS
    counts = np.zeros((last + 1, len(sexes)), int)
    for (sex, years), count in census.ages.items():
        counts[years // _AGE_STEP_YEARS, sexes.index(sex)] += count
    starts = [n * _AGE_STEP_YEARS for n in range(last + 1)]
    x = choice_axis("age in years", f"{_AGE_STEP_YEARS} years a bar, by its first", [str(start) for start in starts])
    area = plane(x, number_axis("images", "", [0.0, float(counts.sum(1).max())]), *_AGES_SIZE)
    bars = []
    for n, start in enumerate(starts):
        ground = 0
        for shade, sex in enumerate(sexes):
            count = int(counts[n, shade])
            bottom, top = area.at_y(ground), area.at_y(ground + count)
            text = f"{start} to {start + _AGE_STEP_YEARS - 1} years, sex {sex}: {count:,} images"
            if count:
                bars.append(_Bar(area.at_x(n), top, round(bottom - top, 2), shade, text))
            ground += count
    wide = (area.right - area.left) / (last + 1)
    return _Ages(area, tuple(bars), round(0.8 * wide, 2), sexes)


def _together(census: Census) -> Matrix | None:
    """How often an image with a row's finding has the column's too, as colour; a finding with itself is left out."""
    shown = [n for n in range(len(FINDINGS)) if census.all.present_C[n]]
    if len(shown) < 2:
        return None
    pairs = census.together_CC[np.ix_(shown, shown)].astype(float)
    shares = pairs / np.diag(pairs)[:, None]
    most = max(float(shares[~np.eye(len(shown), dtype=bool)].max()), 0.01)
    ticks = tuple((most * part / 4, f"{100 * most * part / 4:.0f}") for part in range(5))
    colours = Dimension("percent", "of a row's images", 0.0, most, ticks)
    labels = [finding_label(FINDINGS[n]) for n in shown]
    drawn = matrix("findings that occur together", labels, colours, shares.tolist(), lambda share: f"{share:.1%}")
    return replace(drawn, cells=tuple(cell for n, cell in enumerate(drawn.cells) if n % (len(shown) + 1)))


def _examples(films: Mapping[str, Sequence[Film]]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "films": [
                described(film.case, finding_label(name))
                | {
                    "uri": data_uri(film.case.pixels, _FILM_SIDE),
                    "boxes": film.boxes,
                    "others": _others(film.case, name),
                }
                for film in found
            ],
        }
        for name, found in films.items()
        if found
    ]


def _others(case: Case, name: str) -> list[str]:
    return [finding_label(finding) for finding in case.findings if finding != name]
