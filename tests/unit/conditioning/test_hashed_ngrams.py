"""The weight-free text encoder: fixed vectors, one token per word, never an empty mask."""

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kairos_train.basics.errors import UserError
from kairos_train.conditioning.hashed_ngrams import PAIR_WEIGHT, HashedNgrams
from kairos_train.conditioning.interfaces import TextEncoder


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1).item()


def test_one_token_per_word_and_mark_right_padded():
    context, mask = HashedNgrams(64, 100).encode(["Push the red block, now!", "stop"])
    assert isinstance(HashedNgrams(64, 100), TextEncoder)
    assert context.shape == (2, 7, 64)
    assert context.dtype == torch.float32
    assert mask.tolist() == [[True] * 7, [True] + [False] * 6]
    assert (context[1, 1:] == 0).all()
    assert (context[0] != 0).any(-1).all()


def test_tokens_are_the_written_definition():
    def signs(text: bytes) -> torch.Tensor:
        digest = int.from_bytes(hashlib.shake_256(text).digest(2), "big")
        return torch.tensor([1.0 if digest >> (15 - i) & 1 else -1.0 for i in range(12)])

    start, end, pair = b"\xf8", b"\xf9", b"\xfa"
    grams = [b"g", b"o", start + b"g", b"go", b"o" + end, start + b"go", b"go" + end, start + b"go" + end]
    word = sum(map(signs, grams)) / math.sqrt(8)
    expected = (word + PAIR_WEIGHT * signs(start + pair + b"go")) / math.sqrt(1 + PAIR_WEIGHT**2)
    torch.testing.assert_close(HashedNgrams(12, 4).encode(["Go"])[0][0, 0], expected)


def test_the_same_in_another_process():
    """Python's own hash is salted per process; this one must not be."""
    code = (
        "from kairos_train.conditioning.hashed_ngrams import HashedNgrams\n"
        "import hashlib; context, _ = HashedNgrams(40, 9).encode(['open the drawer', ''])\n"
        "print(hashlib.sha256(context.numpy().tobytes()).hexdigest())"
    )
    root = Path(__file__).resolve().parents[3]
    run = [subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)]
    here = HashedNgrams(40, 9).encode(["open the drawer", ""])[0].numpy().tobytes()
    assert run[0].stdout.strip() == hashlib.sha256(here).hexdigest()


def test_components_have_unit_spread():
    words = "push the red block to left of a green bowl then open drawer and close it gently with your gripper"
    context, mask = HashedNgrams(2048, 100).encode([words])
    spread = context[mask].std(1)
    assert spread.min() > 0.8
    assert spread.max() < 1.2
    assert context.mean().abs() < 0.02


def test_words_are_told_apart_and_kin_are_alike():
    def word(text: str) -> torch.Tensor:
        return HashedNgrams(2048, 10).encode([text])[0][0, 0]

    assert _cosine(word("red"), word("blue")) < 0.35
    assert _cosine(word("drawer"), word("drawers")) > _cosine(word("drawer"), word("button")) + 0.2
    assert torch.equal(word("Red"), word("red"))
    # Composed and decomposed forms of the same text.
    assert torch.equal(word("caf\u00e9"), word("cafe\u0301"))


def test_word_order_changes_the_set_of_tokens():
    """Cross-attention has no positions: as sets, these two must differ."""
    encoder = HashedNgrams(256, 20)
    one, two = (encoder.encode([text])[0][0] for text in ("move red to blue", "move blue to red"))
    assert not torch.allclose(one.sort(0).values, two.sort(0).values)
    assert torch.equal(one[0], two[0])


def test_the_empty_prompt_is_one_token_that_is_not_the_null_condition():
    encoder = HashedNgrams(64, 10)
    context, mask = encoder.encode(["", "  \n", "red"])
    assert mask.sum(1).tolist() == [1, 1, 1]
    assert torch.equal(context[0], context[1])
    assert context[0, 0].square().mean() == 1
    assert not torch.equal(context[0], context[2])


def test_a_long_prompt_loses_its_end_at_max_tokens():
    encoder = HashedNgrams(32, 3)
    long, mask = encoder.encode(["one two three four five"])
    assert mask.shape == (1, 3)
    assert torch.equal(long, encoder.encode(["one two three"])[0])


def test_pictures_are_not_looked_at_and_the_identity_says_so():
    encoder = HashedNgrams(32, 10)
    image = torch.full((1, 8, 8, 3), 200, dtype=torch.uint8)
    assert torch.equal(encoder.encode(["red"], image)[0], encoder.encode(["red"])[0])
    assert encoder.identity["image"] is False


def test_sizes_below_one_are_refused():
    with pytest.raises(UserError, match=r"encoders\.text\.text_dim: 0"):
        HashedNgrams(0, 10)
    with pytest.raises(UserError, match=r"encoders\.text\.max_tokens: 0"):
        HashedNgrams(8, 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_any_text_gives_finite_tokens_and_its_row_does_not_depend_on_the_batch(prompts):
    encoder = HashedNgrams(24, 8)
    context, mask = encoder.encode(prompts)
    assert torch.isfinite(context).all()
    assert mask.any(1).all()
    assert (context[~mask] == 0).all()
    for i, prompt in enumerate(prompts):
        assert torch.equal(context[i][mask[i]], encoder.encode([prompt])[0][0])
