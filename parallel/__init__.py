"""How tensors are split over processes and exchanged; knows no model.

This version splits the data only: DeepSpeed's ZeRO stages 0 to 3 under `torchrun` (`kairos_train.training.engine`). The
places where tensor, sequence and context parallelism act are the seams of `kairos_train.model.seams`; their degrees are
part of the configuration (`parallel.*`) and anything but 1 is refused there.
"""
