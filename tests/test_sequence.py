"""sequence: a patient's ordered slices as one scan, and attacks on the whole of it."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch import nn

from utils import sequence
from utils.attacks.base import group_labels, group_logits, margin
from utils.class_groups import BINARY
from utils.sequence import attacks
from utils.training import macro_cross_entropy
from utils.utils_funcs import UserError

FEATURES = 10


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are tiny: a second thread only waits, and on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Pixels(nn.Module):
    """A backbone of one smooth layer: features (N, D) from pixels (N, 1, H, W)."""

    def __init__(self, side: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(side * side, FEATURES, generator=torch.Generator().manual_seed(1))
        )

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return ((images.flatten(1) - 0.5) @ self.weight).tanh()


def some_scans(
    patients: int = 24, slices: int = 8, side: int = 6, seed: int = 0, shuffled: bool = True
) -> sequence.Scans:
    """Scans of different length, whose class shows in the brightness of slices, later ones more."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for patient in range(patients):
        label, count = patient % 4, slices - patient % 3
        for place in range(count):
            image = 0.4 + 0.05 * torch.randn(1, side, side, generator=generator)
            image[:, : side // 2] += 0.15 * label * place / slices
            rows.append((image.clamp(0, 1), label, patient, place))
    if shuffled:
        rows = [rows[k] for k in torch.randperm(len(rows), generator=generator)]
    return sequence.gather_scans(
        torch.stack([row[0] for row in rows]),
        *(torch.tensor([row[k] for row in rows]) for k in (1, 2, 3)),
    )


def scan_model(name: str, seed: int = 0) -> sequence.ScanModel:
    torch.manual_seed(seed)
    return sequence.ScanModel(
        Pixels(),
        sequence.build_aggregator(name, FEATURES),
        torch.zeros(FEATURES),
        torch.ones(FEATURES),
    ).eval()


# -- scans --------------------------------------------------------------------------------------


def test_slices_come_back_in_body_order_and_shorter_scans_are_masked():
    values = torch.tensor([[5.0], [3.0], [9.0], [7.0]])
    found = sequence.gather_scans(
        values, torch.tensor([1, 1, 0, 1]), torch.tensor([4, 4, 2, 4]), torch.tensor([10, 2, 0, 31])
    )
    assert found.patients.tolist() == [2, 4] and found.labels.tolist() == [0, 1]
    assert found.mask.tolist() == [[True, False, False], [True, True, True]]
    assert found.values[1].flatten().tolist() == [3.0, 5.0, 7.0] and found.values[
        0
    ].flatten().tolist() == [9.0, 0.0, 0.0]


@pytest.mark.parametrize("slices", [[0, 1, -1], [0, 1, 1]])
def test_a_patient_without_slice_order_is_refused(slices):
    with pytest.raises(UserError, match="Patient 7 has no slice order"):
        sequence.gather_scans(
            torch.zeros(3, 2),
            torch.zeros(3, dtype=torch.int64),
            torch.full((3,), 7),
            torch.tensor(slices),
        )


def test_slices_of_unknown_patients_and_of_two_classes_are_refused():
    labels, order = torch.tensor([0, 1]), torch.tensor([0, 1])
    with pytest.raises(UserError, match="no known patient"):
        sequence.gather_scans(torch.zeros(2, 2), labels, torch.tensor([-1, 3]), order)
    with pytest.raises(UserError, match="2 classes"):
        sequence.gather_scans(torch.zeros(2, 2), labels, torch.tensor([3, 3]), order)


# -- aggregators --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sequence.AGGREGATORS)
def test_an_answer_does_not_depend_on_the_other_patients_of_the_batch(name):
    model, patients = scan_model(name), some_scans()
    with torch.no_grad():
        together = model(patients.values, patients.mask)
        for row in (0, 5, 11):
            count = int(patients.mask[row].sum())
            part = slice(row, row + 1), slice(count)
            alone = model(patients.values[part], patients.mask[part])
            assert torch.allclose(alone[0], together[row], atol=1e-5), (name, row)
    order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.allclose(
            model(patients.values[order], patients.mask[order]), together[order], atol=1e-5
        )


@pytest.mark.parametrize("name", sequence.AGGREGATORS)
def test_fewer_slices_are_accepted_wherever_they_are_missing(name):
    model, patients = scan_model(name), some_scans(patients=4)
    thinned = patients.mask.clone()
    thinned[:, 2] = False
    packed = (
        patients.values[:, [0, 1, *range(3, patients.values.shape[1])]],
        patients.mask[:, [0, 1, *range(3, patients.mask.shape[1])]],
    )
    with torch.no_grad():
        one = model(patients.values[:1, :1], patients.mask[:1, :1])
        assert one.shape == (1, 4) and bool(one.isfinite().all())
        if name != "transformer":  # which knows the position of a slice
            assert torch.allclose(model(patients.values, thinned), model(*packed), atol=1e-5)


def test_masked_values_change_nothing():
    patients = some_scans(patients=6)
    filled = patients.values.clone()
    filled[~patients.mask] = 0.9
    for name in sequence.AGGREGATORS:
        model = scan_model(name)
        with torch.no_grad():
            assert torch.allclose(
                model(filled, patients.mask), model(patients.values, patients.mask), atol=1e-6
            ), name


def test_order_matters_to_the_recurrent_network_and_not_to_the_mean():
    patients = some_scans(patients=4, slices=8)
    patients = patients.pick([0, 3])  # of full length
    turned = patients.values.flip(1)
    with torch.no_grad():
        for name, same in (
            ("mean", True),
            ("attention", True),
            ("gru", False),
            ("transformer", False),
        ):
            model = scan_model(name)
            assert (
                torch.allclose(
                    model(turned, patients.mask), model(patients.values, patients.mask), atol=1e-4
                )
                == same
            ), name


def test_the_mean_is_the_mean_of_the_slices_probabilities():
    model, patients = scan_model("mean"), some_scans(patients=4)
    with torch.no_grad():
        found = model(patients.values, patients.mask).softmax(1)
        for row in range(4):
            slices = patients.values[row][patients.mask[row]]
            each = model.aggregator.head(model.backbone.features(slices)).softmax(1)
            assert torch.allclose(found[row], each.mean(0), atol=1e-6)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="Unknown aggregator 'lstm'"):
        sequence.build_aggregator("lstm", 3)
    with pytest.raises(UserError, match="Unknown choice"):
        patients = some_scans(patients=2)
        sequence.slice_budgets(
            scan_model("mean"),
            patients.values,
            patients.mask,
            patients.labels,
            0.1,
            (1,),
            choice="best",
        )


