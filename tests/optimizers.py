"""Ways of updating weights that are met in the wild: wrappers, two phases, slow copies, and no optimizer at all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


class Sam(Optimizer):
    """Sharpness-aware minimisation: up the gradient, then from there the step of another optimizer."""

    def __init__(self, params, rho=0.05, lr=0.1):
        super().__init__(params, {"rho": rho})
        self.base_optimizer = SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in everything(self):
            if p.grad is not None:
                self.state[p]["old"] = p.clone()
                p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in everything(self):
            if "old" in self.state[p]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        closure()
        self.first_step()
        loss = closure()
        self.second_step()
        return loss


class Accelerated(Optimizer):
    """Like accelerate's: an Optimizer by name, without its hook dictionaries, that hands every call on."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def add_param_group(self, group):
        self.optimizer.add_param_group(group)

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self, closure=None):
        return self.optimizer.step(closure)


class ListedLookahead:
    """Lookahead as first published: no Optimizer, and slow weights in a list of its own."""

    def __init__(self, optimizer, k=2, alpha=0.5):
        self.optimizer, self.k, self.alpha, self.calls = optimizer, k, alpha, 0
        self.slow_weights = [p.detach().clone() for p in everything(optimizer)]

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self):
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.calls += 1
        if self.calls % self.k == 0:
            for slow, fast in zip(self.slow_weights, everything(self), strict=False):
                slow.add_(fast - slow, alpha=self.alpha)
                fast.data.copy_(slow)
        return loss


class Whitened(Optimizer):
    """Shampoo's kind: every row of a matrix is moved by a mixture of all rows' gradients."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                rows = p.grad.reshape(len(p), -1)
                statistics = self.state[p].setdefault("rows", torch.eye(len(p), dtype=p.dtype))
                statistics.add_(rows @ rows.T)
                p.add_(torch.linalg.solve(statistics, rows).view_as(p), alpha=-group["lr"])
        return loss


class Langevin(SGD):
    """Stochastic gradient Langevin dynamics: noise on every weight, pruned or not, past autograd's eyes."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for p in everything(self):
            if p.grad is not None:
                p.data.add_(torch.randn(p.shape, dtype=torch.float64).to(p.dtype), alpha=1e-3)
        return loss


class Averaging(SGD):
    """Keeps an average of the weights in its state, and swaps it in and out outside of `step`."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for p in everything(self):
            self.state[p].setdefault("average", p.clone()).lerp_(p, 0.3)
        return loss

    @torch.no_grad()
    def swap(self):
        for p in everything(self):
            if "average" in self.state[p]:
                held = p.clone()
                p.data.copy_(self.state[p]["average"])
                self.state[p]["average"].copy_(held)


def everything(optimizer) -> list[Tensor]:
    """All tensors of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]
