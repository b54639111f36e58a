"""Compact Convolutional Transformers: a convolutional tokenizer, an encoder, and pooling over the sequence.

Hassani et al., "Escaping the Big Data Paradigm with Compact Transformers", 2021 (arXiv:2104.05704).

This file lies beside the weights of every such model, as the code with which transformers reads them: it imports torch
and transformers only. Shapes: B images, C channels, H and W pixels, T tokens, D hidden size, N heads.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class CctConfig(PreTrainedConfig):
    """The shape of a CCT; by default CCT-6/3x1 for colour images of 32 x 32.

    Attributes:
        image_size: height and width, or one number for both; positions are for images of this size alone.
        num_channels: of the images.
        hidden_size: D, divisible by the number of heads.
        mlp_ratio: width of the MLP in hidden sizes.
        num_conv_layers: of the tokenizer; each halves height and width.
        conv_channels: of the tokenizer's layers before the last, which has the hidden size.
        positions: `sinusoidal`, fixed, or `learnable`.
        dropout: on tokens, after attention and in the MLP.
        attention_dropout: on attention's weights.
        drop_path: probability that an image skips a part of the last block; it rises linearly from 0 at the first.
    """

    model_type = "cct"

    image_size: int | list[int] | tuple[int, int] = 32
    num_channels: int = 3
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    mlp_ratio: float = 2.0
    num_conv_layers: int = 1
    conv_channels: int = 64
    positions: str = "sinusoidal"
    dropout: float = 0.0
    attention_dropout: float = 0.1
    drop_path: float = 0.1
    initializer_range: float = 0.02


class CctTokenizer(nn.Module):
    """Images as tokens: convolutions without bias, each with ReLU and pooling that halves height and width."""

    def __init__(self, config: CctConfig):
        super().__init__()
        widths = [config.num_channels, *[config.conv_channels] * (config.num_conv_layers - 1), config.hidden_size]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False) for inputs, outputs in pairwise(widths)
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        for convolution in self.convolutions:
            images_BCHW = F.max_pool2d(F.relu(convolution(images_BCHW)), kernel_size=3, stride=2, padding=1)
        return images_BCHW.flatten(2).transpose(1, 2)


class CctPositions(nn.Module):
    """What is added to the token of each place."""

    def __init__(self, config: CctConfig):
        super().__init__()
        if config.positions not in ("sinusoidal", "learnable"):
            raise ValueError(f"positions are sinusoidal or learnable, not {config.positions!r}")
        tokens = 1
        for side in sides_of(config):
            for _ in range(config.num_conv_layers):
                side = (side + 1) // 2
            tokens *= side
        self.learnt = config.positions == "learnable"
        if self.learnt:
            self.table_1TD = nn.Parameter(torch.zeros(1, tokens, config.hidden_size))
        else:
            self.register_buffer("table_1TD", sinusoids(tokens, config.hidden_size))

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        return tokens_BTD + self.table_1TD


class CctAttention(nn.Module):
    """Attention of every token to every token; queries, keys and values have no bias."""

    def __init__(self, config: CctConfig):
        super().__init__()
        width = config.hidden_size
        if width % config.num_attention_heads:
            raise ValueError(f"hidden_size {width} is not divisible by {config.num_attention_heads} heads")
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BNTd, k_BNTd, v_BNTd = (
            projection(x_BTD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        mixed_BNTd = F.scaled_dot_product_attention(q_BNTd, k_BNTd, v_BNTd, dropout_p=dropout)
        return self.out_proj(mixed_BNTd.transpose(1, 2).flatten(2))


class DropPath(nn.Module):
    """While training, leaves a branch out for some images and scales it up for the others."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return branch
        kept = 1 - self.probability
        mask = branch.new_empty(len(branch), *[1] * (branch.ndim - 1)).bernoulli_(kept)
        return branch * mask / kept


class CctBlock(nn.Module):
    """A block of the encoder, in the authors' form: the second norm stands on the residual path itself."""

    def __init__(self, config: CctConfig, drop_path: float):
        super().__init__()
        width, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CctAttention(config)
        self.mlp_norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.drop_path(self.dropout(self.attention(self.attention_norm(x_BTD))))
        x_BTD = self.mlp_norm(x_BTD)
        inner_BTF = self.dropout(F.gelu(self.up_proj(x_BTD)))
        return x_BTD + self.drop_path(self.dropout(self.down_proj(inner_BTF)))


class CctForImageClassification(PreTrainedModel):
    """A CCT with one linear layer that tells classes apart."""

    config_class = CctConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CctConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.size = sides_of(config)
        self.tokenizer = CctTokenizer(config)
        self.positions = CctPositions(config)
        self.dropout = nn.Dropout(config.dropout)
        layers = config.num_hidden_layers
        self.blocks = nn.ModuleList(
            CctBlock(config, config.drop_path * place / max(1, layers - 1)) for place in range(layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.pool = nn.Linear(config.hidden_size, 1)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits of the classes.

        Args:
            pixel_values: `(B, C, H, W)`, of the configuration's size.
            labels: `(B,)`, places of the classes; with them the loss is the mean cross-entropy.

        Raises:
            ValueError: the images have another size.
        """
        if tuple(pixel_values.shape[-2:]) != self.size:
            given, wanted = (" x ".join(map(str, sides)) for sides in (pixel_values.shape[-2:], self.size))
            raise ValueError(f"the images are {given}, and the model reads {wanted}")
        x_BTD = self.dropout(self.positions(self.tokenizer(pixel_values)))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        x_BTD = self.norm(x_BTD)
        weights_BT1 = self.pool(x_BTD).softmax(dim=1)
        logits = self.classifier((weights_BT1.transpose(1, 2) @ x_BTD).squeeze(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, CctPositions):
            if module.learnt:
                nn.init.trunc_normal_(module.table_1TD, std=10 * std)
            else:
                module.table_1TD.copy_(sinusoids(*module.table_1TD.shape[1:]))


def sides_of(config: CctConfig) -> tuple[int, int]:
    """Height and width of the images."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def sinusoids(tokens: int, width: int) -> Tensor:
    """Fixed positions `(1, T, D)`: sines in even places, cosines in odd ones, of D / 2 frequencies."""
    places_D = torch.arange(width)
    angles_TD = torch.arange(tokens)[:, None] / 10000 ** (2 * (places_D // 2) / width)
    return torch.where(places_D % 2 == 0, angles_TD.sin(), angles_TD.cos())[None]
