"""Names that leave the prepared corpus: pseudonyms by keyed HMAC, and the stable row ids made of them."""

import hashlib
import hmac
import os
from dataclasses import dataclass, field
from pathlib import Path

from cxr_retrieval.config import PrivacySettings
from cxr_retrieval.errors import UserError

KEY_VARIABLE = "CXR_PRIVACY_KEY"
LEAST_KEY_BYTES, LEAST_KEY_VARIETY = 16, 8  # how many bytes, and how many different ones


@dataclass(frozen=True)
class Pseudonyms:
    """Turns names into pseudonyms, or leaves them as they are (public archives, phantoms). Never prints its key."""

    key: bytes | None = field(repr=False)

    @classmethod
    def of(cls, settings: PrivacySettings) -> "Pseudonyms":
        """Blanks and line ends around a key are no part of it.

        Raises UserError where pseudonyms are wanted and there is no key, or one that can be guessed.
        """
        if not settings.pseudonymise:
            return cls(None)
        if settings.key_file is not None:
            try:
                key = Path(settings.key_file).read_bytes()
            except OSError as error:
                raise UserError(f"privacy.key_file={settings.key_file} cannot be read: {error.strerror}") from None
        else:
            key = os.environb.get(KEY_VARIABLE.encode(), b"")
        key = key.strip()
        if len(key) < LEAST_KEY_BYTES or len(set(key)) < LEAST_KEY_VARIETY:
            raise UserError(
                f"privacy.pseudonymise is on and there is no key of {LEAST_KEY_BYTES} bytes or more,"
                f" {LEAST_KEY_VARIETY} of them different: set {KEY_VARIABLE} or privacy.key_file"
                " (`openssl rand -hex 32` makes a key), or privacy.pseudonymise=false for an archive that is public"
            )
        return cls(key)

    @property
    def key_id(self) -> str | None:
        """Tells two keys apart without telling the key."""
        return hmac.digest(self.key, b"key id", "sha256").hex()[:12] if self.key else None

    def name(self, kind: str, value: str) -> str:
        """Pseudonym of a patient, image or source: 20 hexadecimal characters."""
        return hmac.digest(self.key, f"{kind}:{value}".encode(), "sha256").hex()[:20] if self.key else value


def row_id(image_name: str) -> int:
    """Stable 63-bit id of an image from the name that it has outside the corpus."""
    return int.from_bytes(hashlib.sha256(image_name.encode()).digest()[:8], "big") >> 1
