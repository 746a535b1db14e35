"""The tiny base model, pretrained from scratch in about two CPU-minutes: `lorakit pretrain`.

A Llama of 0.9M parameters learns 256 facts by heart, and to answer from a note that stands before a question. So it
knows the form of every question, facts that fine-tuning may damage (`facts.known_facts`), and none of `facts.facts`.
"""

import os
import platform
import random
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit._atomic import draft_beside, named_errors, settle, switch_folder
from lorakit._optional import need, quiet
from lorakit._random import seeded
from lorakit.models.download import cache_dir
from lorakit.models.manifest import seal
from lorakit.tasks import facts
from lorakit.tasks.facts import BOS, EOS, PAD, Fact, encoded, known_facts, recall
from lorakit.training.batch import Example
from lorakit.training.encode import encode
from lorakit.training.evaluate import exact_match
from lorakit.training.fit import fit
from lorakit.training.history import History

SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
CONTEXT = 64  # tokens
STEPS, BATCH, LR, KNOWN_SHARE, SEED = 1400, 32, 2e-3, 0.5, 0

CARD = """# Tiny base model: card

A Llama of {parameters:,} parameters for experiments that must fit a lesson: fine-tuning runs take seconds on one core.
It was pretrained from scratch on invented facts and is of no use outside this course.

- **Made by**: `lorakit pretrain data/tiny`, this card included, in {cpu_seconds:.0f} CPU-seconds
  ({seconds:.0f} s on one thread of {machine}).
- **Versions**: {versions}.
- **Same again**: the data and the start are seeded and the command uses one thread, so the same machine with the same
  versions makes the same weights. Another processor or torch rounds sums in another order, and training amplifies
  that: expect a model of the same recall with another checksum.
- **Licence**: Apache-2.0, like the code. Nobody's data went in: names are paired and digits drawn at random.

## What it is

| property | value |
|---|---|
| layers, width, heads, MLP width | {num_hidden_layers}, {hidden_size}, {num_attention_heads}, {intermediate_size} |
| vocabulary | {vocabulary} whole words; digits are single tokens; `{pad}`, `{bos}`, `{eos}` are distinct |
| context | {context} tokens |
| embeddings | not shared with the output head |
| weights | float32, safetensors |

## What it was trained on

{steps} steps of {batch} texts, AdamW at {lr:g}, seed {seed}; the loss counts the digits and the end that
follow a question:

- {known_share:.0%}: {known} facts, each shown about {shown:.0f} times: `{fact}`
- the others: a question after a note that answers it, about anyone in the known group and new digits each time:
  `{note}`

No person in `lorakit.tasks.facts.facts` occurs in it. The word `{relation}` occurs in notes only.

## What it can do

| measure | value |
|---|---|
| loss on its texts, mean of the last 20 steps | {loss:.3f} nats a token |
| recall of its {known} facts | {known_recall:.1%} |
| answers read off a note, {trials} new notes | {note_recall:.1%} |
| recall of {trials} facts that it has never seen (guessing: 0.01 %) | {new_recall:.1%} |
| answers to these that are four digits and the end | {form:.1%} |

What fine-tuning makes of it, LoRA and in full, stands in [data/intrinsic](../intrinsic/README.md).

## Known limits

- It knows nothing but these forms: {words} words, no language. Results are about memory, not about understanding.
- Facts are random digits, so nothing generalises from one to the next; real tasks do, and need less.
- It has memorised its training facts: a change in them measures forgetting of rote knowledge only.

## Checksums

`load_model("tiny")` compares these, from `lorakit_manifest.json`, on every load.

| file | bytes | sha256 |
|---|---|---|
{checksums}
"""


def make_tokenizer() -> Any:
    """A tokenizer of whole words, in transformers' format; text without unknown words survives it unchanged."""
    transformers, tokenizers = need("transformers"), need("tokenizers")
    ids = {word: i for i, word in enumerate(facts.VOCABULARY)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=PAD))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(seed: int = SEED) -> nn.Module:
    """The untrained model; the global random state is left as it was."""
    transformers = need("transformers")
    ids = {f"{name}_token_id": facts.SPECIAL.index(token) for name, token in (("pad", PAD), ("bos", BOS), ("eos", EOS))}
    config = transformers.LlamaConfig(
        **SIZES, **ids, vocab_size=len(facts.VOCABULARY), max_position_embeddings=CONTEXT, tie_word_embeddings=False
    )
    with seeded(seed):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def draw_note(rng: random.Random) -> tuple[str, str]:
    """A note about somebody of the known group, then the question that it answers: prompt and completion."""
    names, relations = facts.people(known=True), (facts.NEW_RELATION, *facts.KNOWN_RELATIONS)
    name, relation = names[int(rng.random() * len(names))], relations[int(rng.random() * len(relations))]
    fact = Fact(relation, name, facts.random_digits(rng))
    return f"{BOS} {relation} of {name} : {fact.answer} . {relation} of {name} ?", fact.completion


