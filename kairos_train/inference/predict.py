"""Raw observation and prompt in, raw actions (and predicted video) out: the whole path of an exported policy.

Shapes: B batch, T video frames, K history latent frames, F latent frames, H W pixels, h w latent height and width,
A actions, D action dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kairos_train.basics.errors import UserError
from kairos_train.basics.geometry import LATENT_CHANNELS, TIME_STRIDE, latent_sides, video_frames
from kairos_train.conditioning.build import build_encoders
from kairos_train.conditioning.interfaces import Encoders, identities_match
from kairos_train.inference.compiled import CompiledModel
from kairos_train.inference.load import Policy
from kairos_train.inference.normalization import Normalizer, from_statistics
from kairos_train.inference.rollout import ChunkSize, RolloutHistory, SlidingHistory, StreamingHistory, chunk_seed
from kairos_train.inference.sampler import Conditions, SampledOutput, SamplerConfig, sample


@dataclass(frozen=True)
class Request:
    """One client's observation.

    Attributes:
        frames: uint8 RGB of the given frames, (T, H, W, 3), or (H, W, 3) for one; None where `latents` are given, or
            the model is given no frame.
        state: (state_dim,) raw; None for a model without action stream.
        instruction: the task in words; the training template is put around it.
        seed: of the noise.
        latents: (16, K, h, w) of the given frames already encoded, in place of `frames`.
    """

    frames: np.ndarray | None
    state: np.ndarray | None
    instruction: str
    seed: int
    latents: Tensor | None = None


@dataclass(frozen=True)
class Prediction:
    """One chunk of one request, or of a batch with B in front.

    Attributes:
        actions: (A, D) float32, raw units; None in mode video.
        frames: (T, H, W, 3) uint8 RGB, the given frames included (later chunks of a rollout: the new ones alone); None
            in mode action.
    """

    actions: np.ndarray | None
    frames: np.ndarray | None


class Predictor:
    """A policy with its encoders and normalisation.

    Args:
        policy: from `kairos_train.inference.load.load`.
        encoders: as `build_encoders` makes them; None builds those of the policy's configuration.
        sampler: how to sample; None takes the export's `sampler.json`.
        compiled: sample through `torch.compile`; see `CompiledModel`. What a carried rollout computes stays as it is.

    Raises:
        UserError: the encoders are not those the model was trained with.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        encoders: Encoders | None = None,
        sampler: SamplerConfig | None = None,
        compiled: bool = False,
    ) -> None:
        self.policy = policy
        self.sampler = (sampler or policy.sampler).check()
        if (self.sampler.schedule == "distilled") != (policy.sampler.schedule == "distilled"):
            raise UserError(
                f"sampler.schedule={self.sampler.schedule!r}: this model is sampled {policy.sampler.schedule!r}"
            )
        self.encoders = build_encoders(policy.config.encoders, policy.device) if encoders is None else encoders
        if policy.encoders is not None:
            identities_match(policy.encoders, self.encoders.identity)
        self.action_normalizer = self.state_normalizer = None
        if policy.acts:
            self.action_normalizer, self.state_normalizer = normalizers(policy)
        self.model = CompiledModel(policy.model) if compiled else policy.model

    def prompt(self, instruction: str) -> str:
        """The text the model was trained on for this instruction."""
        return self.policy.config.data.prompt_template.replace("{task}", instruction)

    @torch.no_grad()
    def conditions(
        self,
        *,
        texts: Sequence[str],
        state: np.ndarray | Tensor | None,
        frames: np.ndarray | Tensor | None,
        history: Tensor | None = None,
        context: tuple[Tensor, Tensor] | None = None,
    ) -> Conditions:
        """Encode one batch of observations.

        Args:
            texts: full prompts (see `prompt`), one per sample.
            state: (B, state_dim) or (B, 1, state_dim) raw; None for a model without action stream.
            frames: (B, T, H, W, 3) uint8, the given frames, T = 4·(K − 1) + 1; None with K = 0 or with `history`.
            history: (B, 16, K, h, w) latents already encoded.
            context: (B, N, text_dim) and mask (B, N) already encoded; None encodes `texts` (and the first frame).
        """
        policy = self.policy
        given = policy.history_frames
        if history is None and given:
            history = self.encoders.video.encode(self._frames(frames, given))
        if context is None:
            images = None if frames is None else torch.as_tensor(frames)[:, 0].to(policy.device)
            context = self.encoders.text.encode(list(texts), images)
        negative = None
        if self.sampler.negative_prompt is not None:
            # A negative prompt never sees the image.
            negative = self.encoders.text.encode([self.sampler.negative_prompt] * len(texts), None)
        return Conditions(
            context=context[0].to(policy.device, torch.float32),
            context_mask=context[1].to(policy.device),
            history=None if history is None else history.to(policy.device, torch.float32),
            state=self._state(state),
            negative=None if negative is None else tuple(part.to(policy.device) for part in negative),
            action_dim=policy.action_dim if policy.acts else None,
        )

    def sample(self, conditions: Conditions, *, mode: str, seeds: Sequence[int]) -> SampledOutput:
        """Latents and normalised actions of one batch; see `kairos_train.inference.sampler.sample`."""
        policy = self.policy
        latent_shape = None
        if mode != "action":
            latent_shape = (policy.latent_frames, *self._latent_size(conditions.history))
        return sample(
            self.model,
            conditions,
            mode=mode,
            config=self.sampler,
            seeds=seeds,
            latent_shape=latent_shape,
            horizon=policy.horizon,
        )

    def actions(self, sampled: SampledOutput) -> np.ndarray:
        """Raw actions (B, A, D) float32 of a sample."""
        own = sampled.actions[..., : self.policy.action_dim]
        return self.action_normalizer.unnormalize(own).float().cpu().numpy()

    def padded_actions(self, actions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Raw actions (B, A, D) as training gives them to the model: normalised, and where the model has more
        dimensions padded with zeros, with the mask (B, model's D) of the robot's own; None: all are."""
        own, wanted = self.action_normalizer.normalize(actions), self.policy.config.model.action.action_dim
        if own.shape[-1] == wanted:
            return own, None
        mask = (torch.arange(wanted) < own.shape[-1]).expand(len(own), wanted)
        return functional.pad(own, (0, wanted - own.shape[-1])), mask

    @torch.no_grad()
    def frames(self, sampled: SampledOutput) -> np.ndarray:
        """Decoded video (B, T, H, W, 3) uint8 of a sample."""
        return self.encoders.video.decode(sampled.latents).cpu().numpy()

    def predict(
        self,
        frames: np.ndarray,
        state: np.ndarray | None,
        instruction: str,
        *,
        seed: int,
        mode: str = "action",
    ) -> Prediction:
        """Predict from one observation.

        Args:
            frames: (H, W, 3) or (T, H, W, 3) uint8 RGB at the training window's size, cameras side by side.
            state: (state_dim,) raw; None for a model without action stream.
            instruction: the task in words; the training template is put around it.
            seed: of the noise; give another at every replan.
            mode: "action" (chunk only, cached history), "joint" (chunk and video) or "video".

        Raises:
            UserError: an observation that does not fit the model.
        """
        return self.predict_batch([Request(frames, state, instruction, seed)], mode=mode)[0]

    def predict_batch(self, requests: Sequence[Request], *, mode: str = "action") -> list[Prediction]:
        """Predict for several clients in one pass.

        A request's answer does not depend on who shares its batch, but for float rounding: its noise comes from its
        own seed alone, padding of shorter prompts is masked, and nothing else of the model looks across samples. (The
        rounding is real: matrix products of another batch size may add in another order.)

        Args:
            requests: at least one; all with frames or all with latents.
            mode: as for `predict`.

        Returns:
            One prediction per request, in their order.

        Raises:
            UserError: a request that does not fit the model; with several of them its number is named, from 0. Nothing
                is computed then: `check` tells beforehand which one it would be.
        """
        if not requests:
            raise UserError("requests: none given; give at least one")
        for number, request in enumerate(requests):
            try:
                self.check(request)
            except UserError as error:
                raise UserError(f"request {number}: {error}" if len(requests) > 1 else str(error)) from error
        first = requests[0]
        for name in ("frames", "latents"):
            if len({getattr(request, name) is None for request in requests}) > 1:
                raise UserError(f"requests: some hold {name} and some do not; predict them apart")
        conditions = self.conditions(
            texts=[self.prompt(request.instruction) for request in requests],
            state=np.stack([np.asarray(request.state) for request in requests]) if self.policy.acts else None,
            frames=None if first.frames is None else np.stack([_clip(request.frames) for request in requests]),
            history=None if first.latents is None else torch.stack([request.latents for request in requests]),
        )
        sampled = self.sample(conditions, mode=mode, seeds=[request.seed for request in requests])
        actions = None if sampled.actions is None else self.actions(sampled)
        frames = None if sampled.latents is None else self.frames(sampled)
        return [
            Prediction(None if actions is None else actions[i], None if frames is None else frames[i])
            for i in range(len(requests))
        ]

    def check(self, request: Request) -> None:
        """Raise UserError unless the request fits the model; computes nothing."""
        given = self.policy.history_frames
        if request.latents is not None:
            wanted = [LATENT_CHANNELS, given, *self._latent_size(None)]
            if list(request.latents.shape) != wanted:
                raise UserError(f"latents: shape {list(request.latents.shape)}; this model is given {wanted}")
        if given and (request.latents is None or request.frames is not None):
            self._frames(None if request.frames is None else _clip(request.frames)[None], given)
        self._state(None if request.state is None else np.asarray(request.state)[None])

    @torch.no_grad()
    def rollout(
        self,
        conditions: Conditions,
        *,
        mode: str,
        seeds: Sequence[int],
        chunks: int,
        texts: Sequence[str] | None = None,
        history: int | None = None,
        carried: bool = False,
    ) -> Iterator[Prediction]:
        """Go on from a batch of observations, chunk after chunk; every chunk takes the same work and memory.

        With a sliding history a chunk is given the last pictures of the one before, encoded again as a clip of their
        own: what the model is given looks as in training. With a carried one (`carried`) the latents go on as one
        clip, and the video encoder decodes a chunk behind its last K latents. The state token stays that of the
        observation: nobody measures a robot in a dream.

        Args:
            conditions: of `conditions`.
            mode: "video" or "joint".
            seeds: of the whole rollout, one per sample; the first chunk is that of `sample`.
            chunks: how many.
            texts: full prompts; with a sliding history and a text encoder that looks at pictures, encoded again with
                the first frame of every chunk, as in training. None: the context stays.
            history: K, latent frames from which a chunk goes on; None: as many as in training, which is the least.
            carried: carry states and keys over instead of computing the history again; needs a model trained with
                `model.video.history_causal`.

        Yields:
            Predictions of the batch: of the first chunk all frames (B, T, H, W, 3), of later ones the new frames.

        Raises:
            UserError: mode action, a history that leaves nothing new, a model that cannot carry its history.
        """
        memory = self.memory(mode=mode, history=history, carried=carried)
        keep = memory.chunk.history
        size = self._latent_size(conditions.history)
        if conditions.history is not None:
            memory.observe(conditions.history, conditions)
        for number in range(chunks):
            before = memory.latents
            sampled = memory.sample(conditions, mode=mode, seeds=[chunk_seed(s, number) for s in seeds], size=size)
            window = sampled.latents if before is None else torch.cat([before, sampled.latents], dim=2)
            pictures = self.encoders.video.decode(window)
            shown = pictures if number == 0 else pictures[:, -TIME_STRIDE * sampled.latents.shape[2] :]
            yield Prediction(
                actions=None if sampled.actions is None else self.actions(sampled), frames=shown.cpu().numpy()
            )
            if number + 1 == chunks:
                return
            if carried:
                memory.observe(sampled.latents, conditions)
                continue
            clip = pictures[:, -video_frames(keep) :]
            memory.observe(self.encoders.video.encode(clip), conditions)
            if texts is not None and self.encoders.text.identity.get("image", True):
                context, mask = self.encoders.text.encode(list(texts), clip[:, 0])
                context, mask = context.to(self.policy.device, torch.float32), mask.to(self.policy.device)
                conditions = replace(conditions, context=context, context_mask=mask)

    def memory(self, *, mode: str, history: int | None = None, carried: bool = False) -> RolloutHistory:
        """What a rollout begins with; arguments and errors as for `rollout`."""
        policy = self.policy
        if mode == "action":
            raise UserError("mode='action': makes no video to go on from; use mode joint or video")
        least = policy.history_frames
        if not least:
            raise UserError(
                "this model was trained without given frames (stage.conditions) and goes on from none; use chunks=1"
            )
        keep = least if history is None else history
        if keep < least:
            raise UserError(f"history={keep}: the model was trained with {least} history latent frames; use as many")
        chunk = ChunkSize(policy.latent_frames, keep, policy.horizon if mode == "joint" else None)
        if carried:
            return StreamingHistory(policy.model, self.sampler, chunk)
        return SlidingHistory(self.model, self.sampler, chunk)

    def _frames(self, frames: np.ndarray | Tensor | None, history_frames: int) -> Tensor:
        if frames is None:
            raise UserError(f"frames=None: this model is given {history_frames} history latent frames; pass pictures")
        clip = torch.as_tensor(frames)
        count = video_frames(history_frames)
        window = self.policy.config.data.window
        if clip.dtype != torch.uint8 or clip.ndim != 5 or clip.shape[-1] != 3:
            raise UserError(f"frames: {clip.dtype} of shape {list(clip.shape)}; must be uint8 (…, T, H, W, 3)")
        if clip.shape[1] != count:
            raise UserError(f"frames: {clip.shape[1]} given; {history_frames} history latent frames take {count}")
        height, width = clip.shape[2:4]
        beside = window.layout == "side_by_side"
        if height != window.height or (width % window.width if beside else width != window.width):
            raise UserError(
                f"frames: {height}×{width} pixels; the model was trained on {window.height}×{window.width} "
                + ("per camera, cameras side by side" if beside else "in all, the head over both wrists")
                + "; resize first"
            )
        return clip.to(self.policy.device)

    def _state(self, state: np.ndarray | Tensor | None) -> Tensor | None:
        policy = self.policy
        if not policy.acts:
            return None
        if state is None:
            raise UserError(f"state=None: this model takes a state of {policy.state_dim} dimensions; pass it")
        state = torch.as_tensor(state, dtype=torch.float32)
        state = state[:, None] if state.ndim == 2 else state
        if state.ndim != 3 or tuple(state.shape[1:]) != (1, policy.state_dim):
            raise UserError(f"state: shape {list(state.shape)}; must be (B, {policy.state_dim})")
        more = policy.config.model.action.state_dim - policy.state_dim
        return functional.pad(self.state_normalizer.normalize(state), (0, more)).to(policy.device)

    def _latent_size(self, history: Tensor | None) -> tuple[int, int]:
        """Latent height and width: of given frames, else of the picture of all cameras that the configuration names."""
        if history is not None:
            return tuple(history.shape[-2:])
        window = self.policy.config.data.window
        beside = max(1, len(window.cameras)) if window.layout == "side_by_side" else 1
        return latent_sides(window.height, window.width * beside)


def _clip(frames: np.ndarray | Tensor) -> np.ndarray:
    """(H, W, 3) or (T, H, W, 3) -> (T, H, W, 3)."""
    frames = np.asarray(frames)
    return frames[None] if frames.ndim == 3 else frames


def normalizers(policy: Policy) -> tuple[Normalizer, Normalizer]:
    """Of actions and of the state, from the export's own statistics."""
    data = policy.config.data
    return (
        from_statistics(policy.statistics, group="action", key=data.window.action_key, mode=data.normalize_action),
        from_statistics(policy.statistics, group="state", key=data.window.state_key, mode=data.normalize_state),
    )
