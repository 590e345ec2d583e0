"""The small video codec: `codec train`, `codec evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kairos_train.basics.log import logger
from kairos_train.commands.output import Result, Table
from kairos_train.commands.parsing import command, count, group
from kairos_train.config.codec_recipe import CodecRecipe


def run_codec_train(args: argparse.Namespace) -> Result:
    from kairos_train.training.codec import train_codec

    names = ("steps", "batch", "crop", "lr", "seed", "workers")
    recipe = CodecRecipe(**{name: getattr(args, name) for name in names})
    about = train_codec(args.shards, args.out, recipe, say=logger.info)
    weights = args.out / "model.safetensors"
    return Result(
        about,
        look={"weights": weights},
        then=[
            f"kairos-train codec evaluate UNSEEN_SHARDS --weights {weights}",
            f"kairos-train data pack DATASET --out NEW --encode encoders=tiny_vae encoders.video.path={weights}",
        ],
    )


def run_codec_evaluate(args: argparse.Namespace) -> Result:
    from evaluation.codec import reconstruction
    from kairos_train.conditioning.block_dct import BlockDCT
    from kairos_train.conditioning.tiny_vae import TinyVAE

    codecs = {"block_dct": BlockDCT(), "tiny_vae": TinyVAE(args.weights)}
    found = {
        str(folder): {name: reconstruction(codec, folder, windows=args.windows) for name, codec in codecs.items()}
        for folder in args.shards
    }
    rows = [
        (folder, name, entry["windows"], entry["db"], entry["moving_db"])
        for folder, entries in found.items()
        for name, entry in entries.items()
    ]
    return Result(found, Table(rows, ("shards", "codec", "windows", "dB", "dB, moving pixels")))


def add(commands: Any) -> None:
    """Add the subcommands."""
    codec = group(commands, "codec", "the small learned video codec, for demos on a CPU")
    train = command(codec, "train", run_codec_train, "train it on packed windows; repeat the command to go on")
    train.add_argument("shards", nargs="+", type=Path, metavar="SHARDS", help="folders of windows")
    train.add_argument("--out", type=Path, required=True, help="new folder for model.safetensors and codec.json")
    recipe = CodecRecipe()
    train.add_argument("--steps", type=count, default=recipe.steps, help="optimiser steps")
    train.add_argument("--batch", type=count, default=recipe.batch, help="crops per step, of all folders together")
    train.add_argument("--crop", type=count, default=recipe.crop, help="height and width of a crop, a multiple of 8")
    train.add_argument("--lr", type=float, default=recipe.lr, help="highest learning rate")
    train.add_argument("--seed", type=int, default=recipe.seed, help="of weights, order and crops")
    train.add_argument("--workers", type=count, default=recipe.workers, help="loader processes per folder")

    evaluate = command(codec, "evaluate", run_codec_evaluate, "PSNR of reconstructions, beside the block DCT")
    evaluate.add_argument("shards", nargs="+", type=Path, metavar="SHARDS", help="folders of windows")
    evaluate.add_argument("--weights", type=Path, required=True, help="model.safetensors of `codec train`")
    evaluate.add_argument("--windows", type=count, default=64, help="of each folder")
