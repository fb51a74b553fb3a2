"""Does a map depend on what the network learned? Parameters are replaced by random ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from utils.backbones import DinoClassifier, PixelClassifier, build_model
from utils.explain.cells import body_of, pixel_classifier_of
from utils.explain.maps import explain
from utils.explain.similarity import rank_correlation
from utils.prediction import predict
from utils.utils_funcs import UserError

#: With a random last layer a gradient map must have a rank correlation below this with the trained
#: one (Adebayo et al. 2018).
SANITY_LIMIT = 0.5


def randomization_check(
    model: nn.Module,
    images: Tensor,
    *,
    method: str = "gradcam",
    draws: int = 3,
    depth: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    fresh: Callable[[], nn.Module] | None = None,
) -> dict[str, np.ndarray]:
    """Cascading parameter randomization (Adebayo et al. 2018, arXiv:1810.03292): from the head
    down, one stage after the other is replaced by a random one, and the map is compared with the
    trained model's map of the same class.

    Attention rollout never reads the head, so it cannot change with the first stage and fails.
    Grad-CAM++ and Layer-CAM keep positive gradients only, so over the non-negative features of a
    ResNet they can stay nearly what they were (0.97 with random features): trust the number of the
    model at hand, not the name of the method.

    Args:
        images: float32 (N, 1, H, W) in [0, 1].
        draws: random networks to average over. One alone says little about the head: all images
            share its four random rows, and on a coarse grid these can agree with the trained ones
            by luck.
        depth: how many stages, from the head down; None takes all.
        fresh: builds an untrained model of the same architecture; None builds it by the name
            of the `PixelClassifier` in `model`.

    Returns:
        name of the last stage replaced → Spearman correlation with the trained map, float64 (N,),
        mean of the draws.
    """
    targets = predict(model, images, batch_size=batch_size).argmax(1)
    trained = explain(model, images, targets, method=method, batch_size=batch_size)
    result: dict[str, np.ndarray] = {}
    for draw in range(draws):
        with torch.random.fork_rng(devices=[]):
            # Far from the seeds of training, with which this would be the model's own start.
            torch.manual_seed(2**31 + draws * seed + draw)
            source = fresh() if fresh else _untrained(model)
        altered = copy.deepcopy(model)
        pairs = zip(network_stages(altered), network_stages(source), strict=True)
        for (name, stage), (_, random_stage) in list(pairs)[:depth]:
            stage.load_state_dict(random_stage.state_dict())
            maps = explain(altered, images, targets, method=method, batch_size=batch_size)
            result[name] = result.get(name, 0) + rank_correlation(trained, maps) / draws
    return result


def _untrained(model: nn.Module) -> PixelClassifier:
    """A randomly initialized network of the architecture of the `PixelClassifier` in `model`."""
    classifier = pixel_classifier_of(model)
    if classifier is None:
        raise UserError(
            f"{type(model).__name__} holds no backbone of this repository: give `fresh`, a "
            "function that builds it untrained."
        )
    return build_model(classifier.name, pretrained=False, input_size=classifier.input_size)


def network_stages(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The parts of the network that hold parameters, by name, from the head down to the pixels."""
    body = body_of(model)
    if isinstance(body, DinoClassifier):
        layers = body.get_submodule("backbone.encoder.layer").named_children()
        parts = [
            ("embeddings", body.get_submodule("backbone.embeddings")),
            *((f"layer{place}", layer) for place, layer in layers),
            ("layernorm", body.get_submodule("backbone.layernorm")),
            ("head", body.head),
        ]
    else:
        parts = []
        for name, child in body.named_children():
            if name == "blocks":
                parts += [(f"{name}{place}", block) for place, block in child.named_children()]
            else:
                parts.append((name, child))
    return [(name, part) for name, part in reversed(parts) if any(True for _ in part.parameters())]
