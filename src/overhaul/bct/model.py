"""A model made blockwise: which of its modules are replaced by which, filled from the dense ones or from a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overhaul.bct.blocks import QMAX, decode, encode, stored_bytes
from overhaul.bct.decoder import BlockDecoderLayer, BlockNorm
from overhaul.bct.layers import BlockEmbedding, BlockHead, BlockLinear, BlockMatrix, RoundedLinear, TiedHead
from overhaul.bct.product import refuse_overflow
from overhaul.bct.scheme import Scheme, block_of
from overhaul.bct.tables import table_of
from overhaul.errors import UserError
from overhaul.interop import llama
from overhaul.layers import swap
from overhaul.walk import decoder_blocks, linears_of

Widths = Mapping[str, int]
"""Bits of single tensors by the name of their module, where they differ from the scheme's."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A matrix of the model that is stored in blocks.

    Attributes:
        name: of its module.
        weight: its values.
        block: as asked for.
        is_embedding: whether words are looked up in it.
    """

    name: str
    weight: Tensor
    block: str
    is_embedding: bool = False

    def bytes(self, bits: int, scheme: Scheme) -> int:
        """On disk, in so many bits."""
        shape = (self.weight.shape[0], self.weight.shape[1])
        return stored_bytes(shape, block_of(self.block, shape), bits, scheme.scale)


def refuse(model: nn.Module, scheme: Scheme) -> None:
    """Raises `UserError` for a model that the scheme cannot store or compute, before anything is changed."""
    inner: Any = model
    if scheme.has("embedding"):
        _refuse_other_lookups(model)
    if not scheme.computes:
        return
    if not llama.is_llama_like(model):
        raise UserError(
            f"mode {scheme.mode} computes the blocks of {inner.config.model_type!r} models, which this project cannot",
            allowed=", ".join(llama.FAMILIES),
            hint=f"--mode {scheme.mode.replace('a8', 'a32')}, which stores integers and computes in floats",
        )
    table_of(inner.config.hidden_act)
    if scheme.accumulate == "integer":
        for name, linear in _linears(model).items():
            refuse_overflow(name, linear.in_features)


def _refuse_other_lookups(model: nn.Module) -> None:
    """An embedding in blocks is a table; Gemma's, say, also scales what it looks up."""
    for name, module in _embeddings(model).items():
        if type(module).forward not in (nn.Embedding.forward, nn.Linear.forward):
            raise UserError(
                f"{name} is a {type(module).__name__}, which does more than look up rows: in blocks that would be lost",
                allowed="nn.Embedding, nn.Linear",
                hint="--parts without embedding",
            )


def matrices(model: nn.Module, scheme: Scheme) -> Iterator[Stored]:
    """What will be stored in blocks, in the order of the model.

    Raises:
        UserError: a tensor has values that are NaN or infinite, or too large for its scales.
    """
    found: dict[str, tuple[Any, str]] = {}
    embeddings = _embeddings(model)
    if scheme.has("embedding"):
        found |= {name: (module, scheme.embedding_block) for name, module in embeddings.items()}
    if scheme.has("weights"):
        found |= {name: (module, scheme.block) for name, module in _linears(model).items()}
    for name, (module, block) in found.items():
        weight_RC = module.weight.detach()
        if not weight_RC.isfinite().all():
            bad = int((~weight_RC.isfinite()).sum())
            raise UserError(f"tensor {name}.weight has {bad} values that are NaN or infinite", hint="a sound model")
        largest = QMAX[scheme.bits] * torch.finfo(torch.float16).max
        if scheme.scale == "fp16" and float(weight_RC.abs().max()) > largest:
            raise UserError(
                f"tensor {name}.weight has values above {largest:.3g}, more than an fp16 scale reaches",
                allowed="--scale shift, fp32",
            )
        yield Stored(name, weight_RC, block, name in embeddings)


def float_dtype(model: nn.Module) -> torch.dtype:
    """The type that what stays float has on disk, whatever it has in memory."""
    inner: Any = model
    return getattr(inner.config, "dtype", None) or next(model.parameters()).dtype


def refuse_growth(stored: Sequence[Stored], scheme: Scheme, dtype: torch.dtype) -> None:
    """Raises `UserError` where integers and scales take as many bytes as the numbers of `dtype` they stand for."""
    for matrix in stored:
        packed, plain = matrix.bytes(scheme.bits, scheme), matrix.weight.numel() * dtype.itemsize
        if packed >= plain:
            option = "--embedding-block" if matrix.is_embedding else "--block"
            raise UserError(
                f"{option} {matrix.block} with a scale in {scheme.scale} stores {matrix.name} in {packed:,} bytes; "
                f"in {str(dtype).removeprefix('torch.')} it has {plain:,}",
                hint=f"a larger {option}, such as 1x16, or --scale shift",
            )


