"""Promises of what a task of prepare costs."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from cxr_retrieval.corpus.preparation import DECODING

DECODES = """
import re, sys
from cxr_retrieval.corpus.decoding import Recipe, decode
from cxr_retrieval.corpus.limits import Limits
def held():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = held()
decode(open(sys.argv[1], "rb").read(), Recipe(256, "letterbox"), Limits(32, 10**8))
print(held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the highest memory of a process is told by Linux")
@pytest.mark.parametrize(("kind", "channels"), [(np.uint16, 1), (np.uint16, 3), (np.uint8, 4)])
def test_decoding_takes_no_more_memory_than_a_task_is_given(kind: type, channels: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (3000, 3000, channels), kind)
    assert cv2.imwrite(str(tmp_path / "film.png"), noise, [cv2.IMWRITE_PNG_COMPRESSION, 0])
    process = [sys.executable, "-c", DECODES, str(tmp_path / "film.png")]
    taken = int(subprocess.run(process, check=True, capture_output=True, text=True).stdout)
    assert 2 * 3000**2 < taken < DECODING * 3000**2
