"""Whether bfloat16 is worth its rounding for a model on this machine."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: bfloat16 is worth its rounding where it takes at most this share of float32's time; closer to 1
#: the difference is noise of the clock.
PRECISION_GAIN = 0.9


def probe_precision(model: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> str:
    """`bf16` where it makes training steps faster on this machine and agrees with `fp32`, else
    `fp32`.

    They agree where rounding changes the batch's gradient by at most a quarter of what the choice
    of the batch changes it by. The latter is estimated by half the distance between the gradients
    of the batch's two halves.

    The model is left in training mode and its BatchNorm statistics are changed.

    Args:
        images: float32 (N, 1, H, W) in [0, 1] on `device`; labels: (N,).
    """

    def gradient(precision: str, rows: slice = slice(None)) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images[rows])
        loss = F.cross_entropy(logits.float(), labels[rows])
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, learning)])

    model.train()
    # Not timed: the first pass also allocates memory.
    gradients = {precision: gradient(precision) for precision in ("fp32", "bf16")}
    seconds = dict.fromkeys(gradients, math.inf)
    for _ in range(3):  # in turns, so that other load on the machine slows both
        for precision in seconds:
            start = time.perf_counter()
            gradient(precision)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[precision] = min(seconds[precision], time.perf_counter() - start)
    halves = gradient("fp32", slice(0, None, 2)) - gradient("fp32", slice(1, None, 2))
    agrees = bool((gradients["bf16"] - gradients["fp32"]).norm() <= 0.25 * halves.norm() / 2)
    return "bf16" if agrees and seconds["bf16"] < PRECISION_GAIN * seconds["fp32"] else "fp32"
