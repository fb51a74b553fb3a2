"""Evaluation mode and frozen parameters for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def frozen(model: nn.Module, *, eval_mode: bool = True) -> Iterator[None]:
    """Inside the block every module is in evaluation mode and no parameter takes a gradient.

    Afterwards each module's mode and each parameter's `requires_grad` and `.grad` are as they were,
    also where the block raised. Autograd still follows the pixels inside: activations that only
    weight gradients need are not kept. Weights, buffers and random states are not restored
    (`utils.attacks.base.untouched_model` does that for the code of other packages).

    Args:
        eval_mode: False leaves every module in the mode that it is in, e.g. for the perturbations
            of adversarial training, which BatchNorm sees in training mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [
        (parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()
    ]
    try:
        if eval_mode:
            model.eval()
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
            # Taken away, since `zero_grad` may write zeros into the tensor that the caller holds.
            parameter.grad = None
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
