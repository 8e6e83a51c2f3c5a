"""Damage to any file of a run is noticed: cut, emptied, zeroed, replaced, or one bit turned anywhere."""

import json
import random
import shutil

import pytest

from sapwood import Masks, files
from sapwood.errors import DataError, MaskFileError
from sapwood.experiments import store
from sapwood.experiments.config import ORDER_SEED, Place, RunConfig
from sapwood.experiments.run import run
from sapwood.files import checksum
from sapwood.training import TrainConfig, checkpoint

CPU = Place(device="cpu", offline=True)
RANDOM = RunConfig(
    "digits", "mlp", method="random", density=0.1, train=TrainConfig(epochs=2, milestones=(), lr=0.05, seed=ORDER_SEED)
)
FILES = ("config.json", "environment.json", "masks.safetensors", "metrics.jsonl", "result.json", "weights.safetensors")
REPLACED = {"empty": b"", "text": b"not what it was\n", "null": b"null\n", "list": b"[]\n"}


class Stop(BaseException):
    pass


def stop(row):
    raise Stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(RANDOM, folder, CPU, keep={RANDOM.train.epochs})


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    with pytest.raises(Stop):
        run(RANDOM, folder, CPU, on_epoch=stop)
    return folder


def damages(content, places=40):
    """Cut in two, zeroed as by a power failure, replaced, or one bit turned at its ends and at random places."""
    yield from (content[: len(content) // 2], bytes(len(content)), *REPLACED.values())
    chance = random.Random(0)
    for place in {0, len(content) - 1, *(chance.randrange(len(content)) for _ in range(places))}:
        yield content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_of_a_finished_run_is_noticed(tmp_path, whole, name):
    folder, result = whole
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert store.finished(copy, RANDOM) == result
    content = (copy / name).read_bytes()
    for damaged in damages(content):
        (copy / name).write_bytes(damaged)
        assert store.finished(copy, RANDOM) is None, damaged
    (copy / name).unlink()
    assert store.finished(copy, RANDOM) is None


def test_results_of_the_first_version_which_had_no_checksums_are_still_read(tmp_path, whole):
    folder, result = whole
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in ("config.json", "environment.json", "result.json"):
        values = files.read_json(copy / name)
        values.pop("files", None)
        files.write_text(copy / name, json.dumps(values))
        assert files.KEY not in (copy / name).read_text()
    found = store.finished(copy, RANDOM)
    assert found.test_accuracy == result.test_accuracy and found.files == {}


def test_damaged_masks_are_noticed_wherever_the_damage_is(tmp_path, whole):
    file = whole[0] / "masks.safetensors"
    masks, copy = Masks.load(file), tmp_path / "masks"
    for damaged in damages(file.read_bytes(), places=300):
        copy.write_bytes(damaged)
        try:
            found = Masks.load(copy)
        except MaskFileError:
            continue
        assert found == masks and found.provenance == masks.provenance  # a byte that says nothing, or the sum's name


def test_damaged_checkpoint_is_noticed_wherever_the_damage_is(tmp_path, half_way):
    file, copy = half_way / "checkpoint.pt", tmp_path / "checkpoint.pt"
    expected = checksum(checkpoint._read(file))
    refused = 0
    for damaged in damages(file.read_bytes(), places=60):
        copy.write_bytes(damaged)
        try:
            found = checkpoint._read(copy)
        except DataError:
            refused += 1
            continue
        assert checksum(found) == expected  # a byte of the zip format that torch does not read
    assert refused > 50
