"""Radiographs as data URIs, so that a page carries its images with it."""

import base64

import cv2
import numpy as np

JPEG_QUALITY = 85
LONGEST_SIDE = 1024

_MAGIC = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


def data_uri(pixels: np.ndarray | bytes, longest: int = LONGEST_SIDE) -> str:
    """Grey pixels (uint8 [S, S]) or an encoded PNG or JPEG file as a data URI.

    Pixels are reduced to a side of at most `longest` and become JPEG or PNG, whichever is smaller; a file is passed on
    as it is. Raises `ValueError` for anything else.
    """
    encoded = pixels if isinstance(pixels, bytes) else _encode(pixels, longest)
    kind = next((kind for magic, kind in _MAGIC.items() if encoded.startswith(magic)), None)
    if kind is None:
        raise ValueError("the bytes of an image must be a PNG or a JPEG file")
    return f"data:{kind};base64,{base64.b64encode(encoded).decode()}"


def _encode(pixels: np.ndarray, longest: int) -> bytes:
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[0] != pixels.shape[1] or not pixels.size:
        raise ValueError(f"pixels must be uint8 [S, S], got {pixels.dtype} {list(pixels.shape)}")
    if pixels.shape[0] > longest:
        pixels = cv2.resize(pixels, (longest, longest), interpolation=cv2.INTER_AREA)
    files = (
        cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes(),
        cv2.imencode(".png", pixels)[1].tobytes(),
    )
    return min(files, key=len)
