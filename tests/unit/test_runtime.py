"""What processes do about memory."""

import subprocess
import sys
import textwrap

import pytest

FREEING = """
import resource
from cxr_retrieval.runtime import keep_freed_memory

{first}
pages = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    films = [b"x" * ({size} + number) for number in range(10)]
    del films
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(pages[-1])
"""


def pages_taken_again(first: str, size: int) -> int:
    """The pages that a process takes from the system for ten blocks that it has had and freed five times before."""
    code = textwrap.dedent(FREEING).format(first=first, size=size)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is asked")
def test_a_process_that_keeps_freed_memory_takes_no_page_twice_for_films_and_gives_back_what_is_larger():
    film, gigantic = 3 << 20, 36 << 20
    assert pages_taken_again("", film) > 1_000
    assert pages_taken_again("keep_freed_memory()", film) < 100
    assert pages_taken_again("keep_freed_memory()", gigantic) > 1_000
