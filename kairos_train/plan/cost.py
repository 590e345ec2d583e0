"""Seconds of an optimiser step on a cluster, and where they go.

    seconds = compute + tensor + context + data

compute   the busiest rank's FLOPs / (peak · mfu). `cluster.mfu` is the share of the peak that a rank reaches while it
          computes; recomputation, second scans of Gated DeltaNet layers and uneven frames make it work on more than its
          share of the model FLOPs.
tensor    bytes of the busiest rank / bandwidth, not overlapped. Intra-node when every tensor group lies in one node by
context   rank order (tensor fastest, then context), else one network card per GPU.
data      rings over all ranks that hold the same parameters: the ranks of one group in a node share their network
          cards, min(intra-node, cards · inter-node). Not overlapped, but for the weights of ZeRO stage 3, which are
          fetched while the rank computes.

The update itself, launch gaps, latency and waiting for data are left out: this ranks layouts, and is no promise.
"""

from __future__ import annotations

from dataclasses import dataclass

from kairos_train.model.kernels.delta_rule import CHUNK
from kairos_train.plan.layout import Layout
from kairos_train.plan.traffic import Received, received


@dataclass(frozen=True)
class Cost:
    """One optimiser step.

    Attributes:
        flops: model FLOPs of all ranks, forward and backward.
        hardware_flops: with everything that is computed again.
        compute, tensor, context, data: seconds.
        received: bytes of the busiest rank.
    """

    flops: float
    hardware_flops: float
    compute: float
    tensor: float
    context: float
    data: float
    received: Received

    @property
    def seconds(self) -> float:
        return self.compute + self.tensor + self.context + self.data


def cost(layout: Layout) -> Cost:
    """Of one optimiser step."""
    cluster, degrees, sample = layout.config.cluster, layout.degrees, layout.sample
    ranks = range(degrees.context)
    traffic = [received(layout, rank) for rank in ranks]
    most = Received(
        tensor=max(r.tensor for r in traffic),
        context=max(r.context for r in traffic),
        data=max(r.data for r in traffic),
        gathered_weights=max(r.gathered_weights for r in traffic),
    )
    video, action = _hardware(layout)
    samples = layout.batch * layout.config.train.accumulation  # of one data rank
    share = max(layout.frames_per_rank) / sample.frames
    busiest = samples * (video * share + action) / degrees.tensor
    compute = busiest / (cluster.peak_tflops * 1e12 * cluster.mfu)
    exposed = max(0.0, most.gathered_weights / data_bandwidth(layout) - compute)
    return Cost(
        flops=layout.samples_per_step * sample.flops,
        hardware_flops=layout.samples_per_step * (video + degrees.context * action),
        compute=compute,
        tensor=most.tensor / bandwidth(layout, degrees.tensor),
        context=most.context / bandwidth(layout, degrees.tensor * degrees.context),
        data=(most.data - most.gathered_weights) / data_bandwidth(layout) + exposed,
        received=most,
    )


def bandwidth(layout: Layout, span: int) -> float:
    """Bytes per second between ranks that lie within `span` consecutive ones."""
    cluster = layout.config.cluster
    within = layout.degrees.size <= cluster.gpus_per_node or cluster.gpus_per_node % span == 0
    return 1e9 * (cluster.intra_node_gb_per_s if within else cluster.inter_node_gb_per_s)


def data_bandwidth(layout: Layout) -> float:
    """Bytes per second and rank of rings over context × data."""
    cluster = layout.config.cluster
    if layout.degrees.size <= cluster.gpus_per_node:
        return 1e9 * cluster.intra_node_gb_per_s
    cards = max(1, cluster.gpus_per_node // layout.degrees.tensor)
    return 1e9 * min(cluster.intra_node_gb_per_s, cards * cluster.inter_node_gb_per_s)


def _hardware(layout: Layout) -> tuple[float, float]:
    """FLOPs that one sample costs, forward and backward, with what is computed again: video stream, action stream.

    Context ranks all compute the action stream. `selective` is counted as `block`: the attention that it keeps is a few
    per cent.
    """
    video, action = layout.sample.video_flops, layout.sample.action_flops
    passes = 3 if layout.config.train.recompute == "none" else 4
    return passes * video + _second_scans(layout, passes - 2), passes * action


def _second_scans(layout: Layout, forwards: int) -> float:
    """State passing: scans on V + K columns in place of V, forward, and one more scan on V in backward."""
    if layout.degrees.context == 1:
        return 0.0
    video = layout.model.video
    key, value = video.gdn_key_dim, video.gdn_value_dim

    def scan(columns: int) -> float:
        return 4 * CHUNK * key + 2 * CHUNK * (columns + key) + 6 * key * columns + 2 * CHUNK * columns

    per_token = forwards * (scan(value + key) - scan(value)) + scan(value)
    return layout.kinds.count("GATED") * layout.sample.video_tokens * layout.model.num_heads * per_token
