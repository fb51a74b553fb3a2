"""Explanations: what a map promises, and the measures of whether to believe it."""

from __future__ import annotations

import copy
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tests.planted_evidence import (
    BUDGETS,
    EXPLAINED_SIDE,
    LIMIT,
    SIDE,
    accuracy,
    fit,
    inside,
    stripes_in_patch,
    trained_backbone,
)
from utils import grad_cam
from utils.backbones import PixelClassifier, build_model
from utils.prediction import predict
from utils.utils_funcs import BACKBONES, CLASSES, UserError

#: The planted patch of the phantom: 64 px, aligned to the 32 px grid that a ResNet or EfficientNet
#: has at 128 px.
PATCH = slice(32, 96)
GRADIENT_METHODS = ("gradcam", "gradcam++", "layercam")


def planted(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 128, 128) whose class is decided only by the orientation of the stripes in the
    patch, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    angle = (labels * np.pi / 4)[:, None, None]
    phase = 2 * np.pi * torch.rand(count, 1, 1, generator=generator)
    images = torch.zeros(count, 1, 128, 128)
    along = torch.cos(angle) * x + torch.sin(angle) * y
    images[:, 0, PATCH, PATCH] = 0.4 + 0.3 * torch.sin(2 * np.pi / 8 * along + phase)
    return images, labels


class SmallNet(nn.Module):
    """Each cell of its 4 × 4 map sees its 32 px tile and nothing else, so the place of the evidence
    is known exactly. (The backbones' cells see far beyond their tile: evidence next to a cell is
    also in it.)"""

    def __init__(self) -> None:
        super().__init__()
        widths, sides = (3, 16, 24, 32, 48), (4, 2, 2, 2)
        stages = [
            nn.Sequential(
                nn.Conv2d(i, o, side, side, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)
            )
            for i, o, side in zip(widths[:-1], widths[1:], sides, strict=True)
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(48, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(images)))).mean(dim=(2, 3)))


def small_model() -> PixelClassifier:
    return PixelClassifier(SmallNet(), name="SmallNet", init="random", input_size=None).eval()


@pytest.fixture(scope="module")
def trained() -> PixelClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fit(small_model(), count=512, epochs=8, lr=3e-3, phantom=planted)


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> PixelClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return build_model(request.param, pretrained=False, input_size=70)


@pytest.fixture(scope="module")
def slices() -> Tensor:
    return torch.rand(3, 1, 96, 128, generator=torch.Generator().manual_seed(2))


def in_patch(maps: Tensor) -> float:
    mask = torch.zeros(maps.shape, dtype=torch.bool)
    mask[:, PATCH, PATCH] = True
    return float(np.nanmean(grad_cam.anatomy_shares(maps, {"patch": mask})["patch"]))


# -- maps ------------------------------------------------------------------------------------------


def methods_of(model: PixelClassifier) -> tuple[str, ...]:
    return GRADIENT_METHODS + (("rollout",) if model.name == "Dinov2" else ())


def test_maps_have_native_resolution_and_fill_the_unit_range(backbone, slices):
    for method in methods_of(backbone):
        maps = grad_cam.explain(backbone, slices, method=method)
        assert (
            maps.shape == (3, 96, 128)
            and maps.dtype == torch.float32
            and maps.device == slices.device
        )
        assert maps.min() >= 0 and maps.max() <= 1 and torch.isfinite(maps).all()
        assert ((maps.amax(dim=(1, 2)) == 1) | (maps.amax(dim=(1, 2)) == 0)).all(), method


def test_a_map_does_not_depend_on_its_batch(backbone, slices):
    for method in methods_of(backbone):
        together = grad_cam.explain(backbone, slices, method=method, batch_size=3)
        alone = torch.cat(
            [grad_cam.explain(backbone, image[None], method=method) for image in slices]
        )
        assert (together - alone).abs().max() < 1e-3, method


def test_the_network_sees_whole_batches_and_no_more(trained):
    """One forward pass a batch, one image for the geometry of the cells, no loop over images."""
    images, _ = planted(11, seed=5)
    sizes: list[int] = []
    hook = trained.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    for method in GRADIENT_METHODS:
        sizes.clear()
        grad_cam.explain(trained, images, method=method, batch_size=4)
        assert sorted(sizes) == [1, 3, 4, 4], method
    hook.remove()


def fingerprint(model: nn.Module) -> list:
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), m.training)
        for m in model.modules()
    ]
    gradients = [
        (p.requires_grad, None if p.grad is None else (id(p.grad), float(p.grad.sum())))
        for p in model.parameters()
    ]
    return [hooks, gradients, [buffer.double().sum().item() for buffer in model.buffers()]]


