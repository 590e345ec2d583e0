"""README.md of an export."""

from __future__ import annotations

from typing import Any

STANDALONE = [
    "Load it (torch, numpy and safetensors suffice):",
    "",
    "```python",
    "from kairos_train.inference.load import load",
    "from kairos_train.inference.predict import Predictor",
    "",
    'predictor = Predictor(load("."))',
    "```",
    "",
]
PUBLIC = [
    "Weights under the keys of the public inference code, which loads them with `kairos_config.py`: edit the paths at",
    "its top. `kairos-train import model.safetensors --out DIR` makes them a checkpoint to train from.",
    "",
]
NO_PUBLIC = [
    "Weights under the keys of the public inference code, which has no such network: {}.",
    "`kairos-train import model.safetensors --out DIR` makes them a checkpoint to train from.",
    "",
]
LAST = "`config.json` holds every setting of the run, `sampler.json` how to sample, `manifest.json` the hashes."


def model_card(
    described: dict[str, Any], summary: dict[str, Any], statistics: dict[str, Any] | None, sampler: dict[str, Any]
) -> str:
    """README.md of an export, from the content of config.json, the summary, the dataset's statistics, the sampler."""
    run = described["run"]
    model, data, stage = run["model"], run["data"], run["stage"]
    window = data["window"]
    actions = stage["streams"] == "joint"
    encoders = {part: run["encoders"][part]["kind"] for part in ("video", "text")}
    kinds = ", ".join(f"{part} `{kind}`" for part, kind in encoders.items())
    lines = [
        f"# {run['experiment']}, step {described['step']}",
        "",
        f"World-action model `{model['name']}`, {summary['parameters']:,} parameters, {_origin(described)}.",
        f"It predicts {'video and actions' if actions else 'video'}.",
        "",
        "| | |",
        "|---|---|",
        f"| weights | {_which(described)}, {described['dtype']}{_quantized(described)} |",
        f"| stage | `{stage['name']}`, streams `{stage['streams']}`, {described['step']} steps, seed {run['seed']} |",
        f"| data | `{data['name']}`{_data_size(statistics)} |",
        f"| window | {window['frames']} frames of {window['height']}×{window['width']} per camera, one of"
        f" {window['action_video_freq_ratio']} raw frames; {stage['history_frames']} latent frame(s) given |",
        f"| prompt | `{data['prompt_template']}` |",
        f"| encoders | {kinds}{_text_settings(run['encoders']['text'])} |",
        f"| sampling | {_sampling(sampler)} |",
    ]
    if actions:
        lines.append(
            f"| actions | {model['action']['action_dim']} dimensions `{window['action_key']}`,"
            f" `{data['normalize_action']}`; state {model['action']['state_dim']} `{window['state_key']}`,"
            f" `{data['normalize_state']}` |"
        )
    versions = ", ".join(f"{k} {v}" for k, v in sorted(described["versions"]["trained"].items()))
    lines += [
        f"| trained with | {versions} |",
        f"| checkpoint manifest | sha256 `{described['checkpoint_sha256']}` |",
        f"| weights' fingerprint | `{summary['fingerprint']}` |",
        "",
    ]
    if (encoders["video"], encoders["text"]) != ("wan", "qwen"):
        lines += ["Trained on encoders of the demo: it cannot be used with the published ones.", ""]
    if "dit_config" not in described:
        lines += STANDALONE
    elif described["dit_config"] is None:
        lines += [line.format(described["dit_config_missing"]) for line in NO_PUBLIC]
    else:
        lines += PUBLIC
    return "\n".join([*lines, LAST, ""])


def _text_settings(text: dict[str, Any]) -> str:
    """What the VLM is not shown."""
    absent = [
        name for key, name in (("image", "image"), ("system_message", "system message")) if not text.get(key, True)
    ]
    return f", without {' and '.join(absent)}" if absent and text["kind"] == "qwen" else ""


def _sampling(sampler: dict[str, Any]) -> str:
    if sampler["schedule"] == "distilled":
        return f"distilled, {sampler['steps']} fixed steps, no guidance"
    steps = f"{sampler['steps']} steps"
    if sampler["guidance"] == 1:
        return f"{steps}, no guidance"
    negative = sampler["negative_prompt"]
    against = (
        "a context of zeros" if negative is None else f"the prompt `{negative}`" if negative else "the empty prompt"
    )
    return f"{steps}, guidance {sampler['guidance']:g} against {against}"


def _origin(described: dict[str, Any]) -> str:
    imported = described["imported"]
    return "trained with kairos-train" if imported is None else f"imported by kairos-train from `{imported['file']}`"


def _which(described: dict[str, Any]) -> str:
    if described["imported"] is not None:
        return "as imported"
    return "moving average (EMA)" if described["weights"] == "ema" else "raw"


def _quantized(described: dict[str, Any]) -> str:
    if described["quantization"] is None:
        return ""
    errors = described["quantization_error"]["relative_l2"]
    known = ", ".join(f"{stream} {error:.2%}" for stream, error in errors.items() if error is not None)
    large = f"; large linear layers {described['quantization']['method']}"
    return f"{large}, outputs on random inputs differ by {known}" if known else large


def _data_size(statistics: dict[str, Any] | None) -> str:
    known = statistics or {}
    parts = [
        f"{known[key]:,} {name}"
        for key, name in (("num_episodes", "episodes"), ("num_transition", "steps"))
        if key in known
    ]
    return f": {', '.join(parts)}" if parts else ""
