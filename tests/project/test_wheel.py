"""A wheel, installed without the repository, has every module and does what the README begins with."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
IMPORT_ALL = """
import importlib, json, pkgutil
import lorakit
names = [module.name for module in pkgutil.walk_packages(lorakit.__path__, "lorakit.") if "__main__" not in module.name]
print(json.dumps({name: importlib.import_module(name).__file__ for name in ["lorakit", *names]}))
"""
SMOKE = """
import pytest, torch, transformers
import lorakit
from lorakit.course.lessons import find_notebooks

config = transformers.LlamaConfig(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
)
tokens = torch.arange(12)[None]
examples = [lorakit.Example(list(range(12)), list(range(12)))]

def build():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)

model, other = build(), build()
plain = model(tokens).logits
lorakit.inject(model, rank=2, alpha=4)
lorakit.fit(model, examples, steps=2, batch_size=1, lr=0.1, show=False)
trained = model.eval()(tokens).logits
assert (trained - plain).abs().max() > 1e-2
lorakit.save_adapter(model, "adapter")
lorakit.load_adapter(other.eval(), "adapter")
torch.testing.assert_close(other(tokens).logits, trained)
lorakit.merge(other)
assert not lorakit.adapters(other)
torch.testing.assert_close(other(tokens).logits, trained, rtol=1e-3, atol=1e-4)
with pytest.raises(FileNotFoundError, match="part of the course's repository"):
    lorakit.load_model("tiny")
with pytest.raises(FileNotFoundError, match="in the course's folder"):
    find_notebooks()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build folder of the checkout gets into it and none stays there."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    shutil.copytree(ROOT / "lorakit", copy / "lorakit", ignore=shutil.ignore_patterns("*.egg-info"))
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    subprocess.run([*PIP, "wheel", *options, copy], check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("lorakit-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel):
    """The folder that the wheel is installed into."""
    target = wheel.parent / "target"
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel], check=True, timeout=120)
    return target


def run(source, target, folder):
    """What a program prints that has the installed wheel before all else, away from the repository."""
    env = os.environ | {"PYTHONPATH": str(target), "LORAKIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=folder, env=env, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lorakit").rglob("*.py")}
    assert names == sources | {"lorakit/py.typed"}


@pytest.mark.long
def test_every_module_can_be_imported_from_it(installed, tmp_path):
    files = json.loads(run(IMPORT_ALL, installed, tmp_path))
    # an editable install would find modules that the wheel lacks, so each one's place counts
    assert [name for name, file in files.items() if not Path(file).is_relative_to(installed)] == []
    sources = {path.relative_to(ROOT) for path in (ROOT / "lorakit").rglob("*.py") if path.name != "__main__.py"}
    assert {Path(file).relative_to(installed) for file in files.values()} == sources


@pytest.mark.long
def test_it_trains_saves_loads_and_merges(installed, tmp_path):
    run(SMOKE, installed, tmp_path)
