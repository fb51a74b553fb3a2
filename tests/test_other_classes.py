"""A model of one's own on data with other classes than this project's four."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.own_models import Stripes, write_quarters, write_stripes
from utils import metrics
from utils.config import make_config
from utils.data import ImageSet
from utils.pipeline import command
from utils.pipeline.other_classes import OtherResult, attack_other_classes, other_text
from utils.pipeline.own_images import classes_of, own_images
from utils.pipeline.own_model import order_of
from utils.utils_funcs import CLASSES, UserError

TWO = ("NonDemented", "Demented")
THREE = ("CN", "MCI", "AD")
FIVE = ("CN", "SMC", "EMCI", "LMCI", "AD")
SETS = {"two_stripes": TWO, "three_stripes": THREE, "five_stripes": FIVE}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stripes")
    return {name: write_stripes(root / name, classes) for name, classes in SETS.items()}


def attack(name: str, raw: Path, **options) -> None:
    command.attack_command(f"tests.own_models:{name}", raw=str(raw), suite="quick", **options)


# -- which classes the data have -------------------------------------------------------------------


def test_classes_are_those_of_the_data_in_the_order_of_what_they_mean(folders):
    assert classes_of(str(folders["two_stripes"])) == TWO
    assert classes_of(str(folders["three_stripes"])) == THREE
    assert classes_of(str(folders["five_stripes"])) == FIVE


def test_the_four_of_this_project_stay_these_also_with_one_misspelled(tmp_path):
    four = write_quarters(tmp_path / "four")
    assert classes_of(str(four)) == CLASSES
    (four / "Mild_Demented").rename(four / "Mildd_Demented")
    with pytest.raises(UserError, match="Mildd_Demented"):
        own_images(str(four))


def test_the_order_of_the_outputs_is_asked_for_and_never_guessed(folders):
    with pytest.raises(UserError, match="say with --classes .* such as CN,SMC,EMCI,LMCI,AD"):
        attack("five_stripes", folders["five_stripes"])


@pytest.mark.parametrize("classes", ["CN,SMC,EMCI,LMCI", "CN,CN,EMCI,LMCI,AD", "a,b,c,d,e"])
def test_an_order_that_is_none_of_these_classes_is_refused(folders, classes):
    with pytest.raises(UserError, match="expected the 5 of the data, CN, SMC, EMCI, LMCI, AD,"):
        attack("five_stripes", folders["five_stripes"], classes=classes)


def test_a_model_with_another_number_of_outputs_is_refused(folders):
    with pytest.raises(UserError, match=r"logits \(N, 5\) .* give a model with 5 outputs"):
        attack("three_stripes", folders["five_stripes"], classes="CN,SMC,EMCI,LMCI,AD")


def test_spelling_of_class_names_does_not_matter():
    assert order_of(["ad", "m-c-i", "C N"], "here", THREE) == (2, 1, 0)


# -- scores and checks -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_a_set_of_any_classes_is_attacked_and_scored(folders, name, tmp_path, capsys):
    # Stripes stand in the order in which the folders were written, whatever the names mean.
    attack(name, folders[name], classes=",".join(SETS[name]), card=tmp_path / "card.html")
    text = capsys.readouterr().out
    assert "LOOK" not in "\n".join(line for line in text.splitlines() if "converged" not in line)
    found = json.loads((tmp_path / "card.json").read_text())
    assert found["classes"] == list(classes_of(str(folders[name])))
    assert found["clean"]["slice"]["accuracy"]["value"] == 1
    assert set(found["worst_case"]) == {"4/255"}
    page = (tmp_path / "card.html").read_text()
    assert f"{len(SETS[name])} classes" in page
    assert "data:image/png" in page


def result_of(count: int, model: torch.nn.Module | None = None, **changes) -> OtherResult:
    """What is found of the stripes of so many classes, three images of each of ten patients."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat_interleave(3) % count
    images = torch.randint(60, 70, (30, 1, 20, 10 * count), generator=generator)
    for row, label in enumerate(labels.tolist()):
        images[row, :, :, 10 * label : 10 * label + 10] += 12
    part = ImageSet(
        images.to(torch.uint8),
        torch.arange(30),
        labels,
        torch.arange(10).repeat_interleave(3),
        torch.arange(30) % 3,
        [f"{row:064x}" for row in range(30)],
        "stripes",
        pixels=[f"{row:064x}" for row in range(30)],
        cohort_sha256="",
    )
    options = {"eps": ("2/255", "4/255", "8/255"), "suite": "quick", "pgd_steps": 10}
    config = make_config("demo", **(options | changes))
    names = [f"class {label}" for label in range(count)]
    return attack_other_classes(model or Stripes(count), part, names, config, "stripes")


@pytest.mark.parametrize("count", [2, 3, 5, 7, 10])
def test_robust_accuracy_of_a_model_whose_margins_are_known(count):
    # The stripe is 12 gray levels brighter than the others, give or take the noise: an attack of
    # eps gray levels moves the two by 2 eps, so all hold at 4/255 and none at 8/255.
    found = result_of(count)
    values = {eps: scores["accuracy"].value for eps, scores in found.worst.items()}
    assert found.clean["accuracy"].value == 1
    assert (values["2/255"], values["4/255"], values["8/255"]) == (1, 1, 0)
    assert all(check["passed"] for check in found.sanity), [
        check for check in found.sanity if not check["passed"]
    ]
    assert found.n_patients == 10
    assert "worst case at 8/255" in other_text(found)


@pytest.mark.parametrize("count", [2, 5])
def test_the_full_suite_runs_on_any_number_of_classes(count):
    found = result_of(count, suite="full", eps=("4/255", "8/255"), sample=4)
    names = set(found.attacks["4/255"])
    assert {"noise", "fgsm", "apgd_t", "square", "autoattack", "hopskipjump"} <= names
    assert not [name for name in names if "merged" in name or "binary" in name], "none is merged"
    assert found.worst["8/255"]["accuracy"].value == 0


def test_outputs_in_another_order_are_noticed():
    order = (4, 3, 2, 1, 0)
    found = result_of(5, Stripes(5, order))
    check = next(check for check in found.sanity if check["check"] == "classes_in_order")
    assert not check["passed"]
    assert "class 4, class 3, class 2, class 1, class 0" in check["note"]


def test_scores_of_four_classes_are_those_of_the_four_class_scores():
    generator = np.random.default_rng(0)
    labels, patients = np.arange(80) // 2 % 4, np.arange(80) // 2
    flags = generator.random(80) < 0.7
    ours = metrics.score_flags(flags, labels, patients, 4, n_boot=200)
    known = metrics.score_robust(flags, flags, labels, patients, n_boot=200)
    for name in ("balanced_accuracy", "accuracy"):
        assert ours[name] == known[name]


def test_intervals_are_over_patients_and_never_of_width_zero():
    labels = np.repeat(np.arange(6), 20)
    slices = metrics.score_flags(np.ones(120, bool), labels, np.arange(120), 6)["accuracy"]
    patients = metrics.score_flags(np.ones(120, bool), labels, np.arange(120) // 10, 6)["accuracy"]
    assert slices["ci"][1] == patients["ci"][1] == 1
    assert patients["ci"][0] < slices["ci"][0] < 1
