"""ensemble: one model out of several, fitted on no test patient, attacked as one."""

import numpy as np
import pytest
import torch
from torch import nn

from utils import ensemble, metrics
from utils.attacks.base import ATTACKS
from utils.utils_funcs import UserError


class Tiny(nn.Module):
    """Two tanh layers on a 4×4 image: smooth, so that finite differences mean something."""

    def __init__(self, seed: int, scale: float = 3.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(scale * torch.randn(16, 6, generator=generator))
        self.second = nn.Parameter(torch.randn(6, 4, generator=generator))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return ((images.flatten(1) - 0.5) @ self.first.to(images.dtype)).tanh() @ self.second.to(
            images.dtype
        )


def members(count: int = 3, **options) -> dict[str, nn.Module]:
    return {f"m{seed}": Tiny(seed, **options).eval() for seed in range(count)}


def images(count: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weights", [None, (0.2, 0.5, 0.3), (0.0, 1.0, 0.0)])
def test_logits_are_the_log_of_the_members_mean_probability(weights):
    three, x = members(), images()
    mixed = sum(
        weight * member(x).double().softmax(1)
        for weight, member in zip(weights or (1 / 3,) * 3, three.values(), strict=True)
    )
    assert torch.allclose(
        ensemble.Mixture(three, weights)(x).double(), mixed.log(), atol=1e-6, rtol=0
    )


def test_a_pool_is_the_multinomial_model_on_its_members_logits():
    three, x, a, b = members(), images(), np.array([0.5, 0.2, 1.0]), np.array([0.1, -0.2, 0.3, 0.3])
    z = sum(
        k * member(x).double().log_softmax(1) for k, member in zip(a, three.values(), strict=True)
    ) + torch.tensor(b)
    assert torch.allclose(
        ensemble.LogLinearPool(three, a, b)(x).double(), z.log_softmax(1), atol=1e-6, rtol=0
    )


def ensembles() -> list[nn.Module]:
    three = members()
    return [
        ensemble.Mixture(three),
        ensemble.Mixture(three, (0.2, 0.5, 0.3)),
        ensemble.LogLinearPool(three, (0.5, 0.2, 1.0), (0.1, -0.2, 0.3, 0.3)),
        ensemble.SeparateImages(ensemble.Mixture(three)),
    ]


@pytest.mark.parametrize("kind", range(4))
def test_gradients_equal_finite_differences(kind):
    model = ensembles()[kind].double()
    x = (
        images(2, seed=3)
        .double()
        .expand(-1, 3 if kind == 3 else 1, -1, -1)
        .clone()
        .requires_grad_(True)
    )
    value = model(x)[:, 1].sum()
    (gradient,) = torch.autograd.grad(value, x)
    with torch.no_grad():
        for place in ((0, 0, 0, 0), (1, x.shape[1] - 1, 2, 3), (0, 0, 3, 1)):
            step = torch.zeros_like(x)
            step[place] = 1e-5
            difference = (model(x + step)[:, 1].sum() - model(x - step)[:, 1].sum()) / 2e-5
            assert float(difference) == pytest.approx(float(gradient[place]), rel=1e-6, abs=1e-8)


def test_every_ensemble_reads_one_channel_and_no_member_is_forgotten():
    three = members()
    x = images(5)
    for drop in three:
        rest = {name: member for name, member in three.items() if name != drop}
        assert not torch.allclose(ensemble.Mixture(three)(x), ensemble.Mixture(rest)(x), atol=1e-3)
    with pytest.raises(UserError, match="at least one member"):
        ensemble.Mixture({})
    with pytest.raises(UserError, match="sum to 1"):
        ensemble.Mixture(three, (0.5, 0.5, 0.5))


# -- weights ------------------------------------------------------------------------------------


def validation(
    noise: tuple[float, ...], patients: int = 30, each: int = 4, classes: int = 3, seed: int = 0
):
    """Log-probabilities (M, N, 4), labels, patients; a member with less noise is better."""
    generator = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), each)
    labels = patient % classes
    truth = np.eye(4)[labels] * 3
    logits = np.stack([truth + size * generator.normal(size=truth.shape) for size in noise])
    return logits - np.logaddexp.reduce(logits, axis=2, keepdims=True), labels, patient


