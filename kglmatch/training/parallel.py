"""Several processes that share each batch, as `torchrun` starts them; or one alone.

Each process runs the network on its own rows of the batch. What must see the whole batch (batch norm,
the triplet loss, the mined pairs) gathers the rows of all processes, gradients included. Each process
then has losses whose mean over the processes is the whole batch's, and the gradients are averaged.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kglmatch.backends.torch import choose_device
from kglmatch.errors import ConfigError


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that validates, logs and writes."""
        return self.rank == 0

    def rows(self, total: int) -> slice:
        """The rows of a batch of `total` that belong to this process.

        Raises:
            ConfigError: the batch cannot be shared out evenly.
        """
        if total % self.size:
            raise ConfigError(
                f"a batch of {total} pairs cannot be shared evenly by {self.size} processes; "
                "choose a multiple for batch_size"
            )
        each = total // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all processes, in the batch's order: (n, ...) -> (n * size, ...), with gradients."""
        if self.size == 1:
            return x
        if x.dim() == 4:
            # Maps are sent in the order of their memory, channels last.
            rows = self.gather(x.permute(0, 2, 3, 1).flatten(1))
            return rows.view(-1, x.shape[2], x.shape[3], x.shape[1]).permute(0, 3, 1, 2)
        gathered: Tensor = _Gather.apply(x, self)  # type: ignore[no-untyped-call]
        return gathered

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def average_gradients(self, net: nn.Module) -> None:
        """Replaces each gradient by its mean over the processes."""
        if self.size == 1:
            return
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        flat = self.mean(torch.cat([g.flatten() for g in gradients]))
        means = torch.split(flat, [g.numel() for g in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view(gradient.shape))

    def agree(self, value: int, device: torch.device) -> int:
        """The first process's value, in every process."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=device)
        dist.broadcast(tensor, src=0)
        return int(tensor)


ALONE = Processes()


def join_processes(device: str) -> tuple[Processes, torch.device]:
    """Joins the processes that `torchrun` started; without it, there is one.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N". Under `torchrun` each process takes the GPU of its
            local rank, and "cuda:N" is an error.

    Raises:
        BackendError: a device that cannot be had.
        ConfigError: one GPU for several processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE, choose_device(device)
    if device.startswith("cuda:"):
        raise ConfigError(f'device "{device}" is one GPU for {size} processes; use "cuda", one each')
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Processes(dist.get_rank(), size), chosen


def leave_processes() -> None:
    """Ends what `join_processes` began; does nothing where there is one process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """All processes' rows; backward, the sum over the processes of the gradients of one's own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Processes) -> Tensor:
        ctx.rows = slice(processes.rank * len(x), (processes.rank + 1) * len(x))
        parts = [torch.empty_like(x) for _ in range(processes.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.rows], None


class _WholeBatchNorm(nn.BatchNorm2d):
    """Batch norm over the rows of all processes."""

    processes = ALONE

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        rows = slice(self.processes.rank * len(x), (self.processes.rank + 1) * len(x))
        return super().forward(self.processes.gather(x.flatten(1))[:, :, None, None])[rows]


def share_batch_norm(net: nn.Module, processes: Processes) -> None:
    """Lets every batch norm of a network see the rows of all processes. Its parameters stay."""
    if processes.size == 1:
        return
    module: Any
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            # The module itself changes its class, so that the optimizer's parameters and the mode stay.
            module.__class__ = _WholeBatchNorm
            module.processes = processes  # type: ignore[assignment]
