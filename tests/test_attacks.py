"""What every registered attack promises, and that its arithmetic agrees with two independent
libraries."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import fixtures_attacks as zoo
from utils.attacks.base import (
    ATTACKS,
    AttackError,
    GroupedClasses,
    InBfloat16,
    check_result,
    group_labels,
    margin,
    perturbation_size,
    unsaturated_cross_entropy,
)
from utils.attacks.gradient import clinical_targets
from utils.attacks.regional import brain_mask
from utils.attacks.training import perturb_for_training
from utils.class_groups import BINARY, THREE
from utils.model_state import frozen
from utils.otsu import otsu_thresholds

#: Budgets that let every attack run in a moment.
SHORT = {
    "apgd_ce": {"steps": 8},
    "apgd_t": {"steps": 8},
    "fab_t": {"steps": 4},
    "square": {"queries": 30},
    "hopskipjump": {"steps": 1, "evaluations": 20},
    "deepfool": {"steps": 5},
    "few_pixel": {"generations": 3, "population": 8},
    "one_pixel": {"generations": 3, "population": 8},
}
#: AutoAttack takes no smaller budget; it has its own test.
FAST = sorted(set(ATTACKS) - {"autoattack"})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return zoo.honest_model()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    images, labels, _ = zoo.blobs(12, seed=5)
    return torch.as_tensor(images).float() / 255, torch.as_tensor(labels)


def run(
    name: str, model: nn.Module, images: Tensor, labels: Tensor, eps: float = 8 / 255, **budget
) -> Tensor:
    source = {"source": zoo.honest_model(1)} if name == "transfer" else {}
    return ATTACKS[name](model, images, labels, eps, **{**SHORT.get(name, {}), **source, **budget})


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


# -- promises of every attack ----------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
def test_perturbation_stays_in_its_ball_and_changes_images(name, model, batch):
    images, labels = batch
    adversarial = run(name, model, images, labels)
    assert adversarial.shape == images.shape and adversarial.dtype == images.dtype
    assert adversarial.isfinite().all() and adversarial.min() >= 0 and adversarial.max() <= 1
    # An L2 ball is inside the L-infinity ball of the same eps, and a pixel attack changes its
    # pixels by at most eps.
    assert (adversarial - images).abs().max() <= 8 / 255 + 1e-6
    if ATTACKS[name].norm == "l2":
        assert perturbation_size(images, adversarial, "l2").max() <= 8 / 255 + 1e-6
    robust = model(adversarial).argmax(1) == labels
    assert (adversarial != images).flatten(1).any(1)[robust].all(), (
        "a robust image came back as it was"
    )


def test_an_attack_outside_its_ball_is_refused(model, batch):
    images, _ = batch
    with pytest.raises(AttackError, match="perturbation of"):
        check_result("broken", "linf", images, (images + 0.1).clamp(0, 1), 0.05)
    with pytest.raises(AttackError, match="NaN"):
        check_result("broken", "linf", images, images * torch.nan, 0.05)
    with pytest.raises(AttackError, match=r"outside \[0, 1\]"):
        check_result("broken", "linf", images, images + 2, 3.0)


@pytest.mark.parametrize("name", FAST)
def test_eps_zero_changes_nothing(name, model, batch):
    images, labels = batch
    assert torch.equal(run(name, model, images, labels, eps=0.0), images)


def state_of(model: nn.Module) -> tuple:
    return (
        [tensor.clone() for tensor in model.state_dict().values()],
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),
        random.getstate(),
    )


def same_state(before: tuple, after: tuple) -> bool:
    tensors = all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    return (
        tensors
        and before[1:4] == after[1:4]
        and torch.equal(before[4], after[4])
        and np.array_equal(before[5], after[5])
        and before[6] == after[6]
    )


def half_frozen_model() -> nn.Module:
    """In training mode except for a BatchNorm, as when fine-tuning: the state that a careless
    `train()` destroys."""
    model = zoo.honest_model().train()
    model[1].eval()
    return model


@pytest.mark.parametrize("name", FAST)
def test_attack_leaves_model_and_random_states_untouched(name, batch):
    model = half_frozen_model()
    before = state_of(model)
    run(name, model, *batch)
    assert same_state(before, state_of(model))


def test_a_frozen_model_takes_no_gradient_and_keeps_those_it_has(batch):
    images, labels = batch
    model = half_frozen_model()
    nn.functional.cross_entropy(model(images), labels).backward()
    before = state_of(model)
    for eval_mode in (True, False):
        with frozen(model, eval_mode=eval_mode):
            assert all(p.grad is None and not p.requires_grad for p in model.parameters())
            modes = [module.training for module in model.modules()]
            assert modes == ([False] * len(modes) if eval_mode else before[1])
            model.zero_grad(set_to_none=False)
        after = state_of(model)
        assert before[1:3] == after[1:3]
        assert all(a is b and a.abs().sum() > 0 for a, b in zip(before[3], after[3], strict=True))


def test_attack_leaves_model_untouched_when_it_raises(batch):
    class Raises(zoo.Wrapped):
        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                self.model[0].weight += 1
            torch.rand(3)
            raise RuntimeError("boom")

    model = Raises(half_frozen_model())
    before = state_of(model)
    with pytest.raises(RuntimeError, match="boom"):
        ATTACKS["pgd"](model, *batch, 8 / 255)
    assert same_state(before, state_of(model))


def test_the_comparison_of_states_detects_a_careless_library(batch):
    import torchattacks

    model = half_frozen_model().eval()
    model[1].train()
    before = state_of(model)
    torchattacks.PGD(model, steps=1)(*batch)
    assert not same_state(before, state_of(model))


@pytest.mark.parametrize("name", FAST)
def test_same_seed_gives_the_same_images(name, model, batch):
    images, labels = batch
    first, again = (run(name, model, images, labels, seed=3) for _ in range(2))
    assert torch.equal(first, again)


def test_another_seed_gives_another_random_start(model, batch):
    assert not torch.equal(run("noise", model, *batch, seed=1), run("noise", model, *batch, seed=2))


@pytest.mark.parametrize("groups", [THREE, BINARY])
@pytest.mark.parametrize(
    "name",
    [
        "fgsm",
        "pgd",
        "pgd_targeted",
        "apgd_ce",
        "apgd_t",
        "fab_t",
        "square",
        "deepfool",
        "kryptonite",
    ],
)
def test_attacks_work_on_merged_classes(name, groups, model, batch):
    images, labels = batch
    view, merged = GroupedClasses(model, groups), group_labels(labels, groups)
    adversarial = run(name, view, images, merged, eps=0.5)
    assert (margin(view(adversarial), merged) < margin(view(images), merged)).float().mean() > 0.7


def test_grouped_classes_add_probabilities_and_pass_the_gradient(model, batch):
    images = batch[0].clone().requires_grad_(True)
    view = GroupedClasses(model, THREE)(images)
    probabilities = model(images).softmax(1)
    assert torch.allclose(view.exp()[:, 2], probabilities[:, 2] + probabilities[:, 3], atol=1e-6)
    view[:, 2].sum().backward()
    assert images.grad.abs().sum() > 0
    assert group_labels(torch.arange(4), THREE).tolist() == [0, 1, 2, 2]
    assert group_labels(torch.arange(4), BINARY).tolist() == [0, 1, 1, 1]


# -- strength --------------------------------------------------------------------------------------


def test_attacks_order_as_they_must(model):
    images, labels, _ = zoo.blobs(200, seed=6)
    images, labels = torch.as_tensor(images).float() / 255, torch.as_tensor(labels)
    # A clean error is an error, also where noise happens to correct it.
    right = model(images).argmax(1) == labels
    scores = [right.float().mean().item()]
    for name in ("noise", "fgsm", "pgd", "pgd_targeted"):
        attacked = run(name, model, images, labels, 4 / 255)
        scores.append((right & (model(attacked).argmax(1) == labels)).float().mean().item())
    assert all(later <= earlier for earlier, later in zip(scores, scores[1:], strict=False)), scores
    assert scores[0] > 0.9 and scores[-1] < 0.7 * scores[0]


def test_no_image_is_robust_against_pgd_at_eps_one(model, batch):
    images, labels = batch
    assert accuracy(model, images, labels) > 0.6
    assert accuracy(model, run("pgd", model, images, labels, 1.0, loss="margin"), labels) < 0.05


def test_any_successful_iterate_counts():
    model, images, labels = zoo.OnTheWay(), torch.full((4, 1, 8, 8), 0.5), torch.zeros(4).long()
    eps = 8 / 255
    ours = ATTACKS["pgd"](
        model, images, labels, eps, steps=10, step_size=eps / 4, random_start=False
    )
    assert accuracy(model, ours, labels) == 0
    assert accuracy(model, zoo.last_iterate_only(model, images, labels, eps), labels) == 1, (
        "the model no longer shows the flaw"
    )


class AwayFromItsNearest(nn.Module):
    """Class 1 is `ahead` of the true class 0 at first, and stays ahead of class 2, which gains more
    than class 1 loses: the cross-entropy of class 0 rises at every step, and so does its margin."""

    def __init__(self, ahead: float) -> None:
        super().__init__()
        self.ahead = ahead

    def forward(self, images: Tensor) -> Tensor:
        level = images.flatten(1).mean(1) - 0.5
        return torch.stack(
            [torch.zeros_like(level), self.ahead - 5 * level, self.ahead - 0.2 + 7 * level], 1
        )


@pytest.mark.parametrize(
    "name,ahead", [("ifgsm", -0.1), ("mifgsm", -0.1), ("transfer", -0.1), ("transfer", 0.1)]
)
def test_the_image_itself_is_no_iterate(name, ahead):
    """Also where the source of a transfer attack gives a wrong answer to it: the target may not."""
    model, images, labels = (
        AwayFromItsNearest(ahead),
        torch.full((2, 1, 4, 4), 0.5),
        torch.zeros(2, dtype=torch.int64),
    )
    source = {"source": model} if name == "transfer" else {}
    moved = ATTACKS[name](model, images, labels, 4 / 255, **source)
    assert margin(model(moved), labels).min() > margin(model(images), labels).max(), "no step helps"
    assert (moved != images).all()


class ConfusedInBfloat16(zoo.Wrapped):
    """Answers Moderate to everything as soon as it computes in bfloat16, with the same gradient. In
    bfloat16 the other classes are misclassified at once, Moderate itself seems out of reach, and
    the wrong class seems nearest to it."""

    def forward(self, images: Tensor) -> Tensor:
        confused = torch.is_autocast_enabled("cpu")
        return self.model(images).float() + 100 * confused * torch.eye(4)[3]


@pytest.mark.parametrize("wrap", [lambda model: model, ConfusedInBfloat16])
def test_a_search_in_bfloat16_counts_only_what_is_misclassified_in_float32(wrap, model, thousand):
    images, labels = thousand[0][:200], thousand[1][:200]
    scores = []
    for precision in ("fp32", "bf16"):
        found = ATTACKS["pgd"](
            wrap(model), images, labels, 4 / 255, precision=precision, loss="margin"
        )
        scores.append(accuracy(model, found, labels))
    # In whole images, so that the last digit of float32 does not matter.
    apart = round(len(images) * abs(scores[0] - scores[1]))
    assert apart <= 0.02 * len(images) and scores[0] < 0.7 * accuracy(model, images, labels)


@pytest.mark.parametrize("wrap", [lambda model: model, ConfusedInBfloat16])
@pytest.mark.parametrize(
    ("attack", "budget"),
    [
        ("apgd_t", {"steps": 10}),
        ("square", {"queries": 100}),
        ("kryptonite", {"mask": torch.ones(200, 1, 1, 1)}),
    ],
)
def test_any_attack_may_search_in_bfloat16(attack, budget, wrap, model, thousand):
    # The classes to which the confused answer is a wrong one.
    images, labels = (values[thousand[1] != 3][:200] for values in thousand)
    scores = []
    for precision in ("fp32", "bf16"):
        found = ATTACKS[attack](wrap(model), images, labels, 4 / 255, precision=precision, **budget)
        scores.append(accuracy(model, found, labels))
    assert abs(scores[0] - scores[1]) <= 0.02 and scores[0] < accuracy(model, images, labels)


class CoarseInBfloat16(nn.Module):
    """Answers the first class by a margin that brightness lowers: a small step lowers it by less
    than bfloat16 resolves."""

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.stack(
            [100 - images.mean((1, 2, 3)), *images.new_zeros(3, len(images))], dim=1
        )
        return logits.bfloat16().float() if torch.is_autocast_enabled("cpu") else logits


def test_an_image_whose_steps_bfloat16_does_not_resolve_is_attacked_in_float32():
    model, images, labels = (
        CoarseInBfloat16(),
        torch.full((2, 1, 4, 4), 0.2),
        torch.zeros(2, dtype=torch.int64),
    )
    budget = {"steps": 10, "loss": "margin", "push": True}
    assert (ATTACKS["pgd"](InBfloat16(model), images, labels, 4 / 255, **budget) == images).all()
    moved = ATTACKS["pgd"](model, images, labels, 4 / 255, precision="bf16", **budget)
    assert (margin(model(moved), labels) < margin(model(images), labels)).all()


def test_targeted_success_means_hitting_the_target(model, batch):
    images, labels = batch
    targets = (labels + 1) % 4
    for name in ("fgsm_targeted", "ifgsm_targeted", "pgd_targeted"):
        adversarial = run(name, model, images, labels, eps=4 / 255, targets=targets)
        closer = margin(model(adversarial), targets) > margin(model(images), targets)
        assert closer.float().mean() > 0.8, name
    hit = (
        model(run("pgd_targeted", model, images, labels, eps=0.5, targets=targets)).argmax(1)
        == targets
    )
    assert hit.float().mean() > 0.8
    # A targeted attack must not stop at just any wrong answer.
    wrong = model(run("pgd_targeted", model, images, labels, eps=0.5)).argmax(1) != labels
    assert wrong.float().mean() >= hit.float().mean()


def test_a_target_equal_to_the_truth_is_refused(model, batch):
    images, labels = batch
    with pytest.raises(ValueError, match="must differ"):
        ATTACKS["pgd_targeted"](model, images, labels, 0.1, targets=labels)


def test_clinically_worst_targets():
    assert clinical_targets(torch.arange(4)).tolist() == [3, 3, 0, 0]


def test_unsaturated_cross_entropy_has_the_direction_of_cross_entropy_where_that_vanishes():
    logits = torch.randn(64, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(4, (64,))
    ours = torch.autograd.grad(unsaturated_cross_entropy(logits, labels).sum(), logits)[0]
    theirs = torch.autograd.grad(
        nn.functional.cross_entropy(logits, labels, reduction="sum"), logits
    )[0]
    assert torch.allclose(
        nn.functional.normalize(ours, dim=1), nn.functional.normalize(theirs, dim=1), atol=1e-9
    )
    big = (torch.eye(4)[labels] * 1e4).requires_grad_(True)
    assert (
        torch.autograd.grad(nn.functional.cross_entropy(big, labels), big, retain_graph=True)[0]
        .abs()
        .max()
        == 0
    )
    assert torch.autograd.grad(unsaturated_cross_entropy(big, labels).sum(), big)[0].abs().max() > 0


# -- the linear oracle -----------------------------------------------------------------------------

#: Iterative full-gradient attacks on a margin, with a budget for the oracle.
ORACLE = {
    "pgd": {"steps": 20, "loss": "margin"},
    "pgd_targeted": {"steps": 20},
    "ifgsm": {"steps": 20, "loss": "margin"},
    "ifgsm_targeted": {"steps": 20},
    "mifgsm": {"steps": 20, "loss": "margin"},
    "pgd_l2": {"steps": 40},
    "deepfool": {"steps": 20},
    "fab_t": {"steps": 20},
    "apgd_t": {"steps": 20},
    "kryptonite": {"mask": torch.ones(1, 1, 8, 8)},
}


@pytest.mark.parametrize("name", sorted(ORACLE))
def test_iterative_attacks_come_within_a_quarter_of_the_linear_optimum(name):
    assert zoo.within_oracle(name, ORACLE[name])


def test_no_attack_is_stronger_than_the_linear_optimum():
    for name in ORACLE:
        assert not zoo.within_oracle(name, ORACLE[name], slack=0.97)


def test_the_linear_optimum_exposes_too_small_a_step():
    assert not zoo.within_oracle(
        "pgd", {"steps": 3, "step_size": 1e-5, "loss": "margin", "random_start": False}
    )


def test_fgsm_is_optimal_on_two_linear_classes():
    model, images, labels = zoo.linear_model(3, classes=2)
    for image, label, distance in zip(
        images[:, None],
        labels[:, None],
        zoo.linear_optimum(model, images, labels, "linf"),
        strict=True,
    ):
        assert (
            model(ATTACKS["fgsm"](model, image, label, 1.02 * float(distance))).argmax(1) != label
        )
        assert (
            model(ATTACKS["fgsm"](model, image, label, 0.98 * float(distance))).argmax(1) == label
        )


# -- against torchattacks and ART ------------------------------------------------------------------


@pytest.fixture(scope="module")
def thousand() -> tuple[Tensor, Tensor]:
    images, labels, _ = zoo.blobs(1000, seed=8)
    return torch.as_tensor(images).float() / 255, torch.as_tensor(labels)


@pytest.fixture(scope="module")
def art_classifier(model):
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        (1, zoo.SIDE, zoo.SIDE),
        4,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


def test_fgsm_predictions_equal_torchattacks_and_art(model, thousand, art_classifier):
    import torchattacks
    from art.attacks.evasion import FastGradientMethod

    images, labels = thousand
    eps = 4 / 255
    ours = model(run("fgsm", model, images, labels, eps)).argmax(1)
    theirs = model(torchattacks.FGSM(model, eps)(images, labels)).argmax(1)
    toolbox = FastGradientMethod(art_classifier, eps=eps).generate(images.numpy(), y=labels.numpy())
    assert 0.05 < (ours != labels).float().mean() < 0.95, (
        "the comparison says nothing where all or no images are misclassified"
    )
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, model(torch.as_tensor(toolbox)).argmax(1))


def test_pgd_agrees_with_torchattacks_and_art(model, thousand, art_classifier):
    import torchattacks
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    images, labels = thousand
    eps, step, steps = 3 / 255, 3 / 255 / 4, 10
    fixed = accuracy(
        model,
        run("pgd", model, images, labels, eps, steps=steps, step_size=step, random_start=False),
        labels,
    )
    started = accuracy(
        model, run("pgd", model, images, labels, eps, steps=steps, step_size=step), labels
    )

    def toolbox(starts: int) -> torch.Tensor:
        attack = ProjectedGradientDescentPyTorch(
            art_classifier,
            eps=eps,
            eps_step=step,
            max_iter=steps,
            batch_size=500,
            num_random_init=starts,
            verbose=False,
        )
        return torch.as_tensor(attack.generate(images.numpy(), y=labels.numpy()))

    assert 0.05 < fixed < 0.95
    assert (
        abs(
            fixed
            - accuracy(
                model,
                torchattacks.PGD(model, eps, step, steps, random_start=False)(images, labels),
                labels,
            )
        )
        <= 0.001
    )
    assert abs(fixed - accuracy(model, toolbox(0), labels)) <= 0.001
    assert (
        abs(
            started
            - accuracy(model, torchattacks.PGD(model, eps, step, steps)(images, labels), labels)
        )
        <= 0.005
    )
    assert abs(started - accuracy(model, toolbox(1), labels)) <= 0.005


# -- single attacks --------------------------------------------------------------------------------


def test_autoattack_runs_with_as_many_targets_as_other_classes(model, batch, monkeypatch):
    import pyautoattack

    seen = {}

    def short(self, images, labels, *, batch_size):
        seen.update(
            apgd=self.apgd_targeted.n_target_classes,
            fab=self.fab.n_target_classes,
            seed=self.seed,
            steps=(self.apgd.n_iter, self.apgd_targeted.n_iter, self.fab.n_iter),
            version=self.version,
            queries=self.square.n_queries,
            attacks=tuple(self.attacks_to_run),
        )
        return (images + 1e-3).clamp(0, 1), labels

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", short)
    for view, labels, targets in (
        (model, batch[1], 3),
        (GroupedClasses(model, THREE), group_labels(batch[1], THREE), 2),
    ):
        ATTACKS["autoattack"](view, batch[0], labels, 8 / 255, seed=7)
        assert (seen["apgd"], seen["fab"]) == (targets, targets)
    assert (
        seen["steps"] == (100, 100, 100)
        and seen["version"] == "standard"
        and seen["queries"] == 5000
    )
    assert seen["seed"] == 7 and seen["attacks"] == ("apgd-ce", "apgd-t", "fab-t", "square")


def test_autoattack_as_it_comes_breaks_on_four_classes(model, batch):
    from pyautoattack import AutoAttack

    attack = AutoAttack(model, eps=1e-4, seed=0, version="custom", attacks=["apgd-t"])
    with pytest.raises(IndexError):
        attack.run_standard_evaluation(*batch)


def test_training_perturbation_is_a_working_pgd_without_parameter_gradients(model, batch):
    images, labels = batch
    before = state_of(model)
    for loss, steps in (("ce", 1), ("ce", 5), ("kl", 5)):
        found = perturb_for_training(
            model,
            images,
            labels,
            8 / 255,
            steps=steps,
            loss=loss,
            generator=torch.Generator().manual_seed(0),
        )
        assert (
            (found - images).abs().max() <= 8 / 255 + 1e-6 and found.min() >= 0 and found.max() <= 1
        )
        assert not found.requires_grad
        losses = [nn.functional.cross_entropy(model(x), labels) for x in (images, found)]
        assert losses[1] > losses[0]
    after = state_of(model)
    assert same_state((*before[:4], after[4], after[5], after[6]), after)


def test_kryptonite_stays_in_its_region(model, batch):
    images, labels = batch
    mask = torch.zeros(len(images), 1, zoo.SIDE, zoo.SIDE)
    mask[:, :, 4:9, 5:12] = 1
    delta = run("kryptonite", model, images, labels, eps=0.3, mask=mask) - images
    assert (delta * (1 - mask)).abs().max() == 0
    assert delta.abs().max() > 0.1


def test_brain_mask_is_the_bright_piece_with_its_holes_filled():
    image = torch.zeros(1, 1, 32, 32)
    image[..., 8:24, 8:24] = 0.6
    image[..., 14:18, 14:18] = 0.0  # a ventricle
    image[..., 1:3, 1:3] = 0.6  # a speck
    mask = brain_mask(image)
    assert mask[0, 0, 15, 15] == 1 and mask[0, 0, 2, 2] == 0 and mask.sum() == 16 * 16
    assert brain_mask(torch.zeros(1, 1, 8, 8)).min() == 1


def test_otsu_thresholds_part_levels_of_gray():
    levels = np.repeat([0.1, 0.5, 0.9], [50, 30, 20])
    low, high = otsu_thresholds(levels, 2)
    assert 0.1 < low <= 0.5 < high <= 0.9
    assert 0.1 < otsu_thresholds(levels, value_range=(0.0, 1.0))[0] <= 0.5


@pytest.mark.parametrize(("name", "pixels"), [("one_pixel", 1), ("few_pixel", 5)])
def test_pixel_attacks_change_so_many_pixels_and_lower_the_margin(name, pixels, model, batch):
    images, labels = batch
    found = ATTACKS[name](model, images, labels, 1.0, generations=10, population=20)
    assert 1 <= perturbation_size(images, found, "l0").max() <= pixels
    assert margin(model(found), labels).mean() < margin(model(images), labels).mean()


def test_transfer_uses_the_source_alone(model, batch):
    images, labels = batch
    source = zoo.honest_model(1)
    asked = []
    handle = model.register_forward_hook(lambda *_: asked.append(1))
    found = ATTACKS["transfer"](model, images, labels, 8 / 255, source=source)
    handle.remove()
    assert not asked
    assert margin(source(found), labels).mean() < margin(source(images), labels).mean()


def test_images_outside_the_pixel_range_are_refused(model, batch):
    with pytest.raises(ValueError, match="raw pixels"):
        ATTACKS["fgsm"](model, batch[0] * 255, batch[1], 0.1)


# -- what people give it ---------------------------------------------------------------------------

UNTARGETED = {"noise", "pgd_clinical", "apgd_ce", "apgd_t", "square", "autoattack", "fab_t"}


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_attack_finds_the_same_inside_no_grad_and_inference_mode(name, mode, model, batch):
    images, labels = batch[0][:4], batch[1][:4]
    source = {"source": zoo.honest_model(1)} if name == "transfer" else {}
    expected = run(name, model, images, labels, **source)
    with mode():
        found = run(name, model, images.clone(), labels.clone(), **source)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", FAST)
def test_the_layout_of_a_tensor_in_memory_does_not_matter(name, model, batch):
    images, labels = batch[0][:4], batch[1][:4]
    transposed = images.transpose(2, 3).contiguous().transpose(2, 3)
    assert not transposed.is_contiguous() and torch.equal(transposed, images)
    assert torch.equal(run(name, model, transposed, labels), run(name, model, images, labels))


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_targets_are_aimed_at_or_refused(name, batch):
    images, labels = batch
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 4)).eval()
    with torch.no_grad():  # all classes are near each other everywhere
        model[1].weight *= 0.02
        model[1].bias.zero_()
        labels = model(images).argmax(1)
    targets = (labels + 2) % 4
    assert name not in UNTARGETED or not ATTACKS[name].targeted
    if not ATTACKS[name].targeted:
        with pytest.raises(ValueError, match="cannot be aimed"):
            run(name, model, images, labels, targets=targets)
        return
    source = {"source": model} if name == "transfer" else {}
    eps = 30 if ATTACKS[name].norm == "l2" else 0.5
    found = run(name, model, images, labels, eps=eps, targets=targets, **source)
    if name in ("few_pixel", "one_pixel", "hopskipjump"):  # too few queries to get there
        elsewhere = run(name, model, images, labels, eps=eps, targets=(labels + 1) % 4)
        assert not torch.equal(found, elsewhere), "another aim, another way"
    else:
        assert (model(found).argmax(1) == targets).any()


@pytest.mark.parametrize("name", ["few_pixel", "one_pixel", "kryptonite"])
def test_attacks_on_gray_images_refuse_colors(name):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)).eval()
    with pytest.raises(ValueError, match="one channel, not 3"):
        run(name, model, torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ["noise", "pgd", "square", "few_pixel", "kryptonite"])
@pytest.mark.parametrize("eps", [1.5, 4, 8.0, 255])
def test_an_eps_in_gray_levels_is_refused(name, eps, model, batch):
    with pytest.raises(ValueError, match=f"give {eps:g} / 255"):
        run(name, model, *batch, eps=eps)


def test_an_l2_eps_may_be_more_than_a_pixel(model, batch):
    assert run("pgd_l2", model, *batch, eps=1.5, steps=2).shape == batch[0].shape


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda images: (images * 255).byte(), "torch.uint8"),
        (lambda images: (images * 255).long(), "torch.int64"),
        (lambda images: images * 255, "raw pixels"),
        (lambda images: images * 2 - 1, "raw pixels"),
        (lambda images: images.masked_fill(images > images.mean(), torch.nan), "NaN"),
        (lambda images: images / 0, "must lie in|NaN"),
    ],
)
def test_what_are_no_pixels_is_refused(change, sentence, model, batch):
    with pytest.raises(ValueError, match=sentence):
        ATTACKS["pgd"](model, change(batch[0]), batch[1], 0.1)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int16])
def test_labels_may_be_any_whole_numbers(kind, model, batch):
    images, labels = batch
    assert torch.equal(
        run("pgd", model, images, labels.to(kind)), run("pgd", model, images, labels)
    )


@pytest.mark.parametrize("kind", [torch.float32, torch.bool])
def test_labels_that_are_no_numbers_of_classes_are_refused(kind, model, batch):
    with pytest.raises(ValueError, match="whole class numbers"):
        run("pgd", model, batch[0], batch[1].to(kind))


@pytest.mark.parametrize(
    "name, budget",
    [
        ("pgd", {"steps": 0}),
        ("pgd", {"restarts": 0}),
        ("square", {"queries": 0}),
        ("few_pixel", {"generations": -1}),
        ("apgd_t", {"steps": -3}),
    ],
)
def test_a_budget_of_nothing_is_refused(name, budget, model, batch):
    with pytest.raises(ValueError, match="expected 1 or more"):
        run(name, model, *batch, **budget)
