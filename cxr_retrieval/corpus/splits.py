"""Which patients are trained on, chosen with and tested on. A patient is in one split, for ever."""

import hashlib

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
TRAIN_OR_VALIDATION = "train or validation"  # as an archive lists images of which it holds out none to choose by


def patient_position(patient_id: str, salt: int | str) -> float:
    """A patient's place in [0, 1) by salted hash: the same whatever other patients the archive holds."""
    digest = hashlib.sha256(f"{salt}:{patient_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def hash_split(patient_id: str, seed: int, validation_share: float, test_share: float) -> str:
    """Split of a patient by salted hash; shares are of patients, in [0, 1]."""
    position = patient_position(patient_id, seed)
    if position < test_share:
        return TEST
    return VALIDATION if position < test_share + validation_share else TRAIN


def listed_split(listed: str, patient_id: str, seed: int, validation_share: float) -> str:
    """The split that an archive lists; of patients in TRAIN_OR_VALIDATION, some validate, taken by salted hash."""
    if listed != TRAIN_OR_VALIDATION:
        return listed
    return VALIDATION if patient_position(patient_id, seed) < validation_share else TRAIN
