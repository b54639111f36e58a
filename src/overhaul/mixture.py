"""Several sources in token-exact shares, phase after phase, with a ledger of what each has given."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from overhaul.stream import Drawn, Stream, num_tokens


class Phase(NamedTuple):
    """A part of a run with one mixture.

    Attributes:
        shares: of the tokens, by source; they are taken as parts of their sum, and a source without one is not read.
        tokens: how long it lasts; None is to the end.
    """

    shares: Mapping[str, float]
    tokens: int | None = None


class Source(NamedTuple):
    """A text of a mixture.

    Attributes:
        windows: without end.
        key: what its place is kept under for a run that goes on: it changes where that place would mean another one.
    """

    windows: Stream
    key: str


class Mix(Stream):
    """Sources of documents or windows in token-exact shares, which may change from phase to phase.

    The next item comes from the source that is furthest behind its share of the phase, counted in tokens: the realised
    share is never further off than an item per source, and needs no random numbers. A phase ends with the item that
    completes its tokens; all go on where they are in the next. Ends with the last phase, or when the source whose turn
    it is ends.
    """

    def __init__(self, sources: Mapping[str, Stream], phases: Sequence[Phase]) -> None:
        """Puts sources together.

        Args:
            sources: by name.
            phases: in order; only the last may be without an end.

        Raises:
            ValueError: shares that make no mixture, of unknown sources, or a phase that has no end before another one.
        """
        for phase in phases:
            _refuse_no_mixture(phase, sources)
        if not phases or any(phase.tokens is None for phase in phases[:-1]):
            raise ValueError("a mixture has phases, and only the last one may have no end")
        used = [name for name in sources if any(phase.shares.get(name) for phase in phases)]
        self.names, self.sources, self.phases = tuple(used), tuple(sources[name] for name in used), tuple(phases)
        self.ends = list(itertools.accumulate(phase.tokens for phase in phases if phase.tokens is not None))
        self._begin()  # the sources are taken where they are

    def then(self, phase: Phase) -> None:
        """Another phase behind the last one, whose end must be known.

        Raises:
            ValueError: the last one has no end, or the new one makes no mixture of these sources.
        """
        _refuse_no_mixture(phase, dict.fromkeys(self.names))
        if self.phases[-1].tokens is None:
            raise ValueError("nothing comes behind a phase without an end")
        self.phases = (*self.phases, phase)
        self.ends = list(itertools.accumulate(one.tokens for one in self.phases if one.tokens is not None))

    def __next__(self) -> Any:
        while self.phase < len(self.ends) and sum(self.given) >= self.ends[self.phase]:
            self.phase += 1
            self.in_phase = [0] * len(self.names)
        if self.phase >= len(self.phases):
            raise StopIteration
        shares = self._shares(self.phase)
        total = sum(self.in_phase) + 1
        turn = max(range(len(shares)), key=lambda place: shares[place] * total - self.in_phase[place])
        item = next(self.sources[turn])
        for counts in (self.in_phase, self.given):
            counts[turn] += num_tokens(item)
        return item

    @property
    def balance(self) -> list[int]:
        """Tokens of each source in this phase: who goes on with them owes each source what it was owed."""
        return list(self.in_phase)

    @balance.setter
    def balance(self, tokens: Sequence[int]) -> None:
        self.in_phase = list(tokens)

    def _shares(self, phase: int) -> list[float]:
        shares = [self.phases[phase].shares.get(name, 0.0) for name in self.names]
        return [share / sum(shares) for share in shares]

    def ledger(self) -> tuple[Drawn, ...]:
        asked, borders = [0.0] * len(self.names), [0, *self.ends[: self.phase], sum(self.given)]
        # Behind the last phase there is nothing more.
        for number, (began, ended) in enumerate(itertools.pairwise(borders[: len(self.phases) + 1])):
            for place, share in enumerate(self._shares(number)):
                asked[place] += share * (ended - began)
        lengths = [source.tokens() for source in self.sources]
        return tuple(
            Drawn(name, given, wanted, given / length if length else None)
            for name, given, wanted, length in zip(self.names, self.given, asked, lengths, strict=True)
        )

    def own_state(self) -> dict[str, Any]:
        return {"phase": self.phase, "in_phase": list(self.in_phase), "given": list(self.given)}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.phase, self.in_phase, self.given = state["phase"], list(state["in_phase"]), list(state["given"])

    def label(self) -> str:
        return f"mix({'; '.join(map(self._told, self.phases))})"

    def _told(self, phase: Phase) -> str:
        total = sum(phase.shares.values())
        shares = ", ".join(f"{name} {phase.shares[name] / total:.3g}" for name in self.names if phase.shares.get(name))
        return shares if phase.tokens is None else f"{phase.tokens:,} tokens of {shares}"

    def restart(self, epoch: int) -> None:
        self._begin()
        super().restart(epoch)

    def _begin(self) -> None:
        self.phase, self.in_phase, self.given = 0, [0] * len(self.names), [0] * len(self.names)


def _refuse_no_mixture(phase: Phase, sources: Mapping[str, Any]) -> None:
    if unknown := [name for name in phase.shares if name not in sources]:
        raise ValueError(f"there is no source {unknown[0]!r}, but {', '.join(sources)}")
    if any(share < 0 for share in phase.shares.values()) or not sum(phase.shares.values()) > 0:
        raise ValueError(f"shares are 0 or more, and not all 0; got {dict(phase.shares)}")
    if phase.tokens is not None and phase.tokens <= 0:
        raise ValueError(f"a phase has 1 token or more, not {phase.tokens}")
