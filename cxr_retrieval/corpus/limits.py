"""What is not prepared: images that cannot be used, images that a setting leaves out, and sizes that are refused.

An image that cannot be used is quarantined for a reason; one that nothing is wrong with is excluded by a rule.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cxr_retrieval.config import CorpusSettings

HEADER_ROOM = 16 << 20  # bytes of a file beside its pixels
# Why an image cannot be used, and the rules that leave one out: docs/corpus.md says what each means.
REASONS = (
    *("damaged", "not_an_image", "too_small", "too_large", "unsupported", "unreadable", "bad_name", "name_twice"),
    *("no_label_row", "labels_twice", "unknown_finding", "unknown_label", "no_patient"),
)
REMOVED, BY_ARCHIVE, MODALITY, BODY_PART = "removed", "by_archive", "modality", "body_part"
VIEW, AGE, AGE_UNKNOWN = "view", "age", "age_unknown"
NOT_LISTED, SOURCE_SIDE, FOR_PROCESSING, BURNED_IN = "not_listed", "source_side", "for_processing", "burned_in"
# An image is counted by the first of these.
RULES = (
    *(REMOVED, BY_ARCHIVE, MODALITY, BODY_PART, VIEW, AGE, AGE_UNKNOWN, NOT_LISTED, SOURCE_SIDE, FOR_PROCESSING),
    BURNED_IN,
)


class RejectedImage(Exception):
    """An image that cannot be prepared: one of REASONS, which is counted, and the text of what was found."""

    def __init__(self, reason: str, text: str) -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {text}")
        self.reason, self.text = reason, text


class ExcludedImage(Exception):
    """An image that one of RULES leaves out."""

    def __init__(self, rule: str) -> None:
        assert rule in RULES, rule
        super().__init__(rule)
        self.rule = rule


@contextmanager
def reading(what: str, *, words: bool = False) -> Iterator[None]:
    """Whatever a reader of foreign bytes raises in this block is `what`, a damaged file, but for memory that does not
    suffice. Raises RejectedImage; what the reader said is told where `words` are."""
    try:
        yield
    except (RejectedImage, ExcludedImage, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001  # no reader names all of what it raises for mangled bytes
        if isinstance(error.__context__, RejectedImage):  # pydicom takes what is raised before an item for its own
            raise error.__context__ from None
        told = str(error) if words else ""
        raise RejectedImage("damaged", f"{what}: {told or type(error).__name__}") from None


def exclusion(settings: CorpusSettings, view: str | None, age_years: int | None) -> str | None:
    """The first rule that leaves out an image by what its labels tell, before it is read; None where none does.

    With a range of ages set, an unknown age is left out too, by a rule of its own: it may lie outside.
    """
    if settings.views is not None and view not in settings.views:
        return VIEW
    if settings.ages is None:
        return None
    if age_years is None:
        return AGE_UNKNOWN
    first, last = settings.ages
    return None if first <= age_years <= last else AGE


@dataclass(frozen=True)
class Limits:
    """What is refused before a pixel is decoded: sides in pixels, area in pixels.

    A side under `min_side` is no radiograph; one under `source_side` is of a film that is not wanted. `without_text`:
    nor is one whose header says that text is burned in.
    """

    min_side: int
    max_pixels: int
    source_side: int = 0
    without_text: bool = False

    @property
    def max_bytes(self) -> int:
        """Of a file: what `max_pixels` take as 8-bit RGBA that is not compressed, and a header."""
        return 4 * self.max_pixels + HEADER_ROOM

    @classmethod
    def of(cls, settings: CorpusSettings) -> "Limits":
        excludes = settings.burned_in == "exclude"
        return cls(settings.min_side, settings.max_pixels, settings.source_side or 0, excludes)

    def check(self, width: int, height: int) -> None:
        """For an image's size by its header: raise RejectedImage outside the limits, ExcludedImage where it is only
        not wanted."""
        if width * height > self.max_pixels:
            raise RejectedImage("too_large", f"{width} x {height} pixels, more than {self.max_pixels:,}")
        if min(width, height) < self.min_side:
            raise RejectedImage("too_small", f"{width} x {height} pixels, a side under {self.min_side}")
        if min(width, height) < self.source_side:
            raise ExcludedImage(SOURCE_SIDE)
