"""How tensors are split over processes and exchanged; knows no model.

`topology` names the degrees and makes the groups. `sharding` says by name which parameters tensor ranks split, `audit`
checks a model against it. Tensor and sequence parallelism: `collectives` (with their gradients), `linear` (column and
row layers), `gradient_sync` (partial gradients of replicated parameters). `mpu` reports to DeepSpeed which ranks hold
the same parameters. The model meets all of it through the parallel hooks of `kairos_train.model.hooks` only.
"""
