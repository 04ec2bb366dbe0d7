"""The stored values of a compressed DICOM frame: JPEG, JPEG-LS, JPEG 2000 and RLE.

A frame has a header of its own, and a decoder allocates what that header asks for. It is read here first and must tell
the size that the DICOM header tells, so that what is allocated stays within the limits that were checked there.
"""

import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import imagecodecs
import numpy as np

from cxr_retrieval.corpus.limits import RejectedImage, reading

logging.getLogger("imagecodecs").setLevel(logging.CRITICAL + 1)  # its decoders quote the file: nothing is let out

JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
RLE = ("1.2.840.10008.1.2.5",)
LOSSY = (JPEG[0], JPEG[1], JPEG_LS[1], JPEG_2000[1])
SYNTAXES = (*JPEG, *JPEG_LS, *JPEG_2000, *RLE)

START, END, SCAN, APP0, APP14 = 0xD8, 0xD9, 0xDA, 0xE0, 0xEE
RESTARTS = range(0xD0, 0xD8)  # RST0 to RST7
ALONE = (0x01, *RESTARTS)  # markers without a length: TEM too
MOST_SEGMENTS = 100_000  # of a JPEG: a reader keeps those that it does not know
MOST_SCANS = 100  # of a JPEG: each goes over all pixels again, and programs that write them make ten or so
FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15, and SOF55 of JPEG-LS
LOSSLESS = (0xC3, 0xF7)
RGB_NAMES = (b"RGB", b"rgb")
SIZ, COD, COC, TILE, TILE_DATA = b"\xff\x4f\xff\x51", 0x52, 0x53, 0x90, 0x93
# What else a header of JPEG 2000 may hold. Of others the decoder believes no length, and may see what is hidden there.
OTHERS = (0x50, 0x51, 0x55, *range(0x57, 0x59), *range(0x5C, 0x62), 0x63, 0x64)
MOST_TILES, MOST_PRECINCTS = 4096, 100_000  # the decoder keeps some KB for each before it sees a pixel


@dataclass(frozen=True)
class Frame:
    """What a frame's own header tells. `rgb` is what it says of its colours, None where it says nothing."""

    width: int
    height: int
    samples: int
    precision: int
    lossless: bool = True
    rgb: bool | None = None


def decoded(
    syntax: str, data: bytes, width: int, height: int, samples: int, bytes_each: int, rgb: bool
) -> tuple[np.ndarray, int | None]:
    """Stored values [H, W], or [H, W, 3] as they are stored, of a frame of `samples` values a pixel, and their bits as
    the frame tells them (RLE tells none).

    A JPEG whose colours were compressed with a loss comes as its luminance [H, W]; `rgb` says what its colours are
    where the frame itself does not. Values of 9 bits and more come as 16-bit integers, sign and all as they are
    stored. Raises RejectedImage.
    """
    if syntax in RLE:
        return _runs(data, width, height, samples, bytes_each), None
    frame = _jpeg_2000_header(data) if syntax in JPEG_2000 else _jpeg_header(data)
    if (frame.width, frame.height, frame.samples) != (width, height, samples):
        raise RejectedImage("damaged", f"a frame that tells another size or kind than its header: {width} x {height}")
    with reading("a compressed frame that cannot be decoded"):
        if syntax in JPEG_2000:
            values = imagecodecs.jpeg2k_decode(data, numthreads=1)
        elif syntax in JPEG_LS:
            values = imagecodecs.jpegls_decode(data)
        elif samples == 1 or frame.lossless:
            values = imagecodecs.jpeg8_decode(data)
        else:
            stored = "RGB" if (rgb if frame.rgb is None else frame.rgb) else "YCBCR"
            values = imagecodecs.jpeg8_decode(data, colorspace=stored, outcolorspace="GRAYSCALE")
            samples = 1
    shape = (height, width) if samples == 1 else (height, width, samples)
    if values.dtype.itemsize > bytes_each:
        raise RejectedImage("damaged", f"a frame of {frame.precision} bits where its header has {8 * bytes_each}")
    if values.shape != shape:
        raise RejectedImage("damaged", f"a compressed frame of {width} x {height} pixels that gives another size")
    return values, frame.precision


def _runs(data: bytes, width: int, height: int, samples: int, bytes_each: int) -> np.ndarray:
    buffer = bytearray(width * height * samples * bytes_each)  # the decoder writes no further than this
    with reading("run lengths that cannot be decoded"):
        filled = len(imagecodecs.dicomrle_decode(data, np.dtype(f"<u{bytes_each}"), out=buffer))
    if filled != len(buffer):
        raise RejectedImage("damaged", f"run lengths that end before {width} x {height} pixels are full")
    values = np.frombuffer(buffer, f"<u{bytes_each}")
    return values.reshape(height, width) if samples == 1 else values.reshape(samples, height, width).transpose(1, 2, 0)


