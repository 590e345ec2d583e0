"""Runs public exports in a checkout of the public Kairos code and compares with ours, on a CPU.

    python benchmarks/check_public_code.py --repository DIR [--export EXPORT ...]

DIR is a checkout of github.com/kairos-agi/kairos-sensenova; without one the check is skipped and says so. Without
exports it makes four of small random models: both streams, video with windows in tokens and in frames, distilled. Every
`kairos_config.py` is run, its network constructed and loaded strictly, and sampled by the public pipelines (video,
video and actions, actions on cached history; guidance against an encoded prompt; the distilled sampler) from our noise,
next to our sampler. Kernels are plain torch, VAE and text encoder give prepared tensors. Ends with one JSON line: the
relative difference of every case (exit code 1 when one exceeds the tolerance), and by how much timesteps in bfloat16,
as the public pipelines round them, move our own outputs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import runpy
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from public_code_parts.checkout import open_checkout, quiet
from safetensors.torch import load_file
from torch import Tensor

from kairos_train.basics.plain import from_dict
from kairos_train.checkpoint.writing import write_checkpoint
from kairos_train.config import schema
from kairos_train.config.compose import to_yaml
from kairos_train.inference import sampler
from kairos_train.inference.normalization import from_statistics
from kairos_train.inference.sampler import Conditions, SamplerConfig
from kairos_train.model import WorldActionModel
from kairos_train.weights.export import export
from kairos_train.weights.public import from_public

TOLERANCE = 1e-5
FRAMES, SIDE, STEPS, GUIDANCE, HORIZON = 9, 4, 3, 3.0, 8
"""Latent frames, latent height and width, steps, guidance scale, actions."""

NORMALIZER = "benchmarks/robotwin/robotwin_eval/policy/qworld_wam_policy/normalizer.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repository", type=Path, help="checkout of the public code")
    parser.add_argument("--export", type=Path, action="append", default=[], help="written with --format public")
    arguments = parser.parse_args()
    if arguments.repository is None or not (arguments.repository / "kairos" / "modules" / "dits" / "mot.py").is_file():
        where = "no --repository DIR" if arguments.repository is None else f"no mot.py below {arguments.repository}"
        print(json.dumps({"skipped": f"{where}: give a checkout of github.com/kairos-agi/kairos-sensenova"}))
        return 0
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        exports = arguments.export or small_exports(Path(folder))
        code = open_checkout(arguments.repository.resolve())
        found = {export.name: check(export.resolve(), code, arguments.repository) for export in exports}
    moved = {name: cases.pop("moved by bfloat16 timesteps") for name, cases in found.items()}
    worst = max(value for cases in found.values() for value in cases.values())
    print(
        json.dumps({"differences": found, "worst": worst, "tolerance": TOLERANCE, "moved by bfloat16 timesteps": moved})
    )
    return int(not worst <= TOLERANCE)


# --- exports ---


def small_exports(folder: Path) -> list[Path]:
    """Random models at small sizes, but for the heads of Gated DeltaNet layers, which are fixed there."""
    tokens = {"window_semantics": "token", "restrict_history_query_to_history": False}
    kinds = {"joint": {}, "tokens": tokens, "frames": {}, "distilled": tokens}
    return [small_export(folder, name, video) for name, video in kinds.items()]


def small_export(folder: Path, name: str, video: dict[str, Any]) -> Path:
    actions = name == "joint"
    model = schema.ModelConfig(
        name=name,
        num_layers=4,
        num_heads=2,
        text_dim=2048,
        freq_dim=32,
        video=schema.VideoStreamConfig(dim=96, ffn_dim=128, **video),
        action=schema.ActionStreamConfig(dim=48, ffn_dim=64, action_dim=3, state_dim=2) if actions else None,
    )
    config = schema.Config(
        model=model,
        encoders=schema.EncodersConfig(name="wan_qwen35", text=schema.TextEncoderConfig(text_dim=2048)),
        stage=schema.StageConfig(streams="joint" if actions else "video"),
    )
    config.data.normalize_action = config.data.normalize_state = "zscore"
    weights = {
        key: value + 0.05 * torch.randn_like(value) for key, value in WorldActionModel(model).state_dict().items()
    }
    files = {"config.yaml": to_yaml(config)} | (
        {"dataset_stats.json": json.dumps(statistics(model))} if actions else {}
    )
    state = {"encoders": None, "distilled": name == "distilled"}
    checkpoint = write_checkpoint(folder / f"{name}-run", 0, sections={"ema": weights}, state=state, files=files)
    export(checkpoint, folder / name, form="public", dtype="fp32")
    return folder / name


def statistics(model: schema.ModelConfig) -> dict[str, Any]:
    def entry(dims: int) -> dict[str, Any]:
        fields = ("mean", "std", "min", "max", "q01", "q99")
        values = dict(zip(fields, (torch.rand(dims) + i for i in range(len(fields)))))
        return {f"global_{name}": value.tolist() for name, value in values.items()}

    return {
        "state": {"observation.state": entry(model.action.state_dim)},
        "action": {"action": entry(model.action.action_dim)},
    }


# --- one export, both ways ---


@dataclasses.dataclass
class Given:
    """What both sides are conditioned on: contexts with and without, masks, first latent frame, state, seeds."""

    context: Tensor
    mask: Tensor
    negative: Tensor
    negative_mask: Tensor
    history: Tensor
    state: Tensor | None
    seeds: list[int]

    def conditions(self, *, history: bool) -> Conditions:
        first = self.history if history else None
        return Conditions(self.context, self.mask, first, self.state, (self.negative, self.negative_mask))


def check(folder: Path, code: types.SimpleNamespace, repository: Path) -> dict[str, float]:
    """Relative difference by case."""
    described = json.loads((folder / "config.json").read_text())
    settings = json.loads((folder / "sampler.json").read_text())
    run = from_dict(schema.Config, described["run"])
    names = runpy.run_path(str(folder / "kairos_config.py"))
    with contextlib.chdir(folder), quiet():  # its paths are beside it
        theirs = public_network(names["pipeline"], code)
    ours = our_network(folder, run.model)
    distilled = settings["schedule"] == "distilled"
    config = SamplerConfig(steps=STEPS, guidance=GUIDANCE)
    if distilled:  # with a seed the public sampler draws the first noise again
        config = SamplerConfig("distilled", steps=4, guidance=1.0, renoise="same")
    rounded, given = dataclasses.replace(config, timestep_dtype="bfloat16"), draw(run.model, batch=1)
    ours_rounded = run_ours(ours, given, "video", rounded).latents
    found = {"moved by bfloat16 timesteps": difference(ours_rounded, run_ours(ours, given, "video", config).latents)}
    if distilled:
        public = distilled_pipeline(theirs, given, code, names["selected_sampling_time"])
        return found | {"distilled": difference(public, run_ours(ours, given, "video", config).latents)}
    if run.model.action is None:  # its action stream computes in the precision of its timesteps
        public = wam_pipeline(theirs, given, code, "video", torch_dtype=torch.bfloat16)
        found["video, bfloat16 timesteps"] = difference(public["latents"], ours_rounded)
    for batch in (1, 2):
        given = draw(run.model, batch=batch)
        for mode in ("video", "joint", "action") if run.model.action is not None else ("video", "text"):
            public = wam_pipeline(theirs, given, code, mode)
            got = run_ours(ours, given, "video" if mode == "text" else mode, config, history=mode != "text")
            for part, value in public.items():
                found[f"{mode}, {part}, batch {batch}"] = difference(value, getattr(got, part))
    if (folder / "dataset_stats.json").is_file() and run.data.normalize_action == "zscore":
        found["RoboTwin client's normaliser"] = client_difference(folder / "dataset_stats.json", repository)
    return found


def public_network(pipeline: dict[str, Any], code: types.SimpleNamespace) -> torch.nn.Module:
    """As `KairosEmbodiedAPI` constructs and loads it, without a GPU and in the file's own precision."""
    arguments = dict(pipeline["pipeline_args"])
    network = dict(arguments["dit_config"])
    assert arguments["load_dit_fn"] == "strict_load"
    built = code.networks.get(network.pop("dit_type"))(**{key: dict(value) for key, value in network.items()})
    if pipeline.get("pretrained_dit"):
        built.load_state_dict(load_file(pipeline["pretrained_dit"]), strict=True)
    return built.float().eval()