@pytest.mark.parametrize("combiner", ["weighted", "stacking", "blending"])
def test_weights_are_never_fitted_on_test_patients(combiner):
    z, labels, patients = validation((1.0, 1.0, 1.0))
    three = members()
    ensemble.build_ensemble(combiner, three, z, labels, patients, test_patients=np.arange(100, 140))
    with pytest.raises(UserError, match="2 test patients"):
        ensemble.build_ensemble(
            combiner, three, z, labels, patients, test_patients=np.array([3, 4, 200])
        )


def test_the_better_member_gets_the_weight():
    z, labels, patients = validation((0.5, 4.0, 4.0))
    weights = ensemble.fit_weights(z, labels, patients, test_patients=np.array([999]))
    assert weights.sum() == pytest.approx(1) and weights[0] > 0.8
    for fit in (ensemble.fit_stacking, ensemble.fit_blending):
        coefficients, bias = fit(z, labels, patients, test_patients=np.array([999]))
        assert coefficients[0] > 3 * coefficients[1:].max() and (coefficients >= 0).all()


def test_fitted_weights_beat_uniform_ones_on_other_patients():
    z, labels, patients = validation((0.5, 4.0, 4.0), patients=60)
    fitted, held = patients < 30, patients >= 30
    three = members()

    def loss(combiner):
        model = ensemble.build_ensemble(
            combiner,
            three,
            z[:, fitted],
            labels[fitted],
            patients[fitted],
            test_patients=patients[held],
        )
        answers = model.combine(torch.tensor(z[:, held], dtype=torch.float32)).numpy()
        return -answers[np.arange(held.sum()), labels[held]].mean()

    uniform = loss("uniform")
    assert all(loss(combiner) < uniform for combiner in ("weighted", "stacking", "blending"))


def test_stacking_is_calibrated_out_of_fold():
    """Overconfident members: the stacked pool must take most of it back."""
    z, labels, patients = validation((2.0, 2.0), patients=60)
    sharp = 8 * z
    sharp = sharp - np.logaddexp.reduce(sharp, axis=2, keepdims=True)
    coefficients, bias = ensemble.fit_stacking(
        sharp, labels, patients, test_patients=np.array([999])
    )
    model = ensemble.LogLinearPool(members(2), coefficients, bias)
    answers = model.combine(torch.tensor(sharp, dtype=torch.float32)).numpy()
    assert 0.7 < metrics.fit_temperature(answers, labels) < 1.4
    assert metrics.fit_temperature(sharp.mean(0), labels) > 3


def test_a_class_without_any_fitted_patient_is_answered_from_the_members():
    z, labels, patients = validation((1.0, 1.0), classes=3)
    coefficients, bias = ensemble.fit_stacking(z, labels, patients, test_patients=np.array([999]))
    assert bias[3] == bias[2]
    sure = np.log(np.array([[[0.01, 0.01, 0.01, 0.97]], [[0.01, 0.01, 0.01, 0.97]]]))
    assert (
        ensemble.LogLinearPool(members(2), coefficients, bias)
        .combine(torch.tensor(sure, dtype=torch.float32))
        .argmax(1)
        .item()
        == 3
    )


def test_patients_take_turns_whole():
    _, labels, patients = validation((1.0,))
    turns = ensemble.patient_turns(labels, patients)
    assert all(len(set(turns[patients == patient])) == 1 for patient in np.unique(patients))
    for label in range(3):
        assert set(turns[labels == label]) == set(range(ensemble.TURNS))
    with pytest.raises(UserError, match="two patients"):
        ensemble.patient_turns(np.zeros(4, int), np.zeros(4, int))


