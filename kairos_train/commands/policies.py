"""Weights, and what comes after training: `import`, `export`, `rollout`, `serve`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kairos_train.basics.device import device_of
from kairos_train.commands.output import Result, Table
from kairos_train.commands.parsing import command, count, with_overrides, with_robot


def run_import(args: argparse.Namespace) -> Result:
    from kairos_train.weights.import_public import import_weights

    summary = import_weights(
        args.file,
        args.out,
        args.overrides,
        config_dirs=args.config_dir,
        distilled=args.distilled,
        statistics=args.statistics,
        public_config=args.public_config,
    )
    return Result(
        summary,
        look={"checkpoint": args.out},
        then=[
            f"kairos-train train experiment=finetune_custom stage.init_from={args.out} data.shards=SHARDS",
            f"kairos-train export {args.out} --out policy",
        ],
    )


def run_export(args: argparse.Namespace) -> Result:
    from kairos_train.checkpoint.resolve import resolve_best
    from kairos_train.weights.export import export

    summary = export(
        resolve_best(args.checkpoint) if args.best else args.checkpoint,
        args.out,
        form=args.format,
        weights=args.weights,
        dtype=args.dtype,
        quantize=args.quantize,
    )
    then = [f"kairos-train evaluate {args.out} --input SHARDS --out report", f"kairos-train serve {args.out}"]
    return Result(summary, look={"export": args.out}, then=then if args.format == "standalone" else [])


def run_rollout(args: argparse.Namespace) -> Result:
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
        chunks=args.chunks,
        history=args.history,
        carried=args.carried,
        compiled=args.compiled,
        robot=args.robot,
        device=device_of(args.device),
    )
    rows = [("windows", summary["count"]), *summary["mean"].items()]
    look = {"pictures and numbers": args.out}
    then = [f"kairos-train evaluate {args.export} --input {args.input} --out report"]
    return Result(summary, Table(rows), look=look, then=then)


def run_serve(args: argparse.Namespace) -> Result:
    from kairos_train.serving.run import run

    run(
        args.export,
        host=args.host,
        port=args.port,
        token_file=args.token_file,
        max_message_mb=args.max_message_mb,
        max_batch=args.max_batch,
        batch_window_ms=args.batch_window_ms,
        max_connections=args.max_connections,
        max_connections_per_client=args.max_connections_per_client,
        steps=args.steps,
        cameras=args.cameras,
        fps=args.fps,
        robot=args.robot,
        clip_actions=args.clip_actions,
        clip_margin=args.clip_margin,
        device=device_of(args.device),
    )
    return Result()


def add(commands: Any) -> None:
    """Add the subcommands."""
    imported = command(commands, "import", run_import, "turn public weights into a checkpoint to train from")
    imported.add_argument("file", type=Path, metavar="FILE", help="a .safetensors file, or the .index.json of several")
    imported.add_argument("--out", type=Path, required=True, metavar="DIR", help="the checkpoint; must not exist")
    imported.add_argument("--distilled", action="store_true", help="weights distilled to the released four steps")
    imported.add_argument(
        "--statistics",
        type=Path,
        default=None,
        metavar="FILE",
        help="of the dataset; none: the file beside the weights",
    )
    imported.add_argument(
        "--public-config", type=Path, default=None, metavar="FILE", help="configuration of the public code, in Python"
    )
    with_overrides(imported)

    export = command(commands, "export", run_export, "turn a checkpoint into a folder for inference")
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a run, a checkpoint, or an import")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="the export; must not exist")
    export.add_argument("--best", action="store_true", help="of a run, not the last checkpoint but the best validated")
    export.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or last weights")
    export.add_argument(
        "--format", choices=("standalone", "public"), default="standalone", help="for our inference or the public code"
    )
    export.add_argument(
        "--dtype",
        choices=("bf16", "fp32", "stored"),
        default=None,
        help="of the weights; none: as stored for imported ones, else bf16",
    )
    export.add_argument(
        "--quantize",
        choices=("int8", "fp8", "int4"),
        default=None,
        help="weight-only quantization of the large linear layers",
    )

    rollout = command(commands, "rollout", run_rollout, "generate video, actions or both from given first frames")
    rollout.add_argument("export", type=Path, metavar="EXPORT", help="written by the export command")
    rollout.add_argument("--input", type=Path, required=True, metavar="SHARDS", help="held-out shards")
    rollout.add_argument("--mode", choices=("video", "joint", "action"), default="joint", help="what is generated")
    rollout.add_argument("--out", type=Path, required=True, metavar="DIR", help="pictures, videos and numbers")
    rollout.add_argument("--count", type=count, default=4, help="samples")
    rollout.add_argument("--steps", type=count, default=None, help="of the sampler; none: as the export says")
    rollout.add_argument("--guidance", type=float, default=None, help="of the video; none: as the export says")
    rollout.add_argument("--seed", type=int, default=0, help="of the noise")
    rollout.add_argument("--chunks", type=count, default=1, metavar="N", help="windows, each going on from the last")
    rollout.add_argument(
        "--history",
        type=count,
        default=None,
        metavar="K",
        help="latent frames that a chunk goes on from; none: trained",
    )
    rollout.add_argument(
        "--carried", action="store_true", help="carry states and keys over (models of model.video.history_causal)"
    )
    rollout.add_argument("--compiled", action="store_true", help="through torch.compile; the first chunk takes minutes")
    with_robot(rollout, "the one that SHARDS are of")
    rollout.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it is computed")

    serve = command(commands, "serve", run_serve, "answer observations with actions over a websocket, as openpi does")
    serve.add_argument("export", type=Path, metavar="EXPORT", help="written by the export command")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on")
    serve.add_argument("--port", type=int, default=8000, help="0: a free one, which is printed")
    serve.add_argument(
        "--token-file", type=Path, default=None, metavar="FILE", help="what clients must send; none: open"
    )
    serve.add_argument("--max-message-mb", type=float, default=16.0, metavar="MB", help="longest request")
    serve.add_argument("--max-batch", type=count, default=16, metavar="N", help="requests computed together at most")
    serve.add_argument(
        "--batch-window-ms", type=float, default=2.0, metavar="MS", help="how long a batch waits for more"
    )
    serve.add_argument("--max-connections", type=count, default=256, metavar="N", help="at the same time")
    serve.add_argument(
        "--max-connections-per-client", type=count, default=128, metavar="N", help="of one address at the same time"
    )
    serve.add_argument("--steps", type=count, default=None, help="of the sampler; none: as the export says")
    serve.add_argument(
        "--cameras", default="", metavar="KEY,KEY", help="where the export names none: those of training"
    )
    serve.add_argument("--fps", type=float, default=None, help="of actions, told to clients; none: as the export says")
    with_robot(serve, "the first source with actions")
    serve.add_argument(
        "--clip-actions",
        choices=("minmax", "quantile"),
        default=None,
        help="keep actions between the data's min and max, or its q01 and q99; none: as the model says",
    )
    serve.add_argument(
        "--clip-margin", type=float, default=None, metavar="SHARE", help="of the range: widens it on both sides"
    )
    serve.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it is computed")
