"""Jobs of one's own: data of any form, steps, metrics and callbacks, as one would write them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments import StepOutput
from experiments.data import Data, Split
from experiments.training.callbacks import Validated

Optimizers = Any


def splits(make: Any) -> Data:
    """A data set of three splits from a function of a number of rows and a generator."""
    generator = torch.Generator().manual_seed(0)
    return Data(*(Split(*make(rows, generator)) for rows in (90, 40, 30)))


def two_inputs() -> Data:
    """x: a dict of numbers, float32 (rows, 4), and codes, int64 (rows, 2); y: two classes."""

    def rows(count: int, generator: torch.Generator) -> Any:
        numbers = torch.randn(count, 4, generator=generator)
        codes = torch.randint(5, (count, 2), generator=generator)
        return {"numbers": numbers, "codes": codes}, (numbers.sum(1) + codes.sum(1) > 4).long()

    return splits(rows)


class TwoInputs(nn.Module):
    """A linear model of numbers and embedded codes."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(10, out_features)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        """x: as `two_inputs` -> logits: float32 (batch, out_features)"""
        codes = self.embed(x["codes"]).flatten(1)
        return self.head(torch.cat([x["numbers"], codes], 1))  # type: ignore[no-any-return]


def points() -> Data:
    """x: float32 (rows, 2), without targets."""
    return splits(lambda count, generator: (torch.randn(count, 2, generator=generator) / 2 + 1,))


class Vae(nn.Module):
    """A linear variational autoencoder."""

    def __init__(self, in_features: int, latent: int = 2) -> None:
        super().__init__()
        self.encode = nn.Linear(in_features, 2 * latent)
        self.decode = nn.Linear(latent, in_features)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: float32 (batch, in_features) -> the same again, and mean and log variance"""
        mean, logvar = self.encode(x).chunk(2, 1)
        drawn = mean + torch.randn_like(mean) * (logvar / 2).exp()
        return self.decode(drawn), mean, logvar


def vae_step(model: nn.Module, x: Tensor) -> StepOutput:
    """The two terms of the evidence lower bound."""
    output, mean, logvar = model(x)
    reconstruction = functional.mse_loss(output, x)
    kl = -0.5 * (1 + logvar - mean**2 - logvar.exp()).mean()
    numbers = {"reconstruction": reconstruction, "kl": kl}
    return StepOutput(reconstruction + kl, numbers=numbers)


class Gan(nn.Module):
    """Two small networks for points in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))


class GanStep:
    """Two optimizers that take turns."""

    def __init__(self, model: Gan, optimizer: Optimizers) -> None:
        self.of_generator = optimizer(model.generator.parameters())
        self.of_critic = optimizer(model.critic.parameters())
        self.updates = 0

    def __call__(self, model: Gan, x: Tensor) -> StepOutput:
        """The losses of both, for an evaluation."""
        made = model.generator(torch.randn_like(x))
        critic = functional.softplus(-model.critic(x)) + functional.softplus(
            model.critic(made.detach())
        )
        generator = functional.softplus(-model.critic(made)).mean()
        numbers = {"critic": critic.mean(), "generator": generator}
        return StepOutput(critic.mean() + generator, numbers=numbers)

    def update(self, model: Gan, x: Tensor) -> StepOutput:
        """A step of the critic, and of the generator every other time."""
        self.updates += 1
        output = self(model, x)
        for name, opt in (("critic", self.of_critic), ("generator", self.of_generator)):
            if name == "generator" and self.updates % 2:
                continue
            opt.zero_grad()
            self(model, x).numbers[name].backward()
            opt.step()
        return output


class Sequences(torch.utils.data.Dataset[Any]):
    """Samples of different lengths, drawn anew each epoch, with a collate_fn of its own."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        noise = float(torch.rand(()))
        return {
            "ids": torch.arange(1 + row % 5),
            "y": float(row % 2) + noise / 10,
            "name": str(row),
        }

    def collate_fn(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """ids: int64 (batch, longest), y: float32 (batch,)"""
        ids = nn.utils.rnn.pad_sequence([sample["ids"] for sample in samples], batch_first=True)
        jitter = torch.rand(())  # of the batch
        return {"ids": ids, "y": torch.tensor([sample["y"] for sample in samples]) + jitter / 100}


def sequences() -> Data:
    """A data set of such samples."""
    return Data(*(Sequences(rows) for rows in (90, 40, 30)))  # type: ignore[arg-type]


def bag() -> nn.EmbeddingBag:
    """The mean of embedded ids."""
    return nn.EmbeddingBag(5, 1)


def bag_step(model: nn.Module, batch: dict[str, Tensor], loss_func: nn.Module) -> StepOutput:
    """A regression of y, weighted by the ids of a batch."""
    outputs = model(batch["ids"]).squeeze(1)
    loss = loss_func(outputs, batch["y"])
    return StepOutput(loss, outputs, batch["y"], weight=float(batch["ids"].numel()))


def mean_gap(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean absolute difference."""
    return (outputs - targets).abs().mean()


def no_gap(outputs: Tensor, targets: Tensor) -> None:
    """A metric that forgets to return its value."""
    mean_gap(outputs, targets)


def named_step(model: nn.Module, x: Tensor, name: str) -> StepOutput:
    """A step that names a number."""
    output = model(x)[0]
    loss = functional.mse_loss(output, x)
    return StepOutput(loss, output, x, numbers={name: 2 * loss})


def forgetful_step(model: nn.Module, x: Tensor) -> None:
    """A step that forgets to return its loss."""
    named_step(model, x, "twice")


def several(model: nn.Module, metrics: dict[str, float], log: Any, log_image: Any) -> None:
    """A callback as its attributes would suggest."""


def log_loss(validated: Validated) -> None:
    """A callback that logs what the run does."""
    validated.log({"loss/valid": 1.0})


class Drawing:
    """A callback that draws and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, validated: Validated) -> None:
        """Log a number that depends on both."""
        self.calls += 1
        validated.log({"drawn": self.calls + float(torch.rand(()))})


def counting_step(model: nn.Module, batch: Any, loss_func: nn.Module, seen: list[int]) -> Tensor:
    """A step that keeps a count where no checkpoint finds it."""
    seen.append(len(batch))
    loss: Tensor = loss_func(model(batch[0]), batch[1]) * len(seen)
    return loss
