"""`Method` and its shapes: the paper's hyper-parameters are the fields, calling it applies it.

Importing this module, or any method's module, does not import torch: help, schema and validation stay instant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from overhaul.kinds import Kind

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from overhaul.artifact import Artifact
    from overhaul.corpora import Corpus
    from overhaul.data import Data
    from overhaul.stream import Stream
    from overhaul.table import Table
    from overhaul.tasks import TaskSequence
    from overhaul.text_tasks import TextSequence
    from overhaul.train import Plan
    from overhaul.workspace import Workspace


def _several(given: object) -> object:
    return (given,) if isinstance(given, str) else given


Names = Annotated[tuple[str, ...], BeforeValidator(_several)]
"""Names or paths; in a recipe one of them may stand alone."""
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
"""A share of a whole, strictly between 0 and 1."""
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A share of a whole that may be nothing or everything."""
TO_FORGET, TO_RETAIN = "to forget", "to retain"
"""What texts are to a method that makes a model forget some."""
Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """A frozen, strict record: unknown keys are errors, values are checked when it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Method(Settings, ABC):
    """A published system as an object; the first line of a subclass's docstring is its summary everywhere."""

    paper: ClassVar[str] = ""
    """Authors, title, year, and where to find it."""

    kinds: ClassVar[tuple[Kind, ...]] = (Kind.CAUSAL_LM,)
    """The kinds of model that it reads."""
    reads_packed: ClassVar[bool] = False
    """Whether it can begin with a model whose weights are stored as integers."""
    reads_logits_alone: ClassVar[bool] = False
    """Whether logits are all that it asks of a model, so that two networks may make them."""
    networks: ClassVar[int] = 1
    """How many networks of the model's shape are in what it writes."""
    keeps_banks: ClassVar[bool] = False
    """Whether the banks of a directory are still good beside what it writes."""
    holds_out: ClassVar[bool] = True
    """Whether some of its data is held out to measure on; else it reads every row as it stands, with `tags`."""
    brings_text: ClassVar[bool] = False
    """Whether it reads texts that settings of its own name, and none of --data."""
    writes_stock: ClassVar[bool] = True
    """Whether plain transformers loads what it writes, with no other package."""

    def others(self) -> tuple[str, ...]:
        """The models it reads beside the one it changes, as the user named them; they go into the lineage."""
        return ()

    def texts(self) -> tuple[str, ...]:
        """The corpora it reads beside that of --data, as the user named them; the loss on them is watched."""
        return ()

    def whole_corpora(self) -> tuple[Corpus, ...]:
        """The corpora of its own of which it reads every row; the loss on them is watched as well, on all of them.

        Raises `UserError` where one cannot be read.
        """
        return ()

    def whole_names(self) -> tuple[str, ...]:
        """What `whole_corpora` will be called, also before there is a model that says what is in them."""
        return tuple(corpus.name for corpus in self.whole_corpora())

    def reads_data(self) -> bool:
        """Whether it reads the corpus of --data with these settings."""
        return True

    def sequence(self) -> TaskSequence | TextSequence | None:
        """The tasks that it learns one after the other, in place of a corpus; None for a method that reads text."""
        return None

    def references(self) -> tuple[str, ...]:
        """Further corpora and files that it reads and does not train on, as the user named them."""
        return ()

    def measures(self) -> tuple[str, ...]:
        """The metrics of what it makes that it takes itself, beside those on held-out text."""
        return ()

    def at(self, path: Path) -> Self:
        """The method for the model in a directory: what its settings leave to that model is filled in.

        Raises `UserError` where the directory does not tell it.
        """
        return self

    def opened(self, made: Artifact) -> Artifact:
        """The model as the method works on it, such as with a head of another kind; most take it as it is."""
        return made

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Raises `UserError` for what model and data show before anything is measured or changed.

        Args:
            model: the model that would be changed, as it was read; it must be left as it is.
            data: what would be read; None for a method that reads no data.
        """

    @classmethod
    def summary(cls) -> str:
        """The first line of the class's docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]


class Transform(Method, ABC):
    """A change without training: prune, quantize, inject, merge, convert."""

    needs_data: ClassVar[bool] = False
    """Whether `apply` may read calibration data; then the class has fields `samples` and `seq_len`."""

    def reads_data(self) -> bool:
        return self.needs_data

    @abstractmethod
    def apply(self, model: nn.Module, calib: Stream | None) -> nn.Module:
        """Changes `model` in place where it can and returns the changed model.

        Args:
            model: the model, on its device, in evaluation mode.
            calib: batches `{"input_ids": (B, T) int64, "attention_mask": (B, T) optional}`, or None without data.
        """


class Projection(Settings):
    """The subspace in which `--optimizer galore` and `fira` keep their moments, and what `fira` adds from outside."""

    rank: Positive = Field(64, description="Directions kept of each matrix's gradient.")
    gap: Positive = Field(200, description="Steps between two choices of the subspace.")
    scale: Rate = Field(1.0, description="Factor of the update inside it; pre-training scripts have 0.25.")
    side: Literal["std", "reverse_std", "left", "right", "full"] = Field(
        "std", description="Singular vectors that span it: std those of the smaller side, full both."
    )
    subspace: Literal["svd", "randomized", "warm"] = Field(
        "svd", description="How it is found: exactly, by random products, or by turning the one before."
    )
    residual: Literal["released", "orthogonal"] = Field(
        "released", description="What fira adds: G - scale R Q, as its authors' code, or G - R Q, as their paper."
    )
    scaling: Literal["column", "matrix", "none"] = Field(
        "column", description="By which norms fira scales it: of columns, of the matrix, or not at all."
    )
    limiter: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        1.01, description="Largest growth of its norm from step to step; 0 switches the limiter off."
    )


