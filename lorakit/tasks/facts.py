"""The capacity task: facts that nothing but memory can answer, "extension of ada hopper ?" -> four random digits.

A fact carries log2(10,000) = 13.3 bits and follows no rule, so exact recall counts what a set of trainable numbers can
hold. Every text is words of `VOCABULARY` with single blanks between them. People come in two groups that never mix:
those whose facts the tiny base has learnt (`known_facts`), and those it has never heard of (`facts`).
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import nn

from lorakit._numbers import check_integer
from lorakit.tasks.task import Task, encoded, same_texts, shuffled
from lorakit.training.evaluate import exact_match

PAD, BOS, EOS = SPECIAL = ("<pad>", "<bos>", "<eos>")
NEW_RELATION = "extension"
KNOWN_RELATIONS = ("room", "desk", "locker", "badge")
FIRST = """
ada alan alba alma amir anna anton arlo asha aya basil bela bianca boris bruno carla carmen cecil clara cora cyrus dana
daria diego dora edgar edith elena elias elsa emil emma enzo erik esther ethan eva ezra fatima felix fiona flora frank
freya gemma george gita grace greta gustav hana hanna hector heidi helen henry hiro hugo ida igor ilse imani ines ingrid
irene iris isaac ivan ivy jack jana jasper joan jonas julia kai karen karim kira klara lara lars laura leila lena leo
lila linus liv lola lucia luis luna magda maja marco maria marta maya milo mina mira nadia naomi nico nina noah nora
olga oscar otto paula pedro petra rafael rosa
"""
LAST = """
abbott adler akers alvarez amato archer arden avila baker barlow baxter becker benson bishop blake bloom bolton booth
bowen brandt brooks burke byrne calder carver castle chandler cheng clarke cole conway cooper costa crane curtis dalton
dawson delgado dixon doyle drake duffy easton ellis engel evans farrow fisher fleming flynn forbes foster fowler fraser
fuller gibbs gomez grant graves greer griffin haas hale hansen harper hayes hobbs holt hopper howell hughes hunter
irving jansen jensen jordan juarez keller kemp kent khan klein knight kovacs lambert lang larsen lawson lowe lynch
mason mehta mercer meyer mills monroe moreno morris murray nash nielsen nolan novak ortiz osborn palmer park parker
patel perry pierce porter quinn ramos reed reyes
"""
FIRST_NAMES, LAST_NAMES = FIRST.split(), LAST.split()
VOCABULARY = [*SPECIAL, *"0123456789", "of", "?", ":", ".", NEW_RELATION, *KNOWN_RELATIONS, *FIRST_NAMES, *LAST_NAMES]
KNOWN = 256  # facts that the base has learnt


@dataclass(frozen=True)
class Fact:
    """One fact: who, what about them, and the four digits."""

    relation: str
    name: str
    digits: str

    @property
    def answer(self) -> str:
        """The digits, apart: one token each."""
        return " ".join(self.digits)

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return f"{BOS} {self.relation} of {self.name} ?"

    @property
    def completion(self) -> str:
        """What the model must write: the digits and the end."""
        return f" {self.answer} {EOS}"


@cache
def people(known: bool) -> tuple[str, ...]:
    """All names, first and last, of one group: a checksum of the name decides, about one in four is `known`."""
    names = (f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES)
    return tuple(name for name in names if (zlib.crc32(name.encode()) % 4 == 0) == known)


def random_digits(rng: random.Random) -> str:
    """Four digits, each equally likely, from `rng.random()` alone."""
    return f"{int(rng.random() * 10_000):04d}"


def _draw(n: int, known: bool, relations: Sequence[str], rng: random.Random) -> list[Fact]:
    names = people(known)
    check_integer("n", n, 1, len(names))  # people
    chosen = shuffled(names, rng)[:n]
    return [Fact(relations[i % len(relations)], name, random_digits(rng)) for i, name in enumerate(chosen)]


def facts(n: int = 48, seed: int = 0) -> list[Fact]:
    """Draws facts that the tiny base has never seen: extensions of n different people.

    Args:
        n: how many, up to about 10,000.
        seed: other seeds draw other people and other digits; so does another n.

    Raises:
        ValueError: there are fewer than n people.
    """
    return _draw(n, False, [NEW_RELATION], random.Random(f"facts/{n}/{seed}"))


def known_facts(n: int = KNOWN) -> list[Fact]:
    """The first n of the facts that the tiny base was pretrained on, to see what fine-tuning makes it forget."""
    check_integer("n", n, 0, KNOWN)
    return _draw(KNOWN, True, KNOWN_RELATIONS, random.Random("known"))[:n]


def swapped(items: Sequence[Fact]) -> list[Fact]:
    """The same questions, each with the next one's answer: a control, after which the true answers must stay unknown.

    Raises:
        ValueError: fewer than two facts.
    """
    if len(items) < 2:
        raise ValueError(f"expected at least two facts to swap, got {len(items)}")
    return [replace(item, digits=items[i - 1].digits) for i, item in enumerate(items)]


def answers(model: nn.Module, tokenizer: Any, items: Sequence[Fact]) -> list[str]:
    """What the model says to each question, to be compared with `item.answer`."""
    return FACTS.answers(model, tokenizer, items, max_new_tokens=6, batch_size=256, show=False)


def recall(model: nn.Module, tokenizer: Any, items: Sequence[Fact]) -> float:
    """Share of the facts, in [0, 1], that the model answers with exactly the right digits and then stops.

    Guessing scores 1 in 10,000. One forward pass: the same as comparing `answers`.

    Raises:
        ValueError: no facts.
    """
    if not items:
        raise ValueError("expected at least one fact, got none")
    return sum(exact_match(model, encoded(tokenizer, items), batch_size=256, show=False)) / len(items)


def _draw_split(split: str, n: int | None, seed: int) -> list[Fact]:
    return facts(48 if n is None else n, seed) if split == "new" else known_facts(KNOWN if n is None else n)


FACTS = Task("facts", ("new", "known"), _draw_split, same_texts, end=EOS)