def convert(model: nn.Module, scheme: Scheme, widths: Widths = {}) -> int:  # noqa: B006 - a Mapping, never written to
    """Replaces the modules of a dense model in place, and fills them.

    Returns:
        How many blocks were too small for a shift and became zero.
    """
    dense = list(matrices(model, scheme))
    prepare(model, scheme, widths)
    flushed = 0
    for stored in dense:
        matrix: Any = model.get_submodule(stored.name)
        encoded = encode(stored.weight, matrix.block, matrix.bits, scheme.scale)
        matrix.fill(encoded)
        flushed += encoded.flushed
    return flushed


def round_in_place(model: nn.Module, scheme: Scheme) -> None:
    """Gives a dense model the weights that the blocks stand for, rounded once more to the type they have."""
    for stored in matrices(model, scheme):
        shape = (stored.weight.shape[0], stored.weight.shape[1])
        block = block_of(stored.block, shape)
        encoded = encode(stored.weight, block, scheme.bits, scheme.scale)
        stored.weight.copy_(decode(encoded.values, encoded.scale, block))


def prepare(model: nn.Module, scheme: Scheme, widths: Widths = {}) -> None:  # noqa: B006
    """Replaces the modules of a model in place by empty ones of the same names; norms and biases are taken over."""
    inner: Any = model
    tied = inner.config.tie_word_embeddings
    if scheme.has("embedding"):
        for name, old in _embeddings(model).items():
            swap(model, [name], lambda old, name=name: _stored_embedding(old, widths.get(name, scheme.bits), scheme))
        if tied:
            embedding = inner.get_input_embeddings()
            swap(model, [_head_name(model)], lambda _: TiedHead(embedding))
            # Nothing is left to tie, and nothing to leave out where weights are read and written.
            inner.all_tied_weights_keys = {}
    for name in _linears(model):
        swap(model, [name], lambda old, name=name: _stored_linear(old, widths.get(name, scheme.bits), scheme))
    if scheme.computes:
        _compute_blockwise(model, scheme)


def _stored_embedding(old: Any, bits: int, scheme: Scheme) -> nn.Module:
    device = old.weight.device
    if isinstance(old, nn.Linear):
        return BlockHead(old.in_features, old.out_features, old.bias, bits, _as_head(scheme)).to(device)
    return BlockEmbedding(old.num_embeddings, old.embedding_dim, bits, scheme, old.weight.dtype).to(device)


def _as_head(scheme: Scheme) -> Scheme:
    """The scheme of an output embedding, which is stored as the input embedding is."""
    return scheme.model_copy(update={"block": scheme.embedding_block})


def _stored_linear(old: nn.Linear, bits: int, scheme: Scheme) -> nn.Module:
    if scheme.has("weights"):
        return BlockLinear(old.in_features, old.out_features, old.bias, bits, scheme).to(old.weight.device)
    return RoundedLinear.from_linear(old, scheme) if scheme.has("matmul") else old


def _compute_blockwise(model: nn.Module, scheme: Scheme) -> None:
    inner: Any = model
    activation = inner.config.hidden_act
    layers: Any = model.get_submodule(llama.LAYERS)
    names = [f"{llama.LAYERS}.{index}" for index in range(len(layers))]
    made = swap(model, names, lambda old: BlockDecoderLayer(old, scheme, activation))
    llama.record_hidden_states(made.values())
    swap(model, [llama.NORM], lambda old: BlockNorm(old.weight, old.variance_epsilon, scheme))
    llama.ask_for_masks(model)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    blocks = decoder_blocks(model).items()
    return {name: linear for prefix, block in blocks for name, linear in linears_of(block, prefix).items()}


def _embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """The input embedding, and the output embedding where that is another tensor, by name."""
    inner: Any = model
    wanted = [inner.get_input_embeddings()]
    if not inner.config.tie_word_embeddings and inner.get_output_embeddings() is not None:
        wanted.append(inner.get_output_embeddings())
    return {name: module for name, module in model.named_modules() if any(module is one for one in wanted)}


def _head_name(model: nn.Module) -> str:
    inner: Any = model
    head = inner.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def block_matrices(model: nn.Module) -> dict[str, BlockMatrix]:
    """The modules that are stored in blocks, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BlockMatrix)}
