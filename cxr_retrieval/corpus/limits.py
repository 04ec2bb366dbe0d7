"""What is not prepared: images that cannot be used, images that a setting leaves out, and sizes that are refused.

An image that cannot be used is quarantined for a reason; one that nothing is wrong with is excluded by a rule.
"""

from dataclasses import dataclass

from cxr_retrieval.config import CorpusSettings

# The rules, by what they look at.
MODALITY, BODY_PART, SOURCE_SIDE = "modality", "body_part", "source_side"
VIEW, AGE, AGE_UNKNOWN = "view", "age", "age_unknown"


class RejectedImage(Exception):
    """An image that cannot be prepared: a reason (one word, counted) and the text of what was found."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(f"{reason}: {text}")
        self.reason, self.text = reason, text


class ExcludedImage(Exception):
    """An image that a rule of the settings leaves out."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


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

    A side under `min_side` is no radiograph; one under `source_side` is of a film that is not wanted.
    """

    min_side: int
    max_pixels: int
    source_side: int = 0

    def check(self, width: int, height: int) -> None:
        """For an image's size by its header: raise RejectedImage outside the limits, ExcludedImage where it is only
        not wanted."""
        if width * height > self.max_pixels:
            raise RejectedImage("too_large", f"{width} x {height} pixels, more than {self.max_pixels:,}")
        if min(width, height) < self.min_side:
            raise RejectedImage("too_small", f"{width} x {height} pixels, a side under {self.min_side}")
        if min(width, height) < self.source_side:
            raise ExcludedImage(SOURCE_SIDE)
