"""A configuration with some of its settings changed."""

import copy
import re
from typing import Any

from kairos_train.config.schema import Config


def section_of(config: Config, key: str) -> Any:
    """What the last name of a dotted key is an attribute of, as `data.sources[0]` of `data.sources[0].weight`."""
    section: Any = config
    for name, number in re.findall(r"(\w+)(?:\[(\d+)\])?\.", key):
        section = getattr(section, name)[int(number)] if number else getattr(section, name)
    return section


def changed(config: Config, values: dict[str, Any]) -> Config:
    """A copy with the values of some dotted keys replaced."""
    config = copy.deepcopy(config)
    for key, value in values.items():
        setattr(section_of(config, key), key.rpartition(".")[2], value)
    return config
