"""Qwen2.5-VL and Qwen3.5 as encoders of prompt and first frame, through `transformers`, frozen.

The context is the last hidden states (after the final norm) of one chat of a constant system message and a user message
of the first frame, when there is one, and the prompt, with the generation prompt on. The first 97 tokens, which are the
system message and the opening of the user's, are cut (conditioning specification, "Text and image -> context").

Two settings of the public code are settings here: reading no image, as the LIBERO-Plus weights were trained, and no
system message. Without it the public code cuts the same 97 tokens, so that a prompt loses its beginning; a prompt of
which nothing is left is one token of zeros.

Pictures go through the image processor of the weights' folder in its Pillow form, which needs no torchvision and gives
the same numbers on every machine, and are put into the text by hand: the library's own processor class also wants a
video processor, which nothing here uses.

Shapes: B batch, S tokens of the chat, N = S - 97 context tokens, C text_dim.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kairos_train.basics.errors import UserError
from kairos_train.basics.foreign_files import refuse_lfs_pointer
from kairos_train.conditioning.interfaces import config_sha256, weights_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The weights were trained with this text, to the letter.
SYSTEM_MESSAGE = (
    "Describe the video by detailing the following aspects: "
    "1. The main content and theme of the video. "
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects. "
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects. "
    "4. background environment, light, style and atmosphere. "
    "5. camera angles, movements, and transitions used in the video:"
)
DROP_TOKENS = 97  # up to and with "<|im_start|>user\n", in Qwen's vocabularies
MAX_PIXELS = 448 * 448
MODEL_CLASSES = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "qwen3_5": "Qwen3_5ForConditionalGeneration"}
FIELD = "encoders.text.path"
REMEDY = "give the folder of Qwen2.5-VL-7B-Instruct or Qwen3.5-2B, or set encoders.text.kind=hashed_ngrams"


class QwenVLM:
    """TextEncoder with the real weights, in the precision they are stored in (bfloat16 in the releases)."""

    def __init__(
        self,
        path: str | Path | None,
        *,
        text_dim: int,
        max_tokens: int = 1024,
        image: bool = True,
        system_message: bool = True,
        device: str | torch.device = "cpu",
    ) -> None:
        """Read a model folder; nothing is downloaded.

        Args:
            path: folder with the weights, the tokenizer, the chat template and the image processor's settings.
            text_dim: width that the configuration promises; must be the model's.
            max_tokens: longest chat in tokens, the 97 that are cut among them; longer prompts lose their end.
            image: whether images that `encode` is given are read.
            system_message: whether the chat begins with the system message.

        Raises:
            UserError: `path` is missing, unreadable, incomplete or another model; `text_dim` is not its width;
                `max_tokens` has no room for a picture.
        """
        folder, settings = _settings(path)
        self._model = _load_model(folder, settings["model_type"])
        width = self._model.config.text_config.hidden_size
        if width != text_dim:
            raise UserError(
                f"encoders.text.text_dim: {text_dim}, but the model in {folder} is {width} wide; set both "
                f"encoders.text.text_dim and model.text_dim to {width}, or give the other model"
            )
        self.text_dim, self.max_tokens = width, max_tokens
        self._image, self._system_message = image, system_message
        self._tokenizer, self._template, self._images = _load_processors(folder)
        self._image_token = self._tokenizer.convert_ids_to_tokens(self._model.config.image_token_id)
        self._check_prefix(folder)
        self._check_room()
        self._identity = self._describe(settings)
        self._model = self._model.to(device).eval().requires_grad_(False)
        self._device = torch.device(device)

    @property
    def identity(self) -> dict[str, Any]:
        return dict(self._identity)

    @torch.no_grad()
    def encode(self, prompts: list[str], images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Prompts and first frames uint8 (B,H,W,3) -> context float32 (B,N,C), mask bool (B,N).

        White space around a prompt is dropped. A negative prompt is encoded without images. An encoder that reads no
        image ignores them.

        Raises:
            UserError: a prompt contains one of the model's control tokens.
        """
        if images is not None and (images.dtype != torch.uint8 or images.shape[0] != len(prompts)):
            raise TypeError(f"images: {images.dtype} {tuple(images.shape)} for {len(prompts)} prompts; uint8 (B,H,W,3)")
        inputs = self._inputs(prompts, images if self._image else None)
        # The inner model: its output is `hidden_states[-1]` without the logits, which would be the largest tensor here.
        hidden = self._model(**inputs, use_cache=False).last_hidden_state  # B,S,C
        mask = inputs["attention_mask"][:, DROP_TOKENS:].bool()
        context = hidden[:, DROP_TOKENS:].float() * mask[..., None]
        if not self._system_message:  # a short prompt may be gone
            nothing = max(0, 1 - context.shape[1])
            context = torch.nn.functional.pad(context, (0, 0, 0, nothing))
            mask = torch.nn.functional.pad(mask, (0, nothing))
            mask[~mask.any(1), 0] = True
        return context, mask

    def _inputs(self, prompts: list[str], images: Tensor | None) -> dict[str, Tensor]:
        """What the model reads: token ids (B,S), right-padded, with their mask, and the patches of all pictures."""
        chats = [self._chat(prompt.strip(), with_image=images is not None) for prompt in prompts]
        pictures: dict[str, Tensor] = {}
        if images is not None:
            pictures, counts = self._patches(images)
            # The template writes one image token; the model wants as many as the picture has features.
            chats = [
                chat.replace(self._image_token, self._image_token * count, 1) for chat, count in zip(chats, counts)
            ]
        tokens = self._tokenizer(
            chats,
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], **pictures}
        if images is not None:
            inputs["mm_token_type_ids"] = (tokens["input_ids"] == self._model.config.image_token_id).int()
        return {name: tensor.to(self._device) for name, tensor in inputs.items()}

    def _patches(self, images: Tensor) -> tuple[dict[str, Tensor], list[int]]:
        """Pictures of at most 448 x 448 pixels as patches, and how many tokens each becomes."""
        from PIL import Image

        batch = self._images(
            images=[Image.fromarray(image.numpy()) for image in images.cpu()],
            size={"shortest_edge": self._images.size["shortest_edge"], "longest_edge": MAX_PIXELS},
            return_tensors="pt",
        )
        counts = batch["image_grid_thw"].prod(-1) // self._images.merge_size**2
        return {"pixel_values": batch["pixel_values"], "image_grid_thw": batch["image_grid_thw"]}, counts.tolist()

    def _chat(self, prompt: str, *, with_image: bool) -> str:
        for token in self._tokenizer.get_added_vocab():
            if token in prompt:
                raise UserError(f"prompt: {prompt!r} contains the model's control token {token}; remove it")
        user = [{"type": "image"}] if with_image else []
        system = [{"role": "system", "content": SYSTEM_MESSAGE}] if self._system_message else []
        messages = [*system, {"role": "user", "content": [*user, {"type": "text", "text": prompt}]}]
        return self._tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )

    def _check_prefix(self, folder: Path) -> None:
        """The 97 tokens that are cut must be exactly what stands before the user's content, if the chat begins so."""
        if not self._system_message:
            return
        marker = "prompt"
        chat = self._chat(marker, with_image=False)
        before = chat[: chat.rindex(marker)]
        count = len(self._tokenizer(before, add_special_tokens=False)["input_ids"])
        if count != DROP_TOKENS:
            raise UserError(
                f"{FIELD}: the tokenizer and chat template in {folder} put {count} tokens before the prompt, the "
                f"encoder cuts {DROP_TOKENS}; {REMEDY}"
            )

    def _check_room(self) -> None:
        pixels_per_token = (self._images.patch_size * self._images.merge_size) ** 2
        image = MAX_PIXELS // pixels_per_token + 2 if self._image else 0  # with its two marks
        least = DROP_TOKENS + image + 1
        if self.max_tokens < least:
            raise UserError(
                f"encoders.text.max_tokens: {self.max_tokens}; it must be at least {least}, which the system message "
                f"and {'an image' if self._image else 'a word'} take; the published models use 1024"
            )

    def _describe(self, settings: dict[str, Any]) -> dict[str, Any]:
        picture = {
            name: getattr(self._images, name)
            for name in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")
        }
        picture["shortest_edge"] = self._images.size["shortest_edge"]
        return {
            "kind": "qwen",
            "model_type": settings["model_type"],
            "text_dim": self.text_dim,
            "max_tokens": self.max_tokens,
            "drop_tokens": DROP_TOKENS,
            "image": self._image,
            **({} if self._system_message else {"system_message": False}),  # earlier identities do not say
            "image_max_pixels": MAX_PIXELS,
            "image_processor_sha256": config_sha256(json.loads(json.dumps(picture, default=list))),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "chat_sha256": hashlib.sha256(self._chat("prompt", with_image=self._image).encode()).hexdigest(),
            "vocabulary_sha256": config_sha256({"vocabulary": sorted(self._tokenizer.get_vocab().items())}),
            "config_sha256": config_sha256(settings),
            "weights_sha256": weights_sha256(self._model.state_dict()),
        }


