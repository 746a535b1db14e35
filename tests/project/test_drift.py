"""The check of what the course asks of its libraries: what it catches, what it lets pass, and the project itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import drift
import pytest

from lorakit._optional import quiet

AUTO = "transformers.AutoModelForCausalLM.from_pretrained"
LOAD = f"import transformers\n{AUTO}"
TRL = "trl" + " sft"  # in two parts, so that the check does not take this file's strings for commands
LISTED = "c = ['trl', 'sft', '--learning_rate', x]\n"


def unknown(text):
    """What is unknown in a source, and how many keywords and flags are known."""
    with quiet():
        found, _, count = drift.check(text)
    return sorted(what for _, what in found), count


WRONG = {
    "from trl import get_kbit_device_map": "trl.get_kbit_device_map",
    "import trl.no_such_module": "trl.no_such_module",
    "import peft\npeft.NoSuchConfig(r=2)": "peft.NoSuchConfig",
    "def f():\n    from peft import LoraConfig as C\n    return C.no_such_method": "peft.LoraConfig.no_such_method",
    "transformers, x = need('transformers'), 3\ntransformers.NoSuchModel": "transformers.NoSuchModel",
    "import trl\ntrl.SFTConfig(max_seq_length=512)": "trl.SFTConfig(max_seq_length)",
    "import transformers as tf\ntf.TrainingArguments(evaluation_strategy='no')": (
        "transformers.TrainingArguments(evaluation_strategy)"
    ),
    "from trl import SFTTrainer\nSFTTrainer(model=m, tokenizer=t)": "trl.SFTTrainer(tokenizer)",
    "from trl import SFTTrainer\nt = SFTTrainer(m)\nt.train(resume=True)": "trl.SFTTrainer().train(resume)",
    "from trl import SFTTrainer\nt = SFTTrainer(m)\nt.trian()": "trl.SFTTrainer().trian",
    "import peft\npeft.PeftModel.from_pretrained(m, f, trainable=True)": "peft.PeftModel.from_pretrained(trainable)",
    f"{LOAD}(x, torch_dytpe=d)": f"{AUTO}(torch_dytpe)",
    f"{LOAD}(x, load_in_4bit=True)": f"{AUTO}(load_in_4bit)",
    "from transformers import BitsAndBytesConfig as B\nB(bnb_4bit_compute_dytpe=d)": (
        "transformers.BitsAndBytesConfig(bnb_4bit_compute_dytpe)"
    ),
    "import transformers as tf\ntf.LlamaConfig(num_hiden_layers=2)": "transformers.LlamaConfig(num_hiden_layers)",
    "import transformers as tf\ntf.LlamaForCausalLM(c).generate(max_new_token=3)": (
        "transformers.LlamaForCausalLM().generate(max_new_token)"
    ),
    "import datasets\ndatasets.load_dataset('json', data_file=f)": "datasets.load_dataset(data_file)",
    "from bitsandbytes import nn\nnn.Linear4bit(8, 8, quant_typ='nf4')": "bitsandbytes.nn.Linear4bit(quant_typ)",
    "import trl\nmore = {'sed': 3}\ntrl.SFTConfig(**more)": "trl.SFTConfig(sed)",
    "import trl\nmore = dict(sed=3) | {}\nmore |= other\ntrl.SFTConfig(**more)": "trl.SFTConfig(sed)",
    "import trl\nmore = {}\nmore |= {'sed': 3} if x else {}\ntrl.SFTConfig(**more)": "trl.SFTConfig(sed)",
    "import trl\ndef f(a, **b):\n    return trl.SFTConfig(**{'seed': a} | b)\nf(a=1, sed=3)": "trl.SFTConfig(sed)",
    "import functools, trl\nfunctools.partial(trl.SFTConfig, sed=3)": "trl.SFTConfig(sed)",
    f"{LISTED}c += ['--max_seq_length', '1']": f"{TRL} --max_seq_length",
    f"{LISTED}run([sys.executable, '-m', 'trl.cli', *c[1:], '--max_seq_length'])": f"{TRL} --max_seq_length",
    "run([sys.executable, '-m', 'trl.scripts.sft', '--torch_dtype=auto'])": f"{TRL} --torch_dtype",
    f"f'{TRL} --dtype {{x}} --max_seq_length 3'": f"{TRL} --max_seq_length",
    "run(['trl', 'no_such_command', '--seed', '3'])": "trl.scripts.no_such_command",
}
RIGHT = {  # a source -> how many keywords and flags are known
    "import peft\npeft.get_peft_model(m, peft.LoraConfig(r=8, task_type='CAUSAL_LM'), adapter_name='a')": 3,
    "from trl import SFTTrainer\nt = SFTTrainer(m, processing_class=p)\nt.train(resume_from_checkpoint=f)\nt.state": 2,
    f"{LOAD}(x, dtype=d, device_map='auto', quantization_config=q, attn_implementation='sdpa', use_cache=False)": 5,
    f"{LOAD}(x, cache_dir=f, local_files_only=True, num_labels=2, use_safetensors=True, trust_remote_code=False)": 5,
    "import transformers as t\nt.AutoTokenizer.from_pretrained(x, padding_side='left', use_fast=True, sep_token=s)": 3,
    "import transformers as tf\ntf.GPT2Config(n_embd=8, hidden_size=8, num_labels=2)\ntf.LlamaConfig(rope_theta=1)": 4,
    "import transformers as tf\ntf.LlamaForCausalLM(c).generate(input_ids=x, max_new_tokens=3, do_sample=True)": 3,
    "import peft\npeft.PeftModel.from_pretrained(m, f, is_trainable=True, revision='main', subfolder='a')": 3,
    "import peft\npeft.PeftModelForCausalLM(m, c, low_cpu_mem_usage=True, autocast_adapter_dtype=False)": 2,
    "from datasets import load_dataset\nload_dataset('json', data_files=f, split='train', field='data')": 3,
    f"{LISTED}c += ['--seed', '3', '--use-peft']\nrun(c)": 3,
    f"'{TRL} --config f --num_processes 2'": 2,
    "model, tokenizer = load_model()\nmodel.generate(anything=1)\ntokenizer(x, anything=1)": 0,
    "import trl\ntrainer = trl.SFTTrainer(m)\nfor trainer in trainers:\n    trainer.train(anything=1)": 0,
    "import trl\ndef f(trl):\n    return trl.NoSuch(anything=1)\nfrom .peft import NoSuch": 0,
    "import trl\ntrl.SFTConfig(**{k: v for k, v in other}, **other, **more['anything'])": 0,
    "x = x * x\ny = y | {'anything': 1}\ndict(**y)\n['pip', 'install', '--anything', 'trl', 'sft']": 0,
}


@pytest.mark.parametrize("text", WRONG)
def test_it_catches(text):
    assert unknown(text)[0] == [WRONG[text]]


@pytest.mark.parametrize("text", RIGHT)
def test_it_lets_pass(text):
    assert unknown(text) == ([], RIGHT[text])


def test_a_deprecated_keyword_is_only_noted():
    with quiet():
        found, deprecated, count = drift.check(f"\n{LOAD}(x, torch_dtype=d)")
    assert (found, count) == ({}, 1)
    assert deprecated == {(3, f"{AUTO}(torch_dtype) is deprecated; write dtype")}


def test_the_project_asks_for_what_its_libraries_have():
    with quiet():
        problems, _, count = drift.examine()
    assert problems == []
    assert count > 200, f"only {count} keywords were seen"


def notebook(folder, *cells):
    path = folder / "notebooks" / "a.ipynb"
    path.parent.mkdir()
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": cell.splitlines(True)} for cell in cells]}))


def test_a_notebook_is_read_with_its_magics(tmp_path, monkeypatch, capsys):
    notebook(
        tmp_path,
        "%load_ext x\nif a:\n    !" + TRL + " --seed 3 \\\n    --nope 1\nimport trl\nb = (a\n     != 3\n     % 2)",
        "%%bash\n" + TRL + " --nope 2\necho 'it'",
        "%%time\ntrl.SFTConfig(\n    max_seq_length=3)",
    )
    monkeypatch.setattr(drift, "PROJECT", tmp_path)
    assert drift.installed() == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    flag, keyword = f"{TRL} --nope", "trl.SFTConfig(max_seq_length); there is max_length"
    assert [line.split(";")[0] for line in lines[:2]] == [f"notebooks/a.ipynb:cell {i}: {flag}" for i in (1, 2)]
    assert lines[2:] == [f"notebooks/a.ipynb:cell 3: {keyword}"]
    assert summary.startswith("3 unknown, 1 keywords known to transformers ")


def test_a_mistake_that_is_meant_has_to_stay_one(tmp_path, monkeypatch, capsys):
    notebook(tmp_path, "import trl\ntrl.SFTConfig(sed=3)")
    monkeypatch.setattr(drift, "PROJECT", tmp_path)
    monkeypatch.setattr(drift, "MEANT", {("notebooks/a.ipynb", "trl.SFTConfig(sed)")})
    assert drift.installed() == 0
    monkeypatch.setattr(drift, "MEANT", drift.MEANT | {("notebooks/a.ipynb", "trl.SFTConfig(seed)")})
    assert drift.installed() == 1
    assert "notebooks/a.ipynb: expected trl.SFTConfig(seed) to be unknown\n" in capsys.readouterr().out


def test_the_newest_releases_are_not_missed_without_an_index(monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert not drift.newest()
    assert capsys.readouterr().out.startswith("pip cannot get the newest releases: ERROR: No matching distribution")


def test_what_new_releases_need_is_found(tmp_path):
    info = tmp_path / "new-1.0.dist-info"
    info.mkdir()
    needs = ("torch>=99", "peft>=99", "no-such-package", "trl", 'datasets>=99; extra == "x"')
    text = "Metadata-Version: 2.1\nName: new\nVersion: 1.0\n" + "".join(f"Requires-Dist: {need}\n" for need in needs)
    (info / "METADATA").write_text(text)
    assert drift.unmet(str(tmp_path)) == {"peft>=99", "no-such-package"}


@pytest.mark.long
def test_the_newest_releases_are_looked_up_in_their_folder(tmp_path, monkeypatch, capfd):
    """A stand-in for pip puts a package `trl` without anything into the folder, and all its uses become unknown."""
    fake = tmp_path / "pip.py"
    fake.write_text(
        "import pathlib, sys\n"
        "folder = next(word for word in sys.argv if word.startswith('--target='))[9:]\n"
        "pathlib.Path(folder, 'trl.py').write_text('__version__ = \"99\"')\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert not drift.newest()
    printed = capfd.readouterr().out
    assert "trl 99" in printed
    assert ": trl.SFTConfig\n" in printed


def test_a_wrong_argument_is_refused():
    command = [sys.executable, str(Path(drift.__file__)), "--now"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "expected nothing or --newest, got --now\n")
