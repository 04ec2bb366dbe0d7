"""Running jobs as a user does, in the test's own process and on its Ray."""

import contextlib
import io
import runpy
import sys
from dataclasses import dataclass

import pytest

# A corpus and a network so small that a job takes seconds; what a test adds behind it wins.
TINY = [
    "corpus.size=64",
    "corpus.partition_images=32",
    "corpus.row_group_images=16",
    "corpus.validation_share=0.25",
    "network.dimensions=16",
    "training.batch_size=16",
    "training.lanes=2",
    "embedding.workers=1",
]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a refusal."""
        assert self.code == 1, self.err
        assert "Traceback" not in self.err
        (line,) = [line for line in self.err.splitlines() if not line.startswith(("storage: ", "prepare: "))]
        return line.removeprefix("error: ")


def job(name: str, *words: str) -> Outcome:
    """`python -m jobs.NAME WORDS`, in this process and on its Ray."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"jobs.{name}", *words])
        patch.delitem(sys.modules, f"jobs.{name}", raising=False)
        try:
            runpy.run_module(f"jobs.{name}", run_name="__main__")
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def done(name: str, *words: str) -> str:
    outcome = job(name, *words)
    assert outcome.code == 0, outcome.err
    return outcome.out
