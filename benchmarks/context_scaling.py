"""Processes of `step_time.py --context N`: the video stream's step on N context ranks and on one, in one run.

Every process has one thread (or one GPU). A step is forward, backward, the sum of gradients over ranks and AdamW, on
one sample. The one-process figures come from rank 0 while the others wait.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from kairos_train.config.schema import Config
from kairos_train.model.initialise import initialise
from kairos_train.model.layout import empty_model
from parallel.config import ParallelConfig
from parallel.topology import Degrees, Topology


def scaling(rank: int, ranks: int, store: str, config: Config, sizes: tuple[int, ...], side: int, repeats: int, out):
    """One process; rank 0 puts {"one": [...], "context": [...]} median seconds per size into the queue `out`."""
    cuda = torch.cuda.device_count() >= ranks
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    topologies = {
        "one": Topology.single(device),
        "context": Topology.build(Degrees(context=ranks), device),
    }
    steppers = {name: _Stepper(config, topology) for name, topology in topologies.items()}
    times = {name: [[] for _ in sizes] for name in steppers}
    for repeat in range(repeats + 1):
        for i, frames in enumerate(sizes):
            latents = torch.randn(1, config.model.video.latent_channels, frames, 2 * side, 2 * side, device=device)
            for name, stepper in steppers.items():
                dist.barrier()
                if name == "one" and rank:
                    continue
                seconds = stepper.step(latents)
                if repeat:  # the first round warms up
                    times[name][i].append(seconds)
    if rank == 0:
        out.put({name: [statistics.median(t) for t in values] for name, values in times.items()})
    dist.barrier()
    dist.destroy_process_group()
    time.sleep(0.1)  # gloo's threads let go of the last tensors


class _Stepper:
    """One layout's model and optimiser on this rank."""

    def __init__(self, config: Config, topology: Topology) -> None:
        self.topology = topology
        parallel = ParallelConfig(context=topology.degrees.context)
        layout = Config(model=config.model, kernels=config.kernels, stage=config.stage, parallel=parallel)
        self.model = empty_model(layout, topology).to_empty(device=topology.device)
        initialise(self.model, 0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.context = torch.zeros(1, 16, config.model.text_dim, device=topology.device)
        self.timestep = torch.full((1,), 500.0, device=topology.device)

    def step(self, latents: torch.Tensor) -> float:
        """Seconds of one training step."""
        self._wait()
        begin = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        video, _ = self.model(latents, self.context, None, self.timestep, [1])
        (video.pow(2).sum() / latents.numel()).backward()
        if self.topology.gradient_group is not None:
            gradients = torch.cat([p.grad.flatten() for p in self.model.parameters()])
            dist.all_reduce(gradients, group=self.topology.gradient_group)
        self.optimizer.step()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.topology.device.type == "cuda":
            torch.cuda.synchronize()
