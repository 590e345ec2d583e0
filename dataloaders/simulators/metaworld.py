"""Meta-World 3 (MuJoCo): a Sawyer arm, one task at a time, seen by the camera that LeRobot's Meta-World sets use.

Rendering is on the CPU with Mesa unless a GPU's EGL is there. Shadows and reflections are off: with them the software
renderer is eighty times slower.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings

import numpy as np

from dataloaders.simulators.base import CAMERA_KEY, TASKS, SimulatorObservation
from kairos_train.basics.errors import UserError, one_line

_CAMERA = "corner2"
_CAMERA_POSITION = (0.75, 0.075, 0.7)  # LeRobot's: nearer than the scene file has it
_LIBRARIES = {"egl": "libEGL.so.1", "osmesa": "libOSMesa.so.8"}
_PACKAGES = {"egl": "libegl1 libgl1-mesa-dri libopengl0", "osmesa": "libosmesa6"}


class MetaWorld:
    """One Meta-World task. State: the gripper's x, y, z in metres and its opening; action: their changes, in [-1, 1].

    Raises:
        UserError: the packages are not installed, or no GL library can render.
    """

    fps = 80.0  # of the simulated arm's control, which runs every 12.5 ms
    robot_type = "sawyer"
    camera_key = CAMERA_KEY
    action_dim = 4
    state_dim = 4
    action_names = ["dx", "dy", "dz", "gripper"]  # noqa: RUF012 - the interface's constant
    state_names = ["x", "y", "z", "gripper"]  # noqa: RUF012
    max_steps = 200  # its own limit of 500 is far more than the expert ever needs

    def __init__(self, task: str, size: int) -> None:
        self.task, self.instruction = task, TASKS["metaworld"][task]
        backend = choose_gl()
        try:
            import mujoco
        except Exception as error:  # the GL library is loaded on import, each backend fails in its own way
            raise _no_rendering(backend, error) from error
        try:
            import metaworld
            from metaworld.policies import ENV_POLICY_MAP
        except ImportError as error:
            raise UserError(
                f"env metaworld: {error}; run `pip install 'kairos-train[sim]'`, or use --env push2d, which needs no "
                "such package"
            ) from error
        benchmark = metaworld.MT1(task, seed=42)
        self._env = benchmark.train_classes[task]()
        self._env.set_task(benchmark.train_tasks[0])
        # From here on the layout is a pure function of the seed given to reset.
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._make_policy = ENV_POLICY_MAP[task]
        self._policy = self._make_policy()
        self._raw: np.ndarray | None = None
        self._open_renderer(mujoco, size, backend)

    def reset(self, seed: int) -> SimulatorObservation:
        """Start the episode of this seed."""
        self._env.seed(seed)
        self._raw, _ = self._env.reset(seed=seed)
        self._policy = self._make_policy()
        return self.observe()

    def step(self, action: np.ndarray) -> tuple[SimulatorObservation, bool]:
        """Execute (4,) in [-1, 1]; what is seen then, and whether the task is solved."""
        solved = self.advance(action)
        return self.observe(), solved

    def advance(self, action: np.ndarray) -> bool:
        """As `step`, without a picture."""
        self._raw, _, _, _, info = self._env.step(np.clip(np.asarray(action, np.float64), -1, 1))
        return bool(info["success"])

    def observe(self) -> SimulatorObservation:
        """The scene as it is now."""
        self._renderer.update_scene(self._env.data, camera=_CAMERA)
        picture = self._renderer.render()
        # The camera hangs upside down.
        return SimulatorObservation(np.ascontiguousarray(picture[::-1, ::-1]), self._raw[:4].astype(np.float32))

    def expert_action(self) -> np.ndarray:
        """Meta-World's scripted policy, clipped to [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it warns of what the clipping below is for
            return np.clip(self._policy.get_action(self._raw), -1, 1).astype(np.float32)

    def close(self) -> None:
        """Free the GL context: left to the interpreter's exit it prints an error."""
        self._renderer.close()
        self._env.close()

    def _open_renderer(self, mujoco, size: int, backend: str) -> None:
        model = self._env.model
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        model.cam_pos[model.camera(_CAMERA).id] = _CAMERA_POSITION
        try:
            self._renderer = mujoco.Renderer(model, size, size)
        except (
            Exception
        ) as error:  # each backend has errors of its own: ImportError, RuntimeError, AttributeError, GLError
            raise _no_rendering(backend, error) from error
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0


def choose_gl() -> str:
    """The GL backend of this process: what MUJOCO_GL says, else EGL, else OSMesa, by which library can be loaded.

    MuJoCo reads MUJOCO_GL when it is imported, so that it is set here, before that.

    Raises:
        UserError: neither library is installed, or mujoco was imported before without a backend.
    """
    if chosen := os.environ.get("MUJOCO_GL"):
        return chosen.lower().strip()
    if "mujoco" in sys.modules:
        raise UserError(
            "env metaworld: mujoco was imported before a GL backend was chosen; set MUJOCO_GL=egl and start again"
        )
    for backend, library in _LIBRARIES.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        os.environ["MUJOCO_GL"] = backend
        return backend
    raise _no_rendering("egl", None)


def _no_rendering(backend: str, error: Exception | None) -> UserError:
    reason = f" ({type(error).__name__}: {one_line(error)[:120]})" if error is not None else ""
    packages = _PACKAGES.get(backend, _PACKAGES["egl"])
    alternative = "" if backend == "osmesa" else " (or libosmesa6 and set MUJOCO_GL=osmesa)"
    return UserError(
        f"env metaworld: cannot render with MUJOCO_GL={backend}{reason}; install the Debian packages {packages}"
        f"{alternative}, or use --env push2d, which needs none of it"
    )