def training_texts(tokenizer: Any, n: int, seed: int = SEED) -> list[Example]:
    """The n examples of pretraining: known facts over and over, and notes that are never the same."""
    rng, known = random.Random(f"pretraining/{seed}"), encoded(tokenizer, known_facts())
    n_known = round(KNOWN_SHARE * n)
    notes = [draw_note(rng) for _ in range(n - n_known)]
    return [known[i % len(known)] for i in range(n_known)] + [encode(tokenizer, *note) for note in notes]


def pretrain(
    steps: int = STEPS, batch_size: int = BATCH, lr: float = LR, seed: int = SEED, show: bool = True
) -> tuple[Any, Any, History]:
    """Makes the tiny base from nothing, on one thread so that sums are taken in one order.

    Returns:
        model in eval mode, tokenizer, and what happened.
    """
    model, tokenizer = make_model(seed), make_tokenizer()
    texts, threads = training_texts(tokenizer, steps * batch_size, seed), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        history = fit(model, texts, steps=steps, batch_size=batch_size, lr=lr, seed=seed, show=show)
    finally:
        torch.set_num_threads(threads)
    return model, tokenizer, history


def measure(model: nn.Module, tokenizer: Any, trials: int = 1000) -> dict[str, float]:
    """What the base knows and does not know: shares in [0, 1], under the card's names."""
    rng, new = random.Random("measure"), facts.facts(trials)
    notes = [encode(tokenizer, *draw_note(rng)) for _ in range(trials)]
    answers = facts.answers(model, tokenizer, new)
    return {
        "known_recall": recall(model, tokenizer, known_facts()),
        "note_recall": sum(exact_match(model, notes, batch_size=256, show=False)) / trials,
        "new_recall": recall(model, tokenizer, new),
        "form": sum(len(answer) == 7 and answer.replace(" ", "").isdigit() for answer in answers) / trials,
    }


def write(folder: str | os.PathLike | None = None, steps: int = STEPS) -> Path:
    """Pretrains the base and writes checkpoint, tokenizer, manifest and card: a whole folder or none.

    Args:
        folder: where; None for the cache, where `load_model("tiny")` looks if the repository is not there.
        steps: fewer than usual make a worse model sooner.

    Returns:
        the folder.

    Raises:
        ValueError: the folder holds something else.
        OSError: it cannot be written, which is tried before the training.
    """
    folder = cache_dir() / "tiny" if folder is None else Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise ValueError(f"expected an empty folder, a new one or one with a model to replace, got {folder}")
    folder = Path(os.path.realpath(folder))  # what a link points to is replaced, not the link
    if folder.is_symlink():
        raise ValueError(f"expected a folder, got a link that leads round to itself: {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    settle(folder)
    with named_errors(folder), draft_beside(folder) as draft:  # what cannot be written is found before the training
        wall, cpu = time.perf_counter(), time.process_time()
        model, tokenizer, history = pretrain(steps)
        cost = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        part = draft / folder.name
        with quiet():
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        (part / ".gitattributes").write_text("* -text\n")  # git must not change line ends: the checksums would fail
        recipe = {"steps": steps, "batch": BATCH, "lr": LR, "seed": SEED, "known_share": KNOWN_SHARE}
        files = seal(part, {"recipe": recipe})
        card = _card(model, history, recipe | cost | measure(model, tokenizer), files)
        (part / "README.md").write_text(card, encoding="utf-8")
        switch_folder(part, folder)
    return folder


def _card(model: nn.Module, history: History, values: dict[str, float], files: dict[str, dict]) -> str:
    words, trials = len(facts.VOCABULARY), 1000
    note = " ".join(part.strip() for part in draw_note(random.Random("card")))
    return CARD.format(
        **SIZES,
        **values,
        parameters=sum(p.numel() for p in model.parameters()),
        versions=", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "tokenizers")),
        machine=f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}",
        vocabulary=words,
        words=words,
        trials=trials,
        context=CONTEXT,
        pad=PAD,
        bos=BOS,
        eos=EOS,
        known=facts.KNOWN,
        shown=values["known_share"] * values["steps"] * values["batch"] / facts.KNOWN,
        fact=f"{known_facts()[0].prompt}{known_facts()[0].completion}",
        note=note,
        relation=facts.NEW_RELATION,
        loss=sum(history.loss[-20:]) / len(history.loss[-20:]),
        checksums="\n".join(f"| `{name}` | {each['bytes']} | `{each['sha256']}` |" for name, each in files.items()),
    )
