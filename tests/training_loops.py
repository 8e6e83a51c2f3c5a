"""Two ways through the same training loop: a model with masks attached, and one that is multiplied by hand.

The second knows nothing of Sapwood: its forward pass takes `weight * mask` through `functional_call`, so
that autograd masks the gradients, and its weights are multiplied by the mask after every write.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from optimizers import everything
from sapwood import Masks, attach


class Attention(nn.Module):
    """`MultiheadAttention` reads the weight of its projection without calling the projection."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x.view(len(x), -1, 4)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(8, 8)
        self.decode = nn.Linear(8, 8, bias=False)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.decode(torch.tanh(self.encode(x))))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)
    ),
    "attention": Attention,
    "tied": Tied,
}


class Loop:
    """A model, its optimizers, and everything that people do to them."""

    def __init__(self, model: str, optimizers: Callable, density: float, *, by_hand: bool, frozen: bool):
        torch.manual_seed(1)
        self.model = MODELS[model]().double()
        self.build, self.by_hand = optimizers, by_hand
        drawn = torch.Generator().manual_seed(2)
        self.masks = {
            n: torch.rand(p.shape, generator=drawn) < density for n, p in self.model.named_parameters() if p.dim() > 1
        }
        self.average = None
        self.is_attached = False
        if frozen:
            next(iter(self.model.parameters())).requires_grad_(False)
        self.rebuild()

    def rebuild(self):
        if not hasattr(self, "model"):
            return
        self.optimizers = self.build([p for p in self.model.parameters() if p.requires_grad])

    # Masking, either way.

    def attach(self):
        self.is_attached = True
        if not self.by_hand:
            attach(Masks(self.masks), self.model, self.optimizers)
            return
        self.multiply()
        named = {id(p): self.masks[n] for n, p in self.model.named_parameters() if n in self.masks}
        for optimizer in self.optimizers:
            for each in (optimizer, getattr(optimizer, "optimizer", None), getattr(optimizer, "_base_optimizer", None)):
                for p, state in getattr(each, "state", {}).items():
                    by_entry = [v for key, v in state.items() if key != "rows" and getattr(v, "shape", 0) == p.shape]
                    for value in by_entry if id(p) in named else ():
                        value.mul_(named[id(p)])

    @torch.no_grad()
    def multiply(self):
        if self.by_hand and self.is_attached:
            for name, mask in self.masks.items():
                self.model.get_parameter(name).mul_(mask)

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.by_hand or not self.is_attached:
            return self.model(inputs)
        weights = {n: p * self.masks[n] if n in self.masks else p for n, p in self.model.named_parameters()}
        return functional_call(self.model, weights, (inputs,))

    # What people do.

    def loss(self) -> Tensor:
        inputs = torch.randn(6, 8, dtype=torch.float64).to(next(self.model.parameters()).dtype)
        return nn.functional.cross_entropy(self.forward(inputs), torch.arange(6) % 3)

    def backward(self) -> Tensor:
        loss = self.loss()
        loss.backward(create_graph=any(getattr(o, "is_second_order", False) for o in self.optimizers))
        return loss

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def closure(self) -> Tensor:
        self.zero_grad()
        return self.backward()

    def update(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step() if closure is None else optimizer.step(closure)
            self.multiply()

    def mode(self, name: str):
        for optimizer in self.optimizers:
            getattr(optimizer, name, lambda: None)()
        self.multiply()

    def needs_closure(self) -> bool:
        return any(type(o).__name__ in ("LBFGS", "Sam") for o in self.optimizers)

    def step(self, *, twice: bool = False, clip: bool = False, noise: bool = False):
        self.mode("train")
        if self.needs_closure():
            return self.by_closure()
        self.closure()
        if twice:
            self.backward()
        if noise:
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad = p.grad + 0.1 * torch.randn_like(p).detach()
                    self._mask_gradient(p)
        if clip:
            nn.utils.clip_grad_norm_(everything_of(self.optimizers), 0.05)
        return self.update()

    def _mask_gradient(self, parameter):
        for name, mask in self.masks.items() if self.by_hand and self.is_attached else ():
            if self.model.get_parameter(name) is parameter:
                parameter.grad = parameter.grad * mask

    def by_closure(self):
        self.mode("train")
        self.update(self.closure)

    @torch.no_grad()
    def write(self):
        for p in self.model.parameters():
            p.data.add_(0.1 * torch.randn(p.shape, dtype=torch.float64).to(p.dtype))
        self.multiply()

    def descend(self):
        """No optimizer: a step of one length over all weights together, from `autograd.grad`."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(self.loss(), trained)
        length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        for p, gradient in zip(trained, gradients, strict=True):
            p.data.sub_(0.05 * gradient / length)
        self.multiply()

    def evaluate(self) -> Tensor:
        self.mode("eval")
        self.model.eval()
        with torch.no_grad():
            loss = self.loss()
        self.model.train()
        self.mode("train")
        return loss

    def load(self, *, assign: bool = False):
        state = {n: torch.randn_like(v) if v.is_floating_point() else v for n, v in self.model.state_dict().items()}
        for name in [n for n in state if n.endswith("running_var")]:
            state[name] = state[name].abs() + 0.1
        if assign and isinstance(self.model, Tied):
            return  # it would not be tied any more
        self.model.load_state_dict(state, assign=assign)
        if assign:
            self.rebuild()
        self.multiply()

    def unfreeze(self):
        for p in self.model.parameters():
            if not p.requires_grad:
                p.requires_grad_(True)
                self.optimizers[-1].add_param_group({"params": [p]})

    def copy(self):
        """Goes on with a copy, and lets the original do something else."""
        before = self.model, self.optimizers
        self.model = copy.deepcopy(self.model)
        self.rebuild()
        for p in before[0].parameters():
            p.data.add_(1.0)

    def copy_pair(self):
        if not all(type(o).__module__.startswith("torch.optim") for o in self.optimizers):
            return self.copy()
        self.model, self.optimizers = copy.deepcopy((self.model, self.optimizers))

    def pickle(self):
        file = io.BytesIO()
        torch.save(self.model, file)
        file.seek(0)
        self.model = torch.load(file, weights_only=False)
        self.rebuild()

    def cast(self):
        self.model.float()
        self.evaluate()
        self.model.double()
        self.rebuild()

    def move(self):
        for p in self.model.parameters():
            p.data = p.data.clone()

    def swap(self):
        self.mode("swap")

    def ema(self):
        if self.average is None:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
        self.average.update_parameters(self.model)


def everything_of(optimizers) -> list[Tensor]:
    return [p for optimizer in optimizers for p in everything(optimizer)]


ACTIONS: dict[str, Callable[[Loop], object]] = {
    "step": Loop.step,
    "closure": Loop.by_closure,
    "accumulate": lambda loop: loop.step(twice=True),
    "clip": lambda loop: loop.step(twice=True, clip=True),
    "gradients by hand": lambda loop: loop.step(noise=True),
    "write": Loop.write,
    "descend": Loop.descend,
    "evaluate": Loop.evaluate,
    "load": Loop.load,
    "assign": lambda loop: loop.load(assign=True),
    "unfreeze": Loop.unfreeze,
    "copy": Loop.copy,
    "copy pair": Loop.copy_pair,
    "pickle": Loop.pickle,
    "cast": Loop.cast,
    "move": Loop.move,
    "swap": Loop.swap,
    "ema": Loop.ema,
}
