"""The training loop: it learns, repeats itself to the last bit, resumes, and reports the last epoch."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapwood.errors import ConfigError, DataError
from sapwood.masks import Masks
from sapwood.training import Epoch, TrainConfig, TrainResult, evaluate, fabric_for, history_in, train
from sapwood.training.optim import build_optimizer, build_schedule

Pairs = list[tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Networks this small mostly wait for a second thread: 75 s instead of 10 on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Blobs:
    """Four Gaussian blobs in eight dimensions; training inputs get noise from the generator, as augmentation does."""

    def __init__(self, validation: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        self.labels = torch.arange(256) % 4
        centres = 2 * torch.randn(4, 8, generator=generator)
        self.inputs = centres[self.labels] + torch.randn(256, 8, generator=generator)
        self.has_validation = validation
        self.calls: list[str] = []

    def train_batches(self, generator: torch.Generator) -> Pairs:
        self.calls.append("train")
        order = torch.randperm(128, generator=generator)
        inputs = self.inputs[:128] + 0.1 * torch.randn(128, 8, generator=generator)
        return [(inputs[chunk], self.labels[chunk]) for chunk in order.split(32)]

    def validation_batches(self) -> Pairs | None:
        self.calls.append("validation")
        return [(self.inputs[128:192], self.labels[128:192])] if self.has_validation else None

    def test_batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        self.calls.append("test")
        yield self.inputs[192:224], self.labels[192:224]
        yield self.inputs[224:], self.labels[224:]


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4))


def half() -> Masks:
    generator = torch.Generator().manual_seed(5)
    return Masks(
        {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in net().named_parameters() if p.dim() > 1}
    )


SHORT = TrainConfig(epochs=6, batch_size=32, milestones=(3, 5))


def without_time(result: TrainResult) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in result.history]


def stop_after(epoch: int) -> Callable[[Epoch], None]:
    def on_epoch(row: Epoch) -> None:
        if row["epoch"] == epoch:
            raise KeyboardInterrupt

    return on_epoch


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_learns_and_keeps_the_masks() -> None:
    model, masks, rows = net().eval(), half(), []
    result = train(model, Blobs(), SHORT, masks=masks, on_epoch=rows.append)
    assert result.test_accuracy > 80  # chance is 25 %
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert rows == list(result.history)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert result.seconds == sum(row["seconds"] for row in rows) > 0
    assert all(row["images_per_second"] > 0 for row in rows)
    assert not result.diverged
    assert model[1].num_batches_tracked == 6 * 4  # trained in train mode, though it came in eval mode
    for name, mask in masks.items():
        assert (model.get_parameter(name)[~mask] == 0).all()
        assert (model.get_parameter(name)[mask] != 0).all()


@pytest.mark.trap(37)
def test_the_last_epoch_is_reported_not_the_best() -> None:
    noisy = dataclasses.replace(SHORT, epochs=8, lr=3.0, schedule="cosine")
    model, data = net(), Blobs()
    result = train(model, data, noisy)
    accuracies = [row["test_accuracy"] for row in result.history]
    inputs, labels = data.inputs[192:], data.labels[192:]
    with torch.no_grad():
        by_hand = 100 * (model.eval()(inputs).argmax(1) == labels).double().mean().item()
    assert result.test_accuracy == accuracies[-1] == by_hand
    assert max(accuracies) > min(accuracies)


@pytest.mark.trap(37)
def test_two_runs_are_equal_to_the_last_bit_and_leave_the_callers_random_state() -> None:
    first, second, other, masks = net(), net(), net(), half()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one = train(first, Blobs(), SHORT, masks=masks)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)  # the seed in the config counts, not the caller's
    two = train(second, Blobs(), SHORT, masks=masks)
    assert same(first, second)
    assert without_time(one) == without_time(two)
    train(other, Blobs(), dataclasses.replace(SHORT, seed=1), masks=masks)
    assert not same(first, other)


def test_equals_a_loop_written_out() -> None:
    """No masks, no dropout: a plain loop over the same batches must give the same weights."""
    config = dataclasses.replace(SHORT, nesterov=True, weight_decay=0.01)
    model, by_hand = (nn.Sequential(*[layer for layer in net() if not isinstance(layer, nn.Dropout)]) for _ in "ab")
    train(model, Blobs(), config)
    data, generator = Blobs(), torch.Generator().manual_seed(config.seed)
    data.train_batches(generator)  # train() asks once for the number of batches
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for epoch in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.1 ** sum(epoch >= milestone for milestone in (3, 5))
        for inputs, labels in data.train_batches(generator):
            optimizer.zero_grad()
            F.cross_entropy(by_hand(inputs), labels).backward()
            optimizer.step()
    for expected, value in zip(by_hand.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("epoch", [1, 3, 5, 6])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"schedule": "cosine", "warmup_epochs": 2},
        {"schedule": "one-cycle"},
        {"precision": "fp16"},
        {"momentum": 0.0},
    ],
    ids=["step", "cosine", "one-cycle", "fp16", "no momentum"],
)
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path: Path, epoch: int, changes: dict[str, object]) -> None:
    config = dataclasses.replace(SHORT, **changes)
    undisturbed, killed, resumed = net(), net(), net()
    expected = train(undisturbed, Blobs(), config, masks=half())
    path = tmp_path / "new folder" / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(killed, Blobs(), config, masks=half(), checkpoint=path, on_epoch=stop_after(epoch))
    assert not any(m._forward_pre_hooks or m._state_dict_pre_hooks for m in killed.modules())  # no mask stays on it
    nn.init.zeros_(resumed[0].weight)  # whatever the model holds, the checkpoint decides
    resumed(torch.randn(4, 8)).sum().backward()
    result = train(resumed, Blobs(), config, masks=half(), checkpoint=path)
    assert same(undisturbed, resumed)
    assert without_time(result) == without_time(expected)


def test_a_compiled_model_resumes_the_run_of_a_plain_one(tmp_path: Path) -> None:
    undisturbed, compiled, path = net(), net(), tmp_path / "run.pt"
    train(undisturbed, Blobs(), SHORT, masks=half())
    with pytest.raises(KeyboardInterrupt):
        train(net(), Blobs(), SHORT, masks=half(), checkpoint=path, on_epoch=stop_after(2))
    train(torch.compile(compiled, backend="eager"), Blobs(), SHORT, masks=half(), checkpoint=path)
    for expected, value in zip(undisturbed.state_dict().values(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected)


def test_checkpoints_every_few_epochs_and_at_the_end(tmp_path: Path) -> None:
    path, saved = tmp_path / "run.pt", []

    def on_epoch(row: Epoch) -> None:
        saved.append(len(torch.load(path, weights_only=True)["history"]) if path.exists() else 0)

    train(net(), Blobs(), SHORT, checkpoint=path, checkpoint_every=4, on_epoch=on_epoch)
    assert saved == [0, 0, 0, 4, 4, 6]
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def test_a_half_written_checkpoint_of_a_killed_run_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    (tmp_path / "run.pt.tmp").write_bytes(b"half")
    undisturbed, model = net(), net()
    train(undisturbed, Blobs(), SHORT)
    train(model, Blobs(), SHORT, checkpoint=path)
    assert same(undisturbed, model)


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("accuracy 91.7")


def somebody_elses(path: Path) -> None:
    torch.save({"state_dict": net().state_dict()}, path)


def whole_module(path: Path) -> None:
    torch.save(net(), path)  # a pickle of code, which must not be run


@pytest.mark.parametrize("spoil", [damaged, empty, text, somebody_elses, whole_module])
def test_a_file_that_is_no_checkpoint_is_refused_and_kept(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path, model = tmp_path / "run.pt", net()
    train(net(), Blobs(), dataclasses.replace(SHORT, epochs=1), checkpoint=path)
    spoil(path)
    content = path.read_bytes()
    with pytest.raises(DataError, match=r"run\.pt .*delete it"):
        train(model, Blobs(), dataclasses.replace(SHORT, epochs=1), checkpoint=path)
    assert path.read_bytes() == content
    assert same(model, net())


@pytest.mark.parametrize(
    ("config", "masks", "model", "named"),
    [
        (dataclasses.replace(SHORT, lr=0.2), half(), net(), r"lr: 0\.1 -> 0\.2"),
        (SHORT, None, net(), "masks"),
        (SHORT, ~half(), net(), "masks"),
        (SHORT, half(), nn.Sequential(*net(), nn.Linear(4, 4)), "model"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, config: TrainConfig, masks: Masks | None, model: nn.Module, named: str
) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(net(), Blobs(), SHORT, masks=half(), checkpoint=path, on_epoch=stop_after(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=f"another run, which differs in {named};"):
        train(model, Blobs(), config, masks=masks, checkpoint=path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_validation_is_measured_and_the_test_set_only_after_training() -> None:
    data = Blobs(validation=True)
    result = train(net(), data, dataclasses.replace(SHORT, validation=0.5))
    assert result.validation_accuracy == result.history[-1]["validation_accuracy"]
    assert result.validation_accuracy > 80
    first = data.calls.index("test")
    assert "train" in data.calls[:first]
    assert data.calls.count("test") == data.calls.count("train") - 1 == 6


def test_the_test_set_changes_nothing_but_its_own_accuracy() -> None:
    class WrongTest(Blobs):
        def test_batches(self) -> Pairs:
            return [(self.inputs[192:], (self.labels[192:] + 1) % 4)]

    first, second = net(), net()
    right, wrong = train(first, Blobs(True), SHORT), train(second, WrongTest(True), SHORT)
    assert same(first, second)
    assert right.validation_accuracy == wrong.validation_accuracy
    assert wrong.test_accuracy < 20 < 80 < right.test_accuracy


def test_a_missing_validation_split_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"validation is 0\.1, but the data holds no validation split"):
        train(net(), Blobs(), dataclasses.replace(SHORT, validation=0.1))


def test_a_diverged_run_ends_with_a_result(tmp_path: Path) -> None:
    config, path = dataclasses.replace(SHORT, lr=1e30), tmp_path / "run.pt"
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    result = train(model, Blobs(), config, checkpoint=path)
    assert result.diverged
    assert math.isnan(result.history[-1]["train_loss"])
    assert len(result.history) < config.epochs
    assert 0 <= result.test_accuracy <= 40
    again = train(model, Blobs(), config, checkpoint=path)  # nothing left to resume
    assert len(again.history) == len(result.history)
    assert again.diverged


def test_a_fabric_serves_run_after_run_alike() -> None:
    """The loss scale of the first run, which doubles every 2000 steps, is not the start of the second."""
    config = dataclasses.replace(SHORT, precision="fp16")
    fabric, first, second = fabric_for("cpu", precision="fp16"), net(), net()
    train(first, Blobs(), config, device=fabric)
    fabric.strategy.precision.scaler.load_state_dict(
        fabric.strategy.precision.scaler.state_dict() | {"scale": 2.0**-20}
    )
    train(second, Blobs(), config, device=fabric)
    assert same(first, second)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_learns(precision: str) -> None:
    result = train(net(), Blobs(), dataclasses.replace(SHORT, precision=precision), masks=half())
    assert result.test_accuracy > 80


def test_steps_that_fp16_skips_are_no_error() -> None:
    class Loud(Blobs):
        def __init__(self) -> None:
            super().__init__()
            self.inputs *= 1e3  # the first scaled gradients overflow

    model = nn.Linear(8, 4)
    before = model.weight.detach().clone()
    result = train(model, Loud(), dataclasses.replace(SHORT, precision="fp16", lr=1e-6))
    assert not result.diverged
    assert len(result.history) == SHORT.epochs
    assert not torch.equal(model.weight, before)


def test_the_training_loss_weighs_examples_not_batches() -> None:
    class Uneven(Blobs):
        def train_batches(self, generator: torch.Generator) -> Pairs:
            return [(self.inputs[:100], self.labels[:100]), (self.inputs[100:128], self.labels[100:128])]

    model, data = nn.Linear(8, 4), Uneven()
    result = train(model, data, dataclasses.replace(SHORT, epochs=1, lr=1e-12, milestones=()))
    with torch.no_grad():
        logits, labels = model(data.inputs[:128]), data.labels[:128]
    by_hand = (logits.logsumexp(1) - logits[torch.arange(128), labels]).mean()
    assert result.history[0]["train_loss"] == pytest.approx(by_hand.item(), rel=1e-5)
    assert result.history[0]["train_accuracy"] == 100 * (logits.argmax(1) == labels).double().mean().item()


def test_channels_last_changes_the_layout_only() -> None:
    class Pictures(Blobs):
        def __init__(self) -> None:
            super().__init__()
            self.inputs = self.inputs.reshape(256, 2, 2, 2)

        def train_batches(self, generator: torch.Generator) -> Pairs:
            order = torch.randperm(128, generator=generator)
            return [(self.inputs[chunk], self.labels[chunk]) for chunk in order.split(32)]

    def cnn() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))

    plain, last = cnn(), cnn()
    masks = Masks({"0.weight": torch.rand(8, 2, 3, 3) < 0.5})
    train(plain, Pictures(), SHORT, masks=masks)
    train(last, Pictures(), dataclasses.replace(SHORT, channels_last=True), masks=masks)
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert (last[0].weight[~masks["0.weight"]] == 0).all()
    torch.testing.assert_close(last[0].weight.contiguous(), plain[0].weight, rtol=1e-3, atol=1e-4)


def learning_rates(config: TrainConfig, steps_per_epoch: int) -> list[float]:
    optimizer = build_optimizer(nn.Linear(1, 1), config)
    schedule, rates = build_schedule(optimizer, config, steps_per_epoch), []
    for _ in range(config.epochs * steps_per_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_step_schedule() -> None:
    rates = learning_rates(TrainConfig(epochs=8, lr=0.5, milestones=(3, 6), gamma=0.2, warmup_epochs=2), 5)
    warmup = [0.5 * (1 / 10 + 0.9 * step / 10) for step in range(10)]
    assert rates == pytest.approx(warmup + [0.5] * 5 + [0.1] * 15 + [0.02] * 10)


def test_cosine_schedule() -> None:
    rates = learning_rates(TrainConfig(epochs=8, lr=0.5, schedule="cosine", warmup_epochs=2), 5)
    warmup = [0.5 * (1 / 10 + 0.9 * step / 10) for step in range(10)]
    assert rates == pytest.approx(warmup + [0.25 * (1 + math.cos(math.pi * step / 30)) for step in range(30)])


def test_one_cycle_schedule() -> None:
    """Smith & Topin: from a 25th up to lr over the first 30 %, by cosines, then down to a 10,000th of the start."""
    rates = learning_rates(TrainConfig(epochs=8, lr=0.5, schedule="one-cycle"), 5)

    def cosine(start: float, end: float, share: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    peak = 0.3 * 40 - 1
    rise = [cosine(0.02, 0.5, step / peak) for step in range(12)]
    fall = [cosine(0.5, 0.02 / 1e4, (step - peak) / (39 - peak)) for step in range(12, 40)]
    assert rates == pytest.approx(rise + fall)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosin"}, r"Unknown schedule 'cosin'\. Did you mean 'cosine'\? Legal: cosine, one-cycle, step"),
        ({"precision": "float16"}, "Unknown precision 'float16'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"gamma": 0.0}, "gamma must be above 0"),
        ({"momentum": -0.1}, "momentum must be at least 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"validation": 1.0}, r"validation must be in \[0, 1\), got 1\.0"),
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0\.0"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov must be False where momentum is 0"),
        ({"warmup_epochs": 160}, r"warmup_epochs must be below epochs \(160\)"),
        ({"warmup_epochs": 1, "schedule": "one-cycle"}, "warmup_epochs must be 0 with schedule 'one-cycle'"),
        ({"milestones": (120, 80)}, "milestones must be rising epochs"),
        ({"milestones": (3,), "warmup_epochs": 5}, "milestones must be rising epochs, all after the warm-up"),
    ],
)
def test_illegal_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)


def test_the_defaults_are_the_papers() -> None:
    config = TrainConfig()
    assert (config.epochs, config.batch_size, config.lr, config.milestones) == (160, 128, 0.1, (80, 120))
    assert (config.momentum, config.nesterov, config.weight_decay, config.schedule) == (0.9, False, 1e-4, "step")


def test_weight_decay_reaches_every_parameter() -> None:
    (group,) = build_optimizer(net(), SHORT).param_groups
    assert len(group["params"]) == len(list(net().parameters()))
    assert group["weight_decay"] == 1e-4


def test_checkpoint_every_needs_an_epoch() -> None:
    with pytest.raises(ConfigError, match="checkpoint_every must be at least 1"):
        train(net(), Blobs(), SHORT, checkpoint_every=0)


def test_no_training_batches_are_refused() -> None:
    class Empty(Blobs):
        def train_batches(self, generator: torch.Generator) -> Pairs:
            return []

    with pytest.raises(DataError, match="no batches"):
        train(net(), Empty(), SHORT)


def test_evaluate_weighs_examples_not_batches() -> None:
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9))
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    labels = torch.tensor([0, 0, 0])
    loss, accuracy = evaluate(model, [(logits[:2], labels[:2]), (logits[2:], labels[2:])])
    by_hand = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1)), math.log(1 + math.exp(-3))]
    assert loss == pytest.approx(sum(by_hand) / 3)
    assert accuracy == pytest.approx(200 / 3)
    assert model.training and not evaluate_leaves_training(model.eval())


def evaluate_leaves_training(model: nn.Module) -> bool:
    evaluate(model, [(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))])
    return model.training


def test_evaluate_refuses_an_empty_split() -> None:
    with pytest.raises(DataError, match="at least one labelled example"):
        evaluate(net(), [])


def test_a_callback_cannot_bring_pruned_weights_back() -> None:
    model, masks = net(), half()
    train(model, Blobs(), SHORT, masks=masks, on_epoch=lambda _: nn.init.ones_(model[0].weight))
    assert (model[0].weight[~masks["0.weight"]] == 0).all()


@pytest.mark.parametrize("schedule", ["step", "cosine", "one-cycle"])
def test_training_can_begin_at_a_later_epoch_of_its_schedule(tmp_path: Path, schedule: str) -> None:
    whole_config = dataclasses.replace(SHORT, schedule=schedule)
    whole = train(net(), Blobs(), whole_config)
    late, path = dataclasses.replace(whole_config, start_epoch=4), tmp_path / "checkpoint.pt"
    rest = train(net(), Blobs(), late)
    assert [row["epoch"] for row in rest.history] == [5, 6]
    assert [row["lr"] for row in rest.history] == pytest.approx([row["lr"] for row in whole.history[4:]])
    with pytest.raises(KeyboardInterrupt):
        train(net(), Blobs(), late, checkpoint=path, on_epoch=stop_after(5))
    assert [row["epoch"] for row in history_in(path)] == [5]
    resumed = train(net(), Blobs(), late, checkpoint=path)
    assert [row["train_loss"] for row in resumed.history] == [row["train_loss"] for row in rest.history]
    with pytest.raises(ConfigError, match=r"start_epoch must be below epochs \(6\)"):
        dataclasses.replace(whole_config, start_epoch=6)


def test_a_checkpoint_without_newer_settings_had_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        train(net(), Blobs(), SHORT, checkpoint=path, on_epoch=stop_after(2))
    content = torch.load(path, weights_only=True)
    del content["config"]["start_epoch"], content["sha256"]  # which it had neither
    torch.save(content, path)
    assert len(train(net(), Blobs(), SHORT, checkpoint=path).history) == 6
