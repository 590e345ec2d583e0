"""DeepSpeed's "model parallel unit": which ranks hold shards of the same parameters, and which hold replicas.

DeepSpeed knows two axes, model and data. They are

    model = tensor               ranks that hold different shards of a parameter: norms are summed over it
    data  = context and data     ranks that hold the same shards: gradients are averaged and partitioned over it

so that DeepSpeed reduces gradients over context ranks as well. It must not learn of sequence or context parallelism by
any other call (`get_sequence_parallel_*`, `initialize_sequence_parallel`): ZeRO 3 would scale gradients by it.

DeepSpeed 0.19.8 asks for rank, world size and group of both axes when it starts; for the model group in the norms of
stages 0 and 1 (bf16) whatever its size, and of stages 1 to 3 where it has more than one rank; for the data group in
stage 3, for partitions. Every group must therefore be real, also of one rank: None would be the whole world.

The adapter is global to a process (`deepspeed.utils.groups.mpu`), and an engine started without one keeps that of the
engine before. So every engine gets one, and all engines of a process the same.
"""

from __future__ import annotations

import torch.distributed as dist

from parallel.topology import Topology


class DeepSpeedMpu:
    """The `mpu` argument of `deepspeed.initialize` for a topology, of any degrees.

    Raises:
        ValueError: the topology has no process groups (`Topology.single`).
    """

    def __init__(self, topology: Topology) -> None:
        if topology.self_group is None:
            raise ValueError("DeepSpeed needs process groups; make the topology by Topology.build")
        self._model: dist.ProcessGroup = topology.tensor_group or topology.self_group
        self._data: dist.ProcessGroup = topology.gradient_group or topology.self_group
        self._alone: dist.ProcessGroup = topology.self_group
        self._model_ranks, self._data_ranks = topology.ranks("tensor"), topology.ranks("gradient")

    # Ranks that hold shards of the same parameters, by the old and the new name.

    def get_model_parallel_rank(self) -> int:
        return self._model.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._model.size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model

    def get_tensor_model_parallel_rank(self) -> int:
        return self._model.rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._model.size()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self._model_ranks[0]

    # Ranks that hold replicas.

    def get_data_parallel_rank(self) -> int:
        return self._data.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._data.size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_group_ranks(self) -> tuple[int, ...]:
        return self._data_ranks

    # There is one pipeline stage.

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._alone
