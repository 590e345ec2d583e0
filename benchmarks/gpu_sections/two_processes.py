"""State passing between two processes that share one GPU. Gloo carries the tensors: NCCL refuses two ranks on one."""

from __future__ import annotations

import datetime
import os
import tempfile
import traceback
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from gpu_sections.harness import Entry, Setting, absent, check, max_ratio, rms_ratio

from kairos_train.basics.files import replacing

TIMEOUT = 100.0
"""Seconds for both processes, their start and the compilation of kernels included."""


def methods(setting: Setting) -> tuple[str, ...]:
    """Gloo gathers tensors on a GPU; it can send them from rank to rank on a CPU only."""
    return ("all_gather",) if setting.cuda else ("all_gather", "ring")


def against_one(
    setting: Setting, cut: int, tokens: int, backend: str, tolerances: dict[str, float]
) -> Iterator[tuple[str, Entry]]:
    """Outputs and gradients of two ranks with uneven shards against one process on the whole sequence."""
    measure = rms_ratio if setting.cuda else max_ratio
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        ranks = [context.Process(target=_rank, args=(r, folder, setting, cut, tokens, backend)) for r in (0, 1)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(TIMEOUT)
        for process in ranks:
            if process.is_alive():
                process.kill()
        for method in methods(setting):
            parts = [os.path.join(folder, f"{method}.{rank}.pt") for rank in (0, 1)]
            label = f"two processes over gloo, {method}, {backend}"
            if not all(map(os.path.exists, parts)):
                yield label, absent(_reason(folder, method))
                continue
            whole = _whole(setting, tokens, backend)
            found = [torch.load(path, map_location=setting.device) for path in parts]
            ours = {name: torch.cat([part[name] for part in found], dim=1) for name in found[0] if name != "state"}
            ours["state"] = found[1]["state"]
            errors = {name: measure(ours[name], whole[name]) for name in ours}
            yield label, check(errors, tolerances, measure.__name__)


def _inputs(setting: Setting, tokens: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    from gpu_sections.cases import rule_inputs

    dtype = torch.bfloat16 if setting.cuda else torch.float32
    x = rule_inputs(setting, tokens, decay=0.03, dtype=dtype)
    del x["initial_state"]
    random = setting.generator(7)
    return x, torch.randn(x["v"].shape, generator=random, device=setting.device).to(dtype)


def _whole(setting: Setting, tokens: int, backend: str) -> dict[str, torch.Tensor]:
    from kairos_train.model.kernels.delta_rule import gated_delta_rule

    x, cotangent = _inputs(setting, tokens)
    leaves = {name: t.requires_grad_() for name, t in x.items()}
    out, state = gated_delta_rule(*leaves.values(), backend=backend)
    grads = torch.autograd.grad(out, tuple(leaves.values()), cotangent)
    return {"output": out, "state": state, **{f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}}


def _rank(rank: int, folder: str, setting: Setting, cut: int, tokens: int, backend: str) -> None:
    from kairos_train.model.kernels.delta_rule import gated_delta_rule
    from parallel.exchange import state_passing

    torch.set_float32_matmul_precision("highest")
    if os.path.exists("/sys/class/net/lo"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # both are here, and the host's name may not resolve
    limit = datetime.timedelta(seconds=TIMEOUT * 0.6)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=limit)
    part = slice(0, cut) if rank == 0 else slice(cut, None)
    for method in methods(setting):
        try:
            x, cotangent = _inputs(setting, tokens)
            leaves = {name: t[:, part].contiguous().requires_grad_() for name, t in x.items()}
            rule = partial(gated_delta_rule, backend=backend)
            out, state = state_passing.start(rule, *leaves.values(), group=dist.group.WORLD, method=method)()
            grads = torch.autograd.grad(out, tuple(leaves.values()), cotangent[:, part])
            result = {"output": out, "state": state, **{f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}}
            path = os.path.join(folder, f"{method}.{rank}.pt")
            with replacing(path) as part:
                torch.save({name: t.detach().cpu() for name, t in result.items()}, part)
        except Exception as error:  # the other method may still work
            with open(os.path.join(folder, f"{method}.{rank}.error"), "w", encoding="utf-8") as file:
                file.write(traceback.format_exception_only(error)[-1].strip().splitlines()[0])
    dist.destroy_process_group()


def _reason(folder: str, method: str) -> str:
    for rank in (0, 1):
        path = os.path.join(folder, f"{method}.{rank}.error")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                return f"rank {rank}: {file.read()[:300]}"
    return "a rank ended without a result"