@pytest.mark.parametrize("fails", [False, True])
def test_modes_gradients_and_hooks_are_untouched_afterwards(backbone, slices, fails, monkeypatch):
    model = copy.deepcopy(backbone).train()
    list(model.modules())[5].eval()
    parameters = list(model.parameters())
    parameters[0].grad, parameters[1].grad = (
        torch.ones_like(parameters[0]),
        torch.full_like(parameters[1], 3),
    )
    parameters[2].requires_grad_(False)
    implementation = (
        model.body.backbone.config._attn_implementation if model.name == "Dinov2" else None
    )
    before = fingerprint(model)
    if fails:
        monkeypatch.setattr(F, "kl_div", lambda *_, **__: 1 / 0)
    for method in (*methods_of(model), "attack"):
        targets = torch.full((2,), 99 if fails else 1)
        try:
            if method == "attack":
                grad_cam.explanation_attack(model, slices[:2], 4 / 255, steps=1)
            else:
                grad_cam.explain(model, slices[:2], targets, method=method)
            assert not fails or method == "rollout"
        except (UserError, ZeroDivisionError):
            assert fails
        assert fingerprint(model) == before, method
    if implementation:
        assert model.body.backbone.config._attn_implementation == implementation


def test_explain_works_where_the_caller_turned_gradients_off(trained, slices):
    expected = grad_cam.explain(trained, slices)
    with torch.no_grad():
        assert torch.equal(grad_cam.explain(trained, slices), expected)
    with torch.inference_mode():
        assert torch.equal(grad_cam.explain(trained, slices.clone()), expected)


def test_scorecam_explains_and_stays_silent(trained, capfd):
    images, _ = planted(2, seed=5)
    maps = grad_cam.explain(trained, images, method="scorecam")
    assert maps.amax(dim=(1, 2)).tolist() == [1, 1]
    assert capfd.readouterr().err == ""


