"""A text encoder without weights, for machines that have no language model.

Definition (conditioning specification, "The weight-free pair"; the details are *ours*):

1. The prompt is brought to Unicode form NFC and lower case, and split into words and single punctuation marks. Each is
   one token, so that cross-attention can tell words.
2. Every string s has a fixed vector of signs: the first text_dim bits of SHAKE-256(s in UTF-8), as +1 and -1.
3. A word is the sum of the vectors of its distinct 1- to 4-grams of bytes between a start and an end mark, and of the
   whole word, over the square root of their number: words that share letters are alike, and the spread is 1.
4. A token is (word + PAIR_WEIGHT * vector of the pair with the word before it) / sqrt(1 + PAIR_WEIGHT^2). The pair
   carries word order, to which cross-attention without positions is otherwise blind.
5. The empty prompt is one token of its own, not zeros: zeros are the null condition.

Pictures are not looked at. Nothing depends on a random generator, a library version or the machine.

Shapes: B batch, N tokens, C text_dim.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kairos_train.basics.errors import UserError

LONGEST_NGRAM = 4
PAIR_WEIGHT = 0.5
_TOKEN = re.compile(r"\w+|[^\w\s]")
# Marks that no prompt contains: UTF-8 never has these bytes.
_START, _END, _PAIR, _EMPTY = b"\xf8", b"\xf9", b"\xfa", b"\xfb"


class HashedNgrams:
    """TextEncoder without weights. A prompt longer than `max_tokens` is cut at the end."""

    def __init__(self, text_dim: int, max_tokens: int, device: str | torch.device = "cpu") -> None:
        """Raises UserError for sizes below one."""
        for name, value in (("text_dim", text_dim), ("max_tokens", max_tokens)):
            if value < 1:
                raise UserError(f"encoders.text.{name}: {value}; it must be at least 1")
        self.text_dim = text_dim
        self.max_tokens = max_tokens
        self._device = torch.device(device)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "kind": "hashed_ngrams",
            "version": 1,
            "text_dim": self.text_dim,
            "max_tokens": self.max_tokens,
            "image": False,
        }

    def encode(self, prompts: list[str], images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Prompts -> context float32 (B,N,C), mask bool (B,N). `images` is accepted and not looked at."""
        del images
        rows = [self._tokens(prompt) for prompt in prompts]
        longest = max(len(row) for row in rows)
        context = np.zeros((len(rows), longest, self.text_dim), np.float32)
        mask = np.zeros((len(rows), longest), bool)
        for i, row in enumerate(rows):
            context[i, : len(row)] = row
            mask[i, : len(row)] = True
        return torch.from_numpy(context).to(self._device), torch.from_numpy(mask).to(self._device)

    def _tokens(self, prompt: str) -> np.ndarray:
        """float32 (N,C), N >= 1."""
        words = _TOKEN.findall(unicodedata.normalize("NFC", prompt).lower())[: self.max_tokens]
        if not words:
            return self._signs(_EMPTY)[None]
        encoded = [word.encode("utf-8", "surrogatepass") for word in words]
        before = [_START, *encoded]
        tokens = [
            self._word(word) + PAIR_WEIGHT * self._signs(previous + _PAIR + word)
            for previous, word in zip(before, encoded)
        ]
        return np.stack(tokens) / np.float32(math.sqrt(1 + PAIR_WEIGHT**2))

    def _word(self, word: bytes) -> np.ndarray:
        """float32 (C,): step 3."""
        marked = _START + word + _END
        grams = {marked[i : i + n] for n in range(1, LONGEST_NGRAM + 1) for i in range(len(marked) - n + 1)}
        grams -= {_START, _END}  # in every word: they would say nothing
        grams.add(marked)
        # Sorted: a set's order differs between processes, and so would the last bits of the sum if it were not exact.
        return sum(self._signs(gram) for gram in sorted(grams)) / np.float32(math.sqrt(len(grams)))

    def _signs(self, text: bytes) -> np.ndarray:
        """float32 (C,) of +1 and -1: step 2."""
        digest = hashlib.shake_256(text).digest((self.text_dim + 7) // 8)
        bits = np.unpackbits(np.frombuffer(digest, np.uint8), count=self.text_dim)
        return bits.astype(np.float32) * 2 - 1
