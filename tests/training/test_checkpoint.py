"""A training that was killed goes on to the same bits, or says why it cannot."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import killed
from helpers.architectures import build
from helpers.four_bits import LLAMA
from helpers.parity import snapshot, unchanged
from helpers.texts import UNEVEN, examples
from transformers import LlamaForCausalLM

from lorakit import LoRAConfig, fit, inject, quantize_model
from lorakit.speed import accelerated
from lorakit.speed.decision import Decision
from lorakit.training import fit as fitting
from lorakit.training.checkpoint import digest
from lorakit.training.loss import left_to_formula

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("optimizer", killed.OPTIMIZERS)
def test_a_killed_training_goes_on_to_the_same_bits(optimizer):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-m", "helpers.killed", optimizer], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    count, *wrong = run.stdout.splitlines()
    assert int(count.split()[1]) >= 3
    assert not wrong


def adapted(**settings):
    model = build("llama")
    torch.manual_seed(0)
    inject(model, 4, 8, **settings)
    return model


def train(folder, stop=None, model=None, texts=None, **settings):
    """A model and its history; None if it was interrupted."""

    def after_step(step):
        if step.number == stop:
            raise KeyboardInterrupt

    model = model or adapted(dropout=0.2)
    settings = {"steps": 8, "batch_size": 6, "lr": 1e-2, "checkpoint": folder, "checkpoint_every": 2} | settings
    try:
        return model, fit(model, texts or UNEVEN, after_step=after_step, show=False, **settings)
    except KeyboardInterrupt:
        return None


def files(folder):
    return sorted(os.listdir(folder))


def test_a_head_that_was_seen_to_change_is_known_when_the_training_goes_on(tmp_path):
    train(tmp_path, stop=3, model=inject(build("gemma2"), 4, 8))
    model = inject(build("gemma2"), 4, 8)
    assert not left_to_formula(model)
    train(tmp_path, stop=3, model=model)
    assert left_to_formula(model)


def test_adapters_go_on_and_a_finished_training_is_not_made_again(tmp_path):
    whole, history = train(tmp_path / "whole")
    assert train(tmp_path / "killed", stop=5) is None
    assert files(tmp_path / "killed") == ["step-00000002.pt", "step-00000004.pt"]
    model, resumed = train(tmp_path / "killed")
    assert files(tmp_path / "killed") == ["step-00000006.pt", "step-00000008.pt"]
    assert unchanged(model, snapshot(whole))
    assert (resumed.loss, resumed.lr, resumed.tokens) == (history.loss, history.lr, history.tokens)
    assert resumed.seconds[:4] != history.seconds[:4]
    model, again = train(tmp_path / "killed", stop=8)
    assert again == resumed
    assert unchanged(model, snapshot(whole))
    (tmp_path / "killed" / f".step-00000008.pt.{'0' * 32}.lorakit.tmp").mkdir()  # killed behind its last rename
    train(tmp_path / "killed", stop=8)
    assert files(tmp_path / "killed") == ["step-00000006.pt", "step-00000008.pt"]


REAL = {  # architecture, config, settings of the training
    "NF4": ("wide", LoRAConfig(4, 8, dropout=0.2), {}),
    "bfloat16": ("bfloat16", LoRAConfig(4, 8, dropout=0.2), {}),
    "another optimiser": ("llama", LoRAConfig(4, 8, dropout=0.2), {"optimizer": torch.optim.NAdam}),
    "factored": ("llama", LoRAConfig(4, 8), {"optimizer": torch.optim.Adafactor, "accumulate": 3}),
    "experts": ("mixtral", LoRAConfig(3, 6), {"optimizer": lambda groups: torch.optim.SGD(groups, momentum=0.9)}),
    "rows": ("llama-biased-tied", LoRAConfig(3, 6, trainable_token_indices=[5, 7], modules_to_save=["norm"]), {}),
}


def real(kind, config):
    if kind in ("wide", "bfloat16"):
        torch.manual_seed(0)
        plain = LlamaForCausalLM(copy.deepcopy(LLAMA)).to(torch.float32 if kind == "wide" else torch.bfloat16)
        return inject(quantize_model(plain) if kind == "wide" else plain, config)
    return inject(build(kind), config)


@pytest.mark.parametrize("case", REAL)
def test_real_configurations_go_on_to_the_same_bits(tmp_path, case):
    kind, config, settings = REAL[case]
    found = []
    for folder, stop in (("whole", None), ("killed", 5), ("killed", None)):
        torch.manual_seed(0)
        model = real(kind, config)
        trained = train(tmp_path / folder, stop, model, validation=examples(3), validate_every=3, **settings)
        assert (trained is None) == (stop is not None)
        if trained is not None:
            state = torch.load(tmp_path / folder / files(tmp_path / folder)[-1], weights_only=True)
            kept = {key: state["history"][key] for key in ("loss", "lr", "tokens", "validation", "best")}
            found.append((snapshot(model), digest([state["weights"], state["optimizer"], state["random"], kept])))
    (weights, rest), (again, rest_again) = found
    assert all(torch.equal(again[key], value) for key, value in weights.items())
    assert rest == rest_again


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "foreign"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    whole, history = train(tmp_path / "whole")
    train(tmp_path / "killed", stop=5)
    newest = tmp_path / "killed" / files(tmp_path / "killed")[-1]
    data = newest.read_bytes()
    if damage == "flipped":  # in the middle of a weight
        weight = torch.load(newest, weights_only=True)["weights"].popitem()[1].numpy().tobytes()
        place = data.index(weight) + len(weight) // 2
        data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    newest.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "flipped": data, "foreign": b"x" * 99}[damage])
    with pytest.warns(UserWarning, match="passed over .*step-00000004"):
        model, resumed = train(tmp_path / "killed")
    assert resumed.loss == history.loss
    assert unchanged(model, snapshot(whole))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"steps": 9}, r"steps \(9, there 8\)"),
        ({"lr": 2e-2}, "lr"),
        ({"seed": 1}, "seed"),
        ({"schedule": "cosine"}, "schedule"),
        ({"texts": examples(11)}, "examples"),
        ({"validation": examples(2)}, "validation"),
        ({"optimizer": torch.optim.SGD}, "optimizer"),
        ({"accelerate": False}, "accelerate"),
    ],
)
def test_another_training_is_refused(tmp_path_factory, settings, word):
    folder = tmp_path_factory.getbasetemp() / "stopped"
    if not folder.exists():
        train(folder, stop=3)
    with pytest.raises(ValueError, match=rf"got another (optimizer|{word})"):
        train(folder, **settings)
    if word == "seed":
        for model, what in (
            (inject(build("llama"), 3, 8), "model, parameters"),
            (inject(build("llama", seed=1), 4, 8, dropout=0.2), "frozen weights"),
        ):
            with pytest.raises(ValueError, match=what):
                train(folder, model=model)


def test_what_was_decided_is_pinned(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerated, "packable", lambda model: Decision(False, "of the first process"))
    train(tmp_path, stop=3, checkpoint_every=1)
    monkeypatch.undo()
    pins = []
    real = fitting.accelerated
    monkeypatch.setattr(fitting, "accelerated", lambda *a, **k: pins.append(k["onednn"]) or real(*a, **k))
    _, history = train(tmp_path, checkpoint_every=1)
    assert pins == [False], "too small for oneDNN"
    assert history.speed["packing"] == "not used: of the first process"
    assert history.speed["frozen prefix"].startswith("not used")
    threads = torch.get_num_threads()
    train(tmp_path / "threads", stop=3)
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=f"other rounding: threads {threads}, now {threads + 1}"):
            train(tmp_path / "threads")
    finally:
        torch.set_num_threads(threads)


def test_numbers_of_checkpoints_are_checked(tmp_path):
    for settings, word in (
        ({"checkpoint": None}, "folder"),
        ({"checkpoint_every": -1}, "checkpoint_every"),
        ({"keep": 0}, "keep"),
    ):
        with pytest.raises(ValueError, match=word):
            train(tmp_path / "none", **settings)
    assert not (tmp_path / "none").exists()
    train(tmp_path, keep=1)
    assert files(tmp_path) == ["step-00000008.pt"]


def test_a_digest_tells_examples_apart():
    rows = [
        [{"a": torch.zeros(2)}],
        [{"a": torch.zeros(3)}],
        [{"a": torch.zeros(2, dtype=torch.int32)}],
        [{"b": torch.zeros(2)}],
        [{"a": [1, 23]}],
        [{"a": [12, 3]}],
        [{"a": [0], "b": 0}],
        [{"a": "00"}],
        examples(2),
        examples(3),
    ]
    assert len({digest(row) for row in rows}) == len(rows)
    assert digest(examples(3)) == digest(tuple(examples(3)))


def test_a_file_that_cannot_be_written_is_an_oserror_with_place_and_reason(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes of a file; as a full disk, for this process
    try:
        with pytest.raises(OSError, match=r"File too large: .*step-00000002\.pt'"):
            train(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == []
