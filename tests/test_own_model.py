"""A model of one's own on images of one's own: what it is told, and what is said of it."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from tests import own_models
from tests.own_models import write_quarters
from utils.backbones import build_model, save_model
from utils.phantom import write_phantom
from utils.pipeline import command
from utils.pipeline.own_images import own_images
from utils.pipeline.own_model import load_own, order_of, try_one, wrapped
from utils.utils_funcs import UserError


@pytest.fixture(scope="module")
def quarters(tmp_path_factory):
    return write_quarters(tmp_path_factory.mktemp("own") / "raw")


def attack(name: str, raw, capsys, **options) -> str:
    command.attack_command(f"tests.own_models:{name}", raw=str(raw), suite="quick", **options)
    return capsys.readouterr().out


def clean_accuracy(text: str) -> float:
    line = next(line for line in text.splitlines() if line.startswith("0 "))
    return float(re.findall(r"[\d.]+", line)[4])


def check(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if f" {name} " in line).split()[0]


# --- What the model is told ---


@pytest.mark.parametrize(
    "name, words",
    [
        ("colors", "--channels 3"),
        ("strict", "--channels 3 --size 64"),
        ("as_output", "return output.logits"),
        ("as_tuple", "first part"),
        ("as_dict", "dict with out"),
        ("double", r"model\.float\(\)"),
        ("five_classes", "4 outputs"),
        ("without_weights", r"FileNotFoundError.*module:function"),
        ("needs_an_argument", r"takes nothing"),
        ("absent", "gave no model"),
        ("FOUR", "gave no model"),
    ],
)
def test_a_model_that_does_not_fit_is_told_in_one_sentence_what_to_give(name, words, quarters):
    with pytest.raises(UserError, match=words) as caught:
        command.attack_command(f"tests.own_models:{name}", raw=str(quarters), suite="quick")
    assert "\n" not in str(caught.value)


def test_the_order_of_the_classes_stands_in_the_help():
    assert "order Non, Very mild, Mild, Moderate" in " ".join(
        (command.attack_command.__doc__ or "").split()
    )


def test_channels_size_and_normalization_make_a_model_fit(quarters, capsys):
    text = attack("strict", quarters, capsys, channels=3, size=64, mean=(0.5,), std=(0.5,))
    assert clean_accuracy(text) == 100


def test_the_order_of_a_models_outputs_may_be_given(quarters, capsys):
    text = attack("alphabetical", quarters, capsys, classes="Mild,Moderate,Non,Very mild")
    assert clean_accuracy(text) == 100 and check(text, "classes_in_order") == "ok"


@pytest.mark.parametrize("classes", ["Mild,Moderate,Non", "Mild,Mild,Non,Moderate", "a,b,c,d"])
def test_an_order_that_is_none_is_refused(classes):
    with pytest.raises(UserError, match="expected the four"):
        order_of(classes.split(","), "--classes")


@pytest.mark.parametrize("options", [{"mean": (0.1, 0.2)}, {"std": (0.0,)}, {"std": (-1.0,)}])
def test_a_normalization_that_makes_no_sense_is_refused(options):
    with pytest.raises(UserError, match="--(mean|std)"):
        wrapped(own_models.right(), load_own("tests.own_models:right")[1], channels=3, **options)


# --- What is said of it ---


@pytest.mark.parametrize(
    "name, order",
    [
        ("alphabetical", "Mild, Moderate, Non, Very mild"),
        ("reversed_order", "Moderate, Mild, Very mild, Non"),
    ],
)
def test_another_order_of_the_outputs_is_noticed_and_named(name, order, quarters, capsys):
    text = attack(name, quarters, capsys)
    assert check(text, "classes_in_order") == "LOOK" and f"in the order {order}" in text


@pytest.mark.parametrize(
    "name, passed",
    [("right", True), ("softmax", False), ("softmax_in_half", False), ("sigmoid", False)],
)
def test_probabilities_are_noticed_in_any_precision(name, passed, quarters, capsys):
    text = attack(name, quarters, capsys)
    assert check(text, "logits_from_pixels") == ("ok" if passed else "LOOK")


def test_an_answer_that_is_cut_off_from_the_image_is_noticed(quarters, capsys):
    text = attack("detached", quarters, capsys)
    assert check(text, "gradients_present") == "LOOK"


def test_a_right_model_passes_every_check(quarters, capsys):
    text = attack("right", quarters, capsys, eps=("2/255", "16/255"))
    assert "LOOK" not in text and "All 23 checks passed" in text
    assert "nothing is known of the images that this model was trained on".lower() in text.lower()


# --- Which images, and whose ---


def test_the_test_folder_is_scored_and_the_training_folder_is_named(tmp_path, capsys):
    raw = write_quarters(tmp_path / "raw", splits=("train", "train", "test"))
    text = attack("right", raw, capsys)
    assert text.startswith("The 8 images in test; not scored: 16 in train.")
    with pytest.raises(UserError, match="--part validation holds no image"):
        own_images(str(raw), "validation")
    assert len(own_images(str(raw), "all").part) == 24


def test_intervals_are_over_the_patients_that_the_pixels_show(tmp_path):
    raw = write_phantom(tmp_path / "raw", patients=(4, 3, 3, 2), slices=(8, 10), size=64, seed=2)
    found = own_images(str(raw), "all")
    known = found.part.patients[found.part.slices >= 0].unique()
    assert found.patients_known and len(known) == 12
    assert "12 patients, recovered from the pixels" in found.notes[1]
    few = own_images(str(raw), "all", limit=12).part
    assert len(few) == 12 and len(few.patients.unique()) == 12, "a sample takes many patients"


def test_where_no_patients_can_be_told_apart_the_intervals_say_so(quarters):
    found = own_images(str(quarters))
    assert not found.patients_known and "slices are taken as independent" in found.notes[1]
    assert len(found.part.patients.unique()) == len(found.part)


# --- Other doors ---


def test_a_checkpoint_of_this_project_says_what_it_has_seen(tmp_path, quarters, capsys):
    images = own_images(str(quarters)).part
    metadata = {"trained_on": [images.pixels[0][:16]], "chosen_on": []}
    save_model(build_model("Resnet", pretrained=False), tmp_path / "m.safetensors", metadata)
    command.attack_command(
        str(tmp_path / "m.safetensors"), raw=str(quarters), suite="quick", limit=24
    )
    assert "has seen 1 of these 24 images" in capsys.readouterr().out


def test_a_model_of_timm_comes_with_its_weights_and_normalization(tmp_path):
    import timm

    model = timm.create_model("resnet10t", num_classes=4, in_chans=3)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    found, wrapping = load_own(f"timm:resnet10t@{tmp_path / 'weights.safetensors'}")
    assert wrapping.channels == 3 and len(wrapping.mean) == 3
    try_one(wrapped(found, wrapping), torch.rand(1, 1, 64, 64), "timm")
    for text in ("resnet10t", "resnet10t@nothing", f"nonsense@{tmp_path / 'weights.safetensors'}"):
        with pytest.raises(UserError, match="timm:"):
            load_own(f"timm:{text}")


def test_a_model_of_transformers_brings_its_order_of_classes(tmp_path, monkeypatch):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    names = ["MildDemented", "ModerateDemented", "NonDemented", "VeryMildDemented"]
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        id2label=dict(enumerate(names)),
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    model, wrapping = load_own(f"hf:{tmp_path / 'vit'}")
    assert wrapping.order == (2, 3, 0, 1) and (wrapping.channels, wrapping.size) == (3, 32)
    try_one(wrapped(model, wrapping), torch.rand(1, 1, 64, 64), "hf")
    order = "Non,Very mild,Mild,Moderate"
    assert load_own(f"hf:{tmp_path / 'vit'}", order)[1].order == (0, 1, 2, 3)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="hf:no/such could not be loaded"):
        load_own("hf:no/such")


def test_the_card_is_one_page_with_the_same_numbers_as_its_json(tmp_path, quarters, capsys):
    card = tmp_path / "card.html"
    text = attack("right", quarters, capsys, card=card)
    page, found = card.read_text(), json.loads((tmp_path / "card.json").read_text())
    assert "slices are taken as independent" in page and "of unknown patients" in page
    assert "Not for clinical use" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "the page needs no other file"
    value = found["clean"]["slice"]["accuracy"]["value"]
    assert f"{100 * value:.1f}" in page and clean_accuracy(text) == round(100 * value, 1)
    assert f"written to {card}" in text
    with pytest.raises(UserError, match="is a folder"):
        command.attack_command("tests.own_models:right", raw=str(quarters), card=tmp_path)
