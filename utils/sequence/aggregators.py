"""What reads a patient's slices: features (B, S, D) and mask (B, S) → logits (B, 4)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from utils.utils_funcs import CLASSES, UserError


class MeanProbability(nn.Module):
    """The log of the mean of the slices' probabilities, which needs no sequence model."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, len(CLASSES))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, 4) from features (B, S, D) and mask (B, S)."""
        each = self.head(features).log_softmax(2).masked_fill(~mask[..., None], -torch.inf)
        return each.logsumexp(1) - mask.sum(1, keepdim=True).log()


class AttentionPooling(nn.Module):
    """Gated attention over the slices, whose order it ignores (Ilse et al. 2018,
    arXiv:1802.04712)."""

    def __init__(self, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(0.25))
        self.tanh = nn.Linear(hidden, hidden)
        self.gate = nn.Linear(hidden, hidden)
        self.score = nn.Linear(hidden, 1)
        self.head = nn.Linear(hidden, len(CLASSES))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, 4) from features (B, S, D) and mask (B, S)."""
        reduced = self.reduce(features)
        score = self.score(self.tanh(reduced).tanh() * self.gate(reduced).sigmoid()).squeeze(2)
        weights = score.masked_fill(~mask, -torch.inf).softmax(1)
        return self.head((weights[..., None] * reduced).sum(1))


class RecurrentReader(nn.Module):
    """A bidirectional GRU along the body axis, its states averaged over the slices.

    Cho et al. 2014, arXiv:1406.1078.
    """

    def __init__(self, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(0.25))
        self.gru = nn.GRU(hidden, hidden // 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(hidden, len(CLASSES))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, 4) from features (B, S, D) and mask (B, S)."""
        reduced = self.reduce(features)
        existing_first = (~mask).int().argsort(dim=1, stable=True)[..., None].expand_as(reduced)
        # Packed, so that the backward direction starts at each patient's last slice, whatever the
        # other scans of the batch are.
        packed = nn.utils.rnn.pack_padded_sequence(
            reduced.gather(1, existing_first),
            mask.sum(1).cpu(),
            batch_first=True,
            enforce_sorted=False,
        )
        # cuDNN has no backward pass through a recurrent network in evaluation mode, which an
        # attack needs.
        with torch.backends.cudnn.flags(enabled=self.training):
            states = self.gru(packed)[0]
        states, _ = nn.utils.rnn.pad_packed_sequence(
            states, batch_first=True, total_length=mask.shape[1]
        )
        return self.head(states.sum(1) / mask.sum(1, keepdim=True))  # the padding is 0


class SmallTransformer(nn.Module):
    """One pre-norm encoder layer over the slices with sinusoidal positions.

    Vaswani et al. 2017, arXiv:1706.03762.
    """

    def __init__(self, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.hidden = hidden
        self.reduce = nn.Linear(features, hidden)
        self.encoder = nn.TransformerEncoderLayer(
            hidden,
            nhead=4,
            dim_feedforward=2 * hidden,
            dropout=0.25,
            batch_first=True,
            norm_first=True,
        )
        self.head = nn.Linear(hidden, len(CLASSES))

    def positions(self, slices: int, like: Tensor) -> Tensor:
        """Sines and cosines (slices, hidden) of the slices' positions, in the type of `like`."""
        place = torch.arange(slices, device=like.device, dtype=like.dtype)[:, None]
        even = torch.arange(0, self.hidden, 2, device=like.device, dtype=like.dtype)
        frequency = torch.exp(even * (-np.log(1e4) / self.hidden))
        angle = place * frequency
        return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, 4) from features (B, S, D) and mask (B, S)."""
        reduced = self.reduce(features)
        positions = self.positions(reduced.shape[1], reduced)
        states = self.encoder(reduced + positions, src_key_padding_mask=~mask)
        return self.head((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


AGGREGATOR_CLASSES: dict[str, type[nn.Module]] = {
    "mean": MeanProbability,
    "attention": AttentionPooling,
    "gru": RecurrentReader,
    "transformer": SmallTransformer,
}
#: How slices become one answer.
AGGREGATORS = tuple(AGGREGATOR_CLASSES)


def build_aggregator(name: str, features: int) -> nn.Module:
    """A fresh aggregator of `AGGREGATORS` in evaluation mode, for `features` numbers a slice."""
    if name not in AGGREGATORS:
        raise UserError(f"Unknown aggregator {name!r}: expected one of {', '.join(AGGREGATORS)}.")
    return AGGREGATOR_CLASSES[name](features).eval()
