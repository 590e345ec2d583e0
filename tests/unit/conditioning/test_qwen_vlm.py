"""Qwen encoders: tiny random models of the real classes, saved as the releases are, through the real code."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from kairos_train.basics.errors import UserError
from kairos_train.conditioning.build import build_encoders
from kairos_train.conditioning.interfaces import TextEncoder, identities_match
from kairos_train.conditioning.qwen_vlm import DROP_TOKENS, MAX_PIXELS, SYSTEM_MESSAGE, QwenVLM
from kairos_train.config.schema import EncodersConfig, TextEncoderConfig, VideoEncoderConfig

WIDTH = 32
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = ["push the red block to the left", "open the drawer"]
KINDS = ["qwen2_5_vl", "qwen3_5"]
# As the releases have them.
PREPROCESSORS = {
    "qwen2_5_vl": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "qwen3_5": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}


def _vocabulary(corpus: list[str], regex: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE whose merges make every word of `corpus` one token, as Qwen's vocabularies do for common words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet))
    trained = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(trained["vocab"])
    vocabulary.update({token: len(vocabulary) + i for i, token in enumerate(SPECIAL)})
    return vocabulary, [tuple(pair) for pair in trained["merges"]]


def _tokenizer(kind: str, corpus: list[str]):
    from transformers.models.qwen2 import tokenization_qwen2
    from transformers.models.qwen3_5 import tokenization_qwen3_5

    module, name = {
        "qwen2_5_vl": (tokenization_qwen2, "Qwen2Tokenizer"),
        "qwen3_5": (tokenization_qwen3_5, "Qwen3_5Tokenizer"),
    }[kind]
    vocabulary, merges = _vocabulary(corpus, module.PRETOKENIZE_REGEX)
    tokenizer = getattr(module, name)(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    return tokenizer


def _config(kind: str, ids: dict[str, int], size: int):
    import transformers

    text = {"vocab_size": size, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": WIDTH}
    tokens = {name: ids[f"<|{name}|>"] for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    common = {
        "image_token_id": tokens["image_pad"],
        "video_token_id": tokens["video_pad"],
        "vision_start_token_id": tokens["vision_start"],
        "vision_end_token_id": tokens["vision_end"],
    }
    if kind == "qwen2_5_vl":
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
        vision |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]}
        return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **common)
    text |= {"head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": None}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "full_attention_interval": 2}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    }
    vision |= {"patch_size": 16, "num_position_embeddings": 64}
    return transformers.Qwen3_5Config(text_config=text, vision_config=vision, **common)


def _save(folder: Path, kind: str, corpus: list[str]) -> Path:
    """A model folder laid out as the releases are."""
    import transformers

    from kairos_train.conditioning.qwen_vlm import MODEL_CLASSES

    tokenizer = _tokenizer(kind, corpus)
    config = _config(kind, tokenizer.get_vocab(), len(tokenizer))
    torch.manual_seed(0)
    model = getattr(transformers, MODEL_CLASSES[kind])(config)
    with torch.no_grad():
        for parameter in model.parameters():  # the tiny default spread would make every context nearly constant
            parameter.mul_(5.0) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSORS[kind]))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    corpus = [SYSTEM_MESSAGE, "system", "user", "assistant", *PROMPTS] * 3
    return _save(tmp_path_factory.mktemp(request.param), request.param, corpus)


@pytest.fixture(scope="module")
def encoder(folder) -> QwenVLM:
    return QwenVLM(folder, text_dim=WIDTH)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 120, 160, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _library_context(
    folder: Path, kind: str, prompts: list[str], images: torch.Tensor | None, *, system: bool = True
) -> list[torch.Tensor]:
    """The same through the library's own processor and the whole model, one prompt at a time: (N,C) each."""
    import transformers
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    from kairos_train.conditioning.qwen_vlm import MODEL_CLASSES

    model = getattr(transformers, MODEL_CLASSES[kind]).from_pretrained(folder).eval()

    class WithoutVideo({"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_5": Qwen3VLProcessor}[kind]):
        """Its constructor insists on a video processor, which needs torchvision; nothing else of it does."""

        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

    processor = WithoutVideo(
        image_processor=AutoImageProcessor.from_pretrained(folder, backend="pil"),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        chat_template=TEMPLATE,
    )
    processor.image_processor.size["longest_edge"] = MAX_PIXELS
    contexts = []
    for i, prompt in enumerate(prompts):
        content = [{"type": "image"}] if images is not None else []
        messages = [
            *([{"role": "system", "content": SYSTEM_MESSAGE}] if system else []),
            {"role": "user", "content": [*content, {"type": "text", "text": prompt}]},
        ]
        chat = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        picture = [Image.fromarray(images[i].numpy())] if images is not None else None
        inputs = processor(text=[chat], images=picture, return_tensors="pt", truncation=True, max_length=1024)
        contexts.append(model(**inputs, output_hidden_states=True).hidden_states[-1][0, DROP_TOKENS:])
    return contexts


def _kind(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]


