"""Reference vectors: files of weights, inputs, outputs and gradients computed by an independent implementation.

A file is a safetensors file whose metadata key `config` is JSON with every size and flag; its tensors are
`weights.<checkpoint key>`, `inputs.*`, `outputs.*`, `cotangents.*`, `loss` = Σ outputs·cotangents and
`grads.<checkpoint key>` (a parameter without one received no gradient).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import ActionStreamConfig, KernelsConfig, ModelConfig, VideoStreamConfig
from kairos_train.model.world_action import WorldActionModel


@dataclass
class GoldenFile:
    """The contents of one file, grouped by the first part of their names."""

    config: dict
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    cotangents: dict[str, Tensor]
    grads: dict[str, Tensor]
    loss: Tensor


@dataclass
class GoldenResult:
    """Worst relative errors (max |a − b| / max |b|) of one file, and the tensors they occur in."""

    path: Path
    outputs: float
    worst_output: str
    gradients: float
    worst_gradient: str


def read_file(path: Path) -> GoldenFile:
    """Read a reference file.

    Raises:
        UserError: not a safetensors file, or without the metadata key `config` or a group of tensors.
    """
    groups: dict[str, dict[str, Tensor]] = {g: {} for g in ("weights", "inputs", "outputs", "cotangents", "grads")}
    loss = None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 - not a dict
                group, _, rest = name.partition(".")
                if name == "loss":
                    loss = file.get_tensor(name)
                elif group in groups:
                    groups[group][rest] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    missing = [g for g, tensors in groups.items() if not tensors] + (["loss"] if loss is None else [])
    if "config" not in metadata or missing:
        raise UserError(f"{path}: no reference vectors: lacks {'metadata key config' if not missing else missing[0]}")
    return GoldenFile(config=json.loads(metadata["config"]), loss=loss, **groups)


def model_config(file: GoldenFile) -> ModelConfig:
    """The model configuration that a file's header describes. A flag that is absent is false.

    Raises:
        UserError: the header lacks a size.
    """
    try:
        return _model_config(file.config, file.weights)
    except KeyError as error:
        raise UserError(f"reference vectors: the header's config lacks {error}; it must hold every size") from error


def _model_config(header: dict, weights: dict[str, Tensor]) -> ModelConfig:
    has_action = any(name.startswith("action_dit.") for name in weights)
    patch = next((w for name, w in weights.items() if name.endswith("patch_embedding.weight")), None)
    conv = next((w for name, w in weights.items() if name.endswith("q_conv1d.weight")), None)
    gdn_key = header["gdn_head_dim"]
    return ModelConfig(
        name="golden",
        num_layers=header["num_layers"],
        num_heads=header["num_heads"],
        text_dim=header["text_dim"],
        freq_dim=header["freq_dim"],
        eps=header["eps"],
        video=VideoStreamConfig(
            dim=header["dim"],
            ffn_dim=header["ffn_dim"],
            latent_channels=16 if patch is None else patch.shape[1],
            patch_size=[1, 2, 2] if patch is None else list(patch.shape[2:]),
            gdn_conv_size=4 if conv is None else conv.shape[2],
            layer_cycle=list(header["layers"]),
            window_frames=header["window_frames"],
            dilation=header["dilation"],
            window_semantics=header.get("window_semantics", "frame"),
            restrict_history_query_to_history=header.get("restrict_history_query_to_history", False),
            all_attend_history=header.get("all_attend_history", False),
            gdn_key_dim=gdn_key,
            gdn_value_dim=gdn_key * header["gdn_expand_v"],
        ),
        action=ActionStreamConfig(
            dim=header["action_dim_model"],
            ffn_dim=header["action_ffn_dim"],
            action_dim=header["action_dim"],
            state_dim=header["state_dim"],
        )
        if has_action
        else None,
    )


def run(file: GoldenFile, model: WorldActionModel) -> dict[str, Tensor]:
    """The outputs of a file's mode, by the names of the file."""
    header, inputs = file.config, file.inputs
    parameter = next(model.parameters())
    inputs = {k: v.to(parameter.device) for k, v in inputs.items()}
    inputs = {k: v.to(parameter.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    latents, state = inputs["latents"], inputs.get("robot_state")
    text = (inputs["context"], inputs.get("context_mask"))
    batch = latents.shape[0]

    def times(stream: str) -> Tensor:
        return torch.full((batch,), header[f"timestep_{stream}"], device=parameter.device)

    if header["mode"] == "action_with_video_cache":
        cache = model.encode_history(latents, *text, state=state)
        action = model.forward_action(cache, inputs["action_latents"], times("action"), *text, state=state)
        return {"action": action}
    action = inputs.get("action_latents")
    history = [header.get("history_frames", 0)] * batch
    video, action = model(
        latents,
        *text,
        times("video"),
        history,
        state=state,
        action=action,
        action_timestep=None if action is None else times("action"),
    )
    return {"video": video} if action is None else {"video": video, "action": action}


def verify_file(path: Path, *, device: str, dtype: torch.dtype, kernels: KernelsConfig | None = None) -> GoldenResult:
    """Run one file through the model, forward and backward, and compare everything that it holds.

    Raises:
        UserError: the file is unreadable, or its weights are not those of its configuration.
    """
    file = read_file(path)
    model = WorldActionModel(model_config(file), kernels)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    given = {name: tuple(w.shape) for name, w in _with_prefix(file.weights, expected).items()}
    if wrong := sorted(n for n in expected.keys() | given.keys() if expected.get(n) != given.get(n)):
        raise UserError(f"{path}: {wrong[0]} has shape {given.get(wrong[0])}, its config says {expected.get(wrong[0])}")
    model.load_state_dict(_with_prefix(file.weights, expected))
    model.to(device=device, dtype=dtype)

    outputs = run(file, model)
    products = {k: v.double().cpu() * file.cotangents[k].double() for k, v in outputs.items()}
    sum(p.sum() for p in products.values()).backward()
    output_errors = {k: _relative_error(outputs[k], v) for k, v in file.outputs.items()}
    scale = sum(p.detach().abs().sum() for p in products.values())
    total = sum(p.detach().sum() for p in products.values())
    output_errors["loss"] = float((total - file.loss.double()).abs() / scale)

    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    reference = _with_prefix(file.grads, expected)
    gradient_errors = {}
    for name in grads.keys() | reference.keys():
        if name not in reference:  # reached by no output in the reference: must be absent or exactly zero here
            gradient_errors[name] = 0.0 if not grads[name].any() else float("inf")
        elif name not in grads:
            gradient_errors[name] = float("inf") if reference[name].any() else 0.0
        else:
            gradient_errors[name] = _relative_error(grads[name], reference[name])
    worst_output = max(output_errors, key=output_errors.__getitem__)
    worst_gradient = max(gradient_errors, key=gradient_errors.__getitem__)
    return GoldenResult(
        path=Path(path),
        outputs=output_errors[worst_output],
        worst_output=worst_output,
        gradients=gradient_errors[worst_gradient],
        worst_gradient=worst_gradient,
    )


def verify_files(files: list[Path], *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[GoldenResult]:
    """`verify_file` on each of `files`."""
    return [verify_file(Path(path), device=device, dtype=dtype) for path in files]


def _with_prefix(tensors: dict[str, Tensor], expected: dict) -> dict[str, Tensor]:
    """Video-only files may carry no stream prefix."""
    return {k if k in expected or f"video_dit.{k}" not in expected else f"video_dit.{k}": v for k, v in tensors.items()}


def _relative_error(ours: Tensor, reference: Tensor) -> float:
    """max |a − b| / max |b|; infinite when not finite."""
    ours, reference = ours.detach().double().cpu(), reference.double()
    if not torch.isfinite(ours).all():
        return float("inf")
    scale = reference.abs().max()
    return float((ours - reference).abs().max() / scale) if scale > 0 else float(ours.abs().max())
