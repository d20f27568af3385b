"""The processes of a training or scoring, one for each GPU: what each takes, and their sums."""

from collections.abc import Sequence

import torch
from torch import distributed


def count() -> int:
    """Return the number of processes that work together, as `accelerate launch` started them."""
    return distributed.get_world_size() if _are_several() else 1


def share(rows: Sequence) -> Sequence:
    """Return what this process takes of `rows`: every n-th, of n processes."""
    return rows[distributed.get_rank() :: count()] if _are_several() else rows


def summed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the sum of `tensor` over all processes, each of which has to call this."""
    if count() == 1:
        return tensor
    whole = tensor.to(device)
    distributed.all_reduce(whole)
    return whole.to(tensor.device)


def _are_several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
