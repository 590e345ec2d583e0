"""A layout's parallel hooks answer every question of the model, in its words."""

import inspect

from kairos_train.model.hooks import ParallelHooks
from parallel.hooks import StreamHooks


def arguments(owner: type) -> dict[str, list[tuple[str, inspect._ParameterKind, object]]]:
    """Name -> (name, kind, default) of each argument, of every method that a model may call."""
    methods = {name: f for name, f in vars(owner).items() if inspect.isfunction(f) and not name.startswith("_")}
    return {
        name: [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
        for name, method in methods.items()
    }


def test_a_layout_has_the_hooks_that_the_model_calls():
    """`parallel` knows no model, so that nothing but this holds the two together."""
    assert arguments(StreamHooks) == arguments(ParallelHooks)
