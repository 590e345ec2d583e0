"""A LeRobot dataset as a source: every window of every episode, once. A unit is an episode.

One dataset is one embodiment: states and actions have one size throughout. Several embodiments are several shard
folders, each with its own index and statistics; the loader mixes them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.consistency.numbers import refuse_lost_steps
from dataloaders.consistency.report import Contradiction, refuse
from dataloaders.consistency.tables import check_picture_size
from dataloaders.lerobot.episode import DatasetEpisode
from dataloaders.lerobot.layout import INFO_PATH
from dataloaders.lerobot.reader import LeRobotDataset
from dataloaders.lerobot.splits import choose_episodes
from dataloaders.lerobot.vectors import columns_of, read_modality, read_vector, stillness
from dataloaders.sources.base import Clip, SourceSettings, Unit
from dataloaders.sources.rows import check_text, plain_name, read_captions, row_of
from dataloaders.windows import (
    Window,
    camera_places,
    check_dimensions,
    check_window,
    choose_cameras,
    compose,
    cover,
    cut_actions,
    frame_indices,
    windows_of_runs,
)
from kairos_train.basics.errors import UserError
from kairos_train.basics.foreign_files import shown

FRAME_CHUNK = 256  # raw frames decoded at once
INSTRUCTION = "instruction"  # the variant that the task gives
_CAPTION, _SCORE = re.compile(r"caption_([a-z][a-z0-9]*)"), re.compile(r"score_([a-z][a-z0-9]*)")


class LeRobotSource:
    """Windows of a LeRobot dataset; see `Source`.

    Captions: the task in the prompt template is the variant `instruction`. Values of the table of episodes that are
    called `caption_NAME` and `score_NAME` (as strings and numbers) are further variants and scores, as is what the file
    of `settings.captions` says.

    Raises:
        UserError: no dataset, a setting that does not fit it, no episodes.
    """

    def __init__(self, root: Path, settings: SourceSettings) -> None:
        window = settings.window
        check_window(window)
        if "{task}" not in settings.prompt_template:
            raise UserError(
                f"data.prompt_template={settings.prompt_template!r}: must contain {{task}}, where the instruction goes"
            )
        self._root, self._window, self._template = root, window, settings.prompt_template
        self._limits = settings.limits
        self._dataset = LeRobotDataset(
            root, believe=settings.believe, tolerance=settings.timestamp_tolerance, limits=settings.limits
        )
        modality = read_modality(root)
        self._parts: dict[str, list[tuple]] = {}
        for setting in ("state_key", "action_key"):
            key = getattr(window, setting)
            try:
                self._parts[setting] = columns_of(key, self._dataset.features, modality) if key else []
            except UserError as error:
                raise UserError(f"data.window.{setting}={key!r}: {root}: {error}") from error
        if bool(self._parts["state_key"]) != bool(self._parts["action_key"]):
            raise UserError(
                f"data.window.state_key={window.state_key!r} and action_key={window.action_key!r}: name both, or give "
                "'' for both to pack videos without a robot"
            )
        if self._dataset.num_episodes < 1:
            raise UserError(f"{root}: has no episodes; there is nothing to pack")
        outline = self._dataset.outline()
        self._episodes, self._notes = choose_episodes(root, [e[0] for e in outline], settings.only_episodes)
        self._outline = [outline[i] for i in self._episodes]
        # Depth is taken where it is named: beside pictures nobody expects it.
        unasked = [] if window.cameras else self._dataset.depth_keys
        available = [key for key in self._dataset.camera_keys if key not in unasked]
        if unasked and not available:
            raise UserError(f"{root}: its cameras hold depth ({', '.join(unasked)}); name them in data.window.cameras")
        self._cameras = choose_cameras(window, available)
        self._check_places()
        if unasked:
            left_out = ", ".join(unasked)
            self._notes.append(f"depth is packed only where data.window.cameras names it: left out {left_out}")
        self._captions = read_captions(settings.captions, settings.limits) if settings.captions else {}
        self.contradictions = [*self._dataset.contradictions, *self._check_captions()]
        refuse(self.contradictions, root)
        self.files = self._dataset.files(self._cameras)
        trust = {"believe": asdict(settings.believe), "timestamp_tolerance": settings.timestamp_tolerance}
        self._identity = self._dataset.content() | {"parts": str(self._parts), **trust}
        self.name = plain_name(root.resolve().name)
        self.units, self.sizes_differ, self.fps = len(self._episodes), False, self._dataset.fps

    @property
    def identity(self) -> dict[str, Any]:
        """What the dataset's tables say, and how they are read."""
        digest = hashlib.sha256((self._root / INFO_PATH).read_bytes())
        digest.update(json.dumps([self._outline, self._identity], sort_keys=True).encode())
        captions = {str(number): asdict(row) for number, row in self._captions.items()}
        return {"kind": "lerobot", "sha256": digest.hexdigest(), "captions": captions}

    def describe(self) -> dict[str, Any]:
        dataset, extra = self._dataset, {}
        for _, _, _, values in dataset.outline():
            extra |= values
        strange = [name for name, value in extra.items() if _unusable(name, value)]
        return {
            "dataset": self.name,
            "version": dataset.version,
            "robot_type": dataset.robot_type,
            "cameras": list(self._cameras),
        } | ({"columns_left_out": sorted(strange)} if strange else {})

    def notes(self, statistics: Mapping[str, Any]) -> list[str]:
        return [*self._notes, *filter(None, (self._still(statistics, group) for group in ("action", "state")))]

    def _still(self, statistics: Mapping[str, Any], group: str) -> str | None:
        key, parts = getattr(self._window, f"{group}_key"), self._parts[f"{group}_key"]
        if not parts:
            return None
        fields = statistics[group][key]
        bounds = fields["global_min"], fields["global_max"]
        return stillness(group, *bounds, parts=parts, features=self._dataset.features, window=self._window)

    def unit(self, number: int) -> Unit:
        episode = self._dataset.examine(self._episodes[number])
        found = [*episode.contradictions, *(c for key in self._cameras for c in episode.check_pictures(key))]
        refuse(found, self._root)
        where = f"{self._root}: episode {episode.index}"
        numbers = None
        if self._parts["state_key"]:
            state, actions = (
                read_vector(episode.columns, episode.length, self._parts[setting], where)
                for setting in ("state_key", "action_key")
            )
            check_dimensions(self._window, actions.shape[1], state.shape[1])
            numbers = (state, actions)
            self._check_float32(state, actions, where)
        windows = windows_of_runs(episode.runs, self._window)
        tasks = {w.start: self._task(episode, w.start, where) for w, _ in windows}
        unit = Unit(where, iter(()), numbers, episode.runs, self._files(episode), contradictions=found)
        unit.left_out["frames between gaps"] = _between_gaps(episode.runs, windows)
        unit.samples = self._samples(episode, windows, tasks, unit)
        return unit

    def _check_places(self) -> None:
        """Refuse two cameras whose pictures are the same files."""
        for i, camera in enumerate(self._cameras):
            for other in self._cameras[:i]:
                if shared := self._dataset.places(camera) & self._dataset.places(other):
                    raise UserError(
                        f"{self._root}: cameras {other} and {camera} are the same file, {min(shared)}: name the camera "
                        "in video_path of meta/info.json, or leave one out of data.window.cameras"
                    )

    def _check_captions(self) -> list[Contradiction]:
        """Captions of episodes that are not there."""
        known = {index for index, *_ in self._dataset.outline()}
        if not (strange := sorted(set(self._captions) - known)):
            return []
        said = {"the file of captions": f"has episode {strange[0]}", "the dataset": f"has {len(known)} others"}
        return [Contradiction("captions", "--captions", said, f"the dataset: {len(strange)} left out")]

    def _check_float32(self, state: np.ndarray, actions: np.ndarray, where: str) -> None:
        """Refuse what samples cannot hold; differences are small whatever they are of."""
        window = self._window
        absolute = window.absolute_dims if window.action_values == "minus_state" else range(actions.shape[1])
        refuse_lost_steps(state, where, f"data.window.state_key={window.state_key}")
        refuse_lost_steps(actions[:, list(absolute)], where, f"data.window.action_key={window.action_key}")

    def _task(self, episode: DatasetEpisode, row: int, where: str) -> str:
        tasks = episode.tasks_at(row)
        if (task := choose_task(tasks)) is None:
            raise UserError(f"{where}: has no task string (tasks={shown(tasks)}); add one to the dataset")
        try:
            check_text(task, "its task", self._limits)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        return task

    def _files(self, episode: DatasetEpisode) -> tuple[Path, ...]:
        return (*episode.data_files, *(episode.video_files[c] for c in self._cameras if c in episode.video_files))

    def _samples(
        self,
        episode: DatasetEpisode,
        windows: Sequence[tuple[Window, int]],
        tasks: dict[int, str],
        unit: Unit,
    ) -> Iterator[Clip]:
        if not windows:
            return
        window, numbers = self._window, unit.numbers
        captions, scores = self._beside(episode)
        for (w, end), pictures in self._shown(episode, windows, unit.contradictions):
            task = tasks[w.start]
            meta = {"task": task, "episode": int(episode.index), "dataset": self.name, "fps": self.fps} | asdict(w)
            if "seed" in episode.columns and np.isfinite(episode.columns["seed"].flat[0]):
                meta["seed"] = int(episode.columns["seed"].flat[0])
            yield Clip(
                key=f"{self.name}-{episode.index:06d}-{w.start:06d}",
                frames=np.stack(pictures),
                fps=self.fps / window.action_video_freq_ratio,
                captions={INSTRUCTION: self._template.replace("{task}", task)} | captions,
                scores=scores,
                meta=meta,
                actions=None if numbers is None else cut_actions(numbers[1][:end], w.start, window, states=numbers[0]),
                state=None if numbers is None else numbers[0][w.start][None].astype(np.float32),
            )

    def _shown(
        self, episode: DatasetEpisode, windows: Sequence[tuple[Window, int]], found: list[Contradiction]
    ) -> Iterator[tuple[tuple[Window, int], list[np.ndarray]]]:
        """((window, end of its run), pictures of its frames) of all windows in their order.

        Each frame is decoded once, about FRAME_CHUNK at a time, and held until no window can want it any more.
        """
        held: dict[int, np.ndarray] = {}
        waiting: list[tuple[tuple[Window, int], list[int]]] = []
        missing: set[int] = set()
        checked: list[Contradiction] | None = found
        for number, (w, end) in enumerate(windows, 1):
            frames = frame_indices(w.start, end, self._window).tolist()
            waiting.append(((w, end), frames))
            missing.update(frame for frame in frames if frame not in held)
            if len(missing) >= FRAME_CHUNK or number == len(windows):
                held |= self._pictures(episode, sorted(missing), checked)
                yield from ((place, [held[frame] for frame in shown]) for place, shown in waiting)
                held = {frame: picture for frame, picture in held.items() if frame > w.start}
                waiting, missing, checked = [], set(), None

    def _pictures(
        self, episode: DatasetEpisode, needed: Sequence[int], found: list[Contradiction] | None
    ) -> dict[int, np.ndarray]:
        """uint8 (H, W, 3) by raw frame: the pictures of all cameras, composed at the window's size.

        Args:
            found: takes what their sizes contradict; None: has been looked at.
        """
        views = []
        for camera, place in zip(self._cameras, camera_places(self._window, len(self._cameras))):
            sizes: list[tuple[int, int]] = []
            views.append(episode.frames(camera, needed, fit=functools.partial(_fitted, place=place, sizes=sizes)))
            if found is not None and sizes:
                found += check_picture_size(camera, self._dataset.features[camera], sizes[0])
        return dict(zip(needed, compose(views, self._window)))

    def _beside(self, episode: DatasetEpisode) -> tuple[dict[str, str], dict[str, float]]:
        """Further captions and the scores of an episode."""
        captions, scores = {}, {}
        for name, value in episode.extra.items():
            if (match := _CAPTION.fullmatch(name)) and isinstance(value, str) and value.strip():
                captions[match[1]] = value.strip()
            if (match := _SCORE.fullmatch(name)) and not isinstance(value, str):
                scores[match[1]] = float(value)
        try:
            row = row_of({"captions": captions, "scores": scores}, self._limits)
        except ValueError as error:
            raise UserError(f"{self._root}: episode {episode.index}: {error}") from error
        if (row := self._captions.get(episode.index)) is not None:
            captions, scores = captions | row.captions, scores | row.scores
        return {variant: text for variant, text in captions.items() if variant != INSTRUCTION}, scores


def _fitted(picture: np.ndarray, *, place: tuple[int, int], sizes: list[tuple[int, int]]) -> np.ndarray:
    """A picture at the size of its place; `sizes` takes its own."""
    sizes.append(picture.shape[:2])
    return cover(picture[None], *place)[0]


def _unusable(name: str, value: Any) -> bool:
    """Whether a value of the table of episodes is called a caption or score and is none."""
    text = isinstance(value, str)
    return (bool(_CAPTION.fullmatch(name)) and not text) or (bool(_SCORE.fullmatch(name)) and text)


def _between_gaps(runs: Sequence[tuple[int, int]], windows: Sequence[tuple[Window, int]]) -> int:
    """Frames of parts between gaps that are too short for a window."""
    used = {end for _, end in windows}
    return sum(end - first for first, end in runs if end not in used)


def choose_task(tasks: Sequence[str]) -> str | None:
    """The instruction among an episode's task strings.

    Datasets in GR00T's layout attach two strings to every episode, the instruction and the annotation "valid" (the
    episode's validity): the first that is not that word is the instruction.
    """
    return next((task for task in tasks if task.strip() and task != "valid"), None)
