"""Sections of `gpu.py` that measure speed: layers of the 4 B video stream and its whole training step at 480p × 81.

81 frames of 480 × 832 are 21 latent frames of 1560 tokens. Ours is what training uses (gathered windows on torch's
flash kernels, fla's recurrence); the baseline is the same math done plainly: windows as a dense mask, made once for
all layers, and the chunked rule in torch. Both run in bfloat16 on the same weights, in turns, in one process.

Shapes: B batch (1 here), F latent frames, L tokens per frame, D width, N context tokens.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from gpu_sections.conformance import no_fla
from gpu_sections.harness import Entry, Setting, absent, check, interleaved, ratio, rms_ratio
from torch import Tensor, nn

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import Config, KernelsConfig, ModelConfig, VideoStreamConfig
from kairos_train.model import WorldActionModel
from kairos_train.model.activations import ActivationPolicy
from kairos_train.model.flops import forward_flops, training_flops
from kairos_train.model.hooks import ModelHooks
from kairos_train.model.kernels import attention
from kairos_train.model.kernels.windows import key_frames
from kairos_train.model.layout import model_hooks
from kairos_train.model.passes import ClipPass
from kairos_train.training.describe import PEAK_TFLOPS
from parallel import fp8
from parallel.config import Fp8Config
from parallel.topology import Topology

Entries = Iterator[tuple[str, Entry]]
KINDS = ("SWA", "DSWA", "GATED", "FA")


def video_stream(setting: Setting) -> ModelConfig:
    """The published video stream; a toy of the same make where `tiny`."""
    if not setting.tiny:
        return ModelConfig(action=None)
    video = VideoStreamConfig(dim=64, ffn_dim=128, gdn_key_dim=16, gdn_value_dim=32)
    return ModelConfig("toy", num_layers=4, num_heads=2, text_dim=32, freq_dim=32, video=video, action=None)


def sizes(setting: Setting) -> tuple[int, int, int, int]:
    """F, latent height and width, N."""
    return (5, 4, 4, 7) if setting.tiny else (21, 60, 104, 512)


def tokens_per_frame(setting: Setting) -> int:
    _, height, width, _ = sizes(setting)
    return height * width // 4  # patches of 2 × 2


def peak_flops(setting: Setting) -> float | None:
    """Dense bf16 peak of the GPU, as its vendor states it; None when it is not in the table."""
    name = torch.cuda.get_device_name() if setting.cuda else ""
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def build(setting: Setting, config: ModelConfig, *, hooks: ModelHooks | None = None) -> WorldActionModel:
    """A bfloat16 model with random weights, made on the device."""
    kernels = KernelsConfig(gated_delta="torch" if no_fla(setting) else "auto")
    with torch.device("meta"):
        model = WorldActionModel(config, kernels, hooks=hooks).to(torch.bfloat16)
    model.to_empty(device=setting.device)
    random = setting.generator()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.rpartition(".")[2]
            if last == "A_log":
                parameter.uniform_(0.0, 2.8, generator=random)
            elif last == "dt_bias":
                parameter.uniform_(-7.0, -2.0, generator=random)
            elif last == "bias":
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=random)
    return model


def inputs(setting: Setting, config: ModelConfig) -> dict[str, Any]:
    frames, height, width, context = sizes(setting)
    random = setting.generator(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=random, device=setting.device)

    return {
        "latents": draw(config.video.latent_channels, frames, height, width),
        "context": draw(context, config.text_dim).bfloat16(),
        "context_mask": None,
        "video_timestep": torch.full((1,), 500.0, device=setting.device),
        "history_frames": [1],
    }


# --- the baseline ---


@contextlib.contextmanager
def plain_kernels(model: WorldActionModel, masks: dict[Any, Tensor]) -> Iterator[None]:
    """Within: windows by a dense mask (made once per rule, in `masks`), the recurrence by the chunked rule in torch."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, windows: attention.Windows, backend: str) -> Tensor:
        if windows not in masks:
            masks[windows] = dense_mask(windows, q.shape[2], q.device)
        return attention.scaled_dot_product(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), masks[windows])

    gated = [block.gated_delta for block in model.video_dit.blocks if hasattr(block, "gated_delta")]
    usual, backends = attention.window_attention, [layer.backend for layer in gated]
    attention.window_attention = attend
    for layer in gated:
        layer.backend = "torch"
    try:
        yield
    finally:
        attention.window_attention = usual
        for layer, backend in zip(gated, backends, strict=True):
            layer.backend = backend


def dense_mask(windows: attention.Windows, tokens: int, device: torch.device) -> Tensor:
    """Bool (1, 1, S, S) of a rule that counts whole frames, for a batch of one."""
    assert not windows.spec.token_window, "token windows cut frames"
    assert len(windows.history) == 1, "one sample"
    frames = torch.zeros(windows.frames, windows.frames, dtype=torch.bool)
    for frame in range(windows.frames):
        frames[frame, list(key_frames(windows.spec, frame, windows.frames, windows.history[0]))] = True
    return frames.to(device).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)[None, None]


