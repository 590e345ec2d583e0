"""Samples in, batches out: video files, LeRobot datasets, simulators, shards and the loader.

Nothing here knows the model, an encoder or a process group; a loader is told its rank and the number of ranks. Frames
are uint8 RGB with channels last, actions and state are float32 in the dataset's own units.
"""
