"""An evaluation folder as one HTML page that needs nothing beside it: pictures are inside, there is no script.

`write_page` may be called again whenever something is added to the folder, such as a `closed_loop.json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.plots import LABELS, OPEN_LOOP_ROWS, STREAMS, VIDEO_ROWS
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import read_json, write_whole
from kairos_train.basics.format import number
from kairos_train.basics.pages import Html, element, image, note, page, table

FORMAT = "kairos-evaluation-1"
EVALUATION, CLOSED_LOOP, PAGE = "evaluation.json", "closed_loop.json", "report.html"

STYLE = """
td, th { text-align: right; } td:first-child, th:first-child { text-align: left; } .other { background: #fdf0d5; }
"""

NOTES = {
    "open_loop": "Error of sampled action chunks against the recorded ones, with 95 % intervals over episodes. blind: "
    "the same model with grey pictures and the mean state; mean: the dataset's mean action; hold: the action 0. It "
    "says how well recorded actions are imitated, not how often a task succeeds.",
    "losses": "The training's own loss on held-out windows with fixed noise, by noise level σ; in brackets how many "
    "noises fell there.",
    "video": "Rollouts, chunk after chunk, beside what was recorded. copy: the last given frame, standing still; "
    "encoder: the recording through the video encoder and back, the best that the model's latents could show.",
    "memory": "Effective horizon of a head: latent frames until the product of its measured decays falls to 1/e, "
    "median and quantiles over windows. Bound: what is left at most of a difference between two states "
    "after one window, as a power of ten (0: all of it); norm: the same once keys that overwrite one another count.",
    "closed_loop": "Episodes that succeeded of those that were played, with 95 % Wilson intervals.",
}


def write_page(folder: Path) -> Path:
    """Write `report.html` of an evaluation folder; returns its path.

    Raises:
        UserError: the folder holds neither `evaluation.json` nor `closed_loop.json`, or one that cannot be read.
    """
    folder = Path(folder)
    found = read(folder)
    title = f"Evaluation of {found.get('experiment') or folder.name}"
    sections = [element("h1", title), _facts(found)]
    for part, show in SECTIONS.items():
        if part in found["parts"]:
            sections += [heading(part), show(found["parts"][part], folder)]
    if left_out := found.get("left_out"):
        sections += [element("h2", "Left out"), table([["part", "why"], *([k, v] for k, v in left_out.items())])]
    write_html(folder / PAGE, title, sections)
    return folder / PAGE


def read(folder: Path) -> dict[str, Any]:
    """What a folder holds: the content of evaluation.json, with that of closed_loop.json among its "parts".

    Raises:
        UserError: it holds neither, or one that cannot be read.
    """
    found: dict[str, Any] = {"parts": {}}
    if not any((folder / name).is_file() for name in (EVALUATION, CLOSED_LOOP)):
        raise UserError(f"{folder}: holds no {EVALUATION} and no {CLOSED_LOOP}; write one with `kairos-train evaluate`")
    if (folder / EVALUATION).is_file():
        found = read_json(folder / EVALUATION, remedy="evaluate again")
        if found.get("format") != FORMAT:
            raise UserError(f"{folder / EVALUATION}: format is {found.get('format')!r}, not {FORMAT!r}; evaluate again")
    if (folder / CLOSED_LOOP).is_file():
        played = read_json(folder / CLOSED_LOOP, remedy="evaluate again")
        if not isinstance(played.get("policies"), dict):
            raise UserError(f"{folder / CLOSED_LOOP}: has no policies; play the episodes again")
        found["parts"]["closed_loop"] = played
    return found


# --- pieces of a page ---


def heading(part: str) -> Html:
    """The heading of a part, and what its numbers mean."""
    return element("h2", part.replace("_", " ").capitalize(), attributes=f'id="{part}"') + note(NOTES[part])


def ordered(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The entries of `values` that `names` has, in its order: JSON files are sorted by name."""
    return {name: values[name] for name in names if name in values}


def write_html(path: Path, title: str, sections: Sequence[str]) -> None:
    """Write a page through a temporary name."""
    write_whole(path, page(title, sections, style=STYLE))


# --- the parts ---


def _facts(found: Mapping[str, Any]) -> Html:
    if "model" not in found:
        return Html()
    model, shards = found["model"], found["shards"]
    rows = [
        ["", ""],
        ["weights", f"{found['model_name']}, {model['weights']} of step {model['step']}, {model['dtype']}"],
        ["export's fingerprint", str(model["fingerprint"])[:16]],
        ["held-out shards", f"{shards['dataset'] or 'unnamed'}, {shards['samples']} windows, {shards['fingerprint']}"],
        ["seed", str(found["seed"])],
    ]
    return table(rows)


def _open_loop(part: Mapping[str, Any], folder: Path) -> Html:
    rows = [["", "MSE", "±", "MAE", "MSE raw", "MAE raw"]]
    for name, row in ordered(part["rows"], OPEN_LOOP_ROWS).items():
        rows.append([name, *(row[key] for key in ("mse", "mse_ci95", "mae", "mse_raw", "mae_raw"))])
    about = f"{part['windows']} windows of {part['episodes']} episodes, {part['steps']} sampling steps"
    return element("p", about) + table(rows) + _file(folder, "open_loop.png", "error at each step of the chunk")


def _losses(part: Mapping[str, Any], folder: Path) -> Html:
    bins = next(iter(part["streams"].values()))["bins"]
    rows = [["", "loss", "±", *(f"σ {b['sigma'][0]:.1f}–{b['sigma'][1]:.1f}" for b in bins)]]
    for stream, values in ordered(part["streams"], STREAMS).items():
        datasets = values["datasets"] if len(values["datasets"]) > 1 else {}
        for name, row in ({stream: values} | {f"{stream}, {name}": v for name, v in datasets.items()}).items():
            cells = [f"{number(b['loss'])} ({b['draws']})" for b in row["bins"]]
            rows.append([name, row["loss"], row["ci95"], *cells])
    about = f"{part['windows']} windows, noises of each: {part['draws']}, weighting: {part['weighting']}. "
    about += f"Weighted sum of the streams: {part['total']:.4g}"
    return element("p", about) + table(rows) + _file(folder, "losses.png", "loss by noise level")


def _video(part: Mapping[str, Any], folder: Path) -> Html:
    names, settings = list(ordered(part["metrics"], LABELS)), part["settings"]
    rows = [["chunk", "frames ahead", "videos", *(f"{name.upper()} {row}" for name in names for row in VIDEO_ROWS)]]
    for i, chunk in enumerate(part["chunks"], 1):
        cells = [chunk[name][row] for name in names for row in VIDEO_ROWS]
        rows.append([i, "{}–{}".format(*chunk["frames"]), chunk["videos"], *cells])
    about = (
        f"{len(part['videos'])} rollouts of {settings['chunks']} chunks, {part['steps']} steps, guidance "
        f"{part['guidance']:g}, {'carried' if settings['carried'] else 'sliding'} history (K = {settings['history']} "
        f"latent frames). Frames ahead at which the mean PSNR is above the copy's: {part['beats_copy_frames']}."
    )
    found = element("p", about) + table(rows) + _file(folder, "video_drift.png", "closeness against horizon")
    if fvd := part["fvd"]:
        found += table([["", *VIDEO_ROWS], [f"FVD of {fvd['clips']} clips", *(fvd[row] for row in VIDEO_ROWS)]])
    for name in part.get("pictures", ()):
        found += _file(folder, name, "a rollout beside its recording")
    return found


def _memory(part: Mapping[str, Any], folder: Path) -> Html:
    second = part["seconds_per_frame"]
    heads = ["layer, head", "horizon, frames", "5 %–95 %", "in seconds", "per token, 5 %–95 %"]
    rows = [[*heads, "log10 bound", "log10 norm"]]
    for layer in part["layers"]:
        for head, values in enumerate(layer["heads"]):
            spans = [values["horizon_frames"], values["token_horizon_frames"]]
            whole, token = (f"{number(s['q05'])}–{number(s['q95'])}" for s in spans)
            middle = spans[0]["median"]
            bounds = [values["log10_bound"]["median"], values["log10_norm"]["median"]]
            rows.append([f"{layer['layer']}, {head}", middle, whole, middle * second, token, *bounds])
    about = f"{part['windows']} windows of {part['frames']} latent frames, {part['tokens_per_frame']} tokens each"
    details = element("details", element("summary", "every head"), table(rows))
    return element("p", about) + _file(folder, "memory.png", "effective horizons of the GATED heads") + details


def _closed_loop(part: Mapping[str, Any], folder: Path) -> Html:
    tasks = list(dict.fromkeys(task for policy in part["policies"].values() for task in policy["tasks"]))
    rows = [["policy", *tasks, "all"]]
    for name, policy in part["policies"].items():
        rows.append([name, *(successes(policy["tasks"].get(task)) for task in tasks), successes(policy["all"])])
    about = f"{part.get('env')}, {part.get('episodes_per_task')} episodes a task, seeds from {part.get('seed_start')}"
    return element("p", about) + table(rows) + _file(folder, "closed_loop.png", "success rates")


def successes(row: Mapping[str, Any] | None) -> str:
    """k/n [low, high] of a closed-loop entry."""
    if row is None:
        return "–"
    low, high = row["interval95"]
    return f"{row['successes']}/{row['episodes']} [{low:.2f}, {high:.2f}]"


SECTIONS = {
    "closed_loop": _closed_loop,
    "open_loop": _open_loop,
    "losses": _losses,
    "video": _video,
    "memory": _memory,
}
"""What shows a part, in the page's order: what matters most stands first."""


def _file(folder: Path, name: str, about: str) -> Html:
    """A picture of the folder; nothing where it has none of that name."""
    if Path(name).name != name:
        raise UserError(f"{folder / EVALUATION}: the picture {name!r} is not a file of this folder; evaluate again")
    return image((folder / name).read_bytes(), about) if (folder / name).is_file() else Html()
