"""`utils/sequence.py`: a person's ordered slices as one study, and attacks on the whole of it."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from utils import sequence
from utils.training import macro_cross_entropy
from utils.utils_funcs import StudyError

FEATURES = 10


class Pixels(nn.Module):
    """A backbone of one smooth layer: features (N, D) from pixels (N, 1, H, W)."""

    def __init__(self, side: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(side * side, FEATURES, generator=torch.Generator().manual_seed(1)))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return ((images.flatten(1) - 0.5) @ self.weight).tanh()


def studies(people: int = 24, slices: int = 8, side: int = 6, seed: int = 0, shuffled: bool = True) -> sequence.Studies:
    """People whose class shows in the brightness of their slices, the later the more; of different length."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for person in range(people):
        label, count = person % 4, slices - person % 3
        for place in range(count):
            image = 0.4 + 0.05 * torch.randn(1, side, side, generator=generator)
            image[:, : side // 2] += 0.15 * label * place / slices
            rows.append((image.clamp(0, 1), label, person, place))
    if shuffled:
        rows = [rows[k] for k in torch.randperm(len(rows), generator=generator)]
    return sequence.gather_studies(torch.stack([row[0] for row in rows]), *(torch.tensor([row[k] for row in rows]) for k in (1, 2, 3)))


def study_model(name: str, seed: int = 0) -> sequence.StudyModel:
    torch.manual_seed(seed)
    return sequence.StudyModel(Pixels(), sequence.build_aggregator(name, FEATURES), torch.zeros(FEATURES), torch.ones(FEATURES)).eval()


# ------------------------------------------------------------------------------------------------------------- studies


def test_slices_come_back_in_body_order_and_shorter_stacks_are_masked():
    values = torch.tensor([[5.0], [3.0], [9.0], [7.0]])
    found = sequence.gather_studies(values, torch.tensor([1, 1, 0, 1]), torch.tensor([4, 4, 2, 4]), torch.tensor([10, 2, 0, 31]))
    assert found.people.tolist() == [2, 4] and found.labels.tolist() == [0, 1]
    assert found.mask.tolist() == [[True, False, False], [True, True, True]]
    assert found.values[1].flatten().tolist() == [3.0, 5.0, 7.0] and found.values[0].flatten().tolist() == [9.0, 0.0, 0.0]


@pytest.mark.parametrize("slices", [[0, 1, -1], [0, 1, 1]])
def test_a_person_without_slice_order_is_refused(slices):
    with pytest.raises(StudyError, match="Person 7 has no slice order"):
        sequence.gather_studies(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.full((3,), 7), torch.tensor(slices))


def test_slices_of_nobody_and_of_two_classes_are_refused():
    labels, order = torch.tensor([0, 1]), torch.tensor([0, 1])
    with pytest.raises(StudyError, match="no known person"):
        sequence.gather_studies(torch.zeros(2, 2), labels, torch.tensor([-1, 3]), order)
    with pytest.raises(StudyError, match="2 classes"):
        sequence.gather_studies(torch.zeros(2, 2), labels, torch.tensor([3, 3]), order)


# --------------------------------------------------------------------------------------------------------- aggregators


@pytest.mark.parametrize("name", sequence.AGGREGATORS)
def test_an_answer_does_not_depend_on_who_else_is_in_the_batch(name):
    model, people = study_model(name), studies()
    with torch.no_grad():
        together = model(people.values, people.mask)
        for row in (0, 5, 11):
            own = int(people.mask[row].sum())
            alone = model(people.values[row:row + 1, :own], people.mask[row:row + 1, :own])
            assert torch.allclose(alone[0], together[row], atol=1e-5), (name, row)
    order = torch.randperm(len(people), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.allclose(model(people.values[order], people.mask[order]), together[order], atol=1e-5)


@pytest.mark.parametrize("name", sequence.AGGREGATORS)
def test_fewer_slices_are_accepted_wherever_they_are_missing(name):
    model, people = study_model(name), studies(people=4)
    thinned = people.mask.clone()
    thinned[:, 2] = False
    packed = people.values[:, [0, 1, *range(3, people.values.shape[1])]], people.mask[:, [0, 1, *range(3, people.mask.shape[1])]]
    with torch.no_grad():
        one = model(people.values[:1, :1], people.mask[:1, :1])
        assert one.shape == (1, 4) and bool(one.isfinite().all())
        if name != "transformer":  # which knows where in the body a slice lay
            assert torch.allclose(model(people.values, thinned), model(*packed), atol=1e-5)


def test_what_lies_under_the_mask_changes_nothing():
    people = studies(people=6)
    filled = people.values.clone()
    filled[~people.mask] = 0.9
    for name in sequence.AGGREGATORS:
        model = study_model(name)
        with torch.no_grad():
            assert torch.allclose(model(filled, people.mask), model(people.values, people.mask), atol=1e-6), name


def test_order_matters_to_the_recurrent_network_and_not_to_the_mean():
    people = studies(people=4, slices=8)
    people = people.pick([0, 3])  # of full length
    turned = people.values.flip(1)
    with torch.no_grad():
        for name, same in (("mean", True), ("attention", True), ("gru", False), ("transformer", False)):
            model = study_model(name)
            assert torch.allclose(model(turned, people.mask), model(people.values, people.mask), atol=1e-4) == same, name


def test_the_mean_is_the_mean_of_the_slices_probabilities():
    model, people = study_model("mean"), studies(people=4)
    with torch.no_grad():
        found = model(people.values, people.mask).softmax(1)
        for row in range(4):
            own = people.values[row][people.mask[row]]
            assert torch.allclose(found[row], model.aggregator.head(model.backbone.features(own)).softmax(1).mean(0), atol=1e-6)


def test_unknown_names_are_refused():
    with pytest.raises(StudyError, match="Unknown aggregator 'lstm'"):
        sequence.build_aggregator("lstm", 3)
    with pytest.raises(StudyError, match="Unknown choice"):
        people = studies(people=2)
        sequence.slice_budgets(study_model("mean"), people.values, people.mask, people.labels, 0.1, (1,), choice="best")


# ------------------------------------------------------------------------------------------------------------ training


def featured(part: sequence.Studies) -> sequence.Studies:
    model = study_model("mean")
    with torch.no_grad():
        return sequence.Studies(5 * model.features(part.values, part.mask), part.mask, part.labels, part.people)


@pytest.mark.parametrize("name", sequence.AGGREGATORS)
def test_an_aggregator_learns_repeats_itself_and_leaves_the_random_state(name):
    everyone = featured(studies(people=80, seed=1))
    train, validation = everyone.pick(range(60)), everyone.pick(range(60, 80))
    state = torch.get_rng_state()
    model, told = sequence.fit_aggregator(name, train, validation, epochs=30, seed=4)
    assert torch.equal(state, torch.get_rng_state()) and not model.training
    with torch.no_grad():
        logits = model(validation.values, validation.mask)
    assert (logits.argmax(1) == validation.labels).float().mean() > 0.5, "chance is a quarter"
    assert told["score"] == told["history"][-1]["score"]
    assert macro_cross_entropy(logits, validation.labels) == pytest.approx(told["score"], abs=1e-3)
    again, _ = sequence.fit_aggregator(name, train, validation, epochs=30, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_nobody_may_be_in_training_and_validation():
    everyone = featured(studies(people=12))
    with pytest.raises(StudyError, match="Person 5 is in training and validation"):
        sequence.fit_aggregator("mean", everyone.pick(range(6)), everyone.pick(range(5, 12)))


def test_thinning_leaves_everybody_a_slice():
    mask = torch.zeros(200, 5, dtype=torch.bool)
    mask[:, 0] = True
    mask[100:] = True
    thinned = sequence._thinned(mask, torch.Generator().manual_seed(0))
    assert bool((thinned <= mask).all()) and bool(thinned.any(1).all()) and thinned[100:].sum() < mask[100:].sum()


# ------------------------------------------------------------------------------------------------------------- attacks


def attack_four(model, pixels, mask, labels, eps, *, steps=20, allowed=None):
    return sequence.attack_scan(model, pixels, mask, labels, eps, sequence.ScanAttack("four", steps), allowed=allowed)


@functools.cache
def trained(name: str) -> sequence.StudyModel:
    everyone = featured(studies(people=80, seed=1))
    reader, _ = sequence.fit_aggregator(name, everyone.pick(range(60)), everyone.pick(range(60, 80)), epochs=30)
    return sequence.StudyModel(Pixels(), reader, torch.zeros(FEATURES), torch.full((FEATURES,), 1 / 5)).eval()


def attacked(name: str = "gru"):
    """(model, pixels, mask, labels): a trained model and people that it answers, whose answers are the labels."""
    people, model = studies(people=40, seed=2), trained(name)
    with torch.no_grad():
        labels = model(people.values, people.mask).argmax(1)
    return model, people.values, people.mask, labels


@pytest.mark.parametrize("name", sequence.AGGREGATORS)
def test_a_study_attack_stays_inside_the_ball_and_on_existing_slices(name):
    model, pixels, mask, labels = attacked(name)
    made, logits = attack_four(model, pixels, mask, labels, 0.02, steps=5)
    assert float((made - pixels).abs().max()) <= 0.02 + 1e-6 and 0 <= float(made.min()) and float(made.max()) <= 1
    assert torch.equal(made[~mask], pixels[~mask])
    with torch.no_grad():
        assert torch.allclose(model(made, mask), logits, atol=1e-5), "the logits are those of the images"
    few = torch.zeros_like(mask)
    few[:, 1] = True
    made, _ = attack_four(model, pixels, mask, labels, 0.02, steps=5, allowed=few)
    assert torch.equal(made[:, 0], pixels[:, 0]) and torch.equal(made[:, 2:], pixels[:, 2:]) and not torch.equal(made[:, 1], pixels[:, 1])


def test_no_budget_changes_nothing_and_modes_and_gradients_stay():
    model, pixels, mask, labels = attacked()
    model.train()
    made, logits = attack_four(model, pixels, mask, labels, 0.02, allowed=torch.zeros_like(mask))
    assert model.training and all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
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
    least = sequence.slice_budgets(model, pixels, mask, labels, 0.008, budgets, steps=10, choice=choice, view="four")
    curve = sequence.standing_curve(least, budgets)
    with torch.no_grad():
        clean = (model(pixels, mask).argmax(1) == labels).numpy()
    assert np.array_equal(curve[0], clean) and clean.sum() == len(labels) - 3
    full = (attack_four(model, pixels, mask, labels, 0.008, steps=10)[1].argmax(1) == labels).numpy()
    assert np.array_equal(curve[-1], full)
    assert 0 < full.sum() < clean.sum(), "the check says nothing where all or none fall"
    assert all((later <= earlier).all() for earlier, later in zip(curve, curve[1:], strict=False))
    assert len({int(step.sum()) for step in curve}) > 2


def test_the_gradient_chooses_better_slices_than_chance():
    model, pixels, mask, labels = attacked("gru")
    greedy, random_ = (sequence.slice_budgets(model, pixels, mask, labels, 0.008, (1, 2, 4, 8), steps=10, choice=choice, view="four")
                       for choice in ("gradient", "random"))
    fell = greedy >= 0
    assert torch.equal(fell, random_ >= 0) and greedy[fell].float().mean() < random_[fell].float().mean()


def test_a_study_attack_does_not_depend_on_who_else_is_attacked():
    model, pixels, mask, labels = attacked("attention")
    together = attack_four(model, pixels, mask, labels, 0.03, steps=5)[1]
    alone = attack_four(model, pixels[4:5], mask[4:5], labels[4:5], 0.03, steps=5)[1]
    assert torch.allclose(alone[0], together[4], atol=1e-3)
