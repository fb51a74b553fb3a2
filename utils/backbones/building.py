"""Name → a fresh model, with pretrained weights where there are any."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch import nn

from utils.backbones.classifier import PixelClassifier
from utils.backbones.networks import NETWORKS, Network
from utils.utils_funcs import MODELS, UserError

#: Seconds that a hub gets to answer before the model starts from random weights.
HUB_TIMEOUT = 8


def build_model(
    name: str, *, pretrained: bool = True, input_size: int | None = None
) -> PixelClassifier:
    """A fresh model in evaluation mode, with `.init` saying which weights were really loaded.

    Args:
        name: one of `MODELS`; `_atk` models are the same networks as their clean counterparts.
        pretrained: look for weights in the folder `ALZHEIMER_WEIGHTS`, or else on their hub; where
            there are none, say so in one line and start from random weights (`init = "random"`).
        input_size: side in pixels that the backbone sees; None keeps the native size (DINOv2: 126
            for 128).

    Raises:
        UserError: unknown name; a DINOv2 size that is no multiple of 14 (it would silently ignore
            the remainder); `ALZHEIMER_WEIGHTS` without the weights.
    """
    if name not in MODELS:
        raise UserError(f"Unknown model {name!r}: expected one of {', '.join(MODELS)}.")
    backbone = name.removesuffix("_atk")
    network = NETWORKS[backbone]
    input_size = input_size or network.input_size
    if input_size is not None and input_size % network.multiple_of:
        raise UserError(
            f"{backbone} was asked for {input_size} px, but its patch is {network.multiple_of}: "
            f"use a multiple of it, such as {network.input_size}."
        )
    if pretrained:
        body, init = with_pretrained_weights(network, name)
    else:
        body, init = network.build(None, False), "random"
    model = PixelClassifier(body, name=name, init=init, input_size=input_size)
    # Convolutions run up to 1.5 times faster on channels-last weights, in training and under
    # attack (CPU and GPU).
    return model.to(memory_format=torch.channels_last).eval()


def with_pretrained_weights(network: Network, name: str) -> tuple[nn.Module, str]:
    """The network with pretrained weights if there are any, and what its weights are called.

    Args:
        name: of the model, for the line that says that there are none.

    Raises:
        UserError: `ALZHEIMER_WEIGHTS` names a folder that does not hold the weights.
    """
    folder = os.environ.get("ALZHEIMER_WEIGHTS")
    if folder:
        if not Path(folder).is_dir():
            raise UserError(
                f"ALZHEIMER_WEIGHTS names {folder}, which is no folder: point it to the folder of "
                "weights or unset it."
            )
        return network.build(Path(folder), True), network.init
    reason = hub_problem()
    if reason is None:
        try:
            return network.build(None, True), network.init
        except Exception as error:  # noqa: BLE001  any failure means the same: no weights
            reason = type(error).__name__
    announce_missing_weights(name, reason)
    return network.build(None, False), "random"


@functools.cache
def announce_missing_weights(name: str, reason: str) -> None:
    """Prints, once a process for each model and reason, that it starts from random weights."""
    print(
        f"{name}: pretrained weights not available ({reason}); starting from random weights "
        "(init: random)."
    )


def hub_problem() -> str | None:
    """Why the hub cannot be asked for weights (None: it can)."""
    return "HF_HUB_OFFLINE=1" if os.environ.get("HF_HUB_OFFLINE") == "1" else hub_answer()


@functools.cache
def hub_answer() -> str | None:
    """What is wrong with the hub's answer to one request (None: nothing); asked once a process.

    Checked first because hub clients retry for minutes without a network.
    """
    import urllib.error
    import urllib.request

    from huggingface_hub.constants import ENDPOINT

    request = urllib.request.Request(ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError as error:  # a proxy that refuses also answers with a status
        return f"the hub answered {error.code}" if error.code >= 400 else None
    except OSError as error:
        return f"no hub: {type(error).__name__}"
    return None
