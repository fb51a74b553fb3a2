"""Each condition of an honest evaluation holds, and fails on a broken version of it; sham defenses
are flagged or broken; an interrupted evaluation continues to the same numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import fixtures_attacks as zoo
from utils.attacks.base import ATTACKS
from utils.config import make_config, parse_eps
from utils.evaluation.measures import (
    accuracy_curves,
    attack_images,
    direction_success,
    minimal_perturbations,
    pgd_convergence,
    sample_measures,
    transfer_matrix,
)
from utils.evaluation.plan import (
    VIEWS,
    AttackName,
    Stage,
    decides_robust_accuracy,
    other_norms_plan,
    suite_plan,
)
from utils.evaluation.predictions import (
    as_pixels,
    misclassified,
    model_digest,
    stratified_sample,
    worst_case,
)
from utils.evaluation.sanity import verdict
from utils.evaluation.sanity.attacks import attack_order, falls_with_eps
from utils.evaluation.suite import SuiteResult, evaluate_suite
from utils.pipeline.own_model import model_from_factory
from utils.prediction import predict
from utils.utils_funcs import UserError

CONFIG = make_config(
    "demo",
    "Resnet",
    pgd_steps=8,
    eps=("2/255", "4/255", "0.005"),
    sample=24,
    attack_batch=32,
    max_steps=40,
)
IMAGES, LABELS, PATIENTS = zoo.blobs(64, seed=11)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def evaluate(model: nn.Module, stages: list[Stage] | None = None, **options) -> SuiteResult:
    return evaluate_suite(model, IMAGES, LABELS, PATIENTS, CONFIG, stages=stages, **options)


@functools.cache
def result_of(make_model: Callable[[], nn.Module]) -> SuiteResult:
    """The whole suite against a model, evaluated once for all tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # some models draw random numbers
        return evaluate(make_model())


def honest_result() -> SuiteResult:
    return result_of(zoo.honest_model)


def check(
    name: str,
    make_model: Callable[[], nn.Module] = zoo.honest_model,
    stages: list[Stage] | None = None,
) -> bool:
    """Whether a check passed, for the honest model where none is given."""
    result = result_of(make_model) if stages is None else evaluate(make_model(), stages)
    return next(row["passed"] for row in result.sanity if row["check"] == name)


def pixels(count: int = 16) -> tuple[Tensor, Tensor]:
    return as_pixels(IMAGES[:count]), torch.as_tensor(LABELS[:count])


# -- the 21 conditions: a predicate, what satisfies it, and a broken version that must not ---------


def eps_zero_is_clean(attack: Callable[..., Tensor]) -> bool:
    images, labels = pixels()
    return torch.equal(attack(zoo.honest_model(), images, labels, 0.0), images)


def inside_the_ball_also_in_8_bits(to_8_bits: Callable[[Tensor], Tensor]) -> bool:
    images, labels = pixels()
    eps = 4 / 255
    adversarial = ATTACKS["pgd"](zoo.honest_model(), images, labels, eps)
    rounded = to_8_bits(adversarial * 255) / 255
    # Not the nearest 8-bit image: the attack would be weakened by up to a gray level.
    if (rounded - adversarial).abs().max() > 0.5 / 255 + 1e-6:
        return False
    return all(
        bool(
            ((x - images).abs() <= eps + 1e-6).all()
            and (x >= 0).all()
            and (x <= 1).all()
            and x.isfinite().all()
        )
        for x in (adversarial, rounded)
    )


def leaves_the_model_alone(attack: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> bool:
    model = zoo.honest_model()
    model[1].train()  # a BatchNorm that a careless train() or eval() of everything would disturb
    before = [module.training for module in model.modules()], model_digest(model)
    attack(model, *pixels())
    return before == (
        [module.training for module in model.modules()],
        model_digest(model),
    )


def careless_attack(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    model.train()
    return images + model(images).sum() * 0


def is_log_of_mean_probability(combine: Callable[[list[nn.Module]], nn.Module]) -> bool:
    members, images = [zoo.honest_model(0), zoo.honest_model(1)], pixels()[0].requires_grad_(True)
    ensemble = combine(members)
    mean = torch.stack([member(images).softmax(1) for member in members]).mean(0)
    if not torch.allclose(ensemble(images).softmax(1), mean, atol=1e-5):
        return False
    (whole,) = torch.autograd.grad(ensemble(images)[:, 0].sum(), images)
    (expected,) = torch.autograd.grad(mean.log()[:, 0].sum(), images)
    return torch.allclose(whole, expected, atol=1e-4)


class MeanOfLogits(zoo.MeanOfMembers):
    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images) for member in self.members]).mean(0)


def a_curve_does_not_rise(curve: tuple[float, ...]) -> bool:
    """Whether the check passes where these shares of the images are robust against PGD."""
    sweep = ("1/255", "2/255")
    logits = {
        (eps_text, "pgd8"): np.eye(4, dtype=np.float32)[(np.arange(100) >= 100 * share).astype(int)]
        for eps_text, share in zip(sweep, curve, strict=True)
    }
    labels = np.zeros(100, np.int64)
    (row,) = falls_with_eps(labels, logits, [Stage("pgd", "pgd8")], sweep)
    return row["passed"]


