"""Which parameters of a stage's model train: decided here for the model, the plan and the size of checkpoints."""

from kairos_train.config.schema import StageConfig
from kairos_train.model.lora import is_adapter


def trains(name: str, stage: StageConfig) -> bool:
    """Whether the parameter `name` ("video_dit.…" | "action_dit.…") trains in `stage`.

    `stage.train_video=false` freezes the video stream; of a stream that has adapters nothing else trains.
    """
    stream = name.partition("_dit.")[0]
    if stream == "video" and not stage.train_video:
        return False
    return is_adapter(name) if stage.lora.rank is not None and stream in stage.lora.streams else True
