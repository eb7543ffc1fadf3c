"""A generative adversarial network of points in the plane (Goodfellow et al., "Generative
Adversarial Nets", 2014), on the ring of eight normal distributions that such networks are tried on.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.data import Data, Split
from experiments.training.models import mlp
from experiments.training.objective import StepOutput

MODES, RADIUS, STD = 8, 2.0, 0.05


def ring(rows: int = 20_000, seed: int = 0) -> Data:
    """Points around eight places on a circle; a tenth each for validation and the test.

    x: float32 (rows, 2)
    """
    generator = torch.Generator().manual_seed(seed)
    modes = centres()[torch.randint(MODES, (rows,), generator=generator)]
    x = modes + STD * torch.randn(rows, 2, generator=generator)
    part = rows // 10
    return Data(*(Split(p) for p in (x[: -2 * part], x[-2 * part : -part], x[-part:])))


def centres() -> Tensor:
    """The places, float32 (8, 2)."""
    angles = torch.arange(MODES) * (2 * math.pi / MODES)
    return RADIUS * torch.stack([angles.cos(), angles.sin()], 1)


class GAN(nn.Module):
    """A generator, from noise to points, and a critic, from points to a logit of being real."""

    def __init__(self, noise: int = 16, width: int = 128) -> None:
        super().__init__()
        self.noise = noise
        self.generator = mlp(noise, [width, width], 2)
        self.critic = mlp(2, [width, width], 1)

    def forward(self, noise: Tensor) -> Tensor:
        """Points that the generator makes of noise: float32 (rows, noise) -> float32 (rows, 2)"""
        points: Tensor = self.generator(noise)
        return points


class Adversaries:
    """A step of the critic, then one of the generator, each with an optimizer of its own."""

    def __init__(
        self, model: GAN, optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        self.of_generator = optimizer(model.generator.parameters())
        self.of_critic = optimizer(model.critic.parameters())

    def __call__(self, model: GAN, x: Tensor) -> StepOutput:
        """Both losses, for an evaluation, with points that are made and real ones.

        x: float32 (batch, 2)
        """
        made = make(model, x)
        losses = {"critic": critic_loss(model, x, made), "generator": generator_loss(model, made)}
        return StepOutput(losses["critic"] + losses["generator"], made, x, losses)

    def update(self, model: GAN, x: Tensor) -> StepOutput:
        """Take both steps."""
        critic = critic_loss(model, x, make(model, x).detach())
        take(self.of_critic, critic)
        generator = generator_loss(model, make(model, x))
        take(self.of_generator, generator)
        losses = {"critic": critic.detach(), "generator": generator.detach()}
        return StepOutput(losses["critic"] + losses["generator"], numbers=losses)


def make(model: GAN, x: Tensor) -> Tensor:
    """As many points as real ones, from normal noise, float32 (rows, 2)."""
    points: Tensor = model(torch.randn(len(x), model.noise, device=x.device))
    return points


def critic_loss(model: GAN, x: Tensor, made: Tensor) -> Tensor:
    """How badly the critic tells real points from made ones, float ()."""
    real, fake = model.critic(x), model.critic(made)
    return functional.softplus(-real).mean() + functional.softplus(fake).mean()


def generator_loss(model: GAN, made: Tensor) -> Tensor:
    """How little the critic takes made points for real ones, float ()."""
    return functional.softplus(-model.critic(made)).mean()


def take(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """A step of an optimizer. The loss of the generator leaves gradients in the critic, too, which
    are set to zero before its own step.
    """
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def modes(made: Tensor, real: Tensor) -> float:
    """How many of the eight places have a fair share of the points that are made, at least a
    quarter of an eighth, within three standard deviations.

    made, real: float32 (rows, 2)
    """
    near = torch.cdist(made, centres().to(made)) < 3 * STD
    return float((near.float().mean(0) >= 1 / MODES / 4).sum())


def quality(made: Tensor, real: Tensor) -> float:
    """The fraction of points that are within three standard deviations of a place; of real ones it
    is 0.989.
    """
    near = torch.cdist(made, centres().to(made)) < 3 * STD
    return float(near.any(1).float().mean())


modes.higher_is_better = quality.higher_is_better = True  # type: ignore[attr-defined]