# --- one layer ---


class Layer:
    """One layer of the stream, forward and backward, on fixed inputs."""

    def __init__(self, setting: Setting, config: ModelConfig, kind: str, *, hooks: ModelHooks | None = None) -> None:
        self.config = replace(config, num_layers=1, video=replace(config.video, layer_cycle=[kind]))
        self.model = build(setting, self.config, hooks=hooks)
        given = inputs(setting, self.config)
        with torch.no_grad():
            stream, time = self.model.video_dit, given["video_timestep"]
            self.video = ClipPass(stream, given["latents"], given["context"], None, time, (1,), 0)
        first = (self.video.x, self.video.modulation, self.video.context)
        self.inputs = tuple(x.detach().requires_grad_() for x in first)
        self.gradient = torch.randn_like(self.video.x)

    @property
    def block(self) -> nn.Module:
        return self.model.video_dit.blocks[0]

    def forward(self, x: Tensor, modulation: Tensor, context: Tensor) -> Tensor:
        video = self.video
        video.x, video.modulation = x, modulation
        with self.model.hooks.autocast():
            video.layer(0, context)
        return video.x

    def step(self, forward: Callable[..., Tensor] | None = None) -> None:
        (forward or self.forward)(*self.inputs).backward(self.gradient)
        self.forget()

    def plain_step(self, masks: dict[Any, Tensor]) -> None:
        with plain_kernels(self.model, masks):
            self.step()

    def difference(self, masks: dict[Any, Tensor]) -> Entry:
        """Ours and the baseline compute the same, as far as bfloat16 goes."""
        with torch.no_grad():
            ours = self.forward(*self.inputs)
            with plain_kernels(self.model, masks):
                plain = self.forward(*self.inputs)
            x = self.inputs[0]
            return check({"layer": rms_ratio(ours - x, plain - x)}, {"": 2e-2}, rms_ratio.__name__)

    def forget(self) -> None:
        self.model.zero_grad(set_to_none=True)
        for x in self.inputs:
            x.grad = None

    def flops(self, setting: Setting) -> float:
        """Forward and backward of the layer by the project's formula."""
        frames, _, _, context = sizes(setting)
        shape = (frames, tokens_per_frame(setting), context)
        rest = forward_flops(replace(self.config, num_layers=0), *shape, history=1)
        return 3 * (forward_flops(self.config, *shape, history=1) - rest)


def described(results: Entry, flops: float | None, setting: Setting, *, baseline: str = "baseline") -> Entry:
    """Times with TFLOP/s and MFU, and how much faster ours is."""
    peak = peak_flops(setting)
    for result in results.values():
        if flops and "seconds" in result:
            result["tflops_per_second"] = flops / result["seconds"] / 1e12
            result["mfu"] = flops / result["seconds"] / peak if peak else None
    return {**results, "flops": flops, "speedup": ratio(results, baseline, "ours")}


def blocks(setting: Setting) -> Entries:
    """A whole layer of every kind, and cross-attention and FFN by themselves: forward and backward."""
    config, masks = video_stream(setting), {}
    rounds, share = (1 if setting.tiny else 5), setting.seconds / 8
    for kind in KINDS:
        layer = Layer(setting, config, kind)
        subjects = {"ours": layer.step, "baseline": lambda layer=layer: layer.plain_step(masks)}
        flops = layer.flops(setting)
        for results in interleaved(subjects, setting, rounds=rounds, seconds=share):
            yield f"layer {kind}", described(results, flops, setting)
        yield f"layer {kind}, ours against baseline", layer.difference(masks)
        if kind != "GATED":
            masks.clear()
    yield from parts(setting, layer, rounds, share)


def parts(setting: Setting, layer: Layer, rounds: int, seconds: float) -> Entries:
    """Cross-attention beside scores written out; the FFN, whose plain form it already is."""
    block, (x, _, context) = layer.block, layer.inputs
    tokens, width, number = x.shape[1] * x.shape[2], x.shape[3], context.shape[1]

    def cross() -> None:
        block.cross_attn.cross(x, context, None).backward(layer.gradient)
        layer.forget()

    def written_out() -> None:
        cross_attn = block.cross_attn
        q, k, v = cross_attn.project(x, context, None)
        scores = torch.einsum("bshe,bnhe->bhsn", q.flatten(1, 2), k) * q.shape[-1] ** -0.5
        out = torch.einsum("bhsn,bnhe->bshe", scores.softmax(-1), v)
        cross_attn.finish(out, x).backward(layer.gradient)
        layer.forget()

    def ffn() -> None:
        block.ffn(x).backward(layer.gradient)
        layer.forget()

    flops = 3 * (4 * width * width * (tokens + number) + 4 * width * tokens * number)
    for results in interleaved({"ours": cross, "baseline": written_out}, setting, rounds=rounds, seconds=seconds):
        yield "cross-attention", described(results, flops, setting)
    flops = 3 * 4 * tokens * width * layer.config.video.ffn_dim
    for results in interleaved({"ours": ffn}, setting, rounds=rounds, seconds=seconds):
        yield "FFN", described(results, flops, setting)


