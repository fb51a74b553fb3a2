"""From the pixels of a patient's slices to the logits of the patient."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn


class ScanModel(nn.Module):
    """Pixels (B, S, 1, H, W) in [0, 1] and mask (B, S) → logits (B, 4) of the patients.

    Args:
        backbone: a model with `features(images) -> (N, D)`, such as a `PixelClassifier`.
        aggregator: one of `AGGREGATORS`.
        center, scale: (D,), subtracted from the features, and what they are then divided by:
            mean and standard deviation over training slices.
    """

    center: Tensor
    scale: Tensor

    def __init__(
        self, backbone: nn.Module, aggregator: nn.Module, center: Tensor, scale: Tensor
    ) -> None:
        super().__init__()
        self.backbone, self.aggregator = backbone, aggregator
        self.register_buffer("center", center)
        self.register_buffer("scale", scale)

    def standardized(self, images: Tensor) -> Tensor:
        """Standardized features (N, D) of images (N, 1, H, W)."""
        features = cast(Callable[[Tensor], Tensor], self.backbone.features)
        return (features(images) - self.center) / self.scale

    def features(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """Standardized features (B, S, D), 0 where a slice does not exist."""
        seen = self.standardized(pixels[mask])
        features = seen.new_zeros((*mask.shape, seen.shape[1]))
        features[mask] = seen
        return features

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, 4) of the patients."""
        return self.aggregator(self.features(pixels, mask), mask)

    def reread(self, pixels: Tensor, mask: Tensor, changed: Tensor, features: Tensor) -> Tensor:
        """Logits (B, 4) after a change of some slices, from the other slices' known features.

        Only the changed slices pass through the backbone, so an attack on k slices costs k slices.

        Args:
            changed: bool (B, S), the slices that differ from those that gave `features`.
        """
        features = features.clone()
        features[changed] = self.standardized(pixels[changed])
        return self.aggregator(features, mask)
