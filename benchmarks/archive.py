"""The archive that benchmarks run on: phantoms in NIH's layout, drawn once under benchmarks/results."""

from benchmarks.claim import RESULTS
from cxr_retrieval.config import PhantomSettings
from cxr_retrieval.corpus.phantom.archive import write_phantom_archive


def phantom_archive(images: int, size: int) -> str:
    """URI of an archive of so many phantoms of `size` pixels a side; needs Ray."""
    out = str(RESULTS / f"phantoms-{images}-{size}")
    return write_phantom_archive(PhantomSettings(images=images, size=size, out=out))[0].uri
