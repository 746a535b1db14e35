"""Short random texts, and a tokenizer of single characters."""

import torch

from lorakit import encode


class Characters:
    """A tokenizer of single characters; '\\x02' is eos."""

    eos_token_id = 2

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [2 if c == "\x02" else (ord(c) - 94) % 1000 for c in text]}  # a -> 3

    def decode(self, ids):
        return "".join(chr((i + 94) % 1000) for i in ids)


TOKENIZER = Characters()


def examples(n=24, seed=0):
    draw = torch.Generator().manual_seed(seed)
    words = ["".join(chr(97 + int(c)) for c in torch.randint(0, 20, (3 + i % 4,), generator=draw)) for i in range(n)]
    return [encode(TOKENIZER, word, word[:2] + "\x02") for word in words]


UNEVEN = [*examples(5), *(encode(TOKENIZER, letter, "a\x02") for letter in "bcd")]  # of which some can share a row
