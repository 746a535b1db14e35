"""The README's programs of "In your own script" run as they stand; its table of what works with what is tried."""

import json
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import works_with
from helpers.architectures import EXPERTS, GQA, TINY
from helpers.chat import byte_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import lorakit

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## In your own script\n")[2].partition("\n## ")[0]
PROGRAMS = {  # what the README says of each program -> the program
    about.strip().splitlines()[-1].rstrip(":"): code
    for about, code in re.findall(r"(.+?)\n```python\n(.*?)```", SECTION, re.DOTALL)
}
MOST_LINES = 25


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """The folders and files that the programs read, with tiny random models."""
    folder = tmp_path_factory.mktemp("readme")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "my-model")
    tokenizer.save_pretrained(folder / "my-mixture")
    sizes = TINY | GQA | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    config = LlamaConfig(**sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "my-model")
    MixtralForCausalLM(MixtralConfig(**sizes, **EXPERTS)).save_pretrained(folder / "my-mixture")
    BertForSequenceClassification(BertConfig(**TINY)).save_pretrained(folder / "my-bert")
    for name in ("sql-adapter", "poem-adapter"):
        lorakit.save_adapter(lorakit.inject(LlamaForCausalLM(config), 2, 4), folder / name)
    pairs = [{"prompt": f"{n} plus 1 is", "completion": f" {n + 1}<|im_end|>"} for n in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    asked, said = {"role": "user", "content": "2 plus 1?"}, {"role": "assistant", "content": "3"}
    (folder / "chat.jsonl").write_text(json.dumps({"messages": [asked, said, asked, said]}) + "\n")
    return folder


@pytest.fixture(autouse=True)
def tensorboard(monkeypatch):
    """Stands in for a package that the programs may use and the tests need not have."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Mock())


def shortened(program):
    """The program with a two-hundredth of the steps."""
    return re.sub(
        r"(steps|_every)(=|\": )(\d+)", lambda found: f"{found[1]}{found[2]}{max(1, int(found[3]) // 200)}", program
    )


def test_what_works_with_what_is_as_the_table_says():
    """`python tests/works_with.py` writes the table anew."""
    printed = README.partition(works_with.BEGIN)[2].partition(works_with.END)[0].strip().splitlines()
    assert printed == works_with.table().splitlines()


def test_the_section_has_programs():
    assert len(PROGRAMS) >= 2
    assert SECTION.count("```python") == len(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_the_readme_runs(name, workplace, monkeypatch):
    program = PROGRAMS[name]
    assert len([line for line in program.splitlines() if line]) <= MOST_LINES
    monkeypatch.chdir(workplace)
    exec(compile(shortened(program), f"README.md: {name}", "exec"), {"__name__": "__main__"})
