"""README's first picture: one slice, attacked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.backbones import load_model
from utils.evaluation.records import read_records, without_rehearsals
from utils.evaluation.rows import table_rows
from utils.pipeline.example import example_command, make_example
from utils.report.example import example_figure, example_path, read_example, write_example
from utils.utils_funcs import ROOT, UserError

WEIGHTS = ROOT / "checkpoints" / "Efficientnet" / "patient" / "fold0_seed0_fp16.safetensors"
SLICES = ROOT / "assets" / "Efficientnet" / "patient_explained.npz"


def test_the_committed_example_is_what_the_committed_model_says() -> None:
    example = read_example(example_path(ROOT))
    with np.load(SLICES) as file:
        assert any(np.array_equal(example.images[0], image) for image in file["images"])
    change = example.images.astype(int)[1] - example.images[0]
    assert np.abs(change).max() == 1, "one gray level"
    model = load_model(WEIGHTS)
    assert model.name == example.model
    with torch.no_grad():
        found = model(torch.from_numpy(example.images)[:, None] / 255).softmax(1)
    assert np.abs(found.numpy() - example.probabilities).max() < 1e-3
    before, after = example.probabilities.argmax(1)
    assert before == example.label != after


def test_an_example_is_made_again_and_read_as_it_was_written(tmp_path) -> None:
    example = make_example(WEIGHTS, SLICES)
    assert example.probabilities[1].argmax() != example.label
    write_example(example, tmp_path / "example.npz")
    again = read_example(tmp_path / "example.npz")
    assert np.array_equal(again.maps, example.maps)
    assert (again.model, again.eps, again.label) == (example.model, example.eps, example.label)


def test_a_model_without_committed_weights_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="weights are in git"):
        example_command("Dinov2", tmp_path)


def test_the_picture_has_every_network_and_the_slice_before_and_after() -> None:
    rows = table_rows(without_rehearsals(read_records(ROOT)))
    figure = example_figure(read_example(example_path(ROOT)), rows)
    titles = [axes.get_title() for half in figure.subfigs for axes in half.axes]
    assert any(title.startswith("the model says Non") for title in titles)
    assert any(title.startswith("now ") for title in titles)
    shown = [label.get_text() for label in figure.subfigs[1].axes[0].get_yticklabels()]
    assert {"Resnet", "Resnet_atk", "Efficientnet_atk", "Dinov2", "linear 32"} <= set(shown)