def compiled(setting: Setting) -> Entries:
    """torch.compile of a whole layer, beside the same layer eager."""
    if setting.tiny and not setting.cuda:
        yield "layer", absent("torch.compile of a layer is measured on CUDA only")
        return
    config = video_stream(setting)
    for kind in ("SWA", "GATED"):
        layer = Layer(setting, config, kind)
        layer.step()  # what is made once and kept (window plans, rotations) is made outside of the compiled code
        forward = torch.compile(layer.forward)
        subjects = {"ours": lambda layer=layer, forward=forward: layer.step(forward), "eager": layer.step}
        for results in interleaved(subjects, setting, rounds=5, seconds=setting.seconds / 4):
            yield f"layer {kind}", described(results, layer.flops(setting), setting, baseline="eager")


def flex_layers(setting: Setting) -> Entries:
    """Windows by compiled FlexAttention beside gathered ones; its block mask is made in every call, as in the model."""
    if not setting.cuda:
        yield "layer", absent("flex: FlexAttention trains on CUDA only")
        return
    for kind in ("SWA", "DSWA"):
        layer = Layer(setting, video_stream(setting), kind)

        def flex(layer: Layer = layer) -> None:
            layer.video.stream.attention_backend = "flex"
            try:
                layer.step()
            finally:
                layer.video.stream.attention_backend = "gathered"

        for results in interleaved({"ours": layer.step, "flex": flex}, setting, rounds=3, seconds=setting.seconds / 3):
            yield f"layer {kind}", described(results, layer.flops(setting), setting, baseline="flex")


def fp8_layers(setting: Setting) -> Entries:
    """A layer with its linear layers in FP8 by Transformer Engine, beside bfloat16."""
    config = video_stream(setting)
    for recipe in ("current", "block", "mxfp8", "delayed"):
        settings = Fp8Config(recipe=recipe)
        try:
            fp8.require(fp8.Fp8Policy(settings, config.num_layers))
        except UserError as error:
            yield f"layer SWA, {recipe}", absent(str(error))
            continue
        whole = Config(model=config)
        whole.precision.fp8 = settings
        hooks = model_hooks(whole, Topology.single(torch.device(setting.device)))
        plain, quantised = Layer(setting, config, "SWA"), Layer(setting, config, "SWA", hooks=hooks)
        subjects = {"ours": quantised.step, "bfloat16": plain.step}
        for results in interleaved(subjects, setting, rounds=5, seconds=setting.seconds / 4):
            yield f"layer SWA, {recipe}", described(results, plain.flops(setting), setting, baseline="bfloat16")


# --- the whole step ---


class BlockwiseAdamW:
    """AdamW on float32 copies of bfloat16 weights, block by block, so that gradients are upcast a block at a time."""

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        blocks: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            blocks.setdefault(".".join(name.split(".")[:3]), []).append(parameter)
        self.parts = []
        for weights in blocks.values():
            masters = [weight.detach().float() for weight in weights]
            optimizer = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.95), fused=setting.cuda)
            self.parts.append((weights, masters, optimizer))

    @torch.no_grad()
    def step(self) -> None:
        for weights, masters, optimizer in self.parts:
            for weight, master in zip(weights, masters, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_copy_([weight.detach() for weight in weights], masters)


def step(setting: Setting) -> Entries:
    """Forward, backward and AdamW of the whole video stream on one sample."""
    begin, config = time.perf_counter(), video_stream(setting)
    model, given, masks = build(setting, config), inputs(setting, config), {}
    optimizer, target = BlockwiseAdamW(model, setting), torch.randn_like(given["latents"])

    def train(recompute: str) -> None:
        model.zero_grad(set_to_none=True)
        model.video_dit.activations = ActivationPolicy(recompute)
        (model(**given).video.float() - target).pow(2).mean().backward()
        optimizer.step()

    def baseline() -> None:
        with plain_kernels(model, masks):
            train("block")
        masks.clear()  # they are no part of ours' peak memory

    subjects = {"ours": lambda: train("block"), "ours, selective": lambda: train("selective"), "baseline": baseline}
    frames, _, _, context = sizes(setting)
    shape = (frames, tokens_per_frame(setting), context)
    about = {
        "model": config.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": config.num_layers,
        "frames": frames,
        "tokens": frames * tokens_per_frame(setting),
        "context_tokens": context,
        "recompute": "block in ours and baseline; selective keeps outputs of attention",
        "precision": "bfloat16 weights and gradients, float32 master weights and moments",
        "gated_delta": "torch" if no_fla(setting) else "fla",
    }
    flops, left = training_flops(config, *shape, history=1), setting.seconds - (time.perf_counter() - begin)
    for results in interleaved(subjects, setting, rounds=1 if setting.tiny else 3, seconds=0.8 * left):
        yield "video step", {**about, **described(results, flops, setting)}
