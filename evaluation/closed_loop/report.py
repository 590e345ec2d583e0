"""What came of all episodes: counts with intervals, `closed_loop.json`, a table, a bar chart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from evaluation.closed_loop.episode import Episode, EpisodeOutcome
from evaluation.intervals import wilson
from evaluation.pictures import save_figure
from kairos_train.basics.files import write_json

JSON_FILE, CHART_FILE = "closed_loop.json", "closed_loop.png"


def summarise(
    played: Iterable[tuple[Episode, EpisodeOutcome]], *, policies: Sequence[str], tasks: Sequence[str]
) -> dict[str, Any]:
    """The `policies` of closed_loop.json: by policy the counts of each task and of all, and every episode.

    Args:
        played: every episode with its outcome, in any order.
        policies, tasks: in the order of the result.
    """
    by_policy: dict[str, list[tuple[Episode, EpisodeOutcome]]] = {name: [] for name in policies}
    for episode, outcome in played:
        by_policy[episode.policy].append((episode, outcome))
    result = {}
    for name, pairs in by_policy.items():
        pairs.sort(key=lambda pair: (tasks.index(pair[0].task), pair[0].seed))
        result[name] = {
            "tasks": {task: _counts([o for e, o in pairs if e.task == task]) for task in tasks},
            "all": _counts([outcome for _, outcome in pairs]),
            "episodes": [
                {
                    "task": episode.task,
                    "seed": episode.seed,
                    "success": outcome.success,
                    "steps": outcome.steps,
                    "error": outcome.error,
                }
                for episode, outcome in pairs
            ],
        }
    return result


def _counts(outcomes: Sequence[EpisodeOutcome]) -> dict[str, Any]:
    successes, count = sum(outcome.success for outcome in outcomes), len(outcomes)
    return {
        "successes": successes,
        "episodes": count,
        "rate": successes / count,
        "interval95": list(wilson(successes, count)),
    }


def format_table(result: Mapping[str, Any]) -> str:
    """The result as a plain-text table: successes of each policy in each task, rate and interval of all."""
    tasks = list(next(iter(result["policies"].values()))["tasks"])
    heads = [f"{task[:18]:>20}" for task in tasks]
    lines = [
        f"{result['env']}: {result['episodes_per_task']} episodes a task, seeds from {result['seed_start']}, at most"
        f" {result['max_steps']} steps, replanning every {result['replan_every']}",
        f"{'':8}{''.join(heads)}{'all':>12}{'rate':>8}   95 % interval",
    ]
    for name, found in result["policies"].items():
        cells = [f"{_fraction(found['tasks'][task]):>20}" for task in tasks]
        low, high = found["all"]["interval95"]
        crashed = sum(episode["error"] is not None for episode in found["episodes"])
        lines.append(
            f"{name:8}{''.join(cells)}{_fraction(found['all']):>12}{found['all']['rate']:>8.2f}"
            f"   [{low:.2f}, {high:.2f}]{f'   {crashed} crashed' if crashed else ''}"
        )
    return "\n".join(lines)


def write(out: Path, result: Mapping[str, Any]) -> None:
    """Write closed_loop.json and closed_loop.png into the folder, each whole or not at all."""
    save_figure(_chart(result), out / CHART_FILE)
    write_json(out / JSON_FILE, result, sort_keys=False)


def _chart(result: Mapping[str, Any]) -> Figure:
    """Bars of the success rates, grouped by task and for all of them, with their intervals."""
    found = result["policies"]
    groups = [*next(iter(found.values()))["tasks"], "all"]
    width = 0.8 / len(found)
    figure = Figure(figsize=(2.2 + 1.1 * len(groups) * max(len(found) / 3, 1), 4), layout="constrained")
    axis = figure.subplots()
    for position, (name, of) in enumerate(found.items()):
        counts = [of["all"] if group == "all" else of["tasks"][group] for group in groups]
        rates = [count["rate"] for count in counts]
        errors = [
            [rate - count["interval95"][0] for rate, count in zip(rates, counts)],
            [count["interval95"][1] - rate for rate, count in zip(rates, counts)],
        ]
        places = [number + (position - (len(found) - 1) / 2) * width for number in range(len(groups))]
        axis.bar(places, rates, width, yerr=errors, capsize=2, label=name)
    axis.set_xticks(range(len(groups)), groups, fontsize=8)
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("success rate, 95 % interval")
    axis.set_title(f"{result['env']}, {result['episodes_per_task']} episodes a task", fontsize=9)
    axis.legend(fontsize=8, ncols=len(found), loc="lower center", bbox_to_anchor=(0.5, 1.08))
    return figure


def _fraction(counts: Mapping[str, Any]) -> str:
    return f"{counts['successes']}/{counts['episodes']}"
