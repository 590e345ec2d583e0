"""The command line: one thin function per subcommand.

What a subcommand needs is imported inside it, so that `--help` and a typing error cost nothing. A `UserError` becomes
one line on stderr and exit code 2, a `RunStopped` one line and 3; any other exception keeps its traceback. Exit code 1:
the command ran, and what it checked does not hold.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kairos_train import __version__
from kairos_train.errors import RunStopped, UserError

PROGRAM = "kairos-train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
        return args.run(args)
    except UserError as error:
        return _fail(error, 2)
    except RunStopped as error:
        return _fail(error, 3)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130


def _fail(error: Exception, code: int) -> int:
    print(f"{PROGRAM}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
    return code


# --- training and configuration ---


def run_train(args: argparse.Namespace) -> int:
    config = _config(args)  # before the heavy import: a typing error shows at once
    from kairos_train.training.engine import stop_processes
    from kairos_train.training.loop import train

    print(f"last checkpoint: {train(config)}")
    stop_processes()
    return 0


def run_config(args: argparse.Namespace) -> int:
    from kairos_train.config.compose import to_yaml

    print(to_yaml(_config(args, sections=())), end="")
    return 0


def run_model_summary(args: argparse.Namespace) -> int:
    from kairos_train.model.summary import summarize

    print(summarize(_config(args, sections=("model",))))
    return 0


def run_verify_golden(args: argparse.Namespace) -> int:
    import torch

    from kairos_train.model.golden import verify_files

    dtype = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    failed = 0
    for result in verify_files(args.files, device=_device(args.device), dtype=dtype):
        good = result.outputs <= args.tolerance_outputs and result.gradients <= args.tolerance_gradients
        failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {result.path.name}: ", end="")
        print(f"outputs {result.outputs:.2e} ({result.worst_output}), ", end="")
        print(f"gradients {result.gradients:.2e} ({result.worst_gradient})")
    return 1 if failed else 0


# --- data ---


def run_data_simulate(args: argparse.Namespace) -> int:
    from dataloaders.simulators.collect import simulate

    summary = simulate(
        env=args.env,
        tasks=args.tasks or [],
        episodes_per_task=args.episodes,
        out=args.out,
        size=args.size,
        seed_start=args.seed_start,
        noise=args.noise,
        codec=args.codec,
        processes=args.processes,
    )
    return _print(summary)


def run_data_pack(args: argparse.Namespace) -> int:
    from dataloaders.pack import pack

    config = _config(args, sections=("data.window", "data.prompt_template", "encoders"))
    encoded = _encoding(config) if args.encode else {}
    index = pack(
        args.source,
        args.out,
        window=config.data.window,
        prompt_template=config.data.prompt_template,
        processes=args.processes,
        shard_samples=args.shard_samples,
        progress=_show_progress if sys.stderr.isatty() else None,
        **encoded,
    )
    print(f"{args.out}: {index['samples']} samples in {len(index['shards'])} shards")
    return 0


def _encoding(config: Any) -> dict[str, Any]:
    """What `pack` is given when it shall store latents and contexts."""
    import numpy as np
    import torch

    from kairos_train.conditioning.build import build_encoders

    encoders = build_encoders(config.encoders, _device(config.train.device))

    def context_of(text: str, image: torch.Tensor | None) -> np.ndarray:
        context, mask = encoders.text.encode([text], image)
        return context[0][mask[0]].cpu().numpy()

    def encode(frames: np.ndarray, text: str) -> dict[str, np.ndarray]:
        clip = torch.from_numpy(frames)[None]
        return {"latents": encoders.video.encode(clip)[0].cpu().numpy(), "context": context_of(text, clip[:, 0])}

    return {"encode": encode, "encoders_identity": encoders.identity, "empty_context": context_of("", None)}


def _show_progress(done: int, total: int) -> None:
    print(f"\repisodes {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


# --- after training ---


def run_export(args: argparse.Namespace) -> int:
    from kairos_train.checkpoint.export import export

    return _print(export(args.checkpoint, args.out, weights=args.weights, dtype=args.dtype))


def run_rollout(args: argparse.Namespace) -> int:
    from evaluation.rollout import rollout

    summary = rollout(
        args.export,
        source=args.input,
        mode=args.mode,
        out=args.out,
        count=args.count,
        steps=args.steps,
        guidance=args.guidance,
        seed=args.seed,
        device=_device(args.device),
    )
    return _print(summary)


def run_evaluate(args: argparse.Namespace) -> int:
    from evaluation.open_loop import evaluate

    summary = evaluate(
        args.export,
        shards=args.input,
        out=args.out,
        samples=args.samples,
        steps=args.steps,
        seed=args.seed,
        device=_device(args.device),
    )
    return _print(summary)


def run_demo(args: argparse.Namespace) -> int:
    from kairos_train.demo import run

    run(env=args.env, fresh=args.fresh)
    return 0


# --- shared by the commands ---


def _config(args: argparse.Namespace, *, sections: Sequence[str] | None = None) -> Any:
    from kairos_train.config.compose import load_config

    return load_config(args.overrides, config_dirs=args.config_dir, sections=sections)


def _device(name: str) -> str:
    """`auto` resolved; a GPU that is asked for must be there."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda is asked for but torch sees no GPU; use cpu or auto")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _print(summary: dict[str, Any]) -> int:
    print(json.dumps(summary, indent=1, sort_keys=True, default=str))
    return 0


