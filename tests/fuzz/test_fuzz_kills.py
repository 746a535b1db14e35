"""Killed at any moment, what was written is the old or the new, and the next call leaves nothing else behind."""

import os
import shutil
import signal
import sys
import time
from itertools import count

import pytest
import torch
from helpers.architectures import build
from helpers.fuzz import rounds
from helpers.parity import snapshot
from helpers.texts import examples

from lorakit import adapters, fit, inject, load_adapter, load_model, save_adapter
from lorakit.experiments.records import expand, read_record, survey
from lorakit.experiments.sweep import sweep
from lorakit.merging.export import export_merged
from lorakit.models.manifest import find_damage
from lorakit.tasks import tiny_model
from lorakit.training.fit import History

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@pytest.fixture(autouse=True)
def one_thread():
    """A process with several threads does not survive a fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def killed_at(n):
    """Makes this process kill itself before its n-th call that touches a file."""
    calls = count(1)

    def hook(event, _):
        if event.startswith(("open", "os.", "shutil.", "fcntl.")) and next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)  # cannot be taken back: for children
    return calls


def in_a_child(act, n):
    """A child that acts and dies before its n-th call, if it has so many; else it says how many it has."""
    told, tell = os.pipe()
    if (child := os.fork()) == 0:
        try:
            calls = killed_at(n)
            act()
            os.write(tell, str(next(calls)).encode())
        finally:
            os._exit(0)
    os.close(tell)
    return child, told


def kill_often(target, act, check, times=4):
    """Lets a child act, kills it before a call or at a random moment, and checks after each; an act ends a round."""
    act()  # imports whatever it needs
    check(True)
    begin = time.monotonic()
    act()
    longest, kills = time.monotonic() - begin, 0
    check(True)
    child, told = in_a_child(act, 0)
    os.waitpid(child, 0)
    calls = int(os.read(told, 20))
    os.close(told)
    check(True)
    for draw in rounds(target):
        for _ in range(times):
            at_a_call = draw.random() < 0.7
            child, told = in_a_child(act, draw.randint(1, calls) if at_a_call else 0)
            if not at_a_call:
                time.sleep(draw.uniform(0, longest))
                os.kill(child, signal.SIGKILL)
            kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
            os.close(told)
            check(False)
        act()
        check(True)
    print(f"{target}: {kills} kills among {calls} calls", flush=True)


def test_an_adapter_over_one_of_another_rank(tmp_path):
    def model(rank):
        torch.manual_seed(rank)
        net = torch.nn.Sequential(torch.nn.Linear(60, 60))
        inject(net, rank, 4)
        torch.nn.init.normal_(net[0].B)
        return net

    both = [model(2), model(30)]
    sums = {net[0].rank: net[0].B.sum().item() for net in both}

    def act():
        for net in both:
            save_adapter(net, tmp_path)

    def check(ended):
        net = load_adapter(torch.nn.Sequential(torch.nn.Linear(60, 60)), tmp_path)
        assert sums[net[0].rank] == net[0].B.sum().item()
        if ended:
            assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]

    kill_often("save_adapter", act, check)


@pytest.fixture
def tiny(tmp_path):
    """An untrained tiny model in a folder, with an adapter beside it."""
    model, tokenizer = tiny_model.make_model(), tiny_model.make_tokenizer()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    inject(model, 2, 4)
    for adapter in adapters(model).values():
        torch.nn.init.normal_(adapter.B, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path


def test_a_merged_model(tiny):
    def act():
        export_merged(tiny / "base", tiny / "adapter", tiny / "merged")

    def check(ended):
        if ended or (tiny / "merged").exists():
            load_model(tiny / "merged")
        if ended:
            assert sorted(os.listdir(tiny)) == ["adapter", "base", "merged"]
        shutil.rmtree(tiny / "merged", ignore_errors=True)

    kill_often("merge", act, check)


def test_a_pretrained_model(tmp_path, monkeypatch):
    made = tiny_model.make_model(), tiny_model.make_tokenizer(), History(loss=[1.0])
    known = dict.fromkeys(["known_recall", "note_recall", "new_recall", "form"], 0.0)
    monkeypatch.setattr(tiny_model, "pretrain", lambda steps: made)
    monkeypatch.setattr(tiny_model, "measure", lambda *_: known)

    def check(ended):
        assert not find_damage(tmp_path / "tiny", {}, True)
        if ended:
            assert os.listdir(tmp_path) == ["tiny"]

    kill_often("pretrain", lambda: tiny_model.write(tmp_path / "tiny", 1), check)


def test_checkpoints_of_a_training(tmp_path):
    """What was killed goes on to the same bits, and so does what was killed when it was done."""

    def act(folder=tmp_path):
        torch.manual_seed(0)
        model = inject(build("llama"), 2, 4)
        fit(model, examples(6), steps=4, batch_size=2, checkpoint=folder, checkpoint_every=1, show=False)
        return snapshot(model)

    whole = act(tmp_path.with_name("whole"))

    def check(ended):
        assert all(path.suffix == ".pt" or not ended for path in tmp_path.iterdir())
        if ended:
            model = act()
            assert all(torch.equal(model[key], whole[key]) for key in whole)
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()  # a kill may come before a training makes it

    kill_often("checkpoint", act, check)


def test_a_sweeps_records(tmp_path):
    grid = {"x": list(range(8))}
    kept = {}

    def act():
        sweep(lambda x: {"y": x}, grid, tmp_path, show=False)

    def check(ended):
        assert all(path.read_bytes() == content for path, content in kept.items())
        kept.update((path, path.read_bytes()) for path in tmp_path.glob("*.json"))
        assert all(read_record(path) for path in kept)
        if ended:
            assert survey(tmp_path, expand(grid)).done == 8
            assert {path.suffix for path in tmp_path.iterdir()} == {".json", ""}
            kept.clear()
            for path in tmp_path.glob("*.json"):
                path.unlink()

    kill_often("sweep", act, check)
