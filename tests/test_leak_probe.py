"""`utils/leak_probe.py`: who a model's features tell, and where the energy of a perturbation lies."""

import numpy as np
import pytest
import torch
from torch import nn

from utils import leak_probe
from utils.config import make_config
from utils.data import ImageSet


def test_a_person_is_recognised_only_from_slices_that_lie_apart():
    gallery = np.array([[1, 0.0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    people, slices = np.array([7, 7, 8, 8]), np.array([0, 10, 0, 2])
    found = leak_probe.recognised(gallery, gallery, np.zeros(2), people, slices, people, slices, gap=4)
    assert found.tolist() == [True, True, False, False], "person 8 has no slice four or more away"
    assert leak_probe.recognised(gallery, gallery, np.zeros(2), people, slices, people, slices, gap=1).all()
    strangers = leak_probe.recognised(gallery[:1], gallery[2:], np.zeros(2), people[:1], slices[:1], people[2:], slices[2:])
    assert not strangers.any()


@pytest.mark.parametrize("cycles, band", [(0, 0), (1, 0), (3, 1), (10, 3), (40, 5)])
def test_a_wave_lies_in_the_band_of_its_frequency(cycles, band):
    wave = np.cos(2 * np.pi * cycles * np.arange(128) / 128)[None, :, None] + np.zeros((1, 1, 128))
    shares = leak_probe.band_shares(wave)
    assert shares[0, band] == pytest.approx(1) and shares.sum() == pytest.approx(1)


def test_nothing_has_no_frequency_and_noise_has_all():
    assert leak_probe.band_shares(np.zeros((2, 16, 16))).sum() == 0
    noise = leak_probe.band_shares(np.random.default_rng(0).normal(size=(20, 128, 128))).mean(0)
    assert (noise > 0).all() and noise[-2:].sum() > 0.7, "most of the plane is high frequency"


class Reader(nn.Module):
    """Two features: the mean of the left half tells the class, a stripe of the right half tells the person."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        left, right = images[..., :8].mean((1, 2, 3)), images[..., 8:].flatten(1)
        return torch.cat([2 * (left - 0.5)[:, None], right], 1) * self.scale

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        left = 40 * self.features(images)[:, 0] / 2
        return torch.stack([-left, left, left - 9, left - 9], 1)


def cohort(people: int = 10, each: int = 8) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    own = (100 * torch.rand(people, 1, 8, 4, generator=generator)).repeat_interleave(2, dim=3)
    person = torch.arange(people * each) // each
    label = person % 2
    images = torch.cat([torch.full((len(person), 1, 8, 8), 0.0) + (127 + 6 * (2 * label - 1))[:, None, None, None], own[person] + 60],
                       dim=3)
    images += 4 * torch.rand(images.shape, generator=generator)
    return ImageSet(images.round().byte(), label, person, torch.arange(people * each) % each, [f"{k:064x}" for k in range(people * each)],
                    "test")


def test_an_attack_on_the_diagnosis_leaves_the_person_where_they_rest_on_different_pixels():
    part = cohort()
    config = make_config("cpu", "Resnet", sample=20, eps=("1/255", "32/255"), headline_eps="32/255", pgd_steps=5)
    found = leak_probe.probe(Reader(), part, part, config)
    assert np.mean(found["right"]["clean"]) == 1 and np.mean(found["recognised"]["clean"]) > 0.9
    assert np.mean(found["right"]["32/255"]) == 0 and np.mean(found["right"]["noise 32/255"]) > 0.5
    assert np.mean(found["recognised"]["32/255"]) > 0.9
    assert np.mean(found["neighbour"]["clean"]) >= np.mean(found["recognised"]["clean"]) and found["neighbour"] != found["right"]
    assert set(found["right"]) == {"clean", "1/255", "32/255", "noise 1/255", "noise 32/255"}
    shares = np.array(found["shares"])
    assert shares.shape == (20, 7) and np.allclose(shares.sum(1), 1, atol=1e-3)
    assert shares.mean(0)[0] > 5 * found["noise_shares"][0], "a flat perturbation lies in the lowest band"


def test_images_of_nobody_are_no_gallery():
    part = cohort()
    nobody = part.people.clone()
    nobody[::2] = -1
    gallery = ImageSet(part.images, part.labels, nobody, part.slices, part.files, "train")
    config = make_config("cpu", "Resnet", sample=6, eps=("1/255",), headline_eps="1/255", pgd_steps=2)
    assert len(leak_probe.probe(Reader(), part, gallery, config)["rows"]) == 6