# -- training -----------------------------------------------------------------------------------


def featured(part: sequence.Scans) -> sequence.Scans:
    model = scan_model("mean")
    with torch.no_grad():
        return sequence.Scans(
            5 * model.features(part.values, part.mask), part.mask, part.labels, part.patients
        )


@pytest.mark.parametrize("name", sequence.AGGREGATORS)
def test_an_aggregator_learns_repeats_itself_and_leaves_the_random_state(name):
    everyone = featured(some_scans(patients=80, seed=1))
    train, validation = everyone.pick(range(60)), everyone.pick(range(60, 80))
    state = torch.get_rng_state()
    model, outcome = sequence.fit_aggregator(name, train, validation, epochs=30, seed=4)
    assert torch.equal(state, torch.get_rng_state()) and not model.training
    with torch.no_grad():
        logits = model(validation.values, validation.mask)
    assert (logits.argmax(1) == validation.labels).float().mean() > 0.5, "chance is a quarter"
    assert outcome["score"] == outcome["history"][-1]["score"]
    assert macro_cross_entropy(logits, validation.labels) == pytest.approx(
        outcome["score"], abs=1e-3
    )
    again, _ = sequence.fit_aggregator(name, train, validation, epochs=30, seed=4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", sequence.AGGREGATORS)
def test_a_fit_depends_neither_on_threads_nor_on_the_last_bits_of_the_features(name):
    everyone = featured(some_scans(patients=60, seed=1))
    noise = 1e-6 * torch.randn(everyone.values.shape, generator=torch.Generator().manual_seed(9))
    moved = dataclasses.replace(everyone, values=everyone.values + noise * everyone.mask[..., None])
    assert not torch.equal(moved.values, everyone.values)
    threads, fits = torch.get_num_threads(), []
    try:
        for count, patients in ((1, everyone), (2, everyone), (2, moved)):
            torch.set_num_threads(count)
            state = torch.get_rng_state()
            fits.append(
                sequence.fit_aggregator(
                    name, patients.pick(range(44)), patients.pick(range(44, 60)), epochs=12
                )[0]
            )
            assert torch.get_num_threads() == count and torch.equal(state, torch.get_rng_state())
    finally:
        torch.set_num_threads(threads)
    one, two, third = fits
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        logits, other = (model(everyone.values, everyone.mask) for model in (one, third))
    assert (
        torch.equal(logits.argmax(1), other.argmax(1))
        and float((logits - other).abs().max()) < 1e-2
    )


def test_a_fit_that_diverges_leaves_threads_and_random_state():
    everyone = featured(some_scans(patients=12))
    broken = dataclasses.replace(everyone, values=1e6 * everyone.values)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        torch.set_num_threads(2)
        with pytest.raises(UserError, match="is not finite"):
            sequence.fit_aggregator(
                "mean", broken.pick(range(8)), broken.pick(range(8, 12)), epochs=1
            )
        assert torch.get_num_threads() == 2 and torch.equal(state, torch.get_rng_state())
    finally:
        torch.set_num_threads(threads)


def test_a_fit_keeps_its_last_epoch_and_chooses_none():
    everyone = featured(some_scans(patients=24))
    model, outcome = sequence.fit_aggregator(
        "mean", everyone.pick(range(16)), everyone.pick(range(16, 24)), epochs=4
    )
    assert set(outcome) == {"history", "score"}
    assert [epoch["epoch"] for epoch in outcome["history"]] == [1, 2, 3, 4]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_no_patient_may_be_in_training_and_validation():
    everyone = featured(some_scans(patients=12))
    with pytest.raises(UserError, match="Patient 5 is in training and validation"):
        sequence.fit_aggregator("mean", everyone.pick(range(6)), everyone.pick(range(5, 12)))


def test_dropping_slices_leaves_every_patient_one():
    mask = torch.zeros(200, 5, dtype=torch.bool)
    mask[:, 0] = True
    mask[100:] = True
    thinned = sequence.drop_slices(mask, torch.Generator().manual_seed(0))
    assert bool((thinned <= mask).all()) and bool(thinned.any(1).all())
    assert thinned[100:].sum() < mask[100:].sum()


# -- attacks ------------------------------------------------------------------------------------


def attack_four(model, pixels, mask, labels, eps, *, steps=20, allowed=None):
    return sequence.attack_scan(
        model, pixels, mask, labels, eps, sequence.ScanAttack("four", steps), allowed=allowed
    )


@functools.cache
def trained(name: str) -> sequence.ScanModel:
    everyone = featured(some_scans(patients=80, seed=1))
    reader, _ = sequence.fit_aggregator(
        name, everyone.pick(range(60)), everyone.pick(range(60, 80)), epochs=30
    )
    return sequence.ScanModel(
        Pixels(), reader, torch.zeros(FEATURES), torch.full((FEATURES,), 1 / 5)
    ).eval()


def attacked(name: str = "gru"):
    """A trained model, and pixels, mask and labels of patients; the labels are its answers."""
    patients, model = some_scans(patients=40, seed=2), trained(name)
    with torch.no_grad():
        labels = model(patients.values, patients.mask).argmax(1)
    return model, patients.values, patients.mask, labels


@pytest.mark.parametrize("name", sequence.AGGREGATORS)
def test_a_scan_attack_stays_inside_the_ball_and_on_existing_slices(name):
    model, pixels, mask, labels = attacked(name)
    made, logits = attack_four(model, pixels, mask, labels, 0.02, steps=5)
    assert (
        float((made - pixels).abs().max()) <= 0.02 + 1e-6
        and float(made.min()) >= 0
        and float(made.max()) <= 1
    )
    assert torch.equal(made[~mask], pixels[~mask])
    with torch.no_grad():
        assert torch.allclose(model(made, mask), logits, atol=1e-5), (
            "the logits are those of the images"
        )
    few = torch.zeros_like(mask)
    few[:, 1] = True
    made, _ = attack_four(model, pixels, mask, labels, 0.02, steps=5, allowed=few)
    assert (
        torch.equal(made[:, 0], pixels[:, 0])
        and torch.equal(made[:, 2:], pixels[:, 2:])
        and not torch.equal(made[:, 1], pixels[:, 1])
    )


def test_no_budget_changes_nothing_and_modes_and_gradients_stay():
    model, pixels, mask, labels = attacked()
    model.train()
    made, logits = attack_four(model, pixels, mask, labels, 0.02, allowed=torch.zeros_like(mask))
    assert model.training and all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )
    model.eval()
    with torch.no_grad():
        assert torch.equal(made, pixels) and torch.allclose(logits, model(pixels, mask), atol=1e-6)
    made, _ = attack_four(model, pixels, mask, labels, 0.0)
    assert torch.equal(made, pixels)