def our_network(folder: Path, model: schema.ModelConfig) -> WorldActionModel:
    weights = load_file(folder / "model.safetensors")
    ours = WorldActionModel(model)
    ours.load_state_dict({name: weights[key].float() for key, name in from_public(weights).items()})
    return ours.eval().requires_grad_(False)


def draw(model: schema.ModelConfig, *, batch: int) -> Given:
    def rows(count: int) -> tuple[Tensor, Tensor]:
        mask = torch.ones(batch, count, dtype=torch.bool)
        mask[0, count - 2 :] = batch == 1
        return torch.randn(batch, count, model.text_dim) * mask[..., None], mask

    state = None if model.action is None else torch.randn(batch, 1, model.action.state_dim)
    history = torch.randn(batch, 16, 1, SIDE, SIDE)
    return Given(*rows(6), *rows(4), history, state, list(range(3, 3 + batch)))


def run_ours(
    model: WorldActionModel, given: Given, mode: str, config: SamplerConfig, *, history: bool = True
) -> sampler.SampledOutput:
    return sampler.sample(
        model,
        given.conditions(history=history),
        mode=mode,
        config=config,
        seeds=given.seeds,
        latent_shape=(FRAMES, SIDE, SIDE),
        horizon=HORIZON,
    )


# --- the public pipelines ---


