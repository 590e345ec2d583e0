"""Sections of `gpu.py` that compare this machine's kernels with a float64 oracle, and state passing with one process.

Oracles run on the same device in float64: the chunked rule in torch, attention with a dense mask, the whole model. Both
sides get the same inputs, rounded to the tested dtype first. What the tolerances rest on:
    float32          1e-5 of the largest magnitude (another order of sums)
    bfloat16 rule    what flash-linear-attention asks of its own kernels: 5e-3 outputs and states, 8e-3 gradients,
                     2e-2 gradients of decays and write strengths (root mean square, relative)
    state passing    3e-3 against the same kernels on the whole sequence, cut between chunks (7.5e-3 gradients of decays
                     and write strengths); cut within a chunk its sums round otherwise, and float64 is the judge
    bfloat16 windows 5e-3 outputs, 1e-2 gradients: probabilities and outputs are rounded once each

Shapes: B batch, S tokens, H heads, K key and V value width, F frames, L tokens per frame, E head width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_sections.cases import DECAYS, rule_cotangents, rule_inputs, rules, run_rule
from gpu_sections.harness import Entry, Setting, absent, check, last_line, max_ratio, rms_ratio
from torch import Tensor, nn

from kairos_train.config.schema import ActionStreamConfig, KernelsConfig, ModelConfig, VideoStreamConfig
from kairos_train.model import WorldActionModel
from kairos_train.model.kernels.attention import Windows, window_attention
from kairos_train.model.kernels.delta_rule import gated_delta_rule
from kairos_train.model.kernels.windows import WindowSpec
from parallel.fp8_emulated import BACKWARD, FORWARD, EmulatedFp8Linear

Entries = Iterator[tuple[str, Entry]]

FLOAT32 = {"": 1e-5}
RULE_BF16 = {"": 5e-3, "d_": 8e-3, "d_g": 2e-2, "d_beta": 2e-2}
PASSING_BF16 = {"": 3e-3, "d_g": 7.5e-3, "d_beta": 7.5e-3}
WINDOWS_BF16 = {"": 5e-3, "d_": 1e-2}


# --- the gated delta rule ---


def no_fla(setting: Setting) -> str | None:
    """Why fla's kernels cannot run here, None when they can."""
    if importlib.util.find_spec("fla") is None:
        return "fla: flash-linear-attention is not installed"
    return None if setting.cuda else "fla: its kernels need a CUDA GPU"


def gated_delta(setting: Setting) -> Entries:
    """The rule by fla and by torch against float64; what fla does in place of its kernel on Hopper is said."""
    tokens = 150 if setting.tiny else 1000
    for name, decay in DECAYS.items():
        for dtype, backend in ((torch.float32, "torch"), (torch.bfloat16, "torch"), (torch.bfloat16, "fla")):
            label = f"{backend} {str(dtype)[6:]}, {name}"
            if backend == "fla" and (reason := no_fla(setting)):
                yield label, absent(reason)
                continue
            x = rule_inputs(setting, tokens, decay=decay, dtype=dtype)
            cotangents = rule_cotangents(x)
            ours = run_rule(x, cotangents, backend)
            oracle = run_rule({n: t.double() for n, t in x.items()}, cotangents, "torch")
            exact = dtype == torch.float32
            measure = max_ratio if exact else rms_ratio
            errors = {n: measure(ours[n], oracle[n]) for n in oracle}
            yield label, check(errors, FLOAT32 if exact else RULE_BF16, measure.__name__)
    if no_fla(setting) is None:
        from kairos_train.model.kernels.fla_hopper import replace_miscompiled_kernel

        yield "fla's backward step replaced by torch's", {"replaced": replace_miscompiled_kernel()}


# --- state passing ---


def state_passing(setting: Setting) -> Entries:
    """A sequence in two shards, states passed, against the same kernels on the whole; then by two processes."""
    cuts, tokens = ((64, 70), 150) if setting.tiny else ((704, 700), 1500)
    backend = "torch" if no_fla(setting) else "fla"
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    tolerances, measure = (PASSING_BF16, rms_ratio) if setting.cuda else (FLOAT32, max_ratio)
    for name, decay in DECAYS.items():
        x = rule_inputs(setting, tokens, decay=decay, dtype=dtype)
        cotangents = rule_cotangents(x)
        whole = behind(run_rule(x, cotangents, backend), cuts[0])
        ours = behind(in_two_shards(x, cotangents, cuts[0], backend), cuts[0])
        errors = {n: measure(ours[n], whole[n]) for n in ours}
        yield f"one process, {backend} {str(dtype)[6:]}, {name}", check(errors, tolerances, measure.__name__)
        exact = behind(run_rule({n: t.double() for n, t in x.items()}, cotangents, "torch"), cuts[1])
        ours = behind(in_two_shards(x, cotangents, cuts[1], backend), cuts[1])
        errors = {n: rms_ratio(ours[n], exact[n]) for n in exact}
        yield f"one process against float64, {name}", check(errors, RULE_BF16, rms_ratio.__name__)
    from gpu_sections.two_processes import against_one

    yield from against_one(setting, cuts[0], tokens, backend, tolerances)


