"""backbones: raw pixels in, four logits out, whatever the batch; checkpoints restore or refuse."""

import pytest
import torch

from utils.backbones import (
    Depthwise,
    announce_missing_weights,
    build_model,
    load_model,
    read_metadata,
    save_half,
    save_model,
)
from utils.grad_cam import explain
from utils.utils_funcs import BACKBONES, MODELS, UserError


@pytest.fixture(scope="module", params=BACKBONES)
def model(request):
    torch.manual_seed(0)
    size = 70 if request.param == "Dinov2" else 64
    network = build_model(request.param, pretrained=False, input_size=size)
    for module in network.modules():
        # timm starts residual branches at zero: until trained they pass no gradient.
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    return network


def test_raw_pixels_give_four_logits(model):
    logits = model(torch.rand(3, 1, 128, 128))
    assert logits.shape == (3, 4) and logits.dtype == torch.float32 and not model.training


NO_PIXELS = {
    "bytes": lambda images: (images * 255).byte(),
    "whole numbers": lambda images: (images * 255).long(),
    "gray levels": lambda images: images * 255,
    "from -1": lambda images: images * 2 - 1,
    "normalized": lambda images: (images - 0.45) / 0.22,
    "one NaN": lambda images: images.index_fill(3, torch.tensor([5]), torch.nan),
    "infinite": lambda images: images.index_fill(3, torch.tensor([5]), torch.inf),
}


@pytest.mark.parametrize("change", NO_PIXELS.values(), ids=NO_PIXELS)
def test_what_are_no_pixels_gets_a_sentence_and_no_logits_and_no_map(change, model):
    images = change(torch.rand(2, 1, 64, 64))
    with pytest.raises(UserError, match=r"\[0, 1\]"), torch.no_grad():
        model(images)
    with pytest.raises(UserError, match=r"\[0, 1\]"):
        explain(model, images)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_maps_and_logits_are_the_same_inside_no_grad_and_inference_mode(mode, model):
    images = torch.rand(2, 1, 64, 64)
    expected, logits = explain(model, images), model(images).detach()
    with mode():
        given = images.clone()
        assert torch.equal(explain(model, given), expected)
        assert torch.allclose(model(given), logits, atol=1e-5)


def test_logits_do_not_depend_on_the_batch(model):
    images = torch.rand(7, 1, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, single = model(images), torch.cat([model(image[None]) for image in images])
        shuffled = model(images.flip(0)).flip(0)
    assert (whole - single).abs().max() < 1e-4
    assert (whole - shuffled).abs().max() < 1e-4


def test_gradients_reach_every_pixel_region(model):
    images = torch.rand(2, 1, 128, 128, requires_grad=True)
    model(images).square().sum().backward()
    blocks = images.grad.abs().unfold(2, 32, 32).unfold(3, 32, 32).amax((-1, -2))
    assert (blocks > 0).all(), "some part of the image cannot be attacked"


def test_a_checkpoint_restores_the_same_logits(model, tmp_path):
    images = torch.rand(2, 1, 128, 128)
    save_model(model, tmp_path / "model.safetensors", {"note": "x"})
    restored = load_model(tmp_path / "model.safetensors")
    assert restored.init == "random" and restored.name == model.name and not restored.training
    assert torch.equal(restored(images), model(images))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_loaded_nothing_says_random(name, capsys):
    announce_missing_weights.cache_clear()  # said once a process
    model = build_model(name, pretrained=True)
    assert model.init == "random", "the tests run without a hub"
    assert "random weights" in capsys.readouterr().out


def test_local_weights_are_loaded_and_named(tmp_path, monkeypatch):
    import timm
    from safetensors.torch import save_file

    source = timm.create_model("resnet34")
    save_file(source.state_dict(), tmp_path / "resnet34.a1_in1k.safetensors")
    monkeypatch.setenv("ALZHEIMER_WEIGHTS", str(tmp_path))
    model = build_model("Resnet")
    assert model.init == "imagenet1k"
    assert torch.equal(model.body.conv1.weight, source.conv1.weight)


def test_local_dinov2_weights_are_loaded_and_named(tmp_path, monkeypatch):
    from transformers import Dinov2Config, Dinov2Model

    source = Dinov2Model(
        Dinov2Config(
            hidden_size=384,
            num_hidden_layers=2,
            num_attention_heads=6,
            patch_size=14,
            image_size=518,
        )
    )
    source.save_pretrained(tmp_path / "dinov2-small")
    monkeypatch.setenv("ALZHEIMER_WEIGHTS", str(tmp_path))
    model = build_model("Dinov2_atk")
    assert model.init == "lvd142m"
    assert torch.equal(model.body.backbone.embeddings.cls_token, source.embeddings.cls_token)


def test_an_empty_weights_folder_is_an_error_not_random_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("ALZHEIMER_WEIGHTS", str(tmp_path))
    for name in BACKBONES:
        with pytest.raises(UserError, match="unset ALZHEIMER_WEIGHTS"):
            build_model(name)


def test_an_untrained_model_is_not_confident():
    """Its loss in training is near ln 4, that of four equal probabilities; with timm's head that of
    EfficientNet is about 4 here."""
    images = torch.rand(16, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 4
    for name in BACKBONES:
        torch.manual_seed(0)
        model = build_model(name, pretrained=False, input_size=70).train()
        assert torch.nn.functional.cross_entropy(model(images), labels) < 2, name


def test_a_file_of_half_the_size_answers_alike(tmp_path):
    torch.manual_seed(0)
    model = build_model("Efficientnet", pretrained=False)
    with torch.no_grad():
        model.body.bn1.running_var.fill_(1e6)  # more than float16 holds
    save_model(model, tmp_path / "whole.safetensors", {"best_epoch": 3})
    save_half(tmp_path / "whole.safetensors", tmp_path / "half.safetensors")
    sizes = {name: (tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "half")}
    assert sizes["half"] < 0.52 * sizes["whole"]
    half, images = load_model(tmp_path / "half.safetensors"), torch.rand(4, 1, 128, 128)
    assert read_metadata(tmp_path / "half.safetensors")["best_epoch"] == 3
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    assert half.body.bn1.running_var.max() == 1e6
    assert (half(images) - model(images)).abs().max() < 1e-2 * model(images).abs().max()


def test_dinov2_refuses_a_size_it_would_silently_crop():
    with pytest.raises(UserError, match="multiple"):
        build_model("Dinov2", pretrained=False, input_size=128)


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (64, 64), (2, 64, 64)])
def test_anything_but_one_channel_is_refused(shape):
    with pytest.raises(UserError, match=r"\(N, 1, H, W\)"):
        build_model("Resnet", pretrained=False)(torch.rand(shape))