@pytest.mark.parametrize("name", sequence.AGGREGATORS)
@pytest.mark.parametrize("choice", ["gradient", "random"])
def test_the_slice_budget_curve_starts_clean_ends_at_the_full_attack_and_never_rises(name, choice):
    model, pixels, mask, labels = attacked(name)
    labels = labels.clone()
    labels[:3] = (labels[:3] + 1) % 4  # clean errors
    budgets = (0, 1, 2, 4, 8)
    least = sequence.slice_budgets(
        model, pixels, mask, labels, 0.008, budgets, steps=10, choice=choice, view="four"
    )
    curve = sequence.robust_curve(least, budgets)
    with torch.no_grad():
        clean = (model(pixels, mask).argmax(1) == labels).numpy()
    assert np.array_equal(curve[0], clean) and clean.sum() == len(labels) - 3
    full = (
        attack_four(model, pixels, mask, labels, 0.008, steps=10)[1].argmax(1) == labels
    ).numpy()
    assert np.array_equal(curve[-1], full)
    assert 0 < full.sum() < clean.sum(), (
        "the check says nothing where all or no patients are robust"
    )
    assert all((later <= earlier).all() for earlier, later in zip(curve, curve[1:], strict=False))
    assert len({int(step.sum()) for step in curve}) > 2


