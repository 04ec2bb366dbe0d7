"""What no run can train on is refused before workers start."""

from types import SimpleNamespace
from typing import Any

import pytest

from cxr_retrieval.config import load_settings
from cxr_retrieval.errors import UserError
from cxr_retrieval.training.run import require_trainable


def prepared(images: int) -> Any:
    """A corpus of which only counts are known."""
    facts = {"patients": 9, "findings": {"Mass": 9}}
    manifest = {"splits": {"train": {"images": images, **facts}, "validation": {"images": 9, **facts}}}
    return SimpleNamespace(artifact=SimpleNamespace(manifest=manifest, uri="corpus"))


@pytest.mark.parametrize("key", ["losses.contrastive_from", "training.crop_from"])
def test_a_part_of_the_network_that_would_join_after_the_last_step_is_refused_by_the_name_of_its_key(key: str) -> None:
    def check(share: float) -> None:
        words = ["training.batch_size=8", "training.epochs=2", f"{key}={share}"]
        require_trainable(load_settings((), words), prepared(40))  # ten steps, of which the last is at 0.9

    check(0.9)
    with pytest.raises(UserError, match=rf"^{key}=0\.91 leaves none of the 10 optimizer steps: .*training\.epochs$"):
        check(0.91)