class Prompter:
    """In the place of the text encoder: the prepared contexts, and no mask for one sample, as it gives them."""

    def __init__(self, given: Given) -> None:
        self.given = given

    def encode_prompt(self, prompt: Any, *, images: Any, positive: bool, device: Any) -> tuple[Tensor, Tensor | None]:
        given = self.given
        found = (given.context, given.mask) if positive else (given.negative, given.negative_mask)
        return (found[0], None) if len(found[0]) == 1 else found


def wam_pipeline(
    network: torch.nn.Module,
    given: Given,
    code: types.SimpleNamespace,
    mode: str,
    torch_dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Latents, actions or both of the pipeline that is given images, states and prompts."""
    pipe = code.wam.KairosEmbodiedWAMPipeline(device="cpu", torch_dtype=torch_dtype)
    prepare(pipe, network, given)
    acting = {}
    if given.state is not None:
        acting = {"robot_state": given.state, "robot_action_horizon": HORIZON}
    out = pipe(
        prompt=["x"] * len(given.seeds),
        negative_prompt=[""] * len(given.seeds),
        input_image=None if mode == "text" else [picture()] * len(given.seeds),
        wam_infer_mode={"joint": "video_action_joint", "text": "video"}.get(mode, mode),
        height=8 * SIDE,
        width=8 * SIDE,
        num_frames=1 if mode == "action" else 4 * (FRAMES - 1) + 1,
        num_inference_steps=STEPS,
        cfg_scale=GUIDANCE,
        progress_bar_cmd=lambda steps, **_: steps,
        **acting,
    )
    return {{"video": "latents", "action": "actions"}[part]: value for part, value in out.items()}


def distilled_pipeline(network: torch.nn.Module, given: Given, code: types.SimpleNamespace, times: list[int]) -> Tensor:
    """The loop of the distilled pipeline around the wrapper's network."""
    pipe = code.dmd.KairosEmbodiedPipeline_DMD(device="cpu", torch_dtype=torch.float32)
    prepare(pipe, network.video_dit, given)
    pipe.selected_sampling_time = times

    def velocity(*, dit, latents, timestep, context, context_mask, first_frame_latents, **_) -> Tensor:
        masks = code.wam.build_mot_attention_mask_info_dict_wrapper(
            video_seq_len=FRAMES * SIDE * SIDE // 4,
            action_seq_len=0,
            video_tokens_per_frame=SIDE * SIDE // 4,
            num_history_frames=1,
            device="cpu",
            atten_modes=dit.atten_modes,
            window_size=dit.window_size,
            dilated_length=dit.dilated_length,
            attn_method=dit.attn_method,
        )
        return code.mot.mot_infer_pure_video_dit_once(
            dit, latents, first_frame_latents, True, timestep, context, context_mask, masks
        )

    pipe.model_fn = velocity
    image, steps = [picture()], lambda times: times
    size = {"height": 8 * SIDE, "width": 8 * SIDE, "num_frames": 4 * (FRAMES - 1) + 1}
    return pipe(prompt=["x"], input_image=image, cfg_scale=1.0, seed=0, progress_bar_cmd=steps, **size)


def prepare(pipe: torch.nn.Module, network: torch.nn.Module, given: Given) -> None:
    """Give a pipeline its parts: the network, prepared contexts and latents, our noise."""
    pipe.dit = network
    pipe.prompter = Prompter(given)
    pipe.vae = types.SimpleNamespace(
        upsampling_factor=8,
        model=types.SimpleNamespace(z_dim=16),
        encode=lambda images, **_: given.history,
        decode=lambda latents, **_: latents,
    )
    pipe.vae_output_to_video = lambda latents: latents

    def noise(shape: Any, **_: Any) -> Tensor:
        return sampler.noise(tuple(shape[1:]), given.seeds, "video" if len(shape) == 5 else "action")

    pipe.generate_noise = noise


def picture() -> Any:
    from PIL import Image

    return Image.fromarray(np.zeros((8 * SIDE, 8 * SIDE, 3), np.uint8))


def client_difference(file: Path, repository: Path) -> float:
    """Of the RoboTwin client's normalisation and its inverse to ours, under the entries that it asks for."""
    client = runpy.run_path(str(repository / NORMALIZER))["RobotWinStatsNormalizer"](file)
    ours = {group: from_statistics(file, group=group, key="default", mode="zscore") for group in ("state", "action")}
    state, action = torch.randn(1, ours["state"].dim), torch.randn(1, HORIZON, ours["action"].dim)
    inverse = torch.from_numpy(client.denormalize_action(action))
    return max(
        difference(client.normalize_state(state), ours["state"].normalize(state)),
        difference(inverse, ours["action"].unnormalize(action)),
    )


def difference(theirs: Tensor, ours: Tensor) -> float:
    """max |a − b| / max |b|."""
    assert theirs.shape == ours.shape, (theirs.shape, ours.shape)
    return float((theirs - ours).abs().max() / ours.abs().max())


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