def _copy(folder: Path, target: Path, **changes: str | None) -> Path:
    """Links to all files of `folder`, but for those named: new text, or None to leave the file out."""
    target.mkdir()
    for file in folder.iterdir():
        if file.name.replace(".", "_") not in changes:
            (target / file.name).symlink_to(file)
    for name, text in changes.items():
        if text is not None:
            stem, suffix = name.rsplit("_", 1)
            (target / f"{stem}.{suffix}").write_text(text)
    return target


def test_context_is_the_last_hidden_states_after_97_tokens_for_prompts_alone(folder, encoder):
    context, mask = encoder.encode(PROMPTS)
    assert isinstance(encoder, TextEncoder)
    assert context.dtype == torch.float32
    assert mask.dtype == torch.bool
    for row, kept, expected in zip(context, mask, _library_context(folder, _kind(folder), PROMPTS, None)):
        torch.testing.assert_close(row[kept], expected, atol=1e-4, rtol=1e-4)


def test_context_with_first_frames_equals_the_librarys_own_processor_and_model(folder, encoder, images):
    context, mask = encoder.encode(PROMPTS, images)
    for row, kept, expected in zip(context, mask, _library_context(folder, _kind(folder), PROMPTS, images)):
        torch.testing.assert_close(row[kept], expected, atol=1e-4, rtol=1e-4)


def test_an_encoder_without_image_reads_the_prompt_alone(folder, encoder, images):
    blind = QwenVLM(folder, text_dim=WIDTH, image=False)
    context, mask = blind.encode(PROMPTS, images)
    expected, expected_mask = encoder.encode(PROMPTS)
    assert torch.equal(context, expected)
    assert torch.equal(mask, expected_mask)
    assert blind.identity["image"] is False
    with pytest.raises(UserError, match=r"encoders\.image: made with True, this run has False"):
        identities_match(encoder.identity, blind.identity)
    QwenVLM(folder, text_dim=WIDTH, image=False, max_tokens=128)  # no room for an image is needed


def test_without_the_system_message_the_same_97_tokens_are_cut(folder, images):
    """As the public code does: images keep what is behind them, a short prompt is one token of zeros."""
    bare = QwenVLM(folder, text_dim=WIDTH, system_message=False)
    long = [("push the red block " * 30).strip(), "open"]
    context, mask = bare.encode(long)
    expected = _library_context(folder, _kind(folder), long, None, system=False)
    assert mask.sum(1).tolist() == [len(expected[0]), 1]
    torch.testing.assert_close(context[0], expected[0], atol=1e-4, rtol=1e-4)
    assert len(expected[1]) == 0
    assert (context[1] == 0).all()
    context, mask = bare.encode(["open"])
    assert (context.shape, mask.tolist()) == ((1, 1, WIDTH), [[True]])
    large = images.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2)  # more than 97 tokens
    context, mask = bare.encode(PROMPTS, large)
    for row, kept, expected in zip(
        context, mask, _library_context(folder, _kind(folder), PROMPTS, large, system=False)
    ):
        torch.testing.assert_close(row[kept], expected, atol=1e-4, rtol=1e-4)
    assert bare.identity["system_message"] is False


def test_identities_of_before_the_settings_are_those_of_their_defaults(encoder):
    assert "system_message" not in encoder.identity


def test_the_system_message_is_the_published_one_to_the_letter():
    """By hash, so that no edit of the constant goes unseen: weights were trained with this text."""
    digest = "7149fef58a222d80295dfc398a592ed2e31d24b56c2e4178d430a2d11b6c816f"
    assert hashlib.sha256(SYSTEM_MESSAGE.encode()).hexdigest() == digest


def test_shorter_prompts_are_padded_on_the_right_with_zeros(encoder, images):
    context, mask = encoder.encode(PROMPTS, images)
    lengths = mask.sum(1)
    assert lengths[0] > lengths[1] > 0
    assert mask[1, : lengths[1]].all()
    assert not mask[1, lengths[1] :].any()
    assert (context[1, lengths[1] :] == 0).all()


def test_the_empty_prompt_has_tokens(encoder):
    context, mask = encoder.encode([""])
    assert mask.all()
    assert mask.shape[1] > 0
    assert (context != 0).any()


def test_the_picture_changes_the_context_and_a_prompt_without_one_never_sees_it(encoder, images):
    with_first, _ = encoder.encode(PROMPTS[:1], images[:1])
    with_other, _ = encoder.encode(PROMPTS[:1], images[1:])
    assert (with_first - with_other).abs().max() > 1e-3
    # Text alone right after pictures: the model keeps no picture positions from the call before.
    before, _ = encoder.encode(PROMPTS[:1])
    encoder.encode(PROMPTS, images)
    after, _ = encoder.encode(PROMPTS[:1])
    assert torch.equal(before, after)


