"""How much each part of a decoder matters, from one pass over calibration text (Minitron, arXiv:2407.14679, section 3).

Letters of shapes: B windows, T tokens in a window, L layers, D hidden channels, F neurons, H query heads, G groups,
K query heads in a group, I elements of an axis.

An activation a (B, T, I) becomes one number for each element: its size is taken over the tokens of each window, then
over the windows. The default is F_i = sqrt(sum_b (mean_t |a_bti|)^2).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from overhaul import journal, machine
from overhaul.artifact import IMPORTANCE
from overhaul.cut import NOBODY, Kept
from overhaul.errors import UserError
from overhaul.interop import decoder as decoders
from overhaul.interop import hf
from overhaul.progress import Bar
from overhaul.shapes import Shape

How = Literal["mean", "l2", "variance"]
"""Mean magnitude, root of the sum of squares, or variance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How much each part matters; more is more, fp32.

    Attributes:
        ffn_LF: neurons.
        head_LH: query heads: the norm over a head's entries.
        group_LG: groups: the norm over the entries of all their query heads.
        hidden_D: channels of the residual stream: the sum over the norms that read it.
        block_L: layers: 1 - mean cosine of what flows in and out (block importance).
        skipped_L: layers: how much the perplexity rises without each, where that was measured.
    """

    ffn_LF: Tensor
    head_LH: Tensor
    group_LG: Tensor
    hidden_D: Tensor
    block_L: Tensor
    skipped_L: Tensor | None = None


def over_tokens(a_BTI: Tensor, how: How, real_BT: Tensor | None = None) -> Tensor:
    """The size of each element in each window, (B, I) fp32; padding does not count, nor a window of nothing else."""
    if real_BT is not None:
        windows = [a_TI[real_T] for a_TI, real_T in zip(a_BTI, real_BT, strict=True) if real_T.any()]
        sizes = [over_tokens(a_TI[None], how) for a_TI in windows]
        return torch.cat(sizes) if sizes else a_BTI.new_zeros(0, a_BTI.shape[-1]).float()
    a_BTI = a_BTI.float()
    if how == "mean":
        return a_BTI.abs().mean(1)
    return a_BTI.norm(dim=1) if how == "l2" else a_BTI.var(1, correction=0)


class OverWindows:
    """One number for each element from those of many windows, added batch by batch; sums are fp64."""

    def __init__(self, how: How) -> None:
        self.how: How = how
        self.count, self.total, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, size_BI: Tensor) -> None:
        """Adds the windows of a batch."""
        size_BI = size_BI.double()
        self.count += len(size_BI)
        self.total, self.squares = self.total + size_BI.sum(0), self.squares + size_BI.square().sum(0)

    def result(self) -> Tensor:
        """(I,) fp32."""
        if self.how == "mean":
            return (self.total / self.count).float()
        if self.how == "l2":
            return self.squares.sqrt().float()
        return (self.squares / self.count - (self.total / self.count).square()).clamp(min=0).float()


@torch.no_grad()
def score(
    model: nn.Module,
    calib: Iterable[Mapping[str, Tensor]],
    *,
    over_batch: How = "l2",
    over_sequence: How = "mean",
    dtype: torch.dtype = torch.float32,
    windows: int = 0,
) -> Scores:
    """All scores of one pass; memory is that of a forward pass and a few vectors for each layer.

    Args:
        model: a causal language model in evaluation mode.
        calib: finite batches `{"input_ids": (B, T) int64, "attention_mask": (B, T) optional}`.
        over_batch: how windows are put together.
        over_sequence: how the tokens of a window are put together.
        dtype: of matrix products; scores are fp32.
        windows: how many there are, for the progress; no progress without.

    Raises:
        UserError: no calibration token is real, the activations are not finite, or the model's parts are not known.
    """
    found = decoders.find(model)
    sums = _Sums(found, over_batch, over_sequence)
    device = next(model.parameters()).device
    with sums.watching(), Bar("scoring", windows, quiet=not windows) as bar:
        for ids in calib:
            inputs = {name: ids[name].to(device) for name in ("input_ids", "attention_mask") if name in ids}
            mask_BT = inputs.get("attention_mask")
            sums.real_BT = None if mask_BT is None or bool(mask_BT.all()) else mask_BT.bool()
            with machine.autocast(device, dtype):
                hf.body(model)(**inputs, use_cache=False)
            for _ in range(len(inputs["input_ids"])):
                bar.step()
    return sums.scores()


class _Sums:
    """What the hooks of a pass add up."""

    def __init__(self, found: decoders.Decoder, over_batch: How, over_sequence: How) -> None:
        self.found = found
        self.over_batch: How = over_batch
        self.over_sequence: How = over_sequence
        self.real_BT: Tensor | None = None
        self.sums: dict[tuple[str, int], OverWindows] = {}
        self.cosines = torch.zeros(found.shape.layers, dtype=torch.float64)
        self.tokens = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every forward pass of the model is added."""
        handles = []
        for layer, block in enumerate(self.found.blocks):
            for part in (decoders.MLP, decoders.ATTENTION):
                seen = self._input(part, layer)
                handles.append(block.get_submodule(part).register_forward_pre_hook(seen))
            for norm in decoders.NORMS:
                handles.append(block.get_submodule(norm).register_forward_hook(self._output(norm, layer)))
            handles.append(block.register_forward_hook(self._through(layer), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, part: str, layer: int, a_BTI: Tensor) -> None:
        size_BI = over_tokens(a_BTI, self.over_sequence, self.real_BT)
        self.sums.setdefault((part, layer), OverWindows(self.over_batch)).add(size_BI.cpu())

    def _input(self, part: str, layer: int) -> Callable[..., None]:
        return lambda _, args: self._add(part, layer, args[0])

    def _output(self, part: str, layer: int) -> Callable[..., None]:
        return lambda _, __, out: self._add(part, layer, out)

    def _through(self, layer: int) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            before_BTD = args[0] if args else kwargs["hidden_states"]
            after_BTD = out[0] if isinstance(out, tuple) else out
            cosine_BT = F.cosine_similarity(before_BTD.float(), after_BTD.float(), dim=-1)
            cosine_N = cosine_BT.flatten() if self.real_BT is None else cosine_BT[self.real_BT]
            self.cosines[layer] += cosine_N.double().sum().cpu()
            self.tokens += cosine_N.numel() if layer == 0 else 0

        return see

    def scores(self) -> Scores:
        """The scores of all that was seen."""
        if not self.tokens:
            raise UserError(
                "the calibration data holds no token that is not padding, so nothing is known about the model",
                hint="--data sample, or more text",
            )
        shape = self.found.shape
        sizes = {(part, layer): total.result() for (part, layer), total in self.sums.items()}
        attention_LHE = self._stacked(sizes, decoders.ATTENTION).unflatten(1, (shape.heads, -1))
        # In Llama-like models the query heads of a group stand side by side: head = g K + k.
        groups_LGE = attention_LHE.unflatten(1, (shape.kv_groups, -1)).flatten(2)
        norms = [self._stacked(sizes, norm) for norm in decoders.NORMS]
        made = Scores(
            ffn_LF=self._stacked(sizes, decoders.MLP),
            head_LH=attention_LHE.norm(dim=-1),
            group_LG=groups_LGE.norm(dim=-1),
            hidden_D=torch.stack(norms).sum((0, 1)),
            block_L=(1 - self.cosines / self.tokens).float(),
        )
        if not all(tensor.isfinite().all() for tensor in _tensors(made).values()):
            raise UserError("activations of the model are NaN or infinite", hint="--dtype fp32, or a sound model")
        return made

    def _stacked(self, sizes: Mapping[tuple[str, int], Tensor], part: str) -> Tensor:
        return torch.stack([sizes[part, layer] for layer in range(self.found.shape.layers)])


# From scores to what is kept.


def highest(score_I: Tensor, count: int) -> Tensor:
    """The numbers of the `count` highest scores, ascending; of equal ones the first stay."""
    return score_I.argsort(descending=True, stable=True)[:count].sort().values


def choose(scores: Scores, source: Shape, target: Shape, layers_L: Tensor, *, residual: bool = False) -> Kept:
    """What stays of each axis: always the highest scores.

    Args:
        scores: of the source.
        source: the shape of the model as it is.
        target: the shape to reach.
        layers_L: the layers that stay, ascending.
        residual: kept heads take over from the removed ones, with groups from those of their own.
    """
    each, in_group = target.heads // target.kv_groups, source.heads // source.kv_groups
    heads, groups, partners = [], [], []
    for layer in layers_L.tolist():
        groups.append(highest(scores.group_LG[layer], target.kv_groups))
        score_GK = scores.head_LH[layer].view(source.kv_groups, in_group)
        picked = [highest(score_GK[group], each) + group * in_group for group in groups[-1].tolist()]
        heads.append(torch.stack(picked))
        if in_group == 1:  # every head has its own key and value: all heads are sorted together
            partner_of = _partners(scores.group_LG[layer][None], target.heads)
        else:
            partner_of = _partners(score_GK, each)
        partners.append(partner_of[heads[-1]])
    return Kept(
        layers_L=layers_L,
        hidden_D=highest(scores.hidden_D, target.hidden),
        ffn_LF=torch.stack([highest(scores.ffn_LF[layer], target.ffn) for layer in layers_L.tolist()]),
        groups_LG=torch.stack(groups),
        heads_LGK=torch.stack(heads),
        partners_LGK=torch.stack(partners) if residual else None,
    )


def _partners(score_GK: Tensor, kept: int) -> Tensor:
    """(H,): the removed head that each kept one takes over from.

    With the heads of a group sorted by score and counted from 1, of which K of H stay, head i in 2K - H < i <= K takes
    over from head 2K - i + 1: the last one that stays from the first one that goes, and so on outwards.
    """
    num_groups, in_group = score_GK.shape
    partner_H = torch.full((num_groups * in_group,), NOBODY)
    for group in range(num_groups):
        order = score_GK[group].argsort(descending=True, stable=True) + group * in_group
        for i in range(max(1, 2 * kept - in_group + 1), kept + 1):
            partner_H[order[i - 1]] = order[2 * kept - i]
    return partner_H


# Beside the weights.


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What scores were taken on, and how: stored as the file's metadata.

    Attributes:
        weights_sha256: hash of the weights that were scored.
        corpus: fingerprint of the calibration text.
        samples: windows that were read.
        seq_len: tokens of each.
        over_batch, over_sequence: how windows and tokens were put together.
        skipped_on: the text on which perplexity without each layer was taken, if it was.
    """

    weights_sha256: str
    corpus: str
    samples: int
    seq_len: int
    over_batch: How
    over_sequence: How
    skipped_on: str = ""


def note(scores: Scores, source: Source) -> None:
    """Puts the scores beside the weights that are written next."""
    metadata = {name.name: str(getattr(source, name.name)) for name in fields(source)}
    journal.note_tensors(IMPORTANCE, {k: t.contiguous() for k, t in _tensors(scores).items()}, metadata)


def read(
    directory: Path, *, over_batch: How, over_sequence: How, weights_sha256: str | None = None
) -> tuple[Scores, Source]:
    """The scores that lie in a directory, put together in this way and, where a hash is given, taken on these weights.

    Raises:
        UserError: there are none, they belong to other weights, or were put together in another way.
    """
    path = directory / IMPORTANCE
    if not path.is_file():
        raise UserError(f"{directory} holds no {IMPORTANCE}", allowed="a directory that shrink minitron wrote")
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
            source = Source(**{
                name.name: json.loads(metadata[name.name]) if name.type == "int" else metadata[name.name]
                for name in fields(Source)
                if name.name in metadata
            })  # fmt: skip
            scores = Scores(**tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}", hint="without --scores, which reads the text again") from error
    if weights_sha256 is not None and source.weights_sha256 != weights_sha256:
        raise UserError(
            f"the scores in {directory} were taken on other weights than those of the model to be cut",
            allowed="scores of the same model: its first target writes them",
            hint="without --scores",
        )
    if (source.over_batch, source.over_sequence) != (over_batch, over_sequence):
        raise UserError(
            f"the scores in {directory} are {source.over_batch} over windows of {source.over_sequence} over tokens, "
            f"not {over_batch} of {over_sequence}",
            hint=f"--over-batch {source.over_batch} --over-sequence {source.over_sequence}, or without --scores",
        )
    return scores, source


def _tensors(scores: Scores) -> dict[str, Tensor]:
    named = {name.name: getattr(scores, name.name) for name in fields(scores)}
    return {name: tensor for name, tensor in named.items() if tensor is not None}