# --- the parser ---


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and name the nearest legal word."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            **{"allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter, **settings}
        )

    def error(self, message: str) -> NoReturn:
        if match := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            choices = re.findall(r"[\w.-]+", match[2])
            raise UserError(f"{match[1]!r} is unknown; {_nearest(match[1], choices)}choose from: {', '.join(choices)}")
        raise UserError(f"{message}; see {self.prog} --help")


def _nearest(word: str, legal: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, legal, n=1)
    return f"did you mean {close[0]}? " if close else ""


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    args, extra = build_parser().parse_known_args(argv)
    options = [word for word in extra if word.startswith("-")]
    if options or (extra and "overrides" not in args):
        word = (options or extra)[0]
        known = sorted(set(re.findall(r"--[a-z][\w-]*", args.parser.format_help())))
        name = word.split("=")[0]
        raise UserError(f"unknown argument {word!r}; {_nearest(name, known)}{args.parser.prog} has: {', '.join(known)}")
    if "overrides" in args:
        args.overrides = [*args.overrides, *extra]  # argparse leaves over what stands behind an option
    return args


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog=PROGRAM, description="Train, check and evaluate video world-action models.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    _with_overrides(_command(commands, "train", run_train, "train one stage"))
    _with_overrides(_command(commands, "config", run_config, "print the resolved configuration"))

    model = _group(commands, "model", "what a model configuration comes to")
    _with_overrides(_command(model, "summary", run_model_summary, "parameters, keys and FLOPs, without allocating"))

    verify = _group(commands, "verify", "check the implementation")
    golden = _command(verify, "golden", run_verify_golden, "compare outputs and gradients with reference files")
    golden.add_argument("files", nargs="+", type=Path, metavar="FILE", help="safetensors with weights, inputs, outputs")
    golden.add_argument("--tolerance-outputs", type=float, default=1e-5, help="largest relative error")
    golden.add_argument("--tolerance-gradients", type=float, default=1e-4, help="largest relative error")
    golden.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="where it is computed")
    golden.add_argument("--dtype", choices=("float64", "float32", "bfloat16"), default="float32", help="of weights")

    _add_data_commands(_group(commands, "data", "make and pack datasets"))
    _add_later_commands(commands)

    demo = _command(commands, "demo", run_demo, "simulate, pack, train, export and evaluate, on a CPU")
    demo.add_argument("--env", choices=("metaworld", "push2d"), default="metaworld", help="the simulator")
    demo.add_argument("--fresh", action="store_true", help="remove what an earlier demo left and start over")
    return parser


