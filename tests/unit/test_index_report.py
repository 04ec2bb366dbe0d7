"""The page of an index: what was built and why, every setting of the proof, its lists; offline and escaped."""

import re
from typing import Any

import pytest

from cxr_retrieval.report.index import write_index_page

SIZES = {
    "shards/00000.faiss": 3 << 20,
    "shards/00001.faiss": 1 << 20,
    "quantizer.faiss": 1 << 20,
    "shards/00000.rows.npy": 2048,
    "shards/00000.parquet": 512,
    "shards/00000.thumbnails.parquet": 7 << 30,
    "model/model.json": 10,
    "index.json": 10,
}


def setting(probes: int, recall: float, passing: float = 1.0) -> dict[str, float]:
    return {"probes": probes, "recall": recall, "p50_ms": 0.1 * probes, "p95_ms": 0.3 * probes, "passing": passing}


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "rows": 12_345,
        "dimensions": 96,
        "factory": "IVF64,SQ8",
        "lists": 64,
        "candidates": 4,
        "shards": 2,
        "embedding": "combined",
        "pseudonymised": True,
        "corpus": "nih/<b>1a2b",
        "model": "3c4d",
        "list_sizes": [1, 0, 0, 13, 50],
        "plan": {
            "why": {"kind": "lists: <i>too slow</i>", "lists": "about 4 sqrt(rows)", "code": "it fits", "shards": "2"},
            "index_bytes": 5 << 20,
            "vector_bytes": 96,
            "shard_rows": 6173,
            "latency_ms": 0.7,
        },
        "proof": {
            "queries": 400,
            "target": 0.95,
            "probes": 4,
            "recall": 0.961,
            "curve": [setting(1, 0.5), setting(2, 0.8), setting(4, 0.961), setting(8, 0.99)],
            "filtered": [
                setting(6, 0.97, 0.1),
                setting(16, 0.98, 0.01),
                setting(12, 0.96, 0.4) | {"filter": "view <PA>"},
            ],
        },
        **changes,
    }


def exact() -> dict[str, Any]:
    proof = facts()["proof"] | {"probes": 1, "recall": 1.0, "curve": [setting(1, 1.0)], "filtered": []}
    return facts(factory="SQfp16", lists=0, candidates=1, list_sizes=[], proof=proof)


@pytest.mark.parametrize("told", [facts(), exact()], ids=["lists", "exact"])
def test_the_page_is_offline_escaped_and_says_that_it_is_no_medical_device(told: dict[str, Any]) -> None:
    html = write_index_page("chest", "5e6f", told, SIZES)
    assert not re.search(r"https?://|@import|url\(|<link|<script", html)
    assert "no medical device" in html
    assert "<i>too slow" not in html
    assert "nih/<b>" not in html


def test_the_page_shows_what_was_chosen_and_every_setting_that_was_tried() -> None:
    html = write_index_page("chest", "5e6f", facts(), SIZES)
    assert "12,345" in html
    assert "96.1<small> % recall@10" in html
    assert "4<small> of 64 lists" in html
    rows = re.findall(r"<tr( class=\"used\")?><th scope=\"row\">([^<]+)</th><td>(\d+)</td><td>([\d.]+)</td>", html)
    assert rows == [
        ("", "all", "1", "50.0"),
        ("", "all", "2", "80.0"),
        (' class="used"', "all", "4", "96.1"),
        ("", "all", "8", "99.0"),
        ("", "1 of 10", "6", "97.0"),
        ("", "1 of 100", "16", "98.0"),
        ("", "view &lt;PA&gt;, 40.0 %", "12", "96.0"),
    ]
    assert html.count("<polyline") == 3
    assert "about 4 sqrt(rows)" in html


def test_lists_stand_by_their_size_and_add_up() -> None:
    html = write_index_page("chest", "5e6f", facts(), SIZES)
    bars = re.findall(r"<title>([\d-]+) rows: (\d+) lists</title>", html)
    assert bars == [("0", "1"), ("1", "0"), ("2-3", "0"), ("4-7", "13"), ("8-15", "50")]


def test_an_exact_index_has_no_curve_and_no_lists() -> None:
    html = write_index_page("chest", "5e6f", exact(), SIZES)
    assert "it is exact" in html
    assert "<svg" not in html
    assert "How even the lists are" not in html


def test_files_add_up_by_kind_with_the_largest_first() -> None:
    html = write_index_page("chest", "5e6f", facts(), SIZES)
    rows = re.findall(r"<th scope=\"row\">([a-z][^<]+)</th><td>(\d+)</td><td>([^<]+)</td>", html)
    assert [(kind.split(",")[0], count, size) for kind, count, size in rows if "iB" in size or "bytes" in size] == [
        ("thumbnails", "1", "7 GiB"),
        ("codes and lists", "3", "5 MiB"),
        ("rows", "1", "2 KiB"),
        ("sidecars: what a hit shows and a filter needs", "1", "512 bytes"),
        ("facts of model and index", "2", "20 bytes"),
    ]


def test_the_page_is_right_where_the_first_setting_is_enough() -> None:
    proof = facts()["proof"] | {"probes": 1, "curve": [setting(1, 1.0), setting(2, 1.0)]}
    html = write_index_page("chest", "5e6f", facts(proof=proof), SIZES)
    assert "1<small> of 64 lists" in html
    assert "nan" not in html