def behind(result: dict[str, Tensor], cut: int) -> dict[str, Tensor]:
    """With the outputs of the first 64 tokens behind the cut by themselves: there a wrong state shows most."""
    return {**result, "output behind the cut": result["output"][:, cut : cut + 64]}


def in_two_shards(x: dict[str, Tensor], cotangents: tuple[Tensor, Tensor], cut: int, backend: str) -> dict[str, Tensor]:
    """What two context ranks compute, one after the other in this process."""
    from parallel.exchange import state_exchange, state_passing

    rule = partial(gated_delta_rule, backend=backend)
    d_out, d_state = cotangents
    tokenwise = {n: t for n, t in x.items() if n != "initial_state"}
    first, second = ({n: t[:, part] for n, t in tokenwise.items()} for part in (slice(cut), slice(cut, None)))
    with torch.no_grad():
        out, state_in = rule(*first.values(), x["initial_state"])
        base, reads, transition, own = state_passing.local_map(rule, *second.values())
        outputs = [out, state_passing.add_read(base, reads, state_in)]
        final = state_exchange.carry(transition, state_in, own)
        d_second = d_out[:, cut:].to(out.dtype)
        d_in = state_passing.read_gradient(reads, d_second).to(state_in.dtype)
        d_in = state_exchange.carry_back(transition, d_state.to(state_in.dtype), d_in)
    grads_first = run_rule({**first, "initial_state": x["initial_state"]}, (d_out[:, :cut], d_in), backend)
    grads_second = run_rule({**second, "initial_state": state_in}, (d_second, d_state), backend)
    result = {"output": torch.cat(outputs, dim=1), "state": final}
    for n in tokenwise:
        result[f"d_{n}"] = torch.cat([grads_first[f"d_{n}"], grads_second[f"d_{n}"]], dim=1)
    return {**result, "d_initial_state": grads_first["d_initial_state"]}


# --- windows ---


def run_windows(qkv: Tensor, cotangent: Tensor, windows: Windows, backend: str) -> dict[str, Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = window_attention(*qkv, windows=windows, backend=backend)
    (grad,) = torch.autograd.grad(out, qkv, cotangent.to(out.dtype))
    return {"output": out, **{f"d_{name}": g for name, g in zip("qkv", grad, strict=True)}}


def compare_windows(setting: Setting, rule: WindowSpec, dtype: torch.dtype, backend: str) -> Entry:
    frames, tokens, heads, width = (9, 4, 2, 8) if setting.tiny else (13, 96, 4, 128)
    history = (2, 0)
    windows = Windows.whole(rule, history, frames)
    random = setting.generator(3)
    qkv = torch.randn(3, len(history), frames, tokens, heads, width, generator=random, device=setting.device).to(dtype)
    cotangent = torch.randn(qkv[0].flatten(1, 2).shape, generator=random, device=setting.device).to(dtype)
    ours = run_windows(qkv, cotangent, windows, backend)
    oracle = run_windows(qkv.double(), cotangent, windows, "dense")
    exact = dtype == torch.float32
    measure = max_ratio if exact else rms_ratio
    errors = {name: measure(ours[name], oracle[name]) for name in oracle}
    return check(errors, FLOAT32 if exact else WINDOWS_BF16, measure.__name__)


def windows(setting: Setting) -> Entries:
    """Gathered and dense windows against the dense mask in float64."""
    for name, rule in rules().items():
        for backend in ("gathered", "dense"):
            for dtype in (torch.float32, torch.bfloat16):
                yield f"{backend} {name}, {str(dtype)[6:]}", compare_windows(setting, rule, dtype, backend)
    yield from flash_attention(setting)


def flash_attention(setting: Setting) -> Entries:
    """The package flash-attn, which no backend here uses, on full attention: a second opinion where it is there."""
    if importlib.util.find_spec("flash_attn") is None:
        yield "flash-attn", absent("flash-attn is not installed; torch's own flash kernel serves gathered windows")
        return
    from flash_attn import flash_attn_func

    shape = (3, 1, 1000, 4, 128)
    qkv = torch.randn(shape, generator=setting.generator(), device=setting.device).bfloat16().requires_grad_()
    out = flash_attn_func(*qkv)
    exact = qkv.detach().double().requires_grad_()
    reference = nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in exact)).transpose(1, 2)
    grads = [torch.autograd.grad(o.sum(), t)[0] for o, t in ((out, qkv), (reference, exact))]
    errors = {"output": rms_ratio(out, reference), "d_qkv": rms_ratio(*grads)}
    yield "flash-attn FA, bfloat16", check(errors, WINDOWS_BF16, rms_ratio.__name__)