def test_the_differentiable_map_equals_that_of_the_package(backbone, slices):
    upsample = grad_cam.upsampler(backbone, grad_cam.target_layer(backbone), slices[:1])
    targets = torch.ones(3, dtype=torch.int64)

    def shifted(maps: Tensor) -> Tensor:
        # grad-cam subtracts each map's minimum before the map is enlarged.
        return upsample(maps - maps.amin(dim=(1, 2), keepdim=True))

    with (
        grad_cam.eager_attention(backbone.body)
        if backbone.name == "Dinov2"
        else torch.enable_grad()
    ):
        ours = grad_cam.unit_range(
            grad_cam.cam_graph(backbone, slices, targets, shifted)[1].detach()
        )
    assert (ours - grad_cam.explain(backbone, slices, targets)).abs().max() < 1e-3


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_what_all_tokens_have_in_common_is_no_evidence(method, slices):
    """A constant added to the bias of `norm1` and removed from the biases behind it changes nothing
    that the network computes, so it must not change a map."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = build_model("Dinov2", pretrained=False, input_size=70)
        common = 3 * torch.randn(384)
    images, targets = slices[:2], torch.tensor([1, 2])
    logits, maps = model(images), grad_cam.explain(model, images, targets, method=method)
    last = model.body.backbone.encoder.layer[-1]
    with torch.no_grad():
        last.norm1.bias += common
        for projection in (last.attention.q_proj, last.attention.k_proj, last.attention.v_proj):
            projection.bias -= projection.weight @ common
    assert torch.allclose(model(images), logits, atol=1e-4)
    assert (grad_cam.explain(model, images, targets, method=method) - maps).abs().max() < 1e-2
    assert (maps.amax(dim=(1, 2)) == 1).all()


def test_cells_are_drawn_where_they_look(backbone):
    """The gradient of one cell with respect to the pixels is centered where the enlarged map puts
    that cell."""
    # Large enough for a cell away from the border.
    model = build_model(backbone.name, pretrained=False, input_size=224)
    layer = {
        "Resnet": lambda body: body.layer2,
        "Efficientnet": lambda body: body.blocks[2],
        "Dinov2": lambda body: body.backbone.encoder.layer[0].norm1,
    }[model.name](model.body)
    pixels = torch.rand(1, 1, 224, 224, generator=torch.Generator().manual_seed(3)).requires_grad_()
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _m, _i, output: kept.append(output))
    model(pixels)
    hook.remove()
    features = (grad_cam.map_from_tokens(model) or (lambda x: x))(kept[0])
    row, column = features.shape[2] // 2, features.shape[3] // 3
    seen = torch.zeros(224, 224)
    for channel in range(0, features.shape[1], max(1, features.shape[1] // 8)):
        seen += torch.autograd.grad(features[0, channel, row, column], pixels, retain_graph=True)[
            0
        ][0, 0].square()
    seen = torch.where(seen > 0.01 * seen.max(), seen, 0)
    cell = torch.zeros(1, *features.shape[2:])
    cell[0, row, column] = 1
    drawn = grad_cam.upsampler(model, layer, pixels[:1].detach())(cell)[0]
    stride = 224 / features.shape[2]
    for axis in (0, 1):
        place = [
            float((mass.sum(1 - axis) * torch.arange(224)).sum() / mass.sum())
            for mass in (seen, drawn)
        ]
        assert abs(place[0] - place[1]) < 0.3 * stride, (
            "stretching the map over the image is half a cell wrong"
        )


def test_bad_requests_are_refused_in_one_sentence(trained, slices):
    for wrong in (
        {"method": "magic"},
        {"method": "rollout"},
        {"targets": torch.zeros(2, dtype=torch.int64)},
    ):
        with pytest.raises(UserError):
            grad_cam.explain(trained, slices, **wrong)
    with pytest.raises(UserError):
        grad_cam.explain(trained, slices[:, 0])


# -- trust -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_trained_model_is_explained_by_the_planted_patch(trained, method):
    images, labels = planted(64, seed=1)
    assert (predict(trained, images).argmax(1) == labels).float().mean() > 0.95
    assert in_patch(grad_cam.explain(trained, images, method=method)) >= 0.7


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_random_model_does_not_prefer_the_patch(method):
    images, _ = planted(16, seed=1)
    shares = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(5):
            torch.manual_seed(seed)
            shares.append(in_patch(grad_cam.explain(small_model(), images, method=method)))
    assert np.nanmean(shares) <= 2 * 64**2 / 128**2


def test_randomizing_the_last_layer_changes_grad_cam(backbone):
    generator = torch.Generator().manual_seed(4)
    images = F.interpolate(
        torch.rand(4, 1, 12, 12, generator=generator), size=(128, 128), mode="bilinear"
    )
    changed = grad_cam.randomization_check(backbone, images, depth=1)
    assert list(changed) == [stage_names(backbone)[0]]
    assert np.mean(changed[stage_names(backbone)[0]]) < grad_cam.SANITY_LIMIT


def stage_names(model: nn.Module) -> list[str]:
    return [name for name, _ in grad_cam.network_stages(model)]


def test_rollout_fails_the_sanity_check_and_is_marked(slices):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = build_model("Dinov2", pretrained=False, input_size=70)
    changed = grad_cam.randomization_check(model, slices[:2], method="rollout", depth=1, draws=1)
    assert np.allclose(changed["head"], 1)
    labels = patients = np.array([0, 1])
    record = grad_cam.explanation_record(
        {"rollout:randomisation:00 head": changed["head"]}, labels, patients
    )
    assert record["rollout"]["randomisation"]["passed"] is False


def test_the_stages_of_a_network_hold_every_parameter(backbone):
    covered = sum(
        p.numel() for _, stage in grad_cam.network_stages(backbone) for p in stage.parameters()
    )
    assert covered == sum(p.numel() for p in backbone.parameters())


def test_true_maps_are_more_faithful_than_random_ones(trained):
    images, labels = planted(2, seed=1)
    result = grad_cam.faithfulness(
        trained, images, grad_cam.explain(trained, images), labels, 4, 64, 0
    )
    assert result["deletion"].mean() < result["deletion of random maps"].mean() - 0.05
    assert result["insertion"].mean() > result["insertion of random maps"].mean() + 0.05
    assert result["road"].mean() > result["road of random maps"].mean() + 0.05


def test_curves_start_and_end_with_the_whole_image_and_its_blur(trained):
    images, labels = planted(4, seed=1)
    curves = grad_cam.deletion_insertion(trained, images, torch.rand(4, 128, 128), labels, steps=4)
    assert np.allclose(curves["deletion"][:, 0], curves["insertion"][:, -1], atol=1e-5)
    assert np.allclose(curves["deletion"][:, -1], curves["insertion"][:, 0], atol=1e-5)


# -- anatomy ---------------------------------------------------------------------------------------


def drawn_brain() -> tuple[Tensor, Tensor, Tensor]:
    """A gray ellipse with white matter, two dark ventricles and a sulcus, and the true brain and
    ventricles."""
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    brain = ((y - 64) / 54) ** 2 + ((x - 64) / 48) ** 2 <= 1
    white = ((y - 64) / 42) ** 2 + ((x - 64) / 36) ** 2 <= 1
    ventricles = ((y - 62) / 16) ** 2 + (((x - 64).abs() - 9) / 6) ** 2 <= 1
    image = torch.where(ventricles, 0.12, torch.where(white, 0.8, 0.5)) * brain
    image[60:66, 100:112] = 0.12
    noise = 0.02 * torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    return (image + noise * brain).clamp(0, 1)[None, None], brain, ventricles


def test_masks_find_the_drawn_brain_and_its_ventricles_but_not_the_sulcus():
    image, brain, ventricles = drawn_brain()
    masks = {name: mask[0] for name, mask in grad_cam.anatomy_masks(image).items()}
    for found, true in ((masks["brain"], brain), (masks["csf"], ventricles)):
        assert (found & true).sum() / (found | true).sum() > 0.9
    assert not masks["csf"][60:66, 100:112].any()
    assert not (masks["background"] & (masks["brain"] | masks["rim"])).any()
    assert (masks["rim"] & masks["brain"]).any() and (masks["rim"] & ~masks["brain"]).any()


def test_a_uniform_map_has_each_regions_area_as_its_share_and_an_empty_one_has_none():
    masks = grad_cam.anatomy_masks(drawn_brain()[0])
    shares = grad_cam.anatomy_shares(torch.ones(1, 128, 128), masks)
    assert all(np.isclose(shares[name], shares[f"{name}_area"]) for name in masks)
    assert np.isnan(grad_cam.anatomy_shares(torch.zeros(1, 128, 128), masks)["brain"]).all()


def test_an_image_without_a_brain_has_empty_masks():
    masks = grad_cam.anatomy_masks(torch.zeros(1, 1, 64, 64))
    assert masks["background"].all() and not masks["brain"].any() and not masks["csf"].any()


@pytest.mark.skipif("ALZHEIMER_RAW" not in os.environ, reason="needs the real slices")
def test_masks_of_real_slices_have_anatomical_sizes():
    raw = Path(os.environ["ALZHEIMER_RAW"])
    if raw.is_dir():
        files = sorted(raw.rglob("*.jpg"))[::400]
        opened = [Image.open(file) for file in files]
    else:
        with zipfile.ZipFile(raw) as archive:
            names = [
                name
                for name in sorted(archive.namelist())
                if name.endswith(".jpg") and "/test/" in f"/{name}"
            ]
            opened = [Image.open(io.BytesIO(archive.read(name))) for name in names[::40]]
    images = (
        torch.from_numpy(np.stack([np.asarray(image.convert("L")) for image in opened]))[
            :, None
        ].float()
        / 255
    )
    area = {
        name: mask.float().mean(dim=(1, 2)).numpy()
        for name, mask in grad_cam.anatomy_masks(images).items()
    }
    assert (area["brain"] > 0.3).all() and (area["brain"] < 0.65).all()
    assert (area["csf"] < 0.16).all() and np.median(area["csf"]) > 0.01
    assert (area["background"] > 0.25).all()


# -- under attack ----------------------------------------------------------------------------------


def test_similarity_is_one_for_equal_maps_and_chance_for_independent_ones():
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.rand(4, 128, 128, generator=generator),
        torch.rand(4, 128, 128, generator=generator),
    )
    same, other = grad_cam.map_similarity(first, first), grad_cam.map_similarity(first, second)
    assert all(np.allclose(values, 1) for values in same.values())
    assert (
        np.allclose(other["iou_top20"], 1 / 9, atol=0.02)
        and np.abs(other["rank_correlation"]).max() < 0.05
    )
    assert np.abs(other["ssim"]).max() < 0.2


def test_equal_zeros_do_not_count_as_agreement():
    nothing = torch.zeros(3, 64, 64)
    similarity = grad_cam.map_similarity(nothing, nothing)
    assert (similarity["iou_top20"] < 0.2).all() and (similarity["rank_correlation"] == 0).all()


def test_the_explanation_attack_keeps_the_prediction_and_moves_the_map(trained):
    images, _ = planted(8, seed=1)
    eps = 8 / 255
    moved = grad_cam.explanation_attack(trained, images, eps, steps=30)
    before, after = (predict(trained, x).softmax(1) for x in (images, moved))
    targets = before.argmax(1)
    assert (moved - images).abs().max() <= eps + 1e-6 and moved.min() >= 0 and moved.max() <= 1
    assert torch.equal(after.argmax(1), targets)
    assert (before - after).gather(1, targets[:, None]).abs().max() <= 0.1 + 1e-4
    clean_map = grad_cam.explain(trained, images, targets)
    similar = grad_cam.map_similarity(clean_map, grad_cam.explain(trained, moved, targets))
    noise = (
        images + eps * torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).sign()
    ).clamp(0, 1)
    by_noise = grad_cam.map_similarity(clean_map, grad_cam.explain(trained, noise, targets))
    assert similar["iou_top20"].mean() < by_noise["iou_top20"].mean() - 0.05


def test_an_attack_with_eps_zero_changes_nothing(trained):
    images, _ = planted(2, seed=1)
    assert torch.equal(grad_cam.explanation_attack(trained, images, 0.0, steps=2), images)


# -- record and figures ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measures(trained) -> dict[str, np.ndarray]:
    images, _ = planted(8, seed=1)
    noise = 0.02 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    return grad_cam.explanation_measures(
        trained,
        images,
        methods=("gradcam",),
        adversarial={"4/255": images + noise},
        sample=[0, 3],
        fresh=small_model,
    )


def test_measures_are_one_number_a_slice_and_nan_outside_the_sample(measures):
    assert all(values.shape == (8,) for values in measures.values())
    assert np.flatnonzero(~np.isnan(measures["gradcam:faithfulness:road"])).tolist() == [0, 3]
    assert not np.isnan(measures["gradcam:attack 4/255:ssim"]).any()


def test_the_record_is_json_with_clustered_intervals(measures):
    labels, patients = np.arange(8) % 4, np.arange(8)
    record = json.loads(
        json.dumps(grad_cam.explanation_record(measures, labels, patients), allow_nan=False)
    )
    shares = record["gradcam"]["anatomy"]["brain"]
    assert shares["ci"][0] <= shares["value"] <= shares["ci"][1] and shares["n_people"] == 8
    assert np.isclose(shares["value"], np.nanmean(measures["gradcam:anatomy:brain"]), atol=1e-6)
    assert len(shares["by_class"]) == 4
    assert record["gradcam"]["faithfulness"]["road"]["n_slices"] == 2
    assert isinstance(record["gradcam"]["randomisation"]["passed"], bool)
    assert list(record["gradcam"]["randomisation"]["stages"])[0] == "00 fc"


def test_figures_show_every_slice_with_both_classes_and_a_probability(slices):
    maps, predictions = torch.rand(3, 96, 128), torch.tensor([[0.1, 0.2, 0.6, 0.1]] * 3)
    figure = grad_cam.overlay_figure(slices, maps, predictions, [2, 0, 1], title="Resnet")
    titles = [axis.get_title() for axis in figure.axes[:3]]
    assert titles[0] == "true Mild\n✓ Mild 0.60" and titles[1] == "true Non\n✗ Mild 0.60"
    assert len(figure.axes) == 3 * 3 + 1
    row = (slices, maps, predictions)
    grid = grad_cam.comparison_figure({"Resnet": row, "Resnet_atk": row}, [2, 0, 1])
    assert len(grid.axes) == 2 * 3 * 3 + 1
    for made in (figure, grid, grad_cam.patient_strip(slices, maps, predictions, 2)):
        made.savefig(io.BytesIO(), format="png")


def test_the_gif_has_a_frame_a_slice_and_is_small_enough_for_a_readme(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = F.interpolate(
        torch.rand(32, 1, 32, 32, generator=generator), size=(128, 128), mode="bilinear"
    )
    maps = F.interpolate(
        torch.rand(32, 1, 4, 4, generator=generator), size=(128, 128), mode="bilinear"
    )[:, 0]
    path = grad_cam.patient_gif(images, maps, tmp_path / "patient.gif")
    with Image.open(path) as picture:
        assert picture.n_frames == 32 and picture.size == (320, 160)
    assert path.stat().st_size < 1_500_000 and list(tmp_path.iterdir()) == [path]


# -- in words --------------------------------------------------------------------------------------


def block(value: float | None, low: float = 0.0, high: float = 0.0, patients: int = 40) -> dict:
    return {
        "value": value,
        "ci": None if value is None else [low, high],
        "n_slices": 2 * patients if value is not None else 0,
        "n_people": patients if value is not None else 0,
    }


def record_with(**changed: object) -> dict:
    """A record of maps that every measure speaks for; `changed` replaces single blocks, by
    `topic__name`, and removes those that are None."""
    anatomy = {f"{region}_area": block(0.3, 0.29, 0.31) for region in grad_cam.REGIONS}
    for region in grad_cam.REGIONS:
        beyond = 0.2 if region in ("brain", "csf") else -0.2
        anatomy[region] = {
            **block(0.3 + beyond, 0.28 + beyond, 0.32 + beyond),
            "beyond_area": block(beyond, beyond - 0.02, beyond + 0.02),
            "by_class": [
                block(0.4, 0.3, 0.5, patients=class_) if class_ else block(None)
                for class_ in range(4)
            ],
        }
    faithful = {}
    for name in grad_cam.FAITHFUL:
        faithful[name] = {**block(0.5, 0.4, 0.6), "beyond_random": block(0.1, 0.05, 0.15)}
        faithful[name + grad_cam.CONTROL] = block(0.4, 0.3, 0.5)
    alike = {name: block(0.8, 0.7, 0.9) for name in grad_cam.SIMILARITY}
    record = {
        "gradcam": {
            "anatomy": anatomy,
            "faithfulness": faithful,
            "attack 1/255": dict(alike),
            "attack 4/255": dict(alike),
            "explanation attack": {**alike, "eps": block(4 / 255, 4 / 255, 4 / 255)},
            "randomisation": {
                "stages": {"00 fc": block(0.1, 0.0, 0.2), "01 layer4": block(0.05, 0.0, 0.1)},
                "passed": True,
            },
        },
        "prediction": {"kept": {"1/255": block(0.75, 0.7, 0.8), "4/255": block(0.25, 0.2, 0.3)}},
    }
    for path, value in changed.items():
        *parents, last = path.split("__")
        place = record["gradcam"]
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return record


def concluded(numbers: dict) -> dict[str, list[str]]:
    parts = [part.splitlines() for part in grad_cam.explanation_conclusion(numbers).split("\n\n")]
    assert [part[0] for part in parts] == [
        "What may be concluded",
        "What may not be concluded",
        "Undecided by these numbers",
    ]
    return dict(zip(("may", "may not", "undecided"), (part[1:] for part in parts), strict=True))


def test_the_record_compares_slice_by_slice_with_random_maps_and_with_the_area(measures):
    record = grad_cam.explanation_record(measures, np.arange(8) % 4, np.arange(8))["gradcam"]
    for name, sign in (("insertion", 1), ("deletion", -1), ("road", 1)):
        gain = sign * (
            measures[f"gradcam:faithfulness:{name}"]
            - measures[f"gradcam:faithfulness:{name} of random maps"]
        )
        assert np.isclose(
            record["faithfulness"][name]["beyond_random"]["value"], np.nanmean(gain), atol=1e-5
        )
    beyond = measures["gradcam:anatomy:brain"] - measures["gradcam:anatomy:brain_area"]
    assert np.isclose(
        record["anatomy"]["brain"]["beyond_area"]["value"], np.nanmean(beyond), atol=1e-5
    )
    assert np.isclose(record["explanation attack"]["eps"]["value"], 4 / 255, atol=1e-6)


def test_the_text_of_a_measured_record_names_every_part_and_both_sizes(measures):
    numbers = grad_cam.explanation_record(measures, np.arange(8) % 4, np.arange(8))
    text = grad_cam.explanation_text(numbers)
    for words in (
        *grad_cam.REGIONS.values(),
        *grad_cam.FAITHFUL.values(),
        *grad_cam.SIMILARITY.values(),
        *CLASSES,
        "on the prediction, eps 4/255",
        "on the map, eps 4/255",
        "n slices / n patients",
        "8 / 8",
        "2 / 2",
        "last layer random",
    ):
        assert words in text, words
    assert "not measured" not in text and "nan" not in text
    assert concluded(numbers)  # two slices decide little, but every line can be written
    assert "hint" in grad_cam.explanation_conclusion(numbers)


def test_the_text_shows_values_with_intervals_in_aligned_columns():
    text = grad_cam.explanation_text(record_with())
    assert (
        "0.50 [0.48, 0.52]" in text
        and "0.100 [0.050, 0.150]" in text
        and "0.25 [0.20, 0.30]" in text
    )
    for block in text.split("\n\n"):
        header, *rows = block.splitlines()[1:]
        second = header.index(header.split("  ", 1)[1].strip().split("  ")[0])
        assert all(row[second - 1] == " " and row[second] != " " for row in rows), block


@pytest.mark.parametrize("value, mark", [(0.49, "ok"), (0.5, "FAILS"), (0.97, "FAILS")])
def test_a_map_that_stays_with_a_random_last_layer_is_marked(value, mark):
    text = grad_cam.explanation_text(
        record_with(randomisation={"stages": {"00 fc": block(value, value - 0.005, value + 0.005)}})
    )
    line = text.splitlines()[-1]
    assert line.split("  ")[0] == "gradcam" and f"  {mark}" in line
    assert ("do not read it as evidence" in line) == (mark == "FAILS")


def test_what_was_not_measured_is_said():
    assert (
        "No explanation was measured"
        in grad_cam.explanation_text({})
        == grad_cam.explanation_conclusion({})
    )
    bare = {"gradcam": {}, "prediction": {"kept": {}}}
    text = grad_cam.explanation_text(bare)
    assert text.count("not measured") == 5 and "UNKNOWN" in text
    found = concluded(bare)
    assert found["may"] == ["- nothing"] and found["may not"] == [
        "- no limit was found by these measures"
    ]
    assert len(found["undecided"]) == 9
    nothing = record_with(
        anatomy__brain=block(None), randomisation={"stages": {"00 fc": block(None)}}
    )
    assert "UNKNOWN: no map to compare" in grad_cam.explanation_text(nothing)
    assert any(
        "not checked with a random last layer" in line for line in concluded(nothing)["undecided"]
    )


def test_a_record_of_an_earlier_version_can_still_be_shown():
    for file in sorted((Path(grad_cam.__file__).parents[1] / "assets").glob("*/patient.json")):
        for run in json.loads(file.read_text()).get("units", []):
            numbers = run.get("explanation") or {}
            assert grad_cam.explanation_text(numbers) and grad_cam.explanation_conclusion(
                numbers
            ), file


def test_nothing_speaks_against_good_maps():
    found = concluded(record_with())
    assert found["may not"] == ["- no limit was found by these measures"] and found[
        "undecided"
    ] == ["- nothing"]
    assert len(found["may"]) == 10


@pytest.mark.parametrize(
    "changed, heading, words, cited",
    [
        # Each sentence turned from its good outcome (all of them: `record_with()`) to its bad one
        # and its open one.
        (
            {"faithfulness__road": {**block(0.1), "beyond_random": block(0.01, -0.02, 0.04)}},
            "may not",
            "shows what the model uses: it is not better than a random map by ROAD",
            "+0.010 [-0.020, +0.040]",
        ),
        (
            {"faithfulness__deletion": block(0.5, 0.4, 0.6)},
            "undecided",
            "whether the map shows what the model uses",
            "",
        ),
        (
            {"randomisation": {"stages": {"00 fc": block(0.8, 0.7, 0.9)}}},
            "may not",
            "that the map shows what the model learned: it hardly changes",
            "0.80 [0.70, 0.90]",
        ),
        (
            {"randomisation": {"stages": {"00 fc": block(0.4, 0.2, 0.6)}}},
            "undecided",
            "interval reaches the limit",
            "0.40 [0.20, 0.60]",
        ),
        (
            {"anatomy__csf": {**block(0.1, 0.09, 0.11), "beyond_area": block(-0.2, -0.3, -0.1)}},
            "may not",
            "that the map points at the ventricles (CSF): it has less there than an even map",
            "-0.20 [-0.30, -0.10]",
        ),
        (
            {"anatomy__csf": {**block(0.3, 0.29, 0.31), "beyond_area": block(0.0, -0.1, 0.1)}},
            "undecided",
            "prefers or avoids the ventricles",
            "+0.00 [-0.10, +0.10]",
        ),
        (
            {
                "anatomy__background": {
                    **block(0.6, 0.59, 0.61),
                    "beyond_area": block(0.3, 0.2, 0.4),
                }
            },
            "may not",
            "that the map shows anatomy alone: it prefers the background",
            "+0.30 [+0.20, +0.40]",
        ),
        (
            {"attack 4/255__iou_top20": block(0.2, 0.1, 0.3)},
            "may not",
            "that the map is stable: an attack on the prediction at eps 4/255",
            "0.20 [0.10, 0.30]",
        ),
        (
            {"attack 4/255__iou_top20": block(0.5, 0.3, 0.7)},
            "undecided",
            "whether the map stays in place under an attack on the prediction at eps 4/255",
            "0.50 [0.30, 0.70]",
        ),
        (
            {"explanation attack__iou_top20": block(0.2, 0.1, 0.3)},
            "may not",
            "an attack on the map itself that keeps the prediction (eps 4/255) moves",
            "0.20 [0.10, 0.30]",
        ),
        (
            {"explanation attack__iou_top20": block(0.5, 0.3, 0.7)},
            "undecided",
            "whether the map stays in place under an attack on the map itself",
            "0.50 [0.30, 0.70]",
        ),
        (
            {"anatomy__brain": {**block(0.5, 0.3, 0.7), "beyond_area": block(0.2, 0.1, 0.3)}},
            "may not",
            "where the maps of patients in general lie",
            "widest interval 0.40",
        ),
        (
            {
                "anatomy__brain": {
                    **block(0.5, 0.2, 0.8, patients=6),
                    "beyond_area": block(0.2, 0.1, 0.3, patients=6),
                }
            },
            "may not",
            "where the maps of patients in general lie",
            "6 patients",
        ),
    ],
)
def test_every_sentence_turns_with_its_number(changed, heading, words, cited):
    good, found = concluded(record_with()), concluded(record_with(**changed))
    lines = [line for line in found[heading] if words in line]
    assert len(lines) == 1 and cited in lines[0], found
    assert not any(words in line for line in good[heading])


def test_the_place_of_an_untrusted_map_is_no_result_about_the_model():
    failed = concluded(record_with(randomisation={"stages": {"00 fc": block(0.8, 0.7, 0.9)}}))
    assert not any(
        "prefers the brain" in line or "avoids the background" in line for line in failed["may"]
    )
    assert sum("it did not pass both checks" in line for line in failed["may not"]) == 4
    assert any("prefers the brain" in line for line in concluded(record_with())["may"])


def test_a_certain_but_tiny_difference_is_no_preference():
    tiny = concluded(
        record_with(
            anatomy__brain={**block(0.12, 0.11, 0.13), "beyond_area": block(0.004, 0.001, 0.006)}
        )
    )
    assert (
        sum(
            "prefers or avoids the brain: the difference is less than" in line
            for line in tiny["may not"]
        )
        == 1
    )
    assert not any(
        "the map prefers the brain (" in line for lines in tiny.values() for line in lines
    )


def test_few_patients_make_a_verdict_a_hint():
    few = record_with(
        randomisation={
            "stages": {"00 fc": block(0.1, 0.0, 0.2, patients=grad_cam.FEW_PATIENTS - 1)}
        }
    )
    (line,) = (line for line in concluded(few)["may"] if "last layer learned" in line)
    assert "only a hint, n = 19 patients" in line
    assert not any("hint" in line for line in concluded(record_with())["may"])


def test_the_verdict_on_planted_evidence_follows_the_record(tmp_path):
    def written(*shares: float, training: str = "whole") -> str:
        rows = [
            {
                "training": training,
                "tokens_trained_on": None,
                "trained_on": 960,
                "side": 128 * 2**i,
                "cells": 4 * 2**i,
                "noise": True,
                "area": 0.25,
                "accuracy": 1.0,
                "inside": {
                    "gradcam": {"value": share, "ci": [share, share], "n": 48, "empty": 3},
                    "layercam": {"value": 0.9, "ci": [0.9, 0.9], "n": 48, "empty": 0},
                },
            }
            for i, share in enumerate(shares)
        ]
        (tmp_path / "planted.json").write_text(
            json.dumps({"limit": 0.7, "backbones": {"Resnet": rows}})
        )
        return grad_cam.planted_text("Resnet_atk", tmp_path / "planted.json")

    assert "kept from 8 cells a side on" in written(0.5, 0.7)
    assert "n = 48 images" in written(0.5, 0.7) and "0.50 [0.50, 0.50], 3 empty" in written(
        0.5, 0.7
    )
    assert "No row trained whole keeps the limit" in written(0.5, 0.69)
    assert "first learned what lies under them, the limit is kept" in written(
        0.7, 0.8, training="tokens first"
    )
    assert "the limit is not kept either" in written(0.69, 0.8, training="tokens first")
    assert "Every row keeps the limit" in written(0.7, 0.8)
    assert "not measured" in grad_cam.planted_text("Dinov2", tmp_path / "planted.json")
    assert "not measured" in grad_cam.planted_text("Dinov2", tmp_path / "nothing.json")


# -- the backbones, trained on planted evidence ----------------------------------------------------

#: DINOv2 that learns everything from the class misses the limit, as README and its notebooks say.
#: Once it keeps the limit, this mark and those sentences must go.
MISSED = pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="attention moves evidence between tokens below the layer that is read",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, training, side",
    [
        pytest.param("Resnet", "whole", SIDE, marks=pytest.mark.exhaustive),
        pytest.param("Efficientnet", "whole", EXPLAINED_SIDE, marks=pytest.mark.exhaustive),
        pytest.param("Dinov2", "tokens first", SIDE, marks=pytest.mark.exhaustive),
        pytest.param("Dinov2", "whole", SIDE, marks=[MISSED, pytest.mark.exhaustive]),
    ],
)
def test_a_trained_backbone_is_explained_by_the_planted_patch(name, training, side):
    model = trained_backbone(name, training)
    images, labels, patch = stripes_in_patch(
        48, seed=9, side=side, noise=BUDGETS[name, training]["noise"]
    )
    if accuracy(model, images, labels) <= 0.9:
        pytest.fail(
            f"{name} did not learn the stripes"
        )  # no assertion, so that the mark above does not hide it
    # An empty map has nothing inside.
    found = {
        method: np.nan_to_num(inside(model, images, labels, patch, method)).mean()
        for method in GRADIENT_METHODS
    }
    assert min(found.values()) >= LIMIT, found


@pytest.mark.parametrize("name", BACKBONES)
def test_a_random_backbone_does_not_prefer_the_planted_patch(name):
    images, labels, patch = stripes_in_patch(4, seed=11, side=128)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = [build_model(name, pretrained=False) for _ in range(2)]
    for method in GRADIENT_METHODS:
        assert (
            np.mean([np.nanmean(inside(model, images, labels, patch, method)) for model in models])
            <= 2 * patch.float().mean()
        ), method
