"""What a text is like, as numbers: the states of the language model that reads it, or those of a sentence encoder.

Letters of shapes: B texts, T tokens, D numbers of a query.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from overhaul import banks, journal
from overhaul.errors import UserError
from overhaul.interop import hf

OWN = "own"
"""Instead of an encoder's name: the language model's own states."""
FOLDER = "encoder"
"""Where a sentence encoder lies beside the weights of a language model."""


class Encoder(ABC):
    """Turns the first tokens of texts into queries.

    Attributes:
        width: D.
        identity: what must be the same for keys to be those of this encoder.
    """

    width: int
    identity: str

    @abstractmethod
    def __call__(self, ids: Sequence[Tensor]) -> Tensor:
        """`(B, D)` float32, where the language model is.

        Args:
            ids: the language model's tokens of each text, `(T,)`, at least one.
        """

    def note(self) -> None:  # noqa: B027 - states of the model need no file
        """Leaves what it needs to be written beside the weights."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes beside the language model."""
        return 0


class OwnStates(Encoder):
    """The mean over tokens of the last states of the language model itself.

    Args:
        model: the language model.
    """

    identity = OWN

    def __init__(self, model: nn.Module) -> None:
        inner: Any = model
        self.model, self.width = model, hf.width(inner.config)

    def __call__(self, ids: Sequence[Tensor]) -> Tensor:
        return hf.mean_states(self.model, ids)


class SentenceEncoder(Encoder):
    """The mean over tokens of the last states of a model like BERT, of norm 1.

    Source: Reimers, Gurevych: Sentence-BERT, EMNLP 2019, section 3, with the normalisation of its later models.

    Args:
        directory: of the encoder, with its own tokenizer.
        tokenizer: the language model's, which turns tokens into text again.

    Raises:
        UserError: the directory has no such model.
    """

    def __init__(self, directory: Path, tokenizer: Any) -> None:
        self.model, self.tokenizer = _read(directory)
        self.spoken = tokenizer
        self.width: int = self.model.config.hidden_size
        self.longest: int = self.model.config.max_position_embeddings
        self.identity = f"{type(self.model).__name__} {banks.fingerprint(self.model)}"

    def to(self, device: torch.device) -> SentenceEncoder:
        """The same, on a device."""
        self.model.to(device)
        return self

    def __call__(self, ids: Sequence[Tensor]) -> Tensor:
        texts = [self.spoken.decode(one, skip_special_tokens=True) for one in ids]
        read = self.tokenizer(texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt").to(
            self.model.device
        )
        states_BTD = self.model(**read).last_hidden_state
        return normalize(hf.mean_inside(states_BTD, read["attention_mask"].bool()), dim=-1)

    def note(self) -> None:
        def write(directory: Path) -> None:
            self.model.save_pretrained(directory / FOLDER)
            self.tokenizer.save_pretrained(directory / FOLDER)

        journal.note_files(write)

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())


def beside(directory: Path, identity: str, model: nn.Module) -> Encoder:
    """The encoder of a directory's keys.

    Args:
        directory: of the language model.
        identity: which encoder it was.
        model: the language model.

    Raises:
        UserError: there is another one, or none.
    """
    if identity == OWN:
        return OwnStates(model)
    from transformers import AutoTokenizer

    there = directory / FOLDER
    found = SentenceEncoder(there, AutoTokenizer.from_pretrained(directory)).to(next(model.parameters()).device)
    if found.identity != identity:
        raise UserError(
            f"{there} is not the encoder that the keys in {directory} were learnt with",
            hint="the directory as it was written",
        )
    return found


def _read(directory: Path) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    # Without a no, transformers asks on the terminal whether it may run code that lies in the directory.
    how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    allowed = f"{OWN}, all-minilm-l6-v2, or a directory with a model like BERT and its tokenizer"
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, **how)
        model: Any = AutoModel.from_pretrained(directory, dtype=torch.float32, **how)
    except (OSError, ValueError) as error:
        what = str(error).strip().splitlines()[0]
        raise UserError(f"{directory} has no encoder of sentences: {what}", allowed=allowed) from error
    return model.eval().requires_grad_(False), tokenizer
