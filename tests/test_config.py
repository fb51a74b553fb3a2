"""config: profiles change budgets, names are checked, eps reads as it is written."""

import dataclasses

import pytest

from utils.config import PROFILES, RunConfig, folds_of, make_config, parse_eps
from utils.utils_funcs import MODELS, UserError


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("model", MODELS)
def test_every_profile_makes_every_model(profile, model):
    config = make_config(profile, model)
    assert (config.profile, config.model) == (profile, model)
    assert config.headline_eps in config.eps
    if config.backbone == "Dinov2":
        assert (config.input_size or 126) % 14 == 0


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().epochs = 3


@pytest.mark.parametrize("bad", [{"model": "ResNet"}, {"epoch": 3}, {"profile": "huge"}])
def test_wrong_names_are_one_sentence_errors(bad):
    with pytest.raises(UserError):
        make_config(**{"profile": "demo", **bad})


@pytest.mark.parametrize(
    "text,value", [("4/255", 4 / 255), ("0.005", 0.005), ("0", 0.0), ("0.5/255", 0.5 / 255)]
)
def test_eps_reads_as_written(text, value):
    assert parse_eps(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["4", "four", "1/0", "-1/255"])
def test_an_eps_outside_the_pixel_range_is_refused(text):
    with pytest.raises(UserError):
        parse_eps(text)


def test_the_published_split_has_one_fold_and_the_honest_one_five():
    assert folds_of("cpu", "slice") == (0,)
    assert folds_of("cpu", "patient") == (0, 1, 2, 3, 4)


def test_the_small_adversarial_model_starts_from_its_counterpart_in_a_cpu_run_alone():
    config = make_config("cpu", "Efficientnet_atk")
    assert (config.method, config.warm_start) == ("trades", True)
    assert make_config("cpu", "Efficientnet_atk", method="pgd").method == "pgd", (
        "the caller's settings come first"
    )
    others = [
        make_config("paper", "Efficientnet_atk"),
        make_config("demo", "Efficientnet_atk"),
        make_config("cpu", "Resnet_atk"),
    ]
    assert all((other.method, other.warm_start) == ("pgd", False) for other in others)


def test_the_demo_repeats_its_attacks_less_often_than_a_full_run():
    assert (
        make_config("demo").max_steps
        < make_config("cpu").max_steps
        == make_config("paper").max_steps
    )
    assert all(
        make_config(profile).max_steps >= 2 * make_config(profile).pgd_steps for profile in PROFILES
    )
