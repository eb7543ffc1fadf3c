"""A variational autoencoder of MNIST (Kingma and Welling, "Auto-Encoding Variational Bayes",
2014).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.training.models import mlp
from experiments.training.objective import StepOutput


class VAE(nn.Module):
    """Each row as a normal distribution of a few numbers, and a row of pixels from a draw of it.

    hidden: widths of the encoder; the decoder has them in reverse. latent: the numbers
    """

    def __init__(self, in_features: int, hidden: Sequence[int] = (400,), latent: int = 20) -> None:
        super().__init__()
        self.encoder = mlp(in_features, hidden, 2 * latent)
        self.decoder = mlp(latent, list(reversed(hidden)), in_features)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: float32 (batch, in_features) -> logits of pixels, (batch, in_features), and the mean
        and the logarithm of the variance, (batch, latent) each
        """
        mean, log_variance = self.encoder(x).chunk(2, 1)
        drawn = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(drawn), mean, log_variance


def negative_elbo(model: nn.Module, batch: tuple[Tensor, Tensor]) -> StepOutput:
    """The negative evidence lower bound, in nats per image, and its two terms. The classes of the
    batch are not used.
    """
    x = batch[0]
    logits, mean, log_variance = model(x)
    errors = functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    reconstruction = errors.sum(1).mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean()
    numbers = {"reconstruction": reconstruction, "divergence": divergence}
    return StepOutput(reconstruction + divergence, numbers=numbers)
