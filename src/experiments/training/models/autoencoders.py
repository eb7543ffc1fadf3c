"""An autoencoder for rows of numbers."""

from collections.abc import Sequence

from torch import Tensor, nn

from experiments.training.models import mlp


class Autoencoder(nn.Module):
    """Compresses each row to a few numbers, and makes it again from them.

    hidden: widths between the row and its code; the decoder has them in reverse. code: numbers of
        the code. activation, normalization: as in `mlp`
    x: float32 (batch, in_features) -> reconstruction: float32 (batch, in_features)
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int] = (256, 64),
        code: int = 16,
        activation: str = "relu",
        normalization: str | None = None,
    ) -> None:
        super().__init__()
        self.encoder = mlp(in_features, hidden, code, 0.0, activation, normalization)
        self.decoder = mlp(code, hidden[::-1], in_features, 0.0, activation, normalization)

    def forward(self, x: Tensor) -> Tensor:
        reconstruction: Tensor = self.decoder(self.encoder(x))
        return reconstruction
