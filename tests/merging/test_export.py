"""A merged model in a folder is the unmerged one, also for a process without lorakit and peft, or it is not there."""

import json
import subprocess
import sys

import pytest
import torch

import lorakit
from lorakit import cli
from lorakit.merging import export
from lorakit.merging.export import export_merged

TOKENS = torch.arange(5, 29)[None]


def saved_adapter(folder, scale=0.2, layer=lorakit.LoRALinear, rank=4, **settings):
    model, _ = lorakit.load_model("tiny")
    lorakit.inject(model, rank, 8, layer=layer, **settings)
    random = torch.Generator().manual_seed(0)
    for adapter in lorakit.adapters(model).values():
        adapter.B.data = scale * torch.randn(adapter.B.shape, generator=random)
    lorakit.save_adapter(model, folder)
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def logits_of(folder, dtype=torch.float32):
    with torch.no_grad():
        return lorakit.load_model(folder, dtype)[0](input_ids=TOKENS).logits.float()


@pytest.mark.parametrize("settings", [{}, {"layer": lorakit.DoRALinear}, {"scale_rule": "rslora", "rank": 2}])
def test_the_folder_holds_the_unmerged_model(tmp_path, settings):
    want = saved_adapter(tmp_path / "adapter", **settings)
    found = export_merged("tiny", tmp_path / "adapter", tmp_path / "deep" / "merged")
    assert found.folder == tmp_path / "deep" / "merged"
    assert found.dtype == torch.float32
    assert found.error < 1e-6 < 1e-2 < found.effect
    torch.testing.assert_close(logits_of(found.folder), want, rtol=1e-4, atol=1e-4)
    assert [path.name for path in found.folder.parent.iterdir()] == ["merged"]
    assert lorakit.load_model(found.folder)[1]("room of ada adler ?").input_ids


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_sum_is_rounded_once_to_the_dtype(tmp_path, dtype):
    saved_adapter(tmp_path / "adapter")
    found = export_merged("tiny", tmp_path / "adapter", tmp_path / "merged", dtype)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype
    model, _ = lorakit.load_model("tiny")
    lorakit.load_adapter(model, tmp_path / "adapter")
    for name, weight in lorakit.merge(model).state_dict().items():
        other = lorakit.load_model(found.folder, export.DTYPES[dtype])[0].state_dict()[name]
        assert torch.equal(weight.to(other.dtype), other)
    again = export_merged(found.folder, tmp_path / "adapter", tmp_path / "twice")  # the base's own dtype
    assert again.dtype == export.DTYPES[dtype]


def by_plain_transformers(folder, cwd):
    """The most likely tokens after `TOKENS`, from a process that cannot import lorakit or peft."""
    script = f"""
import sys
sys.modules["lorakit"] = sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
AutoTokenizer.from_pretrained({str(folder)!r})
print(model(input_ids=torch.arange(5, 29)[None]).logits.argmax(-1)[0].tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=cwd)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_plain_transformers_loads_it(tmp_path):
    want = saved_adapter(tmp_path / "adapter")
    export_merged("tiny", tmp_path / "adapter", tmp_path / "merged")
    assert by_plain_transformers(tmp_path / "merged", tmp_path) == want.argmax(-1)[0].tolist()
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / "merged").iterdir()), "others may read it"


@pytest.mark.slow
def test_smollm2_from_end_to_end(tmp_path):
    model, _ = lorakit.load_model("smollm2")
    torch.manual_seed(0)
    lorakit.inject(model, 8, 8)
    for adapter in lorakit.adapters(model).values():
        torch.nn.init.normal_(adapter.B, std=0.1)
    lorakit.save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        want = model(input_ids=TOKENS).logits.argmax(-1)[0].tolist()
    assert cli.main(["merge", "smollm2", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    assert by_plain_transformers(tmp_path / "merged", tmp_path) == want
    assert lorakit.load_model("smollm2")[0](input_ids=TOKENS).logits.argmax(-1)[0].tolist() != want


def test_what_exists_is_not_touched(tmp_path):
    saved_adapter(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a new folder"):
        export_merged("tiny", tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine.txt"]


def test_nothing_is_left_of_what_fails(tmp_path, monkeypatch):
    saved_adapter(tmp_path / "adapter")
    places = sorted(path.name for path in tmp_path.iterdir())

    def fails(**changed):
        settings = {"base": "tiny", "adapter": tmp_path / "adapter", "out": tmp_path / "merged"} | changed
        with pytest.raises((ValueError, OSError)) as caught:
            export_merged(**settings)
        assert sorted(path.name for path in tmp_path.iterdir()) == places
        return str(caught.value)

    assert "expected a dtype" in fails(dtype="int8")
    assert "no such folder" in fails(base=tmp_path / "no-base")
    assert "adapter_config.json" in fails(adapter=tmp_path / "no-adapter")
    assert "adapter_config.json" in fails(adapter=tmp_path / "no-adapter", out=tmp_path / "new" / "deep" / "merged")
    monkeypatch.setattr(export, "merge", lorakit.remove)  # a merge that loses the adapter
    assert "expected the unmerged" in fails(out=tmp_path / "new" / "deep" / "merged")
    assert "expected the unmerged model's answers, got others" in fails()

    def broken(model, tokenizer, folder):
        (folder / "config.json").write_text("{")
        raise OSError("disk full")

    monkeypatch.setattr(export, "_save", broken)
    assert "disk full" in fails()


def test_the_command(tmp_path, capsys):
    saved_adapter(tmp_path / "adapter")
    command = ["merge", "tiny", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]
    assert cli.main(command) == 0
    assert "KL to the unmerged model" in capsys.readouterr().out
    assert cli.main(command) == 2
    assert "which exists" in capsys.readouterr().err
