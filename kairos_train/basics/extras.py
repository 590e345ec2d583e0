"""The extras of the project by the packages that they bring: what to install when one of these is missing.

Installed without extras, the project runs exported policies: torch, numpy, safetensors and pillow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kairos_train.basics.errors import UserError

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        *("deepspeed", "megatron", "hydra", "omegaconf", "antlr4", "yaml", "braceexpand", "fsspec", "tensorboard"),
        *("av", "pyarrow", "matplotlib", "rich", "psutil", "scipy"),
    ),
    "encoders": ("transformers", "diffusers"),
    "serve": ("websockets", "msgpack", "prometheus_client"),
    "sim": ("metaworld", "mujoco"),
}
"""Extra -> the packages of it that this project imports, by the names that they are imported by."""


def missing_extra(error: ModuleNotFoundError) -> UserError | None:
    """What to say of a package that is not installed; None when no extra brings it."""
    package = (error.name or "").partition(".")[0]
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    if extra is None:
        return None
    return UserError(f"{package} is not installed; run `pip install 'kairos-train[{extra}]'`")


@contextmanager
def extras_are_named() -> Iterator[None]:
    """A package that is not installed becomes the UserError that names the extra which brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        told = missing_extra(error)
        if told is None:
            raise
        raise told from error
