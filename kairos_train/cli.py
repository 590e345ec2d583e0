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


def run_plan(args: argparse.Namespace) -> int:
    from kairos_train.plan.report import SECTIONS, run

    text, legal = run(
        lambda: _config(args, sections=SECTIONS),
        gpus=args.gpus,
        searching=args.search,
        context_tokens=args.context_tokens,
        as_json=args.json,
    )
    print(text)
    return 0 if legal else 2


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


def run_verify_parallel(args: argparse.Namespace) -> int:
    args.overrides = ["experiment=demo", "train.precision=fp32", "optimizer.warmup_steps=1", *args.overrides]
    config = _config(args, sections=("model", "stage", "optimizer", "parallel", "precision", "train", "data.window"))
    from kairos_train.training.verify_parallel import report, verify_parallel

    deviations = verify_parallel(config, steps=args.steps, ranks=args.nproc)
    if deviations is None:
        return 0
    d = config.parallel
    print(
        report(
            deviations,
            f"tensor {d.tensor}{' with sequence' if d.sequence else ''}, context {d.context}, "
            f"ZeRO {config.train.zero_stage}, {config.train.precision}",
        )
    )
    return 0 if all(deviation.ok for deviation in deviations) else 1


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

    config = _config(args, sections=("data.window", "data.clips", "data.prompt_template", "encoders"))
    index = pack(
        args.source,
        args.out,
        window=config.data.window,
        clips=config.data.clips,
        prompt_template=config.data.prompt_template,
        captions=args.captions,
        encoder=_sample_encoder(config) if args.encode else None,
        processes=args.processes,
        shard_samples=args.shard_samples,
        on_bad=args.on_bad,
        progress=_show_progress if sys.stderr.isatty() else None,
    )
    print(f"{args.out}: {index['samples']} samples in {len(index['shards'])} shards")
    return 0


def run_data_inspect(args: argparse.Namespace) -> int:
    from dataloaders.inspection import inspect

    config = _config(args, sections=("data.window", "data.clips", "data.prompt_template"))
    lines = inspect(args.source, args.out, data=config.data, samples=args.samples)
    print("\n".join([*lines, f"page: {args.out / 'index.html'}"]))
    return 0


def run_data_verify(args: argparse.Namespace) -> int:
    from dataloaders.verification import verify

    progress = _show_progress if sys.stderr.isatty() else None
    verdict = verify(args.shards, decode=not args.no_decode, processes=args.processes, progress=progress)
    for fault in verdict.faults:
        print(f"{fault.name}: {fault.reason}")
    state = f"{len(verdict.faults)} faults" if verdict.faults else "ok"
    counts = f"{verdict.samples} samples in {verdict.shards} shards, {verdict.bytes / 1e6:.1f} MB"
    print(f"{args.shards}: {counts}: {state}" if verdict.faults else f"{args.shards}: ok: {counts}")
    return 1 if verdict.faults else 0


def _sample_encoder(config: Any) -> Callable[[int], Any]:
    """What makes the encoders in each process that packs."""
    import functools

    from kairos_train.conditioning.sample_encoder import load_sample_encoder

    return functools.partial(load_sample_encoder, config.encoders, _device(config.train.device))


def _show_progress(done: int, total: int) -> None:
    print(f"\rpacked {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


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

    plan = _command(commands, "plan", run_plan, "memory, traffic and time on a cluster, without GPUs")
    plan.add_argument("--json", action="store_true", help="one JSON object, also where a layout is not legal")
    plan.add_argument("--gpus", type=_count, default=None, metavar="N", help="in all; none: tensor x context")
    plan.add_argument("--search", action="store_true", help="the cheapest layout for --gpus that fits")
    plan.add_argument("--context-tokens", type=_count, default=128, metavar="N", help="text tokens of a sample")
    _with_overrides(plan)

    verify = _group(commands, "verify", "check the implementation")
    golden = _command(verify, "golden", run_verify_golden, "compare outputs and gradients with reference files")
    golden.add_argument("files", nargs="+", type=Path, metavar="FILE", help="safetensors with weights, inputs, outputs")
    golden.add_argument("--tolerance-outputs", type=float, default=1e-5, help="largest relative error")
    golden.add_argument("--tolerance-gradients", type=float, default=1e-4, help="largest relative error")
    golden.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="where it is computed")
    golden.add_argument("--dtype", choices=("float64", "float32", "bfloat16"), default="float32", help="of weights")

    parallel = _command(
        verify, "parallel", run_verify_parallel, "a sharded layout beside one process, on a small model"
    )
    parallel.add_argument("--nproc", type=_count, default=None, help="processes; none: tensor x context")
    parallel.add_argument("--steps", type=_count, default=5, help="optimiser steps")
    _with_overrides(parallel)

    data = _group(commands, "data", "make, pack and check datasets")
    _add_data_commands(data)
    _add_checks_of_data(data)
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

    pack = _command(data, "pack", run_data_pack, "cut a dataset into training samples; goes on where it was stopped")
    pack.add_argument(
        "source", metavar="SOURCE", help="a LeRobot dataset, a manifest .jsonl or .csv of videos, WebDataset tars"
    )
    pack.add_argument("--out", type=Path, required=True, metavar="DIR", help="the shards")
    pack.add_argument("--encode", action="store_true", help="store latents and contexts of the configured encoders too")
    pack.add_argument("--captions", type=Path, metavar="FILE", help="LeRobot: JSON lines with captions of episodes")
    pack.add_argument(
        "--on-bad", choices=("stop", "skip"), default="stop", help="what cannot be used: stop, or list it"
    )
    pack.add_argument("--shard-samples", type=_count, default=256, help="most samples of a shard")
    pack.add_argument("--processes", type=_count, default=1, help="at the same time; each with encoders of its own")
    _with_overrides(pack)


def _add_checks_of_data(data: Any) -> None:
    inspect = _command(data, "inspect", run_data_inspect, "counts, ranges and pictures of a dataset or of shards")
    inspect.add_argument("source", metavar="DATASET|SHARDS", help="what pack takes, or what it wrote")
    inspect.add_argument("--out", type=Path, required=True, metavar="DIR", help="page and pictures; must not exist")
    inspect.add_argument("--samples", type=_count, default=12, help="rows of the contact sheet")
    _with_overrides(inspect)

    verify = _command(data, "verify", run_data_verify, "read every byte of packed shards; exit code 1 for a fault")
    verify.add_argument("shards", metavar="SHARDS", help="written by pack")
    verify.add_argument("--no-decode", action="store_true", help="do not decode the clips")
    verify.add_argument("--processes", type=_count, default=1, help="shards at the same time")


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