def _settings(path: str | Path | None) -> tuple[Path, dict[str, Any]]:
    """The folder and its config.json, once it is known to be one of the two models."""
    if path is None:
        raise UserError(f"{FIELD}: not set, but encoders.text.kind=qwen needs weights; {REMEDY}")
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{FIELD}: {folder} has no config.json; {REMEDY}")
    refuse_lfs_pointer(folder)
    try:
        settings = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{FIELD}: {folder}/config.json is not JSON ({error}); {REMEDY}") from error
    if settings.get("model_type") not in MODEL_CLASSES:
        raise UserError(f"{FIELD}: {folder} holds a {settings.get('model_type')} model; {REMEDY}")
    return folder, settings


def _load_model(folder: Path, model_type: str) -> torch.nn.Module:
    """The model below the language head. Transformers fills absent tensors with random ones: here that is an error."""
    import transformers

    try:
        model, info = getattr(transformers, MODEL_CLASSES[model_type]).from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # many kinds, from several libraries: no weights, broken weights, other shapes
        raise UserError(f"{FIELD}: the weights in {folder} cannot be read ({_first_line(error)}); {REMEDY}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{FIELD}: {folder} lacks {len(missing)} tensors, the first {missing[0]}; {REMEDY}")
    return model.model


def _load_processors(folder: Path) -> tuple[PreTrainedTokenizerBase, str, Any]:
    """Tokenizer, chat template, image processor."""
    from transformers import AutoImageProcessor, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        images = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        template = _chat_template(folder, tokenizer)
    except Exception as error:  # as for the weights
        raise UserError(
            f"{FIELD}: the tokenizer or image processor in {folder} cannot be read ({_first_line(error)}); {REMEDY}"
        ) from error
    if template is None:
        raise UserError(f"{FIELD}: {folder} has no chat template; {REMEDY}")
    return tokenizer, template, images


def _chat_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The processor's template, which knows pictures, before the tokenizer's."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").is_file():
        return json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    return tokenizer.chat_template


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
