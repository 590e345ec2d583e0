"""Jobs on a cluster: `submit` sends them to Slurm, `launch` is what a job starts on each node."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kairos_train.basics.errors import UserError
from kairos_train.basics.log import logger
from kairos_train.basics.secrets import redacted
from kairos_train.commands.output import Result, Table
from kairos_train.commands.parsing import command, count, with_overrides
from kairos_train.launch.prepare import split_words

if TYPE_CHECKING:
    from kairos_train.config.curriculum import Curriculum
    from kairos_train.config.schema import Config
    from kairos_train.launch.script import SlurmJob

PACKING = ("data.window", "data.clips", "data.prompt_template", "encoders", "cluster", "train")


def run_submit(args: argparse.Namespace) -> Result:
    args.overrides += [f"cluster.nodes={args.nodes}"] if args.nodes else []
    jobs, cluster = {"train": _train, "pack": _pack}.get(args.job, _one_command)(args)
    from kairos_train.launch import submit

    workdir, after = Path.cwd(), args.after
    scripts, sent = [], []
    for job in jobs:
        job_dir = submit.new_job_dir(cluster, job.name, workdir=workdir)
        where = {"workdir": workdir, "python": sys.executable}
        if args.print:
            needs = f"# after {after} has ended well\n" if after else ""
            scripts.append(f"{needs}# {job_dir / submit.SCRIPT}\n{submit.script_of(job, cluster, job_dir, **where)}")
            after = f"job {job.name}" if args.chain else after
            continue
        number = submit.submit(job, cluster, job_dir, **where, after=after)
        logger.info(f"job {number} {job.name}{f' after {after}' if after else ''}: {job_dir}")
        sent.append({"job": number, "name": job.name, "after": after, "folder": job_dir})
        after = number if args.chain else after
    if args.print:
        return Result({"scripts": scripts}, document="\n".join(scripts))
    columns = ("job", "name", "after", "folder")
    numbers = ",".join(str(job["job"]) for job in sent)
    table = Table([[job[column] for column in columns] for job in sent], columns)
    return Result(
        {"jobs": sent}, table, look={"scripts and logs": sent[0]["folder"]}, then=[f"squeue --jobs {numbers}"]
    )


def run_launch(args: argparse.Namespace) -> Result:
    from kairos_train.config.compose import load_config
    from kairos_train.launch.environment import derive
    from kairos_train.launch.node import run_node

    config = load_config(args.overrides, config_dirs=args.config_dir, sections=("cluster",))
    node = derive(os.environ, config.cluster, head=args.head, purpose="check" if args.check else "train")
    if args.check:
        words = ["healthcheck", "--device", config.train.device, "--dir", config.run_dir]
    else:
        where = [word for folder in args.config_dir for word in ("--config-dir", str(folder))]
        words = ["train", *where, *args.overrides, *node.overrides(config.train.deadline)]
    print(
        f"{node.name}: {words[0]}: node {node.node} of {node.nodes}, {node.processes} of {node.world} processes, "
        f"life {node.life}, until {node.deadline or 'they are done'}, code {Path(__file__).resolve().parents[2]}",
        flush=True,
    )
    rank = [sys.executable, "-m", "kairos_train.cli", *words]
    return Result(code=run_node(node, rank, logs=args.logs))


# --- the jobs ---


def _train(args: argparse.Namespace) -> tuple[list[SlurmJob], Any]:
    """A job for all stages, or with `--chain` one for each."""
    from kairos_train.config.curriculum import load_curriculum
    from kairos_train.launch.submit import check_world

    _unused(args, ("sources", "out", "arguments", "gpus"))
    curriculum = load_curriculum(args.overrides, config_dirs=args.config_dir)
    if args.chain and not curriculum.names:
        raise UserError("--chain: this experiment is one stage, not a list of them; submit it without --chain")
    for config in [curriculum.stages[i] for i in curriculum.walk]:
        check_world(config, config.cluster.nodes)
        if args.after is None:
            _check_shards(config, curriculum)
    if args.after is None:
        from kairos_train.training.curriculum import check_curriculum

        check_curriculum(curriculum)
    if not args.chain:
        return [_train_job(args, curriculum, curriculum.walk.start, [])], curriculum.stages[0].cluster
    rest = [text for text in args.overrides if not re.match(r"curriculum\.(first|last)\s*=", text)]
    jobs = []
    for i in curriculum.walk:
        name = curriculum.names[i]
        jobs.append(_train_job(args, curriculum, i, [f"curriculum.first={name}", f"curriculum.last={name}"], rest))
    return jobs, curriculum.stages[0].cluster


def _train_job(
    args: argparse.Namespace,
    curriculum: Curriculum,
    stage: int,
    walk: Sequence[str],
    overrides: Sequence[str] | None = None,
) -> SlurmJob:
    from kairos_train.launch.script import SlurmJob

    config = curriculum.stages[stage]
    cluster = config.cluster
    words = [*(args.overrides if overrides is None else overrides), *walk]
    where = [word for folder in args.config_dir for word in ("--config-dir", str(folder.absolute()))]
    name = config.stage.name if not curriculum.names else curriculum.names[stage] if walk else "all"
    return SlurmJob(
        kind="train",
        name=_job_name(config.experiment, name),
        nodes=cluster.nodes,
        gpus=0 if config.train.device == "cpu" else cluster.gpus_per_node,
        cpus=cluster.cpus_per_gpu * cluster.gpus_per_node,
        places={"overrides": shlex.join([*where, *words])},
    )


def _check_shards(config: Config, curriculum: Curriculum) -> None:
    """What is trained on is there; nobody makes it once the job runs."""
    made = [split_words(line, "prepare") for line in curriculum.prepare]
    outs = [words[words.index("--out") + 1] for words in made if "--out" in words[:-1]]
    if missing := [out for out in outs if not Path(out).expanduser().exists()]:
        raise UserError(
            f"prepare: {missing[0]} is still to be made; run `kairos-train data prepare` with these settings"
        )
    data = config.data
    for folder in filter(None, [*([s.shards for s in data.sources] or [data.shards]), data.validation_shards]):
        if "://" not in folder and not (Path(folder) / "index.json").is_file():
            raise UserError(
                f"{folder}: no packed shards are there; pack them first, or name the job that does with --after ID"
            )


def _pack(args: argparse.Namespace) -> tuple[list[SlurmJob], Any]:
    """An array with a task for each source of a list."""
    from kairos_train.config.compose import load_config
    from kairos_train.launch.script import SlurmJob

    _unused(args, ("chain", "nodes"))
    if args.sources is None or args.out is None:
        raise UserError("--job pack needs --sources FILE, a list with a source per line, and --out DIR for the shards")
    config = load_config(args.overrides, config_dirs=args.config_dir, sections=PACKING)
    if not args.sources.is_file():
        raise UserError(f"--sources {args.sources}: no such file; write one with a source per line")
    lines = [line.strip() for line in args.sources.read_text(encoding="utf-8").splitlines()]
    sources = [line for line in lines if line and not line.startswith("#")]
    outs = [
        str(args.out / re.sub(r"(?<=.)\.\w+$", "", re.split("[/\\\\]", redacted(s).rstrip("/"))[-1])) for s in sources
    ]
    if not sources:
        raise UserError(f"--sources {args.sources}: holds no source; write one per line")
    if twice := [out for out in outs if outs.count(out) > 1]:
        raise UserError(f"--sources {args.sources}: two sources would be packed into {twice[0]}; rename one of them")
    if gone := [s for s in sources if args.after is None and "://" not in s and not Path(s).expanduser().exists()]:
        raise UserError(f"--sources {args.sources}: {gone[0]} does not exist; fix the line")
    where = [word for folder in args.config_dir for word in ("--config-dir", str(folder.absolute()))]
    words = [*split_words(args.arguments or "", "--arguments"), *where, *args.overrides]
    _check_words(args, "data", "pack", [sources[0], "--out", outs[0], *words])
    gpus = _gpus(args, config, 1 if "--encode" in words else 0)
    job = SlurmJob(
        kind="pack",
        name=_job_name("pack", args.sources.stem),
        nodes=1,
        gpus=gpus,
        cpus=config.cluster.cpus_per_gpu * max(1, gpus),
        places={"array": f"0-{len(sources) - 1}", "words": shlex.join(words)},
        files={"sources": "\n".join(sources) + "\n", "outs": "\n".join(outs) + "\n"},
    )
    return [job], config.cluster


def _one_command(args: argparse.Namespace) -> tuple[list[SlurmJob], Any]:
    """Export or evaluation: one of the commands of the same name on one node."""
    from kairos_train.config.compose import load_config
    from kairos_train.launch.script import SlurmJob

    _unused(args, ("chain", "nodes", "sources", "out"))
    if not args.arguments:
        raise UserError(f"--job {args.job} needs --arguments 'WORDS', those behind `kairos-train {args.job}`")
    config = load_config(args.overrides, config_dirs=args.config_dir, sections=("cluster", "train"))
    words = split_words(args.arguments, "--arguments")
    _check_words(args, args.job, None, words)
    gpus = _gpus(args, config, 1 if args.job == "evaluate" else 0)
    job = SlurmJob(
        kind=args.job,
        name=_job_name(args.job, Path(words[0]).name),
        nodes=1,
        gpus=gpus,
        cpus=config.cluster.cpus_per_gpu * max(1, gpus),
        places={"words": shlex.join(words)},
    )
    return [job], config.cluster


def _gpus(args: argparse.Namespace, config: Config, default: int) -> int:
    if args.gpus is None:
        return 0 if config.train.device == "cpu" else default
    if args.gpus > config.cluster.gpus_per_node:
        raise UserError(f"--gpus {args.gpus} is above cluster.gpus_per_node={config.cluster.gpus_per_node}; lower it")
    return args.gpus


def _unused(args: argparse.Namespace, names: Sequence[str]) -> None:
    for name in names:
        if getattr(args, name) not in (None, False):
            raise UserError(f"--{name} means nothing for --job {args.job}; leave it away")


def _check_words(args: argparse.Namespace, name: str, below: str | None, words: Sequence[str]) -> None:
    """Raise UserError when a command would not take these words."""
    parser = args.parsers[name]
    if below is not None:
        parser = next(action.choices for action in parser._actions if isinstance(action.choices, dict))[below]
    _, extra = parser.parse_known_args(list(words))
    if options := [word for word in extra if word.startswith("-")]:
        raise UserError(f"--arguments: {parser.prog} has no {options[0]!r}; see {parser.prog} --help")


def _job_name(*parts: str) -> str:
    return re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip("-")


def add(commands: Any) -> None:
    """Add the subcommands."""
    submit = command(commands, "submit", run_submit, "send a job to Slurm, once everything about it has been checked")
    submit.set_defaults(parsers=commands.choices)
    submit.add_argument("--job", choices=("train", "pack", "export", "evaluate"), default="train", help="what it does")
    submit.add_argument("--print", action="store_true", help="show the script, submit nothing")
    submit.add_argument("--nodes", type=count, default=None, metavar="N", help="of training; none: cluster.nodes")
    submit.add_argument("--chain", action="store_true", help="a curriculum: one job per stage, each after the last")
    submit.add_argument("--after", default=None, metavar="ID", help="start when this job has ended well")
    submit.add_argument("--sources", type=Path, default=None, metavar="FILE", help="pack: a list, a source per line")
    submit.add_argument("--out", type=Path, default=None, metavar="DIR", help="pack: the folder of their folders")
    submit.add_argument("--arguments", default=None, metavar="'WORDS'", help="pack, export, evaluate: of that command")
    submit.add_argument("--gpus", type=int, default=None, metavar="N", help="pack, evaluate; none: what they can use")
    with_overrides(submit)

    launch = command(commands, "launch", run_launch, "in a job, under srun: start this node's part of a training")
    launch.add_argument("--logs", type=Path, required=True, metavar="DIR", help="of this life of the job")
    launch.add_argument("--check", action="store_true", help="start the health check in the place of the training")
    launch.add_argument("--head", default=None, metavar="HOST", help="node 0; none: the first of the job's node list")
    with_overrides(launch)