def flex(setting: Setting) -> Entries:
    """Compiled FlexAttention, forward and backward; each compilation is a fresh one."""
    if not setting.cuda:
        yield "flex", absent("flex: FlexAttention trains on CUDA only")
        return
    from torch._dynamo.utils import counters

    chosen = {name: rule for name, rule in rules().items() if not (rule.kind == "FA" and rule.token_window)}
    for dtype in (torch.bfloat16, torch.float32):
        for name, rule in chosen.items():
            torch.compiler.reset()  # else its limit of compilations per function would fall back to eager in silence
            before = counters["stats"]["unique_graphs"]
            entry = compare_windows(setting, rule, dtype, "flex")
            entry["compiled_graphs"] = counters["stats"]["unique_graphs"] - before
            entry["passed"] = entry["passed"] and entry["compiled_graphs"] > 0
            yield f"flex {name}, {str(dtype)[6:]}", entry


# --- the whole model ---


def small_model(setting: Setting) -> ModelConfig:
    """One cycle of layers, both streams."""
    if setting.tiny:
        video = VideoStreamConfig(dim=64, ffn_dim=128, gdn_key_dim=16, gdn_value_dim=32)
        action = ActionStreamConfig(dim=32, ffn_dim=64, action_dim=4, state_dim=4)
        return ModelConfig("small", num_layers=4, num_heads=2, text_dim=32, freq_dim=32, video=video, action=action)
    video = VideoStreamConfig(dim=512, ffn_dim=2048, gdn_key_dim=64, gdn_value_dim=128)
    action = ActionStreamConfig(dim=256, ffn_dim=1024, action_dim=14, state_dim=14)
    return ModelConfig("small", num_layers=4, num_heads=4, text_dim=256, freq_dim=256, video=video, action=action)


def model(setting: Setting) -> Entries:
    """The joint model in bfloat16 by this machine's kernels against float64, beside plain kernels in bfloat16."""
    config = small_model(setting)
    torch.manual_seed(0)
    oracle = WorldActionModel(config, KernelsConfig(attention="dense", gated_delta="torch")).double()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():  # last layers start at zero and would hide all others
            if name.startswith(("video_dit.head.head", "action_dit.head")):
                parameter.normal_(std=0.02)
    oracle.to(dtype=torch.bfloat16, device=setting.device).double()
    inputs = model_inputs(setting, config)
    exact = run_model(oracle, inputs)
    plain, auto = KernelsConfig(attention="dense", gated_delta="torch"), KernelsConfig()
    if no_fla(setting):
        auto = replace(auto, gated_delta="torch")
    errors = {}
    for label, kernels in (("plain", plain), ("chosen", auto)):
        tested = WorldActionModel(config, kernels)
        tested.load_state_dict(oracle.state_dict())
        found = run_model(tested.to(dtype=torch.bfloat16, device=setting.device), inputs)
        gradients = [torch.cat([found[n].double().flatten(), exact[n].flatten()]) for n in exact if n.startswith("d_")]
        ours, reference = (torch.cat(x) for x in zip(*(g.chunk(2) for g in gradients), strict=True))
        errors[label] = {n: rms_ratio(found[n], exact[n]) for n in exact if not n.startswith("d_")}
        errors[label]["d_all"] = rms_ratio(ours, reference)
        worst = max((n for n in exact if n.startswith("d_")), key=lambda n: rms_ratio(found[n], exact[n]))
        errors[label]["d_worst"] = rms_ratio(found[worst], exact[worst])
        errors[label]["worst"] = worst[2:]
    plain_errors, chosen = errors["plain"], errors["chosen"]
    names = [n for n in chosen if n not in ("worst", "d_worst")]
    # A model's bf16 error is its own; kernels may not add much to it.
    limits = {n: max(1.5 * plain_errors[n], 1e-3) for n in names}
    yield "chosen kernels, bfloat16", {**check({n: chosen[n] for n in names}, limits, rms_ratio.__name__), **errors}