def require_few_markers(data: bytes) -> None:
    """Raises RejectedImage for a JPEG of so many scans that decoding it takes minutes, or of so many segments that what
    a reader keeps of each fills the memory."""
    if data.count(bytes((0xFF, SCAN))) > MOST_SCANS:
        raise RejectedImage("unsupported", f"a JPEG of more than {MOST_SCANS} scans")
    values = np.frombuffer(data, np.uint8)
    markers = values[1:][values[:-1] == 0xFF]
    # Amid pixels are marks of a restart; and a value that looks like a marker is told apart by what follows, 0 or, in
    # JPEG-LS, any number below 0x80.
    segments = (markers >= 0x80) & ((markers < RESTARTS.start) | (markers >= RESTARTS.stop))
    if np.count_nonzero(segments) > MOST_SEGMENTS:
        raise RejectedImage("unsupported", f"a JPEG of more than {MOST_SEGMENTS:,} segments")


def _jpeg_header(data: bytes) -> Frame:
    require_few_markers(data)
    if not data.rstrip(b"\0").endswith(bytes((0xFF, END))):
        raise RejectedImage("damaged", "a JPEG frame without its end mark")
    rgb: bool | None = None
    for marker, body in _jpeg_segments(data):
        if marker == APP0 and body.startswith(b"JFIF"):
            rgb = False
        elif marker == APP14 and body.startswith(b"Adobe") and len(body) > 11:
            rgb = body[11] == 0
        elif marker in FRAMES and len(body) >= 6:
            bits, height, width, samples = struct.unpack_from(">BHHB", body)
            if bytes(body[6 : 6 + 3 * samples : 3]) in RGB_NAMES:
                rgb = True
            return Frame(width, height, samples, bits, marker in LOSSLESS, rgb)
    raise RejectedImage("damaged", "a JPEG frame without its header")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and body of each segment before the pixels."""
    place = 2
    while data[:2] == bytes((0xFF, START)) and place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # markers may be filled up with these
            place += 1
            continue
        if marker in ALONE:
            place += 2
            continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in (0, START, END, SCAN) or length < 2:
            return
        yield marker, data[place + 4 : place + 2 + length]
        place += 2 + length


def _jpeg_2000_header(data: bytes) -> Frame:
    if not data.startswith(SIZ) or len(data) < 52:
        raise RejectedImage("damaged", "a JPEG 2000 frame without its header")
    right, bottom, left, top, tile_w, tile_h, tile_x, tile_y, samples = struct.unpack_from(">8IH", data, 8)
    bits, step_x, step_y = data[42:45]
    if not (tile_w and tile_h and left < right and top < bottom and tile_x <= left and tile_y <= top):
        raise RejectedImage("damaged", "a JPEG 2000 frame whose header makes no sense")
    tiles = -((tile_x - right) // tile_w) * -((tile_y - bottom) // tile_h)
    if (
        tiles > MOST_TILES
        or _precincts(data, right - left, bottom - top) > MOST_PRECINCTS
        or (step_x, step_y) != (1, 1)
    ):
        raise RejectedImage("unsupported", "JPEG 2000 of very many tiles or precincts, or of subsampled components")
    return Frame(right - left, bottom - top, samples, (bits & 0x7F) + 1)


def _precincts(data: bytes, width: int, height: int) -> int:
    """How many precincts a JPEG 2000 frame is cut into, by whichever of its headers makes the most; 0 where none says
    anything of them."""
    most = 0
    for levels, sizes in _coding_styles(data):
        count = 0
        for resolution, size in enumerate(sizes[: levels + 1]):
            down = levels - resolution
            count += -(-(width >> down) >> (size & 15)) * -(-(height >> down) >> (size >> 4))
        most = max(most, count)
    return most


def _coding_styles(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Levels and sizes of precincts that the main header and those of tile-parts tell (ISO 15444-1, A.6.1 and A.6.2).

    Raises RejectedImage for a segment that is none of the standard's, and for a tile that ends before its data begin.
    """
    place, tile_end = 2, 0
    component_bytes = 1 if int.from_bytes(data[40:42], "big") < 257 else 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        body = data[place + 4 : place + 2 + length]
        if marker == END or (marker == TILE_DATA and not tile_end):
            return
        if marker == TILE_DATA:
            if tile_end <= place:  # it would be read again for ever
                raise RejectedImage("damaged", "a JPEG 2000 frame whose tiles lie of their length")
            place = tile_end
            continue
        if marker == TILE:
            told = int.from_bytes(data[place + 6 : place + 10], "big")
            tile_end = place + told if told else 0
        elif marker in (COD, COC):
            # Behind the style: of all components five bytes of what they have in common, of one its number before it.
            at, begin = (0, 5) if marker == COD else (component_bytes, component_bytes + 1)
            if len(body) > begin and body[at] & 1:
                yield body[begin], body[begin + 5 :]
        elif marker not in OTHERS or length < 2:
            raise RejectedImage("unsupported", "JPEG 2000 with segments that the standard's first part does not know")
        place += 2 + length
