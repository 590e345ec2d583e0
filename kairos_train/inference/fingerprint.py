"""What binds the files of an export to each other.

The fingerprint is a hash of what decides a prediction: the model, the training window, normalisation, encoders, the
robot's cameras, which weights these are (by their small tensors), and every tensor's name, type and shape. It stands in
config.json, sampler.json and in the header of each file of weights. Where a machine keeps encoders, shards or runs, and
which kernels it uses, is left out and may be changed. So may the settings of sampler.json, which `SamplerConfig`
checks; its fingerprint says whose they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

ABOUT = ("format", "weights", "dtype", "step", "distilled", "encoders", "small_tensors_sha256", "quantization")
DATA = ("window", "prompt_template", "normalize_action", "normalize_state")


def fingerprint(described: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """SHA-256 of an export.

    Args:
        described: content of config.json.
        tensors: name → (type as safetensors writes it, shape).
    """
    run = described["run"]
    encoders = {
        part: {key: value for key, value in run["encoders"][part].items() if key != "path"}
        for part in ("video", "text")
    }
    decisive = {
        **{key: described.get(key) for key in (*ABOUT, "statistics_sha256")},
        "model": run["model"],
        "stage": {key: value for key, value in run["stage"].items() if key != "init_from"},
        "data": {key: run["data"][key] for key in DATA},
        "encoder_settings": encoders,
        # Earlier exports do not say.
        **({"robot": described["robot"]} if described.get("robot") else {}),
        **({"robots_sha256": described["robots_sha256"]} if described.get("robots_sha256") else {}),
        "tensors": {name: [kind, list(shape)] for name, (kind, shape) in tensors.items()},
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
