"""kairos-train: training of Kairos-type world-action models.

    import kairos_train as kt

    policy = kt.load("policy")
    actions = policy.act({"observation.images.front": picture, "observation.state": state, "task": "open the drawer"})

The functions are those of `kairos_train.api`, which is imported at the first use of one.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kairos_train.api import Policy, UserError, compose, evaluate, export, load, pack, train

__version__ = "0.1.0"
__all__ = ["load", "Policy", "compose", "pack", "train", "export", "evaluate", "UserError", "__version__"]

if not TYPE_CHECKING:  # for a type checker every name would be known then

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from kairos_train import api

        return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
