"""What documents say of tests, files and targets is there."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cxr_retrieval.corpus.limits import REASONS, RULES, ExcludedImage, RejectedImage

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_names_only_what_exists(document: Path) -> None:
    text = document.read_text()
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for target in re.findall(r"`make ([a-z0-9-]+)`", text):
        assert target in targets, target
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / link).exists(), link
    for module in re.findall(r"python -m ((?:jobs|benchmarks|cluster)\.\w+)", text):
        if not module.endswith(".NAME"):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_the_account_of_a_corpus_says_what_every_reason_and_rule_is() -> None:
    _, reasons, rules, *_ = re.split(r"^## ", (ROOT / "docs" / "corpus.md").read_text(), flags=re.MULTILINE)
    for section, words in ((reasons, REASONS), (rules, RULES)):
        assert tuple(re.findall(r"^\| `(\w+)` \| \S", section, flags=re.MULTILINE)) == words


@pytest.mark.parametrize("kind", [lambda word: RejectedImage(word, "text"), ExcludedImage], ids=["reason", "rule"])
def test_no_image_is_left_out_for_what_no_document_tells(kind: Callable[[str], Exception]) -> None:
    with pytest.raises(AssertionError, match="made_up"):
        kind("made_up")
