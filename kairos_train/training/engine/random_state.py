"""The state of every random generator of a process, as tensors and plain data that a checkpoint can hold."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, plain data) of torch's CPU and current CUDA generator, numpy's and Python's global ones."""
    tensors = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["torch_cuda"] = torch.cuda.get_rng_state()
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, next_gauss = random.getstate()
    plain = {
        "numpy": [name, [int(k) for k in keys], int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), next_gauss],
    }
    return tensors, plain


def set_random_state(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(tensors["torch_cpu"])
    if "torch_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["torch_cuda"])
    name, keys, position, has_gauss, gauss = plain["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, next_gauss = plain["python"]
    random.setstate((version, tuple(internal), next_gauss))


def derive_random_state(seed: int, step: int, rank: int) -> None:
    """Set every generator to a state that is a function of the arguments, when there is no state to restore."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))
    np.random.seed(int.from_bytes(digest[8:12], "little"))
    random.seed(digest)
