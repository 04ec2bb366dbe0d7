"""The files of an archive: read no further than is asked for, and known by name where they cannot be read."""

from cxr_retrieval import storage
from cxr_retrieval.corpus.limits import RejectedImage

UNREADABLE = "unreadable"  # the reason of a file that nothing is known of, and that the next run tries again


def read_beginning(uri: str, length: int) -> bytes:
    """The first `length` bytes of a file, all where it is shorter. Raises RejectedImage where it is gone or cannot be
    read, and UserError where the whole bucket fails; of a disk that fails whole, `corpus.max_quarantined` tells."""
    try:
        return storage.read_beginning(uri, length)
    except OSError as error:
        raise RejectedImage(UNREADABLE, error.strerror or type(error).__name__) from None


def read_listed(uri: str, size: int) -> bytes:
    """A file that was listed with `size` bytes. Raises as `read_beginning` does, and RejectedImage where it has more or
    fewer now."""
    data = read_beginning(uri, size + 1)
    if len(data) != size:
        raise RejectedImage(UNREADABLE, f"listed with {size:,} bytes and found with others: it was written meanwhile")
    return data


def is_readable(uri: str) -> bool:
    """Whether a file can be read. Raises UserError where the whole bucket fails."""
    try:
        read_beginning(uri, 1)
    except RejectedImage:
        return False
    return True