def counts_by_image(aggregate: Callable[[dict, np.ndarray], float]) -> bool:
    """No image is robust against two attacks that succeed on different halves."""
    labels = np.zeros(4, np.int64)
    right, wrong = np.eye(4, dtype=np.float32)[0], np.eye(4, dtype=np.float32)[1]
    logits = {
        ("4/255", "a"): np.stack([right, right, wrong, wrong]),
        ("4/255", "b"): np.stack([wrong, wrong, right, right]),
    }
    return aggregate(logits, labels) == 0


def counts_any_iterate(attack: Callable[..., Tensor]) -> bool:
    images, labels = torch.full((4, 1, 8, 8), 0.5), torch.zeros(4).long()
    model = zoo.OnTheWay()
    return bool((model(attack(model, images, labels, 8 / 255)).argmax(1) != labels).all())


def hits_its_targets(attack: Callable[..., Tensor]) -> bool:
    images, labels = pixels(32)
    targets, model = (labels + 2) % 4, zoo.honest_model()
    found = attack(model, images, labels, 0.3, targets=targets)
    return bool((model(found).argmax(1) == targets).float().mean() > 0.8)


def runs_on_four_classes(run: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> bool:
    try:
        run(zoo.honest_model(), *pixels(4))
    except IndexError:
        return False
    return True


def official_default(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    from pyautoattack.autopgd_base import APGDAttack_targeted

    return APGDAttack_targeted(model, n_iter=2, eps=1e-4, seed=0).perturb(images, labels)


def rescores_exactly(store: Callable[[np.ndarray], np.ndarray]) -> bool:
    result = honest_result()
    again = predict(zoo.honest_model(), torch.as_tensor(store(result.kept)))
    return bool(np.abs(again.numpy() - result.kept_logits).max() < 1e-5)


def counts_every_image(score: Callable[[np.ndarray, np.ndarray, np.ndarray], float]) -> bool:
    """One of four is a clean error and one is misclassified: two of four are robust, not two of
    three."""
    labels = np.zeros(4, np.int64)
    right, wrong = np.eye(4, dtype=np.float32)[0], np.eye(4, dtype=np.float32)[1]
    clean, attacked = np.stack([wrong, right, right, right]), np.stack([wrong, wrong, right, right])
    return score(clean, attacked, labels) == 0.5


def sees_one_image_at_a_time(attack: Callable[..., Tensor]) -> bool:
    """No choice of the attack depends on the other test images."""
    images, labels = pixels(12)
    model = zoo.honest_model()
    alone = torch.cat(
        [
            attack(model, x, y, 6 / 255)
            for x, y in zip(images.split(3), labels.split(3), strict=True)
        ]
    )
    return torch.allclose(attack(model, images, labels, 6 / 255), alone, atol=1e-6)


def tuned_on_the_test_set(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    tried = [
        ATTACKS["ifgsm"](model, images, labels, eps, steps=3, step_size=step)
        for step in (eps / 8, eps / 2, eps)
    ]
    return min(
        tried,
        key=lambda found: float(predict(model, found).gather(1, labels[:, None]).mean()),
    )


def attacked_as_one_and_through_members(options: dict) -> bool:
    members = {"a": zoo.honest_model(0), "b": zoo.honest_model(1)}
    config = dataclasses.replace(CONFIG, suite="standard", eps=("4/255",))
    plan = [
        stage
        for stage in suite_plan(config, tuple(members) if options["members"] else ())
        if stage.attack in ("pgd", "transfer") and stage.view == "four"
    ]
    result = evaluate(zoo.MeanOfMembers(*members.values()), plan, sources=members)
    robust = {
        name: (~misclassified(rows, LABELS)).mean() for (_, name), rows in result.logits.items()
    }
    worst = worst_case(result.logits, LABELS, "4/255").mean()
    return {"pgd8", "transfer_a", "transfer_b"} <= set(robust) and worst <= min(robust.values())


def fails_loudly(runner: Callable[[Callable[..., Tensor]], object]) -> bool:
    """Whether evaluations with useless attacks end in an error instead of a robust model."""
    for useless in (crashing, idle, endless):
        try:
            runner(useless)
        except UserError:
            continue
        return False
    return True


def crashing(model, images, labels, eps, **budget) -> Tensor:
    raise RuntimeError("out of memory")


def idle(model, images, labels, eps, **budget) -> Tensor:
    return images.clone()


def endless(model, images, labels, eps, **budget) -> Tensor:
    while True:
        model(images)


def our_runner(attack: Callable[..., Tensor]) -> SuiteResult:
    attack.norm, attack.kind, attack.package = "linf", "white-box", None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ATTACKS, "useless", attack)
        return evaluate(zoo.honest_model(), [Stage("useless", "useless")], time_limit=0.3)


def forgiving_runner(attack: Callable[..., Tensor]) -> float:
    images, labels = pixels()
    if attack is endless:
        return 1.0
    with contextlib.suppress(RuntimeError):
        images = attack(zoo.honest_model(), images, labels, 0.1)
    return float((predict(zoo.honest_model(), images).argmax(1) == labels).float().mean())


def levels_of(images: Tensor) -> Tensor:
    """Gray levels above middle gray, (N, H, W)."""
    return (images[:, 0] - 0.5) * 255


class ThinShell(nn.Module):
    """Answers wrongly only between 3 and 3 + w gray levels of extra brightness, where w halves from
    image to image: the finer the steps of an ascent, the more images are misclassified. Its
    gradient always points outwards.

    The left half is brighter by 40 levels times k, which no attack of 8/255 can hide: w = 3 / 2**k.
    """

    def forward(self, images: Tensor) -> Tensor:
        levels = levels_of(images)
        left, right = (
            levels[:, :, : SHELL_SIDE // 2].mean((1, 2)),
            levels[:, :, SHELL_SIDE // 2 :].mean((1, 2)),
        )
        width = 3 / 2 ** ((left - right) / 40).round().detach()
        wrong = (right > 3) & (right < 3 + width)
        lead = torch.where(wrong, -1.0, 10.0) - 0.1 * right
        others = torch.zeros_like(lead)
        return torch.stack([lead, others, others - 5, others - 5], 1)


class NearestClassOutOfReach(nn.Module):
    """The class that a linear estimate calls nearest is never reached within 8/255, and the second
    nearest is, along another direction: an ascent towards the nearest class finds nothing, however
    many its steps."""

    def forward(self, images: Tensor) -> Tensor:
        levels = levels_of(images)
        checkerboard = (torch.arange(SHELL_SIDE)[:, None] + torch.arange(SHELL_SIDE)) % 2 * 2 - 1
        brightness, contrast = levels.mean((1, 2)), (levels * checkerboard).mean((1, 2))
        nearest = 0.3 * brightness.clamp(max=4) + 0.1 * (brightness - 4).clamp(min=0) - 2
        lead = torch.zeros_like(nearest)
        return torch.stack([lead, nearest, 0.5 * contrast - 3.5, lead - 20], 1)


SHELL_SIDE = 16
#: Model → uint8 images (N, 1, 16, 16), all of class 0.
HARD_TO_FIND = {
    ThinShell: np.concatenate(
        [
            np.concatenate([np.full((8, 1, 16, 8), 128 + 40 * k), np.full((8, 1, 16, 8), 128)], 3)
            for k in range(3)
        ]
    ).astype(np.uint8),
    NearestClassOutOfReach: np.full((8, 1, 16, 16), 128, np.uint8),
}


@functools.cache
def hard_to_find(model: type[nn.Module], max_steps: int) -> SuiteResult:
    """The quick suite at 8/255, with PGD of five steps, against a model whose errors need more
    steps or more starts."""
    images = HARD_TO_FIND[model]
    config = dataclasses.replace(
        CONFIG, eps=("8/255",), headline_eps="8/255", pgd_steps=5, max_steps=max_steps, sample=8
    )
    return evaluate_suite(model(), images, np.zeros(len(images)), np.arange(len(images)), config)


def converges(what: str, model: type[nn.Module], max_steps: int) -> bool:
    """Whether the suite converged within `max_steps`, and its check says so."""
    result = hard_to_find(model, max_steps)
    row = next(row for row in result.sanity if row["check"] == f"converged_in_{what}")
    return (
        row["passed"]
        and not worst_case(result.logits, np.zeros(len(result.clean_logits), int), "8/255").any()
    )


TINY_STEP = [
    Stage("fgsm", "fgsm"),
    Stage("pgd", "pgd8", budget={"steps": 3, "step_size": 1e-4, "random_start": False}),
]
WITH_SQUARE = [
    Stage("pgd", "pgd8", budget={"steps": 8, "loss": "margin"}),
    Stage("square", "square", budget={"queries": 300}),
]

#: Condition → predicate, what must satisfy it, and a broken version that must not.
CONDITIONS: dict[str, tuple[Callable, object, object]] = {
    "01 eps 0 gives the clean predictions": (
        eps_zero_is_clean,
        ATTACKS["pgd"],
        lambda model, images, labels, eps: (images + 1 / 255).clamp(0, 1),
    ),
    "02 inside the ball, also after rounding to 8 bits": (
        inside_the_ball_also_in_8_bits,
        torch.round,
        torch.floor,
    ),
    "03 logits do not depend on the batch": (
        functools.partial(check, "batch_independent"),
        zoo.honest_model,
        zoo.DependsOnItsBatch,
    ),
    "04 an attack leaves the model as it was": (
        leaves_the_model_alone,
        lambda model, x, y: ATTACKS["pgd"](model, x, y, 0.1),
        careless_attack,
    ),
    "05 raw pixels in, logits out": (
        functools.partial(check, "logits_from_pixels"),
        zoo.honest_model,
        zoo.Probabilities,
    ),
    "06 an ensemble is the log of the mean probability": (
        is_log_of_mean_probability,
        lambda members: zoo.MeanOfMembers(*members),
        lambda members: MeanOfLogits(*members),
    ),
    "07 zero gradients are reported": (
        functools.partial(check, "gradients_present"),
        zoo.honest_model,
        zoo.ZeroGradient,
    ),
    "08 PGD is not above FGSM": (
        lambda stages: check("pgd_le_fgsm", stages=stages),
        None,
        TINY_STEP,
    ),
    "09a accuracy does not rise with eps": (a_curve_does_not_rise, (0.8, 0.4), (0.4, 0.8)),
    "09b eps 1 leaves nothing": (
        functools.partial(check, "eps_one_breaks_all"),
        zoo.honest_model,
        zoo.QuantizedInput,
    ),
    "10a the suite repeats until twice the steps misclassify no image, or says that it did not": (
        functools.partial(converges, "steps", ThinShell),
        400,
        5,
    ),
    "10b and until a start towards each other class misclassifies none": (
        functools.partial(converges, "restarts", NearestClassOutOfReach),
        400,
        5,
    ),
    "11 white box not above black box": (
        functools.partial(check, "white_box_le_black_box", stages=WITH_SQUARE),
        zoo.honest_model,
        zoo.QuantizedInput,
    ),
    "12 the mean of minima, not the minimum of means": (
        counts_by_image,
        lambda logits, labels: worst_case(logits, labels, "4/255").mean(),
        lambda logits, labels: min(
            (~misclassified(rows, labels)).mean() for rows in logits.values()
        ),
    ),
    "13 any successful iterate counts": (
        counts_any_iterate,
        functools.partial(ATTACKS["pgd"], steps=10, step_size=2 / 255, random_start=False),
        zoo.last_iterate_only,
    ),
    "14 targeted means hitting the target": (
        hits_its_targets,
        ATTACKS["pgd_targeted"],
        lambda model, images, labels, eps, targets: ATTACKS["pgd"](model, images, labels, eps),
    ),
    "15 AutoAttack runs with three targets": (
        runs_on_four_classes,
        lambda model, x, y: ATTACKS["apgd_t"](model, x, y, 1e-4, steps=2),
        official_default,
    ),
    "16a within a quarter of the linear optimum": (
        lambda budget: zoo.within_oracle("pgd", budget),
        {"loss": "margin"},
        {"steps": 3, "step_size": 1e-5, "random_start": False},
    ),
    "16b quantized input is flagged": (
        functools.partial(check, "gradients_present"),
        zoo.honest_model,
        zoo.QuantizedInput,
    ),
    "16c scaled logits are flagged": (
        functools.partial(check, "gradients_present"),
        zoo.honest_model,
        zoo.ScaledLogits,
    ),
    "17 kept images give the record again": (
        rescores_exactly,
        lambda kept: kept,
        lambda kept: (kept * 255).astype(np.uint8).astype(np.float32) / 255,
    ),
    "18 every image counts, a clean error as not robust": (
        counts_every_image,
        lambda clean, attacked, labels: (~misclassified(attacked, labels)).mean(),
        lambda clean, attacked, labels: (~misclassified(attacked, labels))[
            ~misclassified(clean, labels)
        ].mean(),
    ),
    "19 no choice looks at the test set": (
        sees_one_image_at_a_time,
        functools.partial(ATTACKS["ifgsm"], steps=3),
        tuned_on_the_test_set,
    ),
    "20 an ensemble is attacked as one, and from its members": (
        attacked_as_one_and_through_members,
        {"members": True},
        {"members": False},
    ),
    "21 a useless attack is a failed run": (fails_loudly, our_runner, forgiving_runner),
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_condition_holds(condition):
    predicate, sound, _ = CONDITIONS[condition]
    assert predicate(sound)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_condition_fails_on_a_broken_version(condition):
    predicate, _, broken = CONDITIONS[condition]
    assert not predicate(broken)


def test_rounds_double_their_steps_on_robust_images_until_one_finds_nothing():
    meta = hard_to_find(ThinShell, 400).meta["8/255", "pgd5"]
    rounds = meta["rounds"]
    assert [part["steps"] for part in rounds] == [5 * 2**k for k in range(len(rounds))] and len(
        rounds
    ) >= 3
    for earlier, later in zip(rounds, rounds[1:], strict=False):
        assert later["n_attacked"] == earlier["n_attacked"] - earlier["misclassified"]
    assert (
        rounds[0]["misclassified"]
        < meta["n_attacked"]
        == sum(part["misclassified"] for part in rounds)
    )
    assert meta["steps"] == 5, "the budget of the stage itself"


def test_an_image_that_no_round_misclassifies_keeps_its_right_answer_and_others_are_counted_once():
    result = hard_to_find(ThinShell, 5)
    truth = np.zeros(len(result.clean_logits), int)
    found = sum(part["misclassified"] for part in result.meta["8/255", "pgd5"]["rounds"])
    assert misclassified(result.logits["8/255", "pgd5"], truth).sum() == found < len(truth)


def test_a_stage_whose_steps_are_too_short_ends_with_the_errors_of_a_sound_one():
    """PGD that hardly moves misclassifies nothing however often it doubles its steps: the rounds
    take PGD's default step size."""
    corrected = evaluate(zoo.honest_model(), TINY_STEP)
    for eps_text in CONFIG.eps:
        robust = [
            worst_case(result.logits, LABELS, eps_text).sum()
            for result in (corrected, honest_result())
        ]
        assert abs(robust[0] - robust[1]) <= 1
    order = next(row for row in corrected.sanity if row["check"] == "pgd_le_fgsm")
    assert not order["passed"], "its first round is reported all the same"


def test_a_suite_without_a_repeated_attack_does_not_pass_as_converged():
    assert not check("converged_in_steps", stages=[Stage("fgsm", "fgsm")])


def test_every_eps_and_both_views_are_attacked_until_they_converge():
    config = dataclasses.replace(CONFIG, suite="standard")
    repeated = {
        (stage.attack, stage.view, stage.eps)
        for stage in suite_plan(config)
        if decides_robust_accuracy(stage)
    }
    views = ("four", "three")
    assert repeated == {("pgd", view, "every") for view in views} | {
        ("apgd_t", view, eps) for view in views for eps in ("2/255", "headline", "0.005")
    }
    figure = next(row for row in honest_result().sanity if row["check"] == "converged_in_steps")[
        "figure"
    ]
    assert figure.keys() == set(CONFIG.eps) and all(
        {"pgd8", "pgd8_merged"} == set(stages) for stages in figure.values()
    )


@pytest.mark.parametrize("more, passed", [(1, True), (2, False)])
def test_an_order_of_attacks_may_be_off_by_one_image_whatever_its_printed_figure(more, passed):
    """39 of 80 is 0.4875 and prints as 0.487: one image more must not count as more than one."""
    labels = np.zeros(80, np.int64)

    def robust(count: int) -> np.ndarray:
        return np.eye(4, dtype=np.float32)[np.where(np.arange(80) < count, 0, 1)]

    logits = {
        ("4/255", "noise"): robust(43),
        ("4/255", "fgsm"): robust(39),
        ("4/255", "pgd8"): robust(39 + more),
    }
    meta = {key: {"view": "four", "scope": "all"} for key in logits}
    table = attack_order(robust(43), labels, logits, meta, ["4/255"])
    rows = {row["check"]: row for row in table}
    assert rows["pgd_le_fgsm"]["passed"] is passed and rows["fgsm_le_noise"]["passed"]
    assert rows["pgd_le_fgsm"]["figure"]["4/255"][1] == 0.487


def test_an_honest_model_passes_every_check():
    result = honest_result()
    assert [row["check"] for row in result.sanity if not row["passed"]] == []
    json.dumps([result.sanity, list(result.meta.values())], allow_nan=False)
    assert len(result.sanity) >= 20 and "nothing speaks against" in verdict(result.sanity)
    assert all(
        set(row) == {"check", "passed", "figure", "note"} and isinstance(row["passed"], bool)
        for row in result.sanity
    )


# -- the zoo ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.ZOO)
def test_sham_defense_is_flagged_or_broken(name):
    result = result_of(zoo.ZOO[name])
    flagged = [row["check"] for row in result.sanity if not row["passed"]]
    balanced, honest = (
        np.mean([worst_case(logits, LABELS, "4/255")[k == LABELS].mean() for k in range(4)])
        for logits in (result.logits, honest_result().logits)
    )
    assert flagged or balanced <= honest, f"{name} passes as robust: {balanced:.0%} balanced"
    if flagged:
        assert "do not take these numbers" in verdict(result.sanity)


@pytest.mark.parametrize(
    ("defense", "flag"),
    [
        (zoo.RandomResizing, "same_every_time"),
        (zoo.ChangesItsMind, "same_every_time"),
        (zoo.KnowsItsAttacker, "same_under_attack"),
        (zoo.ChangesItsMode, "same_under_attack"),
        (zoo.ConstantAnswer, "not_constant"),
        (zoo.NonFiniteLogits, "finite_logits"),
        (zoo.QuantizedInput, "gradients_present"),
    ],
)
def test_the_flag_names_the_defect(defense, flag):
    assert not check(flag, defense)


@pytest.mark.parametrize("seed", range(20))
def test_an_attack_that_a_random_model_ends_at_once_is_no_failed_evaluation(seed):
    """Every image may be misclassified by chance when the attack begins: it then changes nothing,
    and the check of the model has to name the reason."""
    torch.manual_seed(seed)
    result = evaluate(zoo.RandomResizing(), [Stage("pgd", "pgd2", budget={"steps": 2})])
    assert "same_every_time" in [row["check"] for row in result.sanity if not row["passed"]]


def test_not_a_number_is_never_a_right_answer():
    result = evaluate(zoo.NonFiniteLogits(), [Stage("fgsm", "fgsm")])
    for view in VIEWS:
        assert misclassified(result.logits["0.005", "fgsm"], LABELS, view).all()


# -- the runner ------------------------------------------------------------------------------------


def test_every_stage_of_the_suites_keeps_the_contract():
    config = dataclasses.replace(
        CONFIG, suite="full", eps=("2/255", "4/255"), sample=8, attack_batch=64
    )
    short = {"apgd_t": {"steps": 10}, "square": {"queries": 50}}
    mask = torch.zeros(len(LABELS), 1, zoo.SIDE, zoo.SIDE)
    mask[:, :, 4:12, 4:12] = 1
    plan = [
        dataclasses.replace(stage, budget=short.get(stage.attack, stage.budget))
        for stage in suite_plan(config, ("other",), ("gradcam",))
        if stage.attack != "autoattack"
    ]
    result = evaluate_suite(
        zoo.honest_model(),
        IMAGES,
        LABELS,
        PATIENTS,
        config,
        stages=plan,
        sources={"other": zoo.honest_model(1)},
        masks={"gradcam": mask},
    )
    names = {name for _, name in result.logits}
    assert {
        "noise",
        "fgsm",
        "pgd8",
        "pgd8_8bit",
        "pgd8_merged",
        "pgd5_binary",
        "transfer_other",
        "pgd_targeted",
        "apgd_t",
        "apgd_t_merged",
        "square",
        "square_merged",
        "pgd_clinical",
        "kryptonite",
        "kryptonite_gradcam",
    } <= names
    for key, rows in result.logits.items():
        meta = result.meta[key]
        assert rows.shape == (len(LABELS), 4) and rows.dtype == np.float32
        outside = np.isnan(rows).any(1)
        assert outside.sum() == (len(LABELS) - config.sample if meta["scope"] == "sample" else 0)
        assert {
            "n_attacked",
            "seconds",
            "queries",
            "norm",
            "kind",
            "standing_before",
            "standing_after",
        } <= set(meta)
        assert meta["n_attacked"] == len(LABELS) or meta["scope"] != "all"
        assert meta["largest_perturbation"] <= parse_eps(key[0]) + 1e-6
    assert result.meta["4/255", "apgd_t"]["package"].startswith("pyautoattack ")
    assert result.meta["4/255", "apgd_t"]["n_attacked"] < len(LABELS)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("pgd20", ("pgd20", "four", False)),
        ("pgd20_merged", ("pgd20", "three", False)),
        ("pgd10_binary", ("pgd10", "binary", False)),
        ("pgd20_8bit", ("pgd20", "four", True)),
        ("apgd_t_float32_merged", ("apgd_t_float32", "three", False)),
        ("transfer_Resnet_atk", ("transfer_Resnet_atk", "four", False)),
    ],
)
def test_names_of_attacks_in_files_are_built_and_parsed(name, parts):
    assert AttackName.parse(name) == AttackName(*parts) and str(AttackName(*parts)) == name


def test_only_pgd_has_its_steps_in_its_name():
    names = ("pgd20_merged", "scan_pgd5", "apgd_t_float32", "noise")
    attacks = [AttackName.parse(name).without_steps for name in names]
    assert attacks == ["pgd", "scan_pgd", "apgd_t_float32", "noise"]


class BlindInBfloat16(zoo.Wrapped):
    """Right, but without a gradient or a change of margin to follow, as soon as it computes in
    bfloat16."""

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images).float()
        return (
            10 * F.one_hot(logits.argmax(1), 4).float()
            if torch.is_autocast_enabled("cpu")
            else logits
        )


@pytest.mark.parametrize("model", [zoo.honest_model, BlindInBfloat16])
def test_a_suite_in_bfloat16_ends_with_a_search_in_float32_and_reports_what_that_found(model):
    config = dataclasses.replace(CONFIG, suite="standard", eps=("2/255", "4/255"))
    plan = [
        stage
        for stage in suite_plan(config)
        if stage.attack in ("pgd", "fgsm") and stage.view != "binary"
    ]
    result = evaluate_suite(
        model(), IMAGES, LABELS, PATIENTS, config, stages=plan, precision="bf16"
    )
    check = next(row for row in result.sanity if row["check"] == "float32_finds_no_more")
    assert list(check["figure"]) == ["apgd_t_float32", "apgd_t_float32_merged"]
    assert check["passed"] == (model is zoo.honest_model) and (
        "float32" in verdict(result.sanity)
    ) == (not check["passed"])
    assert {
        name: meta["precision"] for (eps, name), meta in result.meta.items() if eps == "4/255"
    } == {
        "fgsm": "bf16",
        "pgd8": "bf16",
        "pgd8_8bit": "bf16",
        "pgd8_merged": "bf16",
        "apgd_t_float32": "fp32",
        "apgd_t_float32_merged": "fp32",
    }
    found, asked = check["figure"]["apgd_t_float32"]
    assert result.meta["4/255", "apgd_t_float32"]["n_attacked"] == asked > 0
    robust = {
        name: (~misclassified(rows, LABELS))[~np.isnan(rows).any(1)].sum()
        for (eps, name), rows in result.logits.items()
        if eps == "4/255"
    }
    assert (
        found <= asked
        and worst_case(result.logits, LABELS, "4/255").sum()
        <= (~misclassified(result.clean_logits, LABELS)).sum() - found
    )
    assert robust["apgd_t_float32"] == asked - found


def test_a_state_of_another_precision_is_not_continued(tmp_path):
    plan = [Stage("fgsm", "fgsm")]
    for precision in ("fp32", "bf16", "fp32"):
        evaluate(zoo.honest_model(), plan, state_dir=tmp_path, precision=precision)
    files = [path.name for path in tmp_path.glob("*/*fgsm*")]
    once = evaluate(zoo.honest_model(), plan)
    assert len(files) == 2 * sum(name == "fgsm" for _, name in once.logits) * 2, files


def test_skipped_images_carry_the_logits_that_misclassified_them():
    plan = [
        Stage("pgd", "pgd8", budget={"steps": 8}),
        Stage("square", "square", scope="standing", budget={"queries": 20}),
    ]
    result = evaluate_suite(
        zoo.honest_model(),
        IMAGES,
        LABELS,
        PATIENTS,
        dataclasses.replace(CONFIG, eps=("4/255",)),
        stages=plan,
    )
    wrong = misclassified(result.logits["4/255", "pgd8"], LABELS)
    assert wrong.any() and not wrong.all()
    assert np.array_equal(
        result.logits["4/255", "square"][wrong],
        result.logits["4/255", "pgd8"][wrong],
    )


def test_the_sample_leaves_the_rest_outside():
    result = evaluate(
        zoo.honest_model(),
        [Stage("fgsm", "fgsm"), Stage("pgd_l2", "pgd_l2", scope="sample", eps="0.5")],
    )
    rows = result.logits["0.5", "pgd_l2"]
    inside = stratified_sample(LABELS, PATIENTS, CONFIG.sample)
    assert np.isfinite(rows[inside]).all() and np.isnan(np.delete(rows, inside, axis=0)).all()
    assert result.meta["0.5", "pgd_l2"]["norm"] == "l2"
    assert result.meta["0.5", "pgd_l2"]["standing_before"] == (
        ~misclassified(result.clean_logits, LABELS)
    ).mean().round(4), "an error under an L-infinity attack must not count against another norm"


def test_other_norms_run_apart_from_the_worst_case():
    plan = [
        dataclasses.replace(
            stage,
            budget={
                **stage.budget,
                **({"generations": 2} if "pixel" in stage.attack else {"steps": 3}),
            },
        )
        for stage in other_norms_plan(CONFIG)
    ]
    result = evaluate(zoo.honest_model(), plan)
    assert {meta["norm"] for meta in result.meta.values()} == {"l2", "l0"}


def test_the_stratified_sample_spreads_over_classes_patients_and_slices():
    labels, patients = (
        np.repeat([0, 1, 2, 3], [100 * 8, 70 * 8, 28 * 8, 2 * 8]),
        np.repeat(np.arange(200), 8),
    )
    sample = stratified_sample(labels, patients, 40)
    counts = np.bincount(labels[sample], minlength=4)
    assert (
        len(sample) == len(set(sample)) == 40 and (counts >= 1).all() and abs(counts[0] - 20) <= 2
    )
    assert len(set(patients[sample][labels[sample] == 0])) == counts[0], (
        "a patient twice before every patient once"
    )
    assert np.array_equal(stratified_sample(labels, patients, 5000), np.arange(1600))


def test_an_interrupted_evaluation_continues_to_the_same_numbers(tmp_path):
    def dies_after(calls: int) -> nn.Module:
        model = zoo.honest_model()
        left = [calls]

        def count(*_):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        model.register_forward_hook(count)
        return model

    calls = []
    counted = zoo.honest_model()
    counted.register_forward_hook(lambda *_: calls.append(1))
    whole = evaluate(counted, None)
    needed = len(calls)
    for attempt in (needed // 4, needed // 2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(dies_after(attempt), state_dir=tmp_path)
    (next(iter(tmp_path.glob("*/*.npz"))).parent / ".half-written.npz.tmp").write_bytes(b"PK")
    calls.clear()
    resumed = evaluate(counted, state_dir=tmp_path)
    assert len(calls) < needed, "nothing was continued"
    assert whole.logits.keys() == resumed.logits.keys()
    for key in whole.logits:
        assert np.array_equal(whole.logits[key], resumed.logits[key])
        assert whole.meta[key] | {"seconds": 0} == resumed.meta[key] | {"seconds": 0}
    assert np.array_equal(whole.kept, resumed.kept) and whole.sanity == resumed.sanity


def test_state_of_another_model_or_other_images_is_not_continued(tmp_path):
    plan = [Stage("fgsm", "fgsm")]
    first = evaluate(zoo.honest_model(0), plan, state_dir=tmp_path)
    second = evaluate(zoo.honest_model(1), plan, state_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert not np.array_equal(first.logits["4/255", "fgsm"], second.logits["4/255", "fgsm"])

    class Flipped(zoo.Wrapped):
        flip = False

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images.flip(-1) if self.flip else images)

    model = Flipped()
    evaluate(model, plan, state_dir=tmp_path)
    model.flip = True  # the same weights under changed code
    changed = evaluate(model, plan, state_dir=tmp_path)
    assert np.array_equal(
        changed.logits["4/255", "fgsm"], evaluate(model, plan).logits["4/255", "fgsm"]
    )


@pytest.mark.parametrize(
    ("attack", "message"),
    [(crashing, "out of memory"), (idle, "changed none"), (endless, "out of time")],
)
def test_a_failed_attack_says_which_and_where(attack, message):
    with pytest.raises(UserError, match=message) as error:
        our_runner(attack)
    assert "useless at eps" in str(error.value) and "not a robust model" in str(error.value)


@pytest.mark.parametrize("images", [IMAGES.astype(np.float32), IMAGES[:, 0]])
def test_only_uint8_images_are_taken(images):
    with pytest.raises(UserError, match="uint8"):
        evaluate_suite(zoo.honest_model(), images, LABELS, PATIENTS, CONFIG)


def test_a_model_with_other_outputs_is_refused():
    with pytest.raises(UserError, match="expected 4 logits"):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(zoo.SIDE**2, 3)))


# -- curves, matrices, distributions ---------------------------------------------------------------


def test_curves_never_rise_and_the_worst_case_lies_below_all():
    curves = accuracy_curves(honest_result(), LABELS)
    assert {"noise", "fgsm", "pgd8", "worst_case"} <= set(curves)
    for name, robust in curves.items():
        assert (np.diff(robust.mean(1)) <= 0).all()
        assert (curves["worst_case"] <= robust).all(), name


def test_transfer_is_weaker_than_attacking_the_model_itself():
    matrix = transfer_matrix(
        {"a": zoo.honest_model(0), "b": zoo.honest_model(1)}, IMAGES, LABELS, 5 / 255, steps=8
    ).mean(2)
    assert matrix[0, 0] <= matrix[1, 0] and matrix[1, 1] <= matrix[0, 1] and matrix.shape == (2, 2)


def test_minimal_perturbations_agree_with_pgd():
    model, chosen = zoo.honest_model(), slice(0, 32)
    sizes = minimal_perturbations(model, IMAGES[chosen], LABELS[chosen], steps=20)
    clean_error = misclassified(predict(model, as_pixels(IMAGES[chosen])).numpy(), LABELS[chosen])
    assert np.array_equal(sizes == 0, clean_error)
    eps = float(np.median(sizes[~clean_error]))
    made = attack_images(model, as_pixels(IMAGES[chosen]), LABELS[chosen], "pgd_targeted", eps)
    wrong = misclassified(predict(model, made).numpy(), LABELS[chosen])
    assert abs(wrong.mean() - (sizes <= eps).mean()) <= 0.1


def test_directions_exist_only_where_there_is_a_class_to_go_to():
    moved = direction_success(zoo.honest_model(), IMAGES, LABELS, 8 / 255, steps=8)
    assert (
        np.isnan(moved["healthier"][LABELS == 0]).all()
        and np.isnan(moved["sicker"][LABELS == 3]).all()
    )
    assert np.nanmean(moved["sicker"]) > 0.2 and set(np.unique(moved["healthier"][LABELS > 0])) <= {
        0.0,
        1.0,
    }


def test_more_steps_and_restarts_leave_no_more_robust():
    robust = pgd_convergence(
        zoo.honest_model(), IMAGES, LABELS, 5 / 255, steps=(1, 10), restarts=(1, 2), restart_steps=5
    )
    assert robust["steps", 10].sum() <= robust["steps", 1].sum()
    assert robust["restarts", 2].sum() <= robust["restarts", 1].sum()


def test_the_measures_of_a_sample_are_json_of_its_own_rows():
    config = make_config(
        "cpu", "Resnet", eps=("5/255",), headline_eps="5/255", pgd_steps=4, sample=12
    )
    measures = sample_measures(zoo.honest_model(), IMAGES, LABELS, PATIENTS, config)
    rows = np.array(measures["rows"])
    assert (
        json.loads(json.dumps(measures, allow_nan=False)) == measures and measures["eps"] == "5/255"
    )
    assert np.array_equal(rows, stratified_sample(LABELS, PATIENTS, 12))
    assert [value is None for value in measures["healthier"]] == (LABELS[rows] == 0).tolist()
    clean_error = misclassified(
        predict(zoo.honest_model(), as_pixels(IMAGES[rows])).numpy(), LABELS[rows]
    )
    assert [size == 0 for size in measures["minimal_linf"]] == clean_error.tolist()
    assert {(part["kind"], part["count"]) for part in measures["convergence"]} >= {
        ("steps", 50),
        ("restarts", 5),
    }
    assert all(len(part["standing"]) == 12 for part in measures["convergence"])


def test_no_check_shows_a_model_an_empty_batch():
    """Some networks cannot shape an answer to no image."""

    class RefusesNoImage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = zoo.honest_model()

        def forward(self, images: Tensor) -> Tensor:
            assert len(images), "an empty batch"
            return self.model(images)

    rows = {row["check"]: row for row in evaluate(RefusesNoImage()).sanity}
    assert rows["eps_one_breaks_all"]["passed"]


def test_a_users_model_comes_from_a_factory(tmp_path, monkeypatch):
    (tmp_path / "their_model.py").write_text(
        "from torch import nn\n\nbuild = nn.Flatten\nwrong = int\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(model_from_factory("their_model:build"), nn.Module)
    for spec, message in (
        ("no_such_module:f", "gave no model"),
        ("their_model:absent", "gave no model"),
        ("their_model:wrong", "int"),
    ):
        with pytest.raises(UserError, match=message):
            model_from_factory(spec)