def model_inputs(setting: Setting, config: ModelConfig) -> dict[str, Any]:
    frames, side = (5, 4) if setting.tiny else (9, 16)
    random = setting.generator(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=setting.device).bfloat16()

    return {
        "latents": draw(2, config.video.latent_channels, frames, side, side),
        "context": draw(2, 7, config.text_dim),
        "context_mask": None,
        "video_timestep": torch.tensor([300.0, 800.0], device=setting.device),
        "history_frames": [1, 2],
        "state": draw(2, 1, config.action.state_dim),
        "action": draw(2, 6, config.action.action_dim),
        "action_timestep": torch.tensor([500.0, 900.0], device=setting.device),
    }


def run_model(tested: WorldActionModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Velocities and the gradients of every parameter ("d_…"). Inputs in the model's dtype, times in float32."""
    dtype = next(tested.parameters()).dtype
    moved = {n: t.to(dtype) if isinstance(t, Tensor) and t.dtype == torch.bfloat16 else t for n, t in inputs.items()}
    video, action = tested(**moved)
    random = torch.Generator(video.device).manual_seed(11)
    cotangents = [torch.randn(t.shape, generator=random, device=t.device) for t in (video, action)]
    sum((t * c.to(t.dtype)).double().sum() for t, c in zip((video, action), cotangents, strict=True)).backward()
    grads = {f"d_{n}": p.grad for n, p in tested.named_parameters()}
    return {"video": video.detach(), "action": action.detach(), **grads}


# --- FP8 ---


def fp8(setting: Setting) -> Entries:
    """The emulated layer on this device against its definition in float64, and Transformer Engine against it."""
    random = setting.generator()
    rows, into, out = (33, 32, 48) if setting.tiny else (1000, 2560, 1024)
    x, weight = (torch.randn(n, into, generator=random, device=setting.device) for n in (rows, out))
    grad = torch.randn(rows, out, generator=random, device=setting.device)
    layer = EmulatedFp8Linear(into, out, bias=False, device=setting.device)
    layer.weight.data.copy_(weight)
    x.requires_grad_()
    y = layer(x)
    dx, dw = torch.autograd.grad(y, (x, layer.weight), grad)
    x8, w8 = rounded(x.detach(), FORWARD), rounded(weight, FORWARD)
    g8 = rounded(grad, BACKWARD)
    errors = {"output": max_ratio(y, x8 @ w8.T), "d_x": max_ratio(dx, g8 @ w8), "d_weight": max_ratio(dw, g8.T @ x8)}
    yield "emulated, float32", check(errors, FLOAT32, max_ratio.__name__)
    yield from transformer_engine(setting, x.detach(), weight, grad, (x8 @ w8.T, g8 @ w8, g8.T @ x8))


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to FP8 with one scale, back in float64."""
    scale = torch.finfo(dtype).max / x.double().abs().max()
    return (x.double() * scale).to(dtype).double() / scale


def transformer_engine(
    setting: Setting, x: Tensor, weight: Tensor, grad: Tensor, expected: tuple[Tensor, ...]
) -> Entries:
    """Recipe `current` is the emulated arithmetic; the others have finer scales and are compared with no rounding."""
    from kairos_train.basics.errors import UserError
    from parallel import fp8
    from parallel.config import Fp8Config

    exact = (x.double() @ weight.double().T, grad.double() @ weight.double(), grad.double().T @ x.double())
    for recipe in ("current", "block", "mxfp8", "delayed"):
        policy = fp8.Fp8Policy(Fp8Config(recipe=recipe), 1)
        try:
            fp8.require(policy)
        except UserError as error:
            yield f"Transformer Engine {recipe}", absent(str(error))
            continue
        layer = fp8.make_linear(policy, x.shape[1], weight.shape[0], bias=False).to(x.device, torch.bfloat16)
        layer.weight.data.copy_(weight)
        inputs = x.bfloat16().requires_grad_()
        try:
            with fp8.forward_autocast(policy):
                y = layer(inputs)
            found = (y, *torch.autograd.grad(y, (inputs, layer.weight), grad.bfloat16()))
        except Exception as error:  # one recipe's fault shall not hide the others' results
            yield f"Transformer Engine {recipe}", {"error": last_line(error), "passed": False}
            continue
        reference, limit = (expected, 1e-2) if recipe == "current" else (exact, 8e-2)
        names = ("output", "d_x", "d_weight")
        errors = {n: rms_ratio(a, b) for n, a, b in zip(names, found, reference, strict=True)}
        yield f"Transformer Engine {recipe}, bfloat16", check(errors, {"": limit}, rms_ratio.__name__)
