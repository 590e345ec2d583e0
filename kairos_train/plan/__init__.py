"""What a run would need of a cluster: memory, traffic, time. Computed from shapes, without GPUs or processes."""
