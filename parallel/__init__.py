"""How tensors are split over processes and exchanged; knows no model.

`topology` names the degrees and makes the groups. `sharding` says by name which parameters are split over tensor ranks,
`audit` checks a model against it. Tensor and sequence parallelism: `collectives` (regions with their gradients),
`linear` (column and row layers), `gradient_sync` (what replicated parameters see in part). `mpu` tells DeepSpeed who
holds the same. The model meets all of it through the parallel hooks of `kairos_train.model.hooks` only.
"""
