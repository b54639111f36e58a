"""Continual pre-training on few, good documents several times over, in the base model's mixture (Guo et al., 2024)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from overhaul.errors import UserError
from overhaul.extend.mixing import Mixing
from overhaul.method import Positive
from overhaul.progress import say

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from overhaul.data import Data
    from overhaul.mixture import Source
    from overhaul.ngram import NGram, Ranking

ARPA = ".arpa"


@dataclass(frozen=True, slots=True)
class Draw:
    """Which documents each pass reads.

    Attributes:
        pool_D: numbers of the documents that may be drawn, best first.
        lengths_D: tokens of each of these.
        tokens: of one pass, at least; it ends with the document that completes them.
        seed: of the order.
    """

    pool_D: np.ndarray
    lengths_D: np.ndarray
    tokens: int
    seed: int

    def __call__(self, number: int) -> np.ndarray:
        """The documents of a pass in its order; none comes twice in one pass."""
        import numpy as np

        order = np.random.default_rng((self.seed, number)).permutation(len(self.pool_D))
        return self.pool_D[order[: _enough(self.lengths_D[order], self.tokens)]]

    def key(self) -> str:
        """What the choice is known by."""
        told = f"{self.tokens}\n{self.seed}\n".encode() + self.pool_D.tobytes()
        return hashlib.sha256(told).hexdigest()

    def read_in(self, passes: int) -> np.ndarray:
        """The documents that so many passes read, each once."""
        import numpy as np

        return np.unique(np.concatenate([self(number) for number in range(passes)]))


def _enough(lengths_D: np.ndarray, tokens: int) -> int:
    """How many of the documents, from the first one on, have so many tokens together."""
    import numpy as np

    return min(int(np.searchsorted(np.cumsum(lengths_D), tokens)) + 1, len(lengths_D))


class StabilityGap(Mixing):
    """Go on pre-training on the best few of the documents several times over, in the mixture that the model knows.

    The tokens of the run are what was asked for: with more passes, fewer documents are read.
    """

    paper: ClassVar[str] = (
        "Guo, Fu, Zhang, Zhao, Shen: Efficient Continual Pre-training by Mitigating the Stability Gap, ACL 2025, "
        "arXiv:2406.14833"
    )

    reads_all: ClassVar[bool] = False

    passes: Positive = Field(
        4, description="Over the documents that are chosen; their tokens are the run's over these."
    )
    reference: str | None = Field(
        None,
        description="Small clean text of the domain, or an .arpa file: the documents of --data likeliest under its "
        "n-grams are chosen; without it, any.",
    )
    order: Positive = Field(5, description="Words of the longest n-grams.")
    draw: Literal["fixed", "dynamic"] = Field(
        "fixed", description="Whether all passes read the same documents, or each draws anew from --pool times as many."
    )
    pool: float = Field(2.0, ge=1, description="Of dynamic: tokens drawn from, as a multiple of those of one pass.")

    _fitted: Any = PrivateAttr(None)

    @model_validator(mode="after")
    def _tokens_are_the_budget(self) -> StabilityGap:
        if self.epochs is not None:
            raise ValueError(
                f"epochs {self.epochs:g} are passes over all of data; use steps for the tokens of the run, and passes"
            )
        if self.new_share() <= 0:
            raise ValueError("mix and replay leave nothing of the tokens for data")
        return self

    def references(self) -> tuple[str, ...]:
        """What documents are held against."""
        return () if self.reference is None else (self.reference,)

    def check(self, model: nn.Module, data: Data | None) -> None:
        """Also refuses to choose more than there is.

        Raises:
            UserError: one pass would have more tokens than the text, or there is no such reference.
        """
        super().check(model, data)
        if data is None:
            return
        self._ngrams()
        wanted, held = self._wanted(data), data.num_training_tokens
        drawn = math.ceil(wanted * self.pool) if self.draw == "dynamic" else wanted
        if drawn > held:
            most = held * self.passes / (self._step_tokens() * self.new_share())
            what = f"{self.pool:g} times the tokens of a pass" if self.draw == "dynamic" else "one pass"
            raise UserError(
                f"{what} would be {drawn:,} tokens, and {data.corpus.name} has {held:,}",
                allowed=f"--steps up to {int(most * wanted / drawn)}, more --passes, or extend cpt for all of the text",
            )
        say(f"note: {self.passes} passes over {wanted:,} of the {held:,} tokens of {data.corpus.name}")

    def _wanted(self, data: Data) -> int:
        """Tokens of --data in one pass; all passes are over the whole run, of which this may be a part."""
        begins, ends = self.part
        return round(self._num_tokens(data) * self.new_share() / (ends - begins) / self.passes)

    def new_source(self, data: Data) -> Source:
        """The chosen documents of --data; the further texts are read on as they are."""
        draw = self._chosen(data)
        return self.chosen(data, draw, name=f"{self.draw} choice {draw.key()[:8]}")

    def _chosen(self, data: Data) -> Draw:
        import numpy as np

        lengths_D, wanted = data.lengths(), self._wanted(data)
        ranking = self._ranking(data)
        order_D = (
            np.random.default_rng((data.seed,)).permutation(len(lengths_D)) if ranking is None else ranking.order_D
        )
        pooled = wanted if self.draw == "fixed" else math.ceil(wanted * self.pool)
        pool_D = order_D[: _enough(lengths_D[order_D], pooled)]
        draw = Draw(pool_D, lengths_D[pool_D], wanted, data.seed)
        self._note(data, draw, ranking, lengths_D)
        return draw

    def _ranking(self, data: Data) -> Ranking | None:
        """Documents of --data, the likeliest first; None without a reference."""
        from overhaul import ngram

        model = self._ngrams()
        return None if model is None else ngram.rank(data.corpus.train, model)

    def _ngrams(self) -> NGram | None:
        """The n-gram model of the reference, read or fitted once; None without a reference."""
        from overhaul import arpa, ngram
        from overhaul.corpora import open_corpus
        from overhaul.documents import as_plain_text

        if self.reference is not None and self._fitted is None:
            if self.reference.endswith(ARPA):
                self._fitted = arpa.from_arpa(self.reference)
            else:
                texts = (as_plain_text(row)["text"] for row in open_corpus(self.reference).train)
                self._fitted = ngram.fit(texts, order=self.order)
        return self._fitted

    def _note(self, data: Data, draw: Draw, ranking: Ranking | None, lengths_D: np.ndarray) -> None:
        """The table of what was chosen."""
        import numpy as np

        from overhaul.journal import note_table

        read_D, all_D = draw.read_in(self.passes), np.arange(len(lengths_D))

        def told(what: str, places_D: np.ndarray) -> tuple[str, ...]:
            tokens = int(lengths_D[places_D].sum())
            typical = "" if ranking is None else f"{np.median(ranking.perplexities_D[places_D]):.1f}"
            return (what, f"{len(places_D):,}", f"{tokens:,}", f"{tokens / lengths_D.sum():.1%}", typical)

        rows = [told(f"all of {data.corpus.name}", all_D), told(f"chosen, {self.passes} passes", read_D)]
        columns = ("documents", "how many", "tokens", "of all", "median n-gram perplexity")
        note_table("Which documents were read", columns, rows)
