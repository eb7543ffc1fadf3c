"""A causal transformer for sequences of tokens."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.training.models import dropout_layer


class Transformer(nn.Module):
    """Predicts the next token at each position from the tokens up to it: token and position
    embedding, pre-norm blocks, initialized as GPT-2 is.

    vocabulary: number of tokens. length: of the longest sequence. heads: must divide the width
    x: integers (batch, length) -> logits: float32 (batch, vocabulary, length), as
        CrossEntropyLoss takes them with targets (batch, length)
    """

    def __init__(
        self,
        vocabulary: int,
        length: int = 256,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"model.heads={heads} does not divide model.width={width}")
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.dropout = dropout_layer(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                closing = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * layers) if closing else 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            raise TypeError(f"its rows are {x.dtype} and not tokens, which are integers")
        length = x.shape[1]
        if length > self.position.num_embeddings:
            raise ValueError(f"its rows have {length} tokens: use model.length={length}")
        h = self.token(x.long()) + self.position(torch.arange(length, device=x.device))
        logits: Tensor = self.head(self.norm(self.blocks(self.dropout(h))))
        return logits.transpose(1, 2)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on normalized input and added to it.

    h: float32 (batch, length, width) -> float32 (batch, length, width)
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = dropout_layer(dropout)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.dropout(self.attention(self.attention_norm(h)))
        added: Tensor = h + self.dropout(self.mlp(self.mlp_norm(h)))
        return added


class CausalAttention(nn.Module):
    """Multi-head attention of each position to itself and to those before it.

    h: float32 (batch, length, width) -> float32 (batch, length, width)
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        batch, length, width = h.shape
        q, k, v = self.qkv(h).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return attended
