"""Images that stay on disk look like a list of arrays."""

import errno

import numpy as np
import pytest

from utils.images import StoredImages, chosen, computed
from utils.manifest.files import EIGHT_BITS, eight_bits
from utils.utils_funcs import UserError

IMAGES = [
    np.arange(12, dtype=np.uint8).reshape(3, 4),
    np.arange(10, dtype=np.uint16).reshape(5, 2) * 400,
    np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
]


@pytest.fixture
def stored() -> StoredImages:
    found = StoredImages()
    for image in IMAGES:
        found.append(image)
    return found


def test_images_come_back_in_their_order_size_and_type(stored):
    assert len(stored) == len(IMAGES)
    for found, image in zip(stored, IMAGES, strict=True):
        assert found.dtype == image.dtype
        assert np.array_equal(found, image)
    assert np.array_equal(stored[-1], IMAGES[-1])
    assert [image.shape for image in stored[1:3]] == [(5, 2), (2, 3)]
    with pytest.raises(IndexError):
        stored[4]


def test_images_can_be_added_between_readings(stored):
    assert stored[0].shape == (3, 4)
    stored.append(IMAGES[0])
    assert np.array_equal(stored[4], IMAGES[0])
    assert np.array_equal(stored[3], IMAGES[3])


def test_chosen_and_computed_images_are_read_when_asked_for(stored):
    asked = []

    def twice(image: np.ndarray) -> np.ndarray:
        asked.append(image.shape)
        return image * 2

    some = computed(chosen(stored, np.array([3, 0])), twice)
    assert not asked
    assert np.array_equal(some[1], IMAGES[0] * 2)
    assert asked == [(3, 4)]
    assert np.array_equal(some[:1][0], IMAGES[3] * 2)
    assert len(some) == 2


def test_one_rule_for_all_images_changes_them_when_they_are_read(stored):
    deep = StoredImages()
    for image in (IMAGES[1], IMAGES[1] * 2):
        deep.append(image)
    found, rule = eight_bits(deep, ["a", "b"])
    assert rule == "0 to 65535 scaled to 0 to 255"
    assert found[1].dtype == np.uint8
    assert np.array_equal(found[1], np.rint(IMAGES[1] * 2.0 * 255 / 65535).astype(np.uint8))
    plain = chosen(stored, [0, 3])
    assert eight_bits(plain, ["a", "b"]) == (plain, EIGHT_BITS)


def test_a_full_disk_is_named_with_what_to_do(stored, monkeypatch):
    class Full:
        def seek(self, place: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stored, "_file", Full())
    with pytest.raises(UserError, match="TMPDIR"):
        stored.append(IMAGES[0])
