"""Run folders that are mutated at random, and inputs that change at random: what is served is right, or it is refused.

Seeded loops. The short form takes seconds; the long one is slow ($SAPWOOD_FUZZ has its rounds, default 400).
"""

import importlib
import os
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sapwood import Masks, files
from sapwood.errors import ConfigError, SapwoodError
from sapwood.experiments.config import ORDER_SEED, Place, RunConfig
from sapwood.experiments.run import run
from sapwood.training import TrainConfig

ROUNDS = int(os.environ.get("SAPWOOD_FUZZ", "400"))
CPU = Place("cpu", offline=True)
SHORT = TrainConfig(epochs=2, milestones=(), lr=0.05, seed=ORDER_SEED)
SNIP = RunConfig("digits", "mlp", "snip", 0.1, per_class=1, train=SHORT)
LENGTHS = [8, pytest.param(ROUNDS, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]


class Stop(BaseException):
    pass


def stop(row):
    raise Stop


def essence(folder):
    """All that a run found, less the times."""
    rows = [(r["epoch"], r["train_loss"], r["test_accuracy"]) for r in files.read_rows(folder / "metrics.jsonl")]
    masks = Masks.load(folder / "masks.safetensors")
    return rows, {name: mask.numpy().tobytes() for name, mask in masks.items()}


# Mutations of a folder.


def flip(path, others, chance):
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 3))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(path, others, chance):
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def grow(path, others, chance):
    content, at = path.read_bytes(), chance.randrange(path.stat().st_size)
    path.write_bytes(content[:at] + chance.randbytes(chance.randrange(1, 64)) + content[at:])


def zero(path, others, chance):
    path.write_bytes(bytes(path.stat().st_size))


def take_anothers(path, others, chance):
    path.write_bytes(chance.choice(others).read_bytes())


def vanish(path, others, chance):
    path.unlink()


def become_a_folder(path, others, chance):
    path.unlink()
    path.mkdir()


def become_a_loop(path, others, chance):
    path.unlink()
    path.symlink_to(path)


def become_a_link(path, others, chance):
    target = chance.choice(others)
    if target != path:
        path.unlink()
        path.symlink_to(target)


def nest(path, others, chance):
    path.write_bytes(chance.choice((b"[", b'{"a":')) * 100_000)


def empty_object(path, others, chance):
    path.write_bytes(b"{}")


MUTATIONS = (flip, flip, cut, grow, zero, take_anothers, vanish, become_a_folder, become_a_loop, become_a_link, nest)
MUTATIONS += (empty_object,)


@pytest.mark.trap(78)
@pytest.mark.parametrize("rounds", LENGTHS)
@pytest.mark.parametrize("moment", ["finished", "half-way"])
def test_a_mutated_folder_gives_the_same_result_or_a_sentence(tmp_path, moment, rounds):
    expected = run(SNIP, tmp_path / "whole", CPU)
    found = essence(tmp_path / "whole")
    source = tmp_path / "whole"
    if moment == "half-way":
        source = tmp_path / "half"
        with pytest.raises(Stop):
            run(SNIP, source, CPU, on_epoch=stop)
    served = 0
    for seed in range(rounds):
        chance, folder = random.Random(seed), tmp_path / "copies" / SNIP.id
        shutil.copytree(source, folder)
        for _ in range(chance.choice((1, 1, 2))):
            paths = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name != "run.lock" and p.stat().st_size]
            mutation = chance.choice(MUTATIONS)
            mutation(chance.choice(paths), paths, chance)
        try:
            result = run(SNIP, folder, CPU)
        except SapwoodError as error:
            assert "\n" not in str(error) and str(folder) in str(error), seed
        else:
            served += 1
            assert result.test_accuracy == expected.test_accuracy and essence(folder) == found, seed
        shutil.rmtree(folder)
    assert served > rounds / 2


# Inputs that change.


class World:
    """Images, a method with a helper, and a version of torch, each of which may be another one."""

    def __init__(self, root, patch):
        self.root, self.patch, self.other = (
            root,
            patch,
            dict.fromkeys(("image", "label", "method", "helper", "torch"), 0),
        )
        chance = np.random.default_rng(0)
        for part, label, i in ((p, c, i) for p in ("train", "test") for c in "ab" for i in range(3)):
            folder = root / "data" / part / label
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(chance.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        self.image = (root / "data/train/a/0.png").read_bytes()
        (root / "code").mkdir()
        self.write()

    def write(self):
        data, code = self.root / "data/train", self.root / "code"
        image = (data / "b/1.png").read_bytes() if self.other["image"] else self.image
        files.write_in_one_step(data / "a/0.png", image)
        here, there = (data / "b/0.png", data / "a/z.png")[:: -1 if self.other["label"] else 1]
        if there.exists():
            there.rename(here)
        sign = "-" if self.other["method"] else ""
        method = "import fuzzed_helper\n\ndef method(net, masks, data, generator):\n"
        method += f"    return {{name: {sign}fuzzed_helper.score(w) for name, w in net.weights.items()}}\n"
        (code / "fuzzed_method.py").write_text(method)
        power = 3 if self.other["helper"] else 2
        (code / "fuzzed_helper.py").write_text(f"def score(w):\n    return w ** {power} * w.sign()\n")
        for name in ("fuzzed_method", "fuzzed_helper"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        self.patch.setattr(torch, "__version__", "9.9" if self.other["torch"] else self.torch_version)

    torch_version = str(torch.__version__)

    def state(self, *, versions):
        return tuple(value for name, value in self.other.items() if versions or name != "torch")


@pytest.mark.trap(90, 91, 92)
@pytest.mark.parametrize("rounds", LENGTHS)
def test_a_run_is_served_for_its_own_inputs_and_for_no_others(tmp_path, monkeypatch, rounds):
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    world, chance = World(tmp_path, monkeypatch), random.Random(0)
    config = RunConfig("folder", "mlp", "fuzzed_method:method", 0.2, per_class=1, train=SHORT)
    place, folder = Place("cpu", tmp_path / "data", offline=True), tmp_path / "run"
    begun, finished, truth = None, False, {}
    served = refused = 0
    for _ in range(rounds):
        for name in chance.sample(sorted(world.other), chance.choice((0, 1, 1, 2))):
            world.other[name] ^= 1
        world.write()
        stopping = chance.random() < 0.3
        same = begun is None or begun[not finished] == world.state(versions=not finished)
        try:
            result = run(config, folder, place, on_epoch=stop if stopping else None)
        except Stop:
            assert same and not finished
            begun = world.state(versions=False), world.state(versions=True)
        except ConfigError as error:
            refused += 1
            assert not same and "changed" in str(error) and "delete" in str(error)
            if chance.random() < 0.5:
                shutil.rmtree(folder)
                begun, finished = None, False
        else:
            served += 1
            assert same
            if not finished:
                begun, finished = (world.state(versions=False), world.state(versions=True)), True
            assert truth.setdefault(begun[0], result.test_accuracy) == result.test_accuracy
    assert served and refused
