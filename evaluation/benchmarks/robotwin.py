"""RoboTwin 2.0: the policy's folder for its evaluation script, and the script's results.

Formats as in github.com/RoboTwin-Platform/RoboTwin: script/eval_policy.py (100 episodes of expert-solvable seeds from
100000·(1 + seed) on, `eval_result/<task>/<policy>/<config>/<setting>/<time>/_result.txt`, whose last line is the rate),
policy/Your_Policy (the files of a policy), envs/ (the 50 tasks).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.benchmarks.interface import listed, read_text
from evaluation.benchmarks.scores import counted
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import sha256_of, write_json, write_whole

CONFIGS = ("demo_clean", "demo_randomized")
EPISODES = 100  # test_num of the script
TASKS = (
    *("adjust_bottle", "beat_block_hammer", "blocks_ranking_rgb", "blocks_ranking_size", "click_alarmclock"),
    *("click_bell", "dump_bin_bigbin", "grab_roller", "handover_block", "handover_mic", "hanging_mug", "lift_pot"),
    *("move_can_pot", "move_pillbottle_pad", "move_playingcard_away", "move_stapler_pad", "open_laptop"),
    *("open_microwave", "pick_diverse_bottles", "pick_dual_bottles", "place_a2b_left", "place_a2b_right"),
    *("place_bread_basket", "place_bread_skillet", "place_burger_fries", "place_can_basket", "place_cans_plasticbox"),
    *("place_container_plate", "place_dual_shoes", "place_empty_cup", "place_fan", "place_mouse_pad"),
    *("place_object_basket", "place_object_scale", "place_object_stand", "place_phone_stand", "place_shoe"),
    *("press_stapler", "put_bottles_dustbin", "put_object_cabinet", "rotate_qrcode", "scan_object", "shake_bottle"),
    *("shake_bottle_horizontally", "stack_blocks_three", "stack_blocks_two", "stack_bowls_three", "stack_bowls_two"),
    *("stamp_seal", "turn_switch"),
)

_INIT = "from evaluation.benchmarks.robotwin_policy import eval, get_model, reset_model  # noqa: F401\n"
_EVALUATE = """#!/bin/bash
# Every task in both settings, 100 episodes each; run in RoboTwin's folder. What has a result is left out.
# PYTHONPATH must hold the kairos-train checkout; the policy server must be up.
set -euo pipefail
for config in {configs}; do
  for task in {tasks}; do
    if compgen -G "eval_result/$task/{name}/$config/{setting}/*/_result.txt" > /dev/null; then continue; fi
    python script/eval_policy.py --config policy/{name}/deploy_policy.yml --overrides \\
      --task_name "$task" --task_config "$config" --ckpt_setting {setting} --seed {seed} --policy_name {name}
  done
done
"""


def write_policy(
    out: Path, *, url: str, setting: str, seed: int = 0, replan_steps: int | None = None, cameras: str = ""
) -> dict[str, Any]:
    """Write a policy's folder: __init__.py, deploy_policy.yml and evaluate.sh.

    Args:
        out: RoboTwin's policy/NAME; NAME is what the script imports.
        url: of the policy server.
        setting: what the result folders are called (the script's ckpt_setting); one per set of weights.
        seed: of the script: episodes begin at 100000·(1 + seed).
        replan_steps, cameras: see `robotwin_policy.get_model`.

    Raises:
        UserError: a name that cannot be imported, or a setting that cannot be a folder.
    """
    name = out.absolute().name
    if not name.isidentifier():
        raise UserError(f"out={out}: the script imports {name!r}; name the folder with letters, digits and underscores")
    if not setting.replace("-", "_").replace(".", "_").isidentifier():
        raise UserError(f"setting={setting!r}: becomes a folder's name; use letters, digits, dots, - and _")
    settings = {
        **{"policy_name": name, "task_name": None, "task_config": None, "ckpt_setting": setting, "seed": seed},
        **{"instruction_type": "unseen", "policy_url": url, "policy_token_file": None},
        **{"replan_steps": replan_steps, "cameras": cameras or None},
    }
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items())  # JSON values are YAML
    script = _EVALUATE.format(configs=" ".join(CONFIGS), tasks=" ".join(TASKS), name=name, setting=setting, seed=seed)
    files = {"__init__.py": _INIT, "deploy_policy.yml": lines, "evaluate.sh": script}
    out.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        write_whole(out / file, content)
    return {"policy": name, "files": [str(out / file) for file in files]}


def check_robotwin(results: Path, *, policy: str, setting: str, configs: Sequence[str] = CONFIGS) -> dict[str, Any]:
    """Which of the tasks have no result, or several, under each configuration.

    Args:
        results: RoboTwin's eval_result.
        policy, setting: as `write_policy` named them.
        configs: declared beforehand; a set without one of them is another benchmark.

    Raises:
        UserError: no such folder.
    """
    cells = _cells(results, policy, setting, configs)
    missing = [f"{config}/{task}" for (config, task), files in cells.items() if not files]
    several = {f"{config}/{task}": [str(f) for f in files] for (config, task), files in cells.items() if len(files) > 1}
    told = {"benchmark": "robotwin", "expected": len(cells), "missing": missing, "several": several}
    return {"complete": not missing and not several, **told}


def import_robotwin(
    results: Path, *, policy: str, setting: str, out: Path, configs: Sequence[str] = CONFIGS
) -> dict[str, Any]:
    """Success by task and in total, each configuration for itself.

    Two results of one task are refused: runs of one seed are copies of each other, and which one counts is not ours to
    choose.

    Args:
        out: JSON to write; the others as for `check_robotwin`.

    Returns:
        The content of `out`.

    Raises:
        UserError: an incomplete or doubled set, or a file that is no result.
    """
    report = check_robotwin(results, policy=policy, setting=setting, configs=configs)
    if not report["complete"]:
        doubled = list(report["several"])
        raise UserError(
            f"{results}: of {report['expected']} results {len(report['missing'])} are missing"
            f" ({listed(report['missing'])}) and {len(doubled)} there several times ({listed(doubled)}); finish the"
            " set, leave one of each"
        )
    cells = {cell: files[0] for cell, files in _cells(results, policy, setting, configs).items()}
    won = {cell: _successes(path) for cell, path in cells.items()}
    scores = {
        config: {
            "total": counted(sum(won[config, task] for task in TASKS), EPISODES * len(TASKS)),
            **{task: counted(won[config, task], EPISODES) for task in TASKS},
        }
        for config in configs
    }
    content = {
        **{"benchmark": "robotwin", "complete": True, "policy": policy, "setting": setting},
        "sources": [{"file": str(path), "sha256": sha256_of(path)} for path in cells.values()],
        "scores": scores,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, content, sort_keys=False)
    return content


def _cells(results: Path, policy: str, setting: str, configs: Sequence[str]) -> dict[tuple[str, str], list[Path]]:
    """(configuration, task) -> result files."""
    if not results.is_dir():
        raise UserError(f"{results}: is no folder; give RoboTwin's eval_result")
    return {
        (config, task): sorted((results / task / policy / config / setting).glob("*/_result.txt"))
        for config in configs
        for task in TASKS
    }


def _successes(path: Path) -> int:
    """Of 100 episodes."""
    lines = read_text(path, "a _result.txt of RoboTwin").split()
    try:
        rate = float(lines[-1])
        count = round(rate * EPISODES)
    except (ValueError, OverflowError, IndexError):
        rate = count = -1
    if not 0 <= count <= EPISODES or abs(rate * EPISODES - count) > 1e-6:
        raise UserError(f"{path}: ends with no rate of {EPISODES} episodes; run this task again")
    return count
