"""What the tests of criteria share."""

import torch

from sapwood import Data, FunctionalModel, Masks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(batches=(), input_shape=None) -> Data:
    return Data(tuple(batches), input_shape)


def random_masks(net: FunctionalModel, density: float = 0.6) -> Masks:
    rng = generator(3)
    return Masks({n: torch.rand(w.shape, generator=rng, dtype=torch.float64) < density for n, w in net.weights.items()})


def flat(scores: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([score.flatten() for score in scores.values()])