def _add_data_commands(data: Any) -> None:
    simulate = _command(data, "simulate", run_data_simulate, "record a scripted expert as a LeRobot dataset")
    simulate.add_argument("--env", choices=("metaworld", "push2d"), required=True, help="the simulator")
    simulate.add_argument("--tasks", nargs="+", default=None, metavar="TASK", help="none: the demo's tasks")
    simulate.add_argument("--episodes", type=_count, default=40, help="successful episodes per task")
    simulate.add_argument("--out", type=Path, required=True, metavar="DIR", help="the dataset; must not exist")
    simulate.add_argument("--size", type=_count, default=128, help="side of the picture in pixels")
    simulate.add_argument("--seed-start", type=int, default=0, help="seed of the first episode")
    simulate.add_argument(
        "--noise", type=float, default=0.2, help="added to the executed action of every other episode"
    )
    simulate.add_argument("--codec", choices=("h264", "av1"), default="h264", help="of the video files")
    simulate.add_argument("--processes", type=_count, default=2, help="simulators at the same time")

    pack = _command(data, "pack", run_data_pack, "cut a LeRobot dataset into training windows")
    pack.add_argument("source", type=Path, metavar="SOURCE", help="a LeRobot dataset, v2.0 to v3.0")
    pack.add_argument("--out", type=Path, required=True, metavar="DIR", help="the shards; must not exist")
    pack.add_argument("--encode", action="store_true", help="store latents and contexts of the configured encoders too")
    pack.add_argument("--shard-samples", type=_count, default=256, help="most samples of a shard")
    pack.add_argument("--processes", type=_count, default=1, help="episodes at the same time; 1 with --encode")
    _with_overrides(pack)


def _add_later_commands(commands: Any) -> None:
    export = _command(commands, "export", run_export, "turn a checkpoint into a folder for inference")
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a run folder, or one of its checkpoints")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="the export; must not exist")
    export.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or last weights")
    export.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the stored weights")

    rollout = _command(commands, "rollout", run_rollout, "generate video, actions or both from given first frames")
    rollout.add_argument("export", type=Path, metavar="EXPORT", help="written by the export command")
    rollout.add_argument("--input", type=Path, required=True, metavar="SHARDS", help="held-out shards")
    rollout.add_argument("--mode", choices=("video", "joint", "action"), default="joint", help="what is generated")
    rollout.add_argument("--out", type=Path, required=True, metavar="DIR", help="pictures, videos and numbers")
    rollout.add_argument("--count", type=_count, default=4, help="samples")
    rollout.add_argument("--steps", type=_count, default=None, help="of the sampler; none: as the export says")
    rollout.add_argument("--guidance", type=float, default=None, help="of the video; none: as the export says")
    rollout.add_argument("--seed", type=int, default=0, help="of the noise")
    rollout.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it is computed")

    evaluate = _command(commands, "evaluate", run_evaluate, "errors of actions and future frames on held-out windows")
    evaluate.add_argument("export", type=Path, metavar="EXPORT", help="written by the export command")
    evaluate.add_argument("--input", type=Path, required=True, metavar="SHARDS", help="held-out shards")
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR", help="report and pictures")
    evaluate.add_argument("--samples", type=_count, default=200, help="windows")
    evaluate.add_argument("--steps", type=_count, default=None, help="of the sampler; none: as the export says")
    evaluate.add_argument("--seed", type=int, default=0, help="of the noise")
    evaluate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it is computed")


def _group(commands: Any, name: str, text: str) -> Any:
    parser = commands.add_parser(name, help=text, description=text)
    return parser.add_subparsers(metavar="COMMAND", required=True)


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run, parser=parser)
    return parser


def _with_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="OVERRIDE", help="GROUP=OPTION or KEY=VALUE")
    parser.add_argument("--config-dir", type=Path, action="append", default=[], metavar="DIR", help="own configs")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
