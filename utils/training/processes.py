"""The processes that share one training."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator


class Team:
    """The processes of one training: this one alone, or those that `torchrun` started.

    Several processes work together through `accelerate`. Each takes its part of every batch and of
    every validation, so the global batch and the gradient are those of a single process.
    """

    def __init__(self, device: torch.device) -> None:
        self.size, self.rank, self.device = 1, 0, device
        self.engine: Accelerator | None = None
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import Accelerator

            self.engine = Accelerator(cpu=device.type == "cpu")
            self.size = self.engine.num_processes
            self.rank = self.engine.process_index
            self.device = self.engine.device

    @property
    def share(self) -> slice:
        """The rows of any batch or set that this process works on; no two processes share a row."""
        return slice(self.rank, None, self.size)

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose gradient is averaged over all processes."""
        return model if self.engine is None else self.engine.prepare_model(model)

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.engine is not None:
            self.engine.wait_for_everyone()

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """All `count` rows in their original order, on the CPU, from each process's share."""
        if self.engine is None:
            return rows
        longest = math.ceil(count / self.size)
        padding = rows.new_zeros(longest - len(rows), *rows.shape[1:])
        gathered = self.engine.gather(torch.cat([rows, padding]).to(self.device)).cpu()
        whole = rows.new_empty(count, *rows.shape[1:])
        for rank in range(self.size):
            part = whole[rank :: self.size]
            part.copy_(gathered[rank * longest : rank * longest + len(part)])
        return whole

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.engine is None:
            return value
        number = torch.tensor(value, dtype=torch.float64, device=self.device)
        return float(self.engine.reduce(number, "sum"))