def test_an_unknown_combiner_is_named():
    z, labels, patients = validation((1.0,))
    with pytest.raises(UserError, match="Unknown combiner 'vote'"):
        ensemble.build_ensemble("vote", members(1), z, labels, patients, test_patients=np.array([]))


# -- diversity ----------------------------------------------------------------------------------


def test_diversity_of_equal_and_of_independent_members():
    generator = np.random.default_rng(0)
    labels, patients = np.arange(400) % 4, np.arange(400) // 4
    a = np.eye(4)[np.where(generator.random(400) < 0.6, labels, (labels + 1) % 4)]
    b = np.eye(4)[np.where(generator.random(400) < 0.6, labels, (labels + 1) % 4)]
    found = ensemble.diversity({"a": a, "copy": a, "b": b}, labels, patients, n_boot=200)
    assert set(found) == {"a / copy", "a / b", "copy / b"}
    assert found["a / copy"]["disagreement"]["value"] == 0 and found["a / copy"][
        "error_correlation"
    ]["value"] == pytest.approx(1)
    wrong = [(x.argmax(1) != labels).astype(float) for x in (a, b)]
    assert found["a / b"]["error_correlation"]["value"] == pytest.approx(
        np.corrcoef(*wrong)[0, 1], abs=1e-5
    )
    low, high = found["a / b"]["disagreement"]["ci"]
    assert low <= (a.argmax(1) != b.argmax(1)).mean() <= high and high > low


# -- relaxation ---------------------------------------------------------------------------------


def attacked(eps: float):
    model, x = ensemble.Mixture(members(3, scale=4.0)), images(64, seed=5)
    with torch.no_grad():
        labels = model(x).argmax(1)
    one = ATTACKS["pgd"](model, x, labels, eps, steps=40, loss="margin")
    return model, x, labels, one


@pytest.mark.parametrize("eps", [0.02, 0.05, 0.1])
def test_separate_images_leave_no_more_robust_than_one_image(eps):
    model, x, labels, one = attacked(eps)
    with torch.no_grad():
        robust_one = model(one).argmax(1) == labels
    alone = ensemble.attack_separately(model, x, labels, eps, steps=40).argmax(1) == labels
    helped = (
        ensemble.attack_separately(model, x, labels, eps, steps=40, shared=one).argmax(1) == labels
    )
    assert 0 < robust_one.sum() < len(x), "the check says nothing where all or no images are robust"
    assert alone.sum() <= robust_one.sum()
    assert not (helped & ~robust_one).any(), "one image is a point of the relaxation"


def test_the_original_projects_attack_never_reaches_the_edge_of_the_ball_and_leaves_more_robust():
    model, x, labels, _ = attacked(0.1)
    strong = (ensemble.attack_separately(model, x, labels, 0.1, steps=40).argmax(1) == labels).sum()
    weak = (
        ensemble.attack_like_the_original_project(model, x, labels, 0.1).argmax(1) == labels
    ).sum()
    assert strong < weak
    parts = [
        ATTACKS["pgd"](
            member, x, labels, 0.1, steps=10, step_size=1e-4, random_start=False, push=True
        )
        for member in model.members.values()
    ]
    assert max(float((part - x).abs().max()) for part in parts) <= 10 * 1e-4 + 1e-6


def test_separate_images_must_be_as_many_as_members():
    model = ensemble.SeparateImages(ensemble.Mixture(members(3)))
    with pytest.raises(UserError, match="3 members"):
        model(images(2))


def test_an_attack_on_the_ensemble_leaves_its_members_as_they_were():
    model = ensemble.Mixture(members(3))
    before = [parameter.clone() for parameter in model.parameters()]
    x, labels = images(8), torch.zeros(8, dtype=torch.int64)
    ensemble.attack_separately(model, x, labels, 0.05, steps=5)
    ensemble.attack_like_the_original_project(model, x, labels, 0.05)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