Steps = Annotated[int, Field(gt=0, description="Optimizer steps.")]
BatchSize = Annotated[int, Field(gt=0, description="Windows per micro-batch and process.")]
SeqLen = Annotated[int, Field(gt=1, description="Tokens per window.")]
PeakRate = Annotated[float, Field(gt=0, allow_inf_nan=False, description="Peak learning rate.")]
# Named types carry the description, so that a method can change a default without repeating the text.


class Training(Method, ABC):
    """A change by gradient descent: says what to train; the loop is in `overhaul.train`."""

    steps: Steps = 100
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Passes over the training data; replaces --steps when given."
    )
    batch_size: BatchSize = 4
    accumulate: Positive = Field(1, description="Micro-batches per optimizer step.")
    seq_len: SeqLen = 512
    lr: PeakRate = 1e-4
    warmup: Fraction = Field(0.1, description="Share of the steps with a linearly rising rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="Decay after the warm-up.")
    weight_decay: NonNegative = Field(0.0, description="Decoupled weight decay.")
    clip: NonNegative = Field(1.0, description="Largest gradient norm; 0 switches clipping off.")
    optimizer: Literal["adamw", "adamw8bit", "galore", "fira"] = Field(
        "adamw", description="Update rule: AdamW, with moments of 8 bits, or with moments of low-rank gradients."
    )
    projection: Projection = Field(Projection.model_validate({}), description="Of --optimizer galore and fira.")
    per_layer: bool = Field(
        False, description="Update each parameter in the backward pass and free its gradient at once; needs --clip 0."
    )
    checkpoint_activations: bool = Field(
        False, description="Recompute each block in the backward pass: less memory, a third more time."
    )
    eval_every: Natural = Field(0, description="Steps between held-out perplexities; 0 measures before and after only.")
    save_every: Natural = Field(50, description="Steps between checkpoints for --resume; 0 writes none.")
    keep: Positive = Field(2, description="Checkpoints kept while training.")

    @model_validator(mode="after")
    def _settings_are_read(self) -> Self:
        chosen = sorted(self.projection.model_dump(exclude_defaults=True))
        if self.optimizer not in ("galore", "fira") and chosen:
            raise ValueError(f"projection.{chosen[0]} is read by optimizer galore and fira, not by {self.optimizer}")
        if self.optimizer == "galore" and (outside := {"residual", "scaling", "limiter"} & set(chosen)):
            raise ValueError(f"projection.{min(outside)} is of what fira adds to galore; use optimizer fira")
        if self.optimizer == "fira" and (self.projection.side, self.projection.scaling) == ("full", "column"):
            raise ValueError(
                "projection.side full leaves no columns whose norms could scale; use projection.scaling matrix or none"
            )
        return self

    @model_validator(mode="after")
    def _per_layer_sees_one_gradient(self) -> Self:
        if self.per_layer and self.clip:
            raise ValueError(
                f"per_layer cannot clip: the norm of all gradients is known when the first are gone; use clip 0, "
                f"not {self.clip:g}"
            )
        if self.per_layer and self.accumulate > 1:
            raise ValueError(
                f"per_layer updates after every backward pass; use accumulate 1, not {self.accumulate}, "
                "and a larger batch_size"
            )
        return self

    @abstractmethod
    def plan(self, model: nn.Module, data: Data) -> Plan:
        """What to train on what, under which update rule."""

    def stages(self, model: nn.Module, data: Data) -> Iterator[Plan]:
        """Plans that are run one after the other; the next is asked for when the one before is finished.

        One plan for most methods; a method that trains part after part, or in rounds, yields one for each. A run that
        is resumed goes through all of them again, each as its last checkpoint left it.
        """
        yield self.plan(model, data)

    def new_share(self) -> float:
        """Of the tokens it trains on, those of --data: `epochs` are passes over these."""
        return 1.0

    def left_bytes(self, model: nn.Module) -> int:
        """What it writes beside the weights, about."""
        return 0

    def in_stages(self) -> bool:
        """Whether there is more than one plan: then each has checkpoints of its own."""
        return False

    def in_parts(self) -> bool:
        """Whether each plan trains a part of the model that predicts no tokens by itself."""
        return False


class Pipeline(Method, ABC):
    """A change in several steps, or with several models: candidates, stages, clients."""

    def outline(self, model: nn.Module) -> tuple[str, ...]:
        """What it would do with this model, one sentence a line, for a dry run."""
        return ()

    @abstractmethod
    def run(self, model: nn.Module, work: Workspace) -> nn.Module:
        """Returns the changed model; `model` may be changed in place or left alone.

        Args:
            model: the model, on its device, in evaluation mode.
            work: the data, the loop, and where to put notes.
        """


class Measure(Method, ABC):
    """Numbers with intervals."""

    reads_packed: ClassVar[bool] = True

    needs_corpus: ClassVar[bool] = True
    """Whether `measure` reads `data.corpus`; False for a measure that brings its own questions."""

    @abstractmethod
    def measure(self, model: nn.Module, data: Data) -> Table:
        """One row per number."""


class Difference(Measure):
    """Numbers about what was made of a base: it reads directories, the base's first, and no corpus."""

    needs_corpus: ClassVar[bool] = False

    def measure(self, model: nn.Module, data: Data) -> Table:
        """A model in memory is not enough.

        Raises:
            UserError: always; there is `between`.
        """
        from overhaul.errors import UserError

        raise UserError("one model alone has no difference", hint="between(base, tuned), with directories")

    @abstractmethod
    def between(self, base: str, tuned: str) -> Table:
        """One row per number.

        Args:
            base, tuned: models as the user named them.
        """