def test_checkpoints_that_do_not_fit_say_so(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="No checkpoint"):
        load_model(tmp_path / "nothing.safetensors")
    (tmp_path / "half.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match="no readable safetensors"):
        load_model(tmp_path / "half.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="not written by this project"):
        load_model(tmp_path / "foreign.safetensors")
    model = build_model("Resnet", pretrained=False)
    save_model(
        model,
        tmp_path / "wrong.safetensors",
        state=build_model("Efficientnet", pretrained=False).state_dict(),
    )
    with pytest.raises(UserError, match="does not fit Resnet"):
        load_model(tmp_path / "wrong.safetensors")


def test_fast_layers_change_neither_names_nor_weights_nor_answers():
    import timm

    torch.manual_seed(0)
    ours = build_model("Efficientnet", pretrained=False, input_size=64)
    torch.manual_seed(0)
    delivered = timm.create_model("efficientnet_b0", num_classes=4).eval()
    fast = [layer for layer in ours.modules() if isinstance(layer, Depthwise)]
    assert len(fast) == 11 and all(layer.groups == layer.in_channels for layer in fast)
    mine, theirs = ours.body.state_dict(), delivered.state_dict()
    assert list(mine) == list(theirs)
    assert all(
        torch.equal(mine[name], theirs[name]) for name in mine if not name.startswith("classifier")
    )
    delivered.load_state_dict(mine)
    images = torch.rand(2, 1, 64, 64)
    assert torch.allclose(ours(images), delivered(ours.pixels_to_input(images)), atol=1e-6)


@pytest.mark.parametrize("name", ["Dinov2", "Efficientnet"])
def test_bfloat16_on_a_cpu_agrees_with_float32_forwards_and_backwards(name):
    torch.manual_seed(0)
    model = build_model(name, pretrained=False, input_size=56 if name == "Dinov2" else 64).train()
    images, found = torch.rand(16, 1, 64, 64), {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(1)  # stochastic depth, where there is any
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        gradient = torch.autograd.grad(logits.float().square().sum(), list(model.parameters()))
        found[precision] = logits.float().detach(), torch.cat([part.flatten() for part in gradient])
    (logits, gradient), (low_logits, low_gradient) = found["fp32"], found["bf16"]
    assert logits.dtype == torch.float32 and not torch.equal(logits, low_logits)
    # Wide limits: BatchNorm over random features amplifies a rounding; a layer that computes
    # something else is far outside.
    assert (low_logits - logits).norm() < 0.2 * logits.norm()
    assert torch.cosine_similarity(low_gradient, gradient, dim=0) > 0.9


def test_attention_is_plain_in_bfloat16_and_fused_in_float32(monkeypatch):
    from transformers.integrations import sdpa_attention
    from transformers.models.dinov2 import modeling_dinov2

    used = []
    for module, function in (
        (sdpa_attention, "sdpa_attention_forward"),
        (modeling_dinov2, "eager_attention_forward"),
    ):
        inner = getattr(module, function)
        monkeypatch.setattr(
            module,
            function,
            lambda *given, inner=inner, function=function, **more: (
                used.append(function) or inner(*given, **more)
            ),
        )
    model, images = build_model("Dinov2", pretrained=False, input_size=28), torch.rand(1, 1, 28, 28)
    model(images)
    assert set(used) == {"sdpa_attention_forward"}
    used.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
    assert set(used) == {"eager_attention_forward"}