def test_large_pictures_are_brought_under_448_by_448_pixels(folder, encoder):
    frame = torch.zeros(1, 720, 1280, 3, dtype=torch.uint8)
    inputs = encoder._inputs(["x"], frame)
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    patch = PREPROCESSORS[_kind(folder)]["patch_size"]
    assert 0.8 * MAX_PIXELS < rows * columns * patch**2 <= MAX_PIXELS
    assert inputs["mm_token_type_ids"].sum() == rows * columns // 4


def test_a_long_prompt_loses_its_end_at_max_tokens(folder):
    short = QwenVLM(folder, text_dim=WIDTH, max_tokens=400)
    context, mask = short.encode(["push the red block " * 200, "open"])
    assert context.shape[1] == 400 - DROP_TOKENS
    assert mask[0].all()


def test_control_tokens_in_a_prompt_are_refused(encoder):
    with pytest.raises(UserError, match=r"control token <\|im_end\|>"):
        encoder.encode(["push<|im_end|>"])


def test_identity_names_weights_and_settings_and_survives_json(folder, encoder):
    identities_match(json.loads(json.dumps(encoder.identity)), QwenVLM(folder, text_dim=WIDTH).identity)
    other = QwenVLM(folder, text_dim=WIDTH, max_tokens=512).identity
    with pytest.raises(UserError, match=r"encoders\.max_tokens: made with 1024, this run has 512"):
        identities_match(encoder.identity, other)
    assert encoder.identity["image"] is True
    assert encoder.identity["drop_tokens"] == 97
    assert str(folder) not in json.dumps(encoder.identity)


def test_the_model_runs_in_the_precision_it_is_stored_in_and_context_is_float32(folder, encoder, tmp_path):
    import transformers

    from kairos_train.conditioning.qwen_vlm import MODEL_CLASSES

    target = _copy(folder, tmp_path / "m", model_safetensors=None, config_json=None)
    model_class = getattr(transformers, MODEL_CLASSES[_kind(folder)])
    model_class.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(target)
    half = QwenVLM(target, text_dim=WIDTH)
    assert half.encode(["open"])[0].dtype == torch.float32
    with pytest.raises(UserError, match=r"encoders\.dtype: made with 'float32', this run has 'bfloat16'"):
        identities_match(encoder.identity, half.identity)


def test_weights_are_frozen(encoder):
    assert not encoder._model.training
    assert not any(p.requires_grad for p in encoder._model.parameters())
    assert not encoder.encode(["x"])[0].requires_grad


def test_a_tokenizer_that_spends_other_than_97_tokens_before_the_prompt_is_refused(folder, tmp_path):
    """Also: the number holds for Qwen's word splitting with whole words, or the fixture itself would not load."""
    template = TEMPLATE.replace("{{ message.role }}", "{{ message.role }} system")
    with pytest.raises(UserError, match="101 tokens before the prompt, the encoder cuts 97"):
        QwenVLM(
            _copy(folder, tmp_path / "m", chat_template_json=json.dumps({"chat_template": template})), text_dim=WIDTH
        )


def test_another_width_is_refused(folder):
    with pytest.raises(UserError, match=r"encoders\.text\.text_dim: 2048, but the model in .* is 32 wide"):
        QwenVLM(folder, text_dim=2048)


def test_too_few_tokens_for_a_picture_are_refused(folder):
    with pytest.raises(UserError, match=r"encoders\.text\.max_tokens: 128; it must be at least"):
        QwenVLM(folder, text_dim=WIDTH, max_tokens=128)


def test_missing_tensors_are_refused_instead_of_filled_at_random(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    target = _copy(folder, tmp_path / "m", model_safetensors=None)
    state = load_file(folder / "model.safetensors")
    name = next(n for n in sorted(state) if n.endswith("norm.weight"))
    del state[name]
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 tensors"):
        QwenVLM(target, text_dim=WIDTH)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config_json": None}, "has no config.json"),
        ({"config_json": "{"}, "is not JSON"),
        ({"config_json": '{"model_type": "llama"}'}, "holds a llama model"),
        ({"model_safetensors": None}, "weights in .* cannot be read"),
        ({"model_safetensors": "not tensors"}, "weights in .* cannot be read"),
        ({"tokenizer_json": "{"}, "tokenizer or image processor in .* cannot be read"),
        ({"preprocessor_config_json": "{"}, "tokenizer or image processor in .* cannot be read"),
        ({"chat_template_json": None}, "has no chat template"),
    ],
)
def test_a_folder_that_is_not_the_model_is_refused_in_one_line(folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        QwenVLM(_copy(folder, tmp_path / "m", **changes), text_dim=WIDTH)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("encoders.text.path: ")


def test_no_path_is_refused_and_build_passes_the_settings_on(folder):
    config = EncodersConfig(
        video=VideoEncoderConfig(kind="block_dct"), text=TextEncoderConfig(path=None, text_dim=WIDTH)
    )
    with pytest.raises(UserError, match=r"encoders\.text\.path: not set"):
        build_encoders(config)
    config.text.path, config.text.image, config.text.system_message = str(folder), False, False
    identity = build_encoders(config).identity["text"]
    assert identity["weights_sha256"]
    assert (identity["image"], identity["system_message"]) == (False, False)
