"""What a benchmark says: a claim, what it is measured against, the ratio (more is better), the target, the samples."""

import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cxr_retrieval.console import show_table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Claim:
    """`ratio` is the median of `samples`, each a ratio of two measurements taken side by side; `details` are written
    and not printed."""

    claim: str
    against: str
    ratio: float
    target: float
    holds: bool
    samples: list[float]
    machine: str
    origin: str
    figures: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, claim: str, against: str, target: float, samples: Sequence[float], **figures: float) -> "Claim":
        ratio = statistics.median(samples)
        rounded = [_three_digits(sample) for sample in samples]
        return cls(claim, against, _three_digits(ratio), target, ratio >= target, rounded, machine(), origin(), figures)


def _three_digits(ratio: float) -> float:
    """So that what is far below its target is not told as nothing."""
    return float(f"{ratio:.3g}")


def machine() -> str:
    """Enough of the machine to read a ratio by."""
    return f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _processor() -> str:
    """Its model, where this system tells it: cores of one name differ by half in what they do."""
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")]
    return f"{platform.machine()} {models[0]}" if models else platform.machine()


def origin() -> str:
    """When it was measured, and the commit of the code (`-dirty`: with changes), where git knows it."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False) if shutil.which("git") else None
    commit = told.stdout.strip() if told and told.returncode == 0 else "unknown"
    return f"{datetime.date.today().isoformat()}, commit {commit}"


def publish(name: str, claims: Sequence[Claim]) -> None:
    """Print the claims and write `benchmarks/results/NAME.json`."""
    rows = [
        [c.claim, c.against, f"{c.ratio:g}", f"{c.target:g}", "yes" if c.holds else "NO", _figures(c)] for c in claims
    ]
    show_table(name, ["claim", "against", "ratio", "target", "holds", "figures"], rows)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps([asdict(claim) for claim in claims], indent=1) + "\n")


def _figures(claim: Claim) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:,.1f}" for name, value in claim.figures.items())