def test_the_gradient_chooses_better_slices_than_chance():
    model, pixels, mask, labels = attacked("gru")
    greedy, random_ = (
        sequence.slice_budgets(
            model, pixels, mask, labels, 0.008, (1, 2, 4, 8), steps=10, choice=choice, view="four"
        )
        for choice in ("gradient", "random")
    )
    flipped = greedy >= 0
    assert torch.equal(flipped, random_ >= 0)
    assert greedy[flipped].float().mean() < random_[flipped].float().mean()


def test_slices_are_chosen_by_the_view_that_is_attacked():
    """The four-class margin of this scan, between Mild and Moderate, depends on the first slice
    alone; its three-class decision on the second."""

    class Brightness(nn.Module):
        def features(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).mean(1, keepdim=True) - 0.5

    class Reader(nn.Module):
        def forward(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            first, second = features[:, 0, 0], features[:, 1, 0]
            return torch.stack(
                [second * 0 - 20, 30 * second - 2, second * 0, 10 * first - 0.1], dim=1
            )

    model = sequence.ScanModel(Brightness(), Reader(), torch.zeros(1), torch.ones(1)).eval()
    given = (
        model,
        torch.full((1, 2, 1, 2, 2), 0.5),
        torch.ones(1, 2, dtype=torch.bool),
        torch.tensor([2]),
    )
    four, three = (sequence.slice_gains(*given, view=view)[0] for view in ("four", "three"))
    assert four[0] > four[1] == 0 and three[1] > three[0]
    assert sequence.slice_budgets(*given, 0.1, (1,), steps=40).tolist() == [1], (
        "one slice is enough, the right one"
    )


def test_random_slices_do_not_depend_on_which_other_patients_are_flipped():
    model, pixels, mask, labels = attacked("attention")
    options = {"steps": 5, "choice": "random", "view": "four", "seed": 3}
    together = sequence.slice_budgets(model, pixels, mask, labels, 0.02, (1, 2, 4), **options)
    turned = labels.clone()
    turned[1::2] = (turned[1::2] + 1) % 4  # clean errors, left out before any slice is drawn
    assert torch.equal(
        sequence.slice_budgets(model, pixels, mask, turned, 0.02, (1, 2, 4), **options)[::2],
        together[::2],
    )


def test_a_scan_attack_does_not_depend_on_the_other_patients():
    model, pixels, mask, labels = attacked("attention")
    together = attack_four(model, pixels, mask, labels, 0.03, steps=5)[1]
    alone = attack_four(model, pixels[4:5], mask[4:5], labels[4:5], 0.03, steps=5)[1]
    assert torch.allclose(alone[0], together[4], atol=1e-3)


# -- each view attacked separately --------------------------------------------------------------


class Halves(nn.Module):
    """A slice's logits from the brightness of its halves: the upper one changes Moderate, the lower
    one Very mild."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.0, 0.0], [0.0, 30.0], [0.0, 0.0], [10.0, 0.0]]))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        halves = (
            torch.stack([images[:, 0, :1].mean((1, 2)), images[:, 0, 1:].mean((1, 2))], dim=1) - 0.5
        )
        return halves @ self.weight.T + torch.tensor([-20.0, -2.0, 0.0, -0.1])


class MeanLogits(nn.Module):
    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return features.sum(1) / mask.sum(1, keepdim=True)


def count_queries(model: sequence.ScanModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets an element whenever the model is asked about a changed scan."""
    queries, reread = [], model.reread
    monkeypatch.setattr(model, "reread", lambda *given: (queries.append(1), reread(*given))[1])
    return queries


def test_mild_called_moderate_is_not_taken_for_robustness_in_three_classes(monkeypatch):
    model = sequence.ScanModel(Halves(), MeanLogits(), torch.zeros(4), torch.ones(4)).eval()
    pixels, mask, labels = (
        torch.full((1, 3, 1, 2, 2), 0.5),
        torch.ones(1, 3, dtype=torch.bool),
        torch.tensor([2]),
    )
    queries, answers, count = count_queries(model, monkeypatch), {}, {}
    for view in ("four", "three"):
        queries.clear()
        answers[view] = sequence.attack_scan(
            model, pixels, mask, labels, 0.1, sequence.ScanAttack(view, 40)
        )[1]
        count[view] = len(queries)
    truth = sequence.scan_labels(labels, "three")
    assert sequence.scan_decisions(answers["four"], "four").tolist() == [3], "Mild became Moderate"
    assert torch.equal(sequence.scan_decisions(answers["four"], "three"), truth), (
        "which are one answer of three"
    )
    assert (
        sequence.scan_decisions(answers["three"], "three").tolist() == [1]
        and count["three"] > 3 * count["four"]
    )
    # The budget curve counts the answer of three classes by default.
    least = {
        view: sequence.slice_budgets(model, pixels, mask, labels, 0.1, (1, 2), steps=40, **view_)
        for view, view_ in (
            ("four", {"view": "four"}),
            ("three", {"view": "three"}),
            ("default", {}),
        )
    }
    assert least["default"].tolist() == least["three"].tolist() == [3] and least[
        "four"
    ].tolist() == [1]


VIEWS = ("four", "three", "binary")


def robust(logits: torch.Tensor, labels: torch.Tensor, view: str) -> torch.Tensor:
    return sequence.scan_decisions(logits, view) == sequence.scan_labels(labels, view)


@pytest.mark.parametrize("view", VIEWS)
def test_given_the_scans_of_other_views_an_attack_is_not_weaker_than_they_are(view):
    model, pixels, mask, labels = attacked("attention")
    eps, scans, logits = 0.012, {}, {}
    for other in VIEWS:
        if other != view:
            attack = sequence.ScanAttack(other, 10, push=other == "binary")
            scans[other], logits[other] = sequence.attack_scan(
                model, pixels, mask, labels, eps, attack
            )
    weak = sequence.ScanAttack(view, 1, push=view == "binary")
    alone = robust(
        sequence.attack_scan(model, pixels, mask, labels, eps / 4, weak)[1], labels, view
    )
    made, answers = sequence.attack_scan(
        model, pixels, mask, labels, eps, weak, candidates=list(scans.values())
    )
    left = robust(answers, labels, view)
    assert all(bool((left <= robust(found, labels, view)).all()) for found in logits.values())
    assert bool(
        (
            alone & ~torch.stack([robust(found, labels, view) for found in logits.values()]).all(0)
        ).any()
    ), "they misclassified patients that this attack alone did not"
    assert left.sum() > 0, "the check says nothing where no patient is robust"
    assert float((made - pixels).abs().max()) <= eps + 1e-6
    with torch.no_grad():
        assert torch.allclose(model(made, mask), answers, atol=1e-5)


def test_a_pushed_attack_goes_on_below_its_first_success():
    model, pixels, mask, labels = attacked("attention")
    margins, wrong = {}, {}
    for push in (False, True):
        answers = sequence.attack_scan(
            model, pixels, mask, labels, 0.02, sequence.ScanAttack("binary", 10, push=push)
        )[1]
        margins[push] = margin(group_logits(answers, BINARY), group_labels(labels, BINARY))
        wrong[push] = ~robust(answers, labels, "binary")
    flipped = wrong[False]
    assert bool(flipped.any()) and bool((wrong[False] <= wrong[True]).all())
    assert bool((margins[True] <= margins[False] + 1e-6).all()) and bool(
        (margins[True][flipped] < margins[False][flipped] - 0.1).any()
    )
    # A patient misclassified without any attack is pushed as well, and else left as is. Wrong in
    # the binary view: the other classes together may outweigh an answer Non among four.
    with torch.no_grad():
        turned = 1 - group_logits(model(pixels[:4], mask[:4]), BINARY).argmax(1)
    given = model, pixels[:4], mask[:4], turned, 0.02
    left, pushed = (
        sequence.attack_scan(*given, sequence.ScanAttack("binary", 5, push=push))
        for push in (False, True)
    )
    assert torch.equal(left[0], pixels[:4])
    low, lower = (
        margin(group_logits(answers, BINARY), group_labels(turned, BINARY))
        for _, answers in (left, pushed)
    )
    assert bool((lower < low).all())


@pytest.mark.parametrize("momentum", [None, sequence.MOMENTUM])
def test_random_starts_follow_each_patients_seed(momentum, monkeypatch):
    model, pixels, mask, labels = attacked("attention")
    eps, few, seeds = 0.004, [3, 0, 8, 5], [11, 12, 13, 14]
    # Pushed, so that every attempt is made whether or not an earlier one succeeded.
    attack = sequence.ScanAttack("four", 2, attempts=3, momentum=momentum, push=True)
    starts, random_scan = [], sequence.random_scan

    def noted(*given):
        starts.append(random_scan(*given))
        return starts[-1]

    def run(rows: list[int], seeds: list[int] | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Adversarial scans, and the random starts of all attempts."""
        starts.clear()
        scans, _ = sequence.attack_scan(
            model, pixels[rows], mask[rows], labels[rows], eps, attack, seeds=seeds
        )
        return scans, list(starts)

    monkeypatch.setattr(attacks, "random_scan", noted)
    together, of_all = run(few, seeds)
    alone, of_one = run(few[2:3], seeds[2:3])
    reversed_, _ = run(few[::-1], seeds[::-1])
    _, of_another = run(few[2:3], [99])
    _, of_none = run(few[2:3], None)
    _, of_zero = run(few[2:3], [0])
    assert len(of_all) == 2 * len(few) and len(of_one) == 2
    assert torch.equal(alone[0], together[2]) and torch.equal(reversed_, together.flip(0))
    assert all(torch.equal(a, b) for a, b in zip(of_one, of_all[4:6], strict=True))
    assert not torch.equal(*of_one)
    assert not any(torch.equal(a, b) for a, b in zip(of_one, of_another, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(of_none, of_zero, strict=True))
    clean, absent = pixels[few[2:3]], ~mask[few[2:3]]
    for start in of_one:
        assert float((start - clean).abs().max()) <= eps + 1e-6
        assert torch.equal(start[absent], clean[absent])
