"""Which images a model was trained on, as its checkpoint says, and which of them a set holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from utils.data import ImageSet

#: Hexadecimal digits of an image's pixel hash that a checkpoint keeps: eight bytes, so that among
#: a hundred thousand images two different ones share them once in a billion.
DIGITS = 16


def images_seen(train: ImageSet, validation: ImageSet) -> dict[str, object]:
    """What a checkpoint says of its data: the cohort, and the first eight bytes of the pixel hash
    of every image it was trained on, and of every image that its epoch was chosen on, sorted."""
    return {
        "cohort_sha256": train.cohort_sha256,
        "trained_on": short_hashes(train),
        "chosen_on": short_hashes(validation),
    }


def short_hashes(part: ImageSet) -> list[str]:
    """The first digits of each pixel hash, sorted, each once."""
    return sorted({pixels[:DIGITS] for pixels in part.pixels})


@dataclass(frozen=True)
class Seen:
    """How much of a set a model has seen before.

    Attributes:
        known: whether the checkpoint says what it was trained on.
        images: images of the set that it was trained on, or its epoch was chosen on.
        patients: patients of the set with at least one such image.
        of_images, of_patients: how many the set holds.
    """

    known: bool
    images: int
    patients: int
    of_images: int
    of_patients: int

    def __str__(self) -> str:
        if not self.known:
            return "its checkpoint does not say what this model was trained on"
        return (
            f"in training, or in the choice of its epoch, this model has seen {self.images:,} of "
            f"these {self.of_images:,} images and {self.patients:,} of these {self.of_patients:,} "
            "patients"
        )


def seen_before(metadata: Mapping[str, object], part: ImageSet) -> Seen:
    """How many images and patients of a set a model has seen, by their pixels: of any set, whatever
    the names of its files are.

    Args:
        metadata: of its checkpoint (`read_metadata`).
    """
    hashes: set[str] = set()
    for name in ("trained_on", "chosen_on"):
        hashes |= set(metadata.get(name, ()))  # type: ignore[call-overload]
    seen = np.array([pixels[:DIGITS] in hashes for pixels in part.pixels], bool)
    patients = part.patients.numpy()
    return Seen(
        known="trained_on" in metadata,
        images=int(seen.sum()),
        patients=len(np.unique(patients[seen & (patients >= 0)])),
        of_images=len(part),
        of_patients=len(np.unique(patients[patients >= 0])),
    )
