"""What is not prepared: the error that says why, and the sizes that are refused before a pixel is decoded."""

from dataclasses import dataclass


class RejectedImage(Exception):
    """An image that cannot be prepared: a reason (one word, counted) and the text of what was found."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(f"{reason}: {text}")
        self.reason, self.text = reason, text


@dataclass(frozen=True)
class Limits:
    """What is refused before or after decoding: sides in pixels, area in pixels."""

    min_side: int
    max_pixels: int

    def check(self, width: int, height: int) -> None:
        """Raise RejectedImage for an image whose header tells a size outside the limits."""
        if width * height > self.max_pixels:
            raise RejectedImage("too_large", f"{width} x {height} pixels, more than {self.max_pixels:,}")
        if min(width, height) < self.min_side:
            raise RejectedImage("too_small", f"{width} x {height} pixels, a side under {self.min_side}")
