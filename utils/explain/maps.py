"""Maps of what a classifier looked at: the Grad-CAM family and attention rollout."""

from __future__ import annotations

import contextlib
import io

import torch
from torch import Tensor, nn

from utils.explain.cells import target_layer, upsampler
from utils.explain.tokens import above_mean, attention_rollout, find_dino, map_from_tokens
from utils.model_state import frozen
from utils.pixel_range import pixel_fault
from utils.utils_funcs import UserError

#: Class activation maps of the `grad-cam` package: Grad-CAM (Selvaraju et al. 2017), Grad-CAM++
#: (Chattopadhay et al. 2018), Layer-CAM (Jiang et al. 2021), Score-CAM (Wang et al. 2020), which
#: takes one forward pass a channel, hundreds an image: use it for the few slices of a figure.
CAMS = ("gradcam", "gradcam++", "layercam", "scorecam")
#: Attention rollout (Abnar and Zuidema 2020) reads attention matrices, which only DINOv2 has.
METHODS = (*CAMS, "rollout")


def explain(
    model: nn.Module,
    images: Tensor,
    targets: Tensor | None = None,
    *,
    method: str = "gradcam",
    batch_size: int = 64,
    layer: nn.Module | None = None,
) -> Tensor:
    """One map an image: where the evidence for the target class lies.

    Each map is scaled by itself to [0, 1]; a map without positive evidence is all zero. The model
    is used in eval mode and float32. Its modes, gradients and hooks are afterwards what they were,
    also when this raises.

    Args:
        model: a `PixelClassifier`, or a wrapper around one that still returns one logit a class.
        images: float32 (N, 1, H, W) in [0, 1].
        targets: int64 (N,), the class to explain; None takes the predicted one. Rollout does not
            depend on a class and ignores it.
        method: one of `METHODS`.
        batch_size: bounds the peak memory; no map depends on it.
        layer: a module whose output is feature maps (N, C, h, w) or, for DINOv2, tokens; None takes
            `target_layer(model)`.

    Returns:
        float32 (N, H, W) in [0, 1], at the images' resolution and on their device.

    Raises:
        UserError: unknown method, a method that this backbone does not have, images or targets of
            another shape, pixels outside [0, 1], or a target that is no class of the model.
    """
    if method not in METHODS:
        raise UserError(f"Unknown explanation {method!r}: expected one of {', '.join(METHODS)}.")
    if images.ndim != 4 or images.shape[1] != 1:
        raise UserError(
            f"Images to explain have the shape (N, 1, H, W), not {tuple(images.shape)}."
        )
    if fault := pixel_fault(images):
        raise UserError(f"No map is made: {fault}.")
    if targets is not None and tuple(targets.shape) != (len(images),):
        raise UserError(
            f"{len(images)} images need as many target classes, not the shape "
            f"{tuple(targets.shape)}."
        )
    if not len(images):
        return images.new_zeros((0, *images.shape[-2:]))
    if method == "rollout":
        find_dino(model)  # raises for any other backbone
    layer = layer or target_layer(model)
    device = images.device
    with (
        frozen(model),
        torch.inference_mode(False),
        torch.autocast(device.type, enabled=False),
    ):
        maps = torch.empty(len(images), *images.shape[-2:], device=device)
        # A clone made here takes part in autograd even if the images come from inference mode.
        upsample = upsampler(model, layer, images[:1].detach().float().clone())
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            batch = images[rows].detach().float().clone()
            if method == "rollout":
                coarse = attention_rollout(model, batch)
            else:
                classes = None if targets is None else targets[rows].tolist()
                coarse = _class_activation_maps(model, batch, classes, method, layer)
            # Enlarged batch by batch: the steps of it for all images at once would hold several
            # full sets of maps.
            maps[rows] = unit_range(upsample(coarse.to(device)))
    return maps


def _class_activation_maps(
    model: nn.Module, images: Tensor, targets: list[int] | None, method: str, layer: nn.Module
) -> Tensor:
    """Coarse maps (N, h, w) of one batch by one of `CAMS`, each scaled to [0, 1], on the CPU."""
    from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, LayerCAM, ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    by_name = dict(zip(CAMS, (GradCAM, GradCAMPlusPlus, LayerCAM, ScoreCAM), strict=True))
    tokens_to_map = map_from_tokens(model)
    logits = None if targets is None else [ClassifierOutputTarget(target) for target in targets]
    needs_gradients = method != "scorecam"
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(needs_gradients))
        if needs_gradients:
            # Gradients are needed from the logits down to this layer: cutting the graph here saves
            # the rest of the backward pass and its memory. Registered first, so that grad-cam sees
            # the output behind the cut.
            cut = layer.register_forward_hook(
                lambda _module, _inputs, output: output.detach().requires_grad_()
            )
            stack.callback(cut.remove)
        else:  # Score-CAM opens a progress bar an image
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        cam = stack.enter_context(by_name[method](model, [layer], reshape_transform=tokens_to_map))
        if tokens_to_map:
            # Only the activations change, not the weights of Score-CAM. From those of Grad-CAM++
            # the term with a channel's sum, which is now zero, drops out.
            combine = cam.get_cam_image
            cam.get_cam_image = lambda pixels, layer, targets, activations, *others: combine(
                pixels, layer, targets, above_mean(activations), *others
            )
        # None leaves the map coarse: grad-cam would stretch it over the image (see `upsampler`).
        cam.get_target_width_height = lambda _inputs: None
        cam.batch_size = len(images)  # of Score-CAM's masked copies
        try:
            return torch.from_numpy(cam(images, logits))
        except IndexError as error:  # grad-cam's own `__exit__` would print and swallow this one
            raise UserError(
                f"grad-cam failed ({error}): are all target classes among the logits?"
            ) from error


def unit_range(maps: Tensor) -> Tensor:
    """Maps (N, H, W), each divided by its maximum; a map without positive values becomes zeros.
    Nothing is subtracted: zero means "no evidence"."""
    peak = maps.amax(dim=(-2, -1), keepdim=True)
    tiny = torch.finfo(maps.dtype).tiny
    return torch.where(peak > 0, maps / peak.clamp_min(tiny), 0.0).clamp(0, 1).float()
