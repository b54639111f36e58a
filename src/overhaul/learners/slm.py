"""What SLM keeps from task to task: the library, and nothing else. Keys are learnt first, then what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from overhaul import banks, journal, pretrained
from overhaul.corpora import CorpusSpec, open_corpus
from overhaul.data import Data
from overhaul.encoders import OWN, Encoder, OwnStates, SentenceEncoder
from overhaul.learners.learner import Learner
from overhaul.learners.text import note_told
from overhaul.library import Library
from overhaul.objective import Batch, CrossEntropy, Forward, Objective, Term, Terms
from overhaul.optim.build import build
from overhaul.retrieval import Keys, find, first_keys, pull
from overhaul.schedules import schedule
from overhaul.stream import IGNORED, Repeat, Rows, Shuffle
from overhaul.stream import Batch as Batches
from overhaul.text_task_data import Said, TextTaskData, asked
from overhaul.train import Plan

if TYPE_CHECKING:
    from overhaul.learn.slm import Slm

CENTRE_WINDOWS = 32
"""Windows of novels whose mean query is taken off every query."""


class Retrieving(Objective):
    """An objective before which increments are chosen for each row of the micro-batch.

    Args:
        inner: what is minimised.
        choose: for a micro-batch.
    """

    def __init__(self, inner: Objective, choose: Callable[[Batch], None]) -> None:
        self.inner, self.choose = inner, choose

    def parts(self) -> tuple[tuple[float, Term], ...]:
        return self.inner.parts()

    def __call__(self, forward: Forward, batch: Batch) -> Terms:
        self.choose(batch)
        return super().__call__(forward, batch)


class KeyPull(Term):
    """What keys are learnt by: each text pulls the likest of them that are not masked.

    Args:
        count: keys that are pulled, of each group.
        masked: probability with which one is left out.
    """

    name = "key_pull"

    def __init__(self, count: int, masked: float) -> None:
        self.count_of, self.masked = count, masked

    def total(self, forward: Forward, batch: Batch) -> Tensor:
        keys: Any = forward.model
        return pull(batch["queries"], keys.keys_GPC, self.count_of, self.masked)

    def count(self, batch: Batch) -> int:
        return len(batch["queries"])


class SlmLearner(Learner):
    """Trains keys and increments for each task; the library tells by itself which are used.

    Args:
        method: how.
        model: the frozen language model, into which room for increments is put.
        data: the tasks.

    Raises:
        UserError: the model has no room, or its directory has a task of the same name.
    """

    data: TextTaskData  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, method: Slm, model: nn.Module, data: Any) -> None:
        super().__init__(model, data)
        self.method = method
        self.library = Library(
            model,
            rank=method.rank,
            entries=method.entries,
            top_k=method.top_k,
            groups=method.groups,
            query_tokens=method.query_tokens,
            unknown=method.unknown,
            encoder=self._encoder(),
            centre_D=torch.zeros(()),
        )
        if method.start is not None:
            self.library.read(method.start)
        self.before = len(self.library.tasks)
        banks.refuse_known((task.name for task in data.sequence.tasks), self.library.tasks)
        if not self.before:
            self.library.centre_D = self._centre()
        self.keys_GPC: Tensor | None = None
        self._said: dict[tuple[int, tuple[int, ...]], Said] = {}
        self._queries: dict[int, Tensor] = {}
        self._nearest: dict[int, tuple[Tensor, Tensor]] = {}

    def _encoder(self) -> Encoder:
        """What texts are known by; a named one is fetched."""
        if self.method.encoder == OWN:
            return OwnStates(self.model)
        there = pretrained.resolve(self.method.encoder)
        return SentenceEncoder(there, self.data.processor).to(next(self.model.parameters()).device)

    def _centre(self) -> Tensor:
        """The mean query of a text in general, which is that of the novels that come with the project."""
        novels = open_corpus(CorpusSpec(path="sample"))
        data = Data(novels, self.data.processor)
        windows = data.windows("train", seq_len=self.method.query_tokens, limit=CENTRE_WINDOWS)
        return self.library.queries(list(windows)).mean(dim=0).cpu()

    def begin(self, number: int) -> None:
        self.library.begin()

    def plans(self, number: int) -> Iterator[Plan]:
        """Keys first, which are frozen then, and what they find."""
        queries_ND = self._task_queries(number)
        keys = Keys(first_keys(queries_ND, self.method.groups, self.method.entries))
        rows = Rows(
            [{"queries": query_D} for query_D in queries_ND],
            name=self.data.sequence.tasks[number].name,
            fingerprint=self.data.sequence.fingerprint,
        )
        yield key_plan(self.method, keys, rows, seed=self.data.seed)
        self.keys_GPC = keys.keys_GPC.detach()
        yield self.plan(number)

    def _task_queries(self, number: int) -> Tensor:
        """`(N, D)` of a task's training texts."""
        found: list[Tensor] = []
        for batch in self.data.batches(number, self.method):
            texts = [asked(ids_T, labels_T != IGNORED) for ids_T, labels_T in _rows(batch)]
            found.append(self.library.queries(texts).cpu())
            if sum(map(len, found)) >= self.method.key_texts:
                break
        return torch.cat(found)[: self.method.key_texts]

    def plan(self, number: int) -> Plan:
        """Next-token cross-entropy, with the task's own increments for what each text is like."""
        method, trained = self.method, self.library.parameters()
        self.model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        return Plan(
            model=self.model,
            objective=Retrieving(CrossEntropy(), self._choose),
            stream=self.data.batches(number, method),
            optimizer=build(method, trained),
            schedule=schedule(method.schedule, method.warmup),
            steps=method.steps_of(self.data, number),  # pyright: ignore[reportArgumentType]
        )

    def _choose(self, batch: Batch) -> None:
        """Of the task that is being learnt, the increments for each row."""
        assert self.keys_GPC is not None
        texts = [asked(ids_T, labels_T != IGNORED) for ids_T, labels_T in _rows(batch)]
        queries_BD = self.library.queries(texts)
        found = find(queries_BD, self.keys_GPC.to(queries_BD.device), self.method.top_k)
        self.library.choice.take(found.entries_BK, found.weights_BK)

    def learnt(self, number: int) -> None:
        assert self.keys_GPC is not None
        self.library.keep(self.data.sequence.tasks[number].name, self.keys_GPC)

    def kept_bytes(self) -> dict[str, int]:
        tensors = [*self.library.keys, *(tensor for block in self.library.blocks for tensor in block.values())]
        library = sum(tensor.nbytes for tensor in tensors)
        return {"library": library} | ({"encoder": of} if (of := self.library.encoder.nbytes) else {})

    def right(self, number: int, tasks: Sequence[int]) -> Tensor:
        return self.said(number, tasks).right_N

    def said(self, number: int, tasks: Sequence[int]) -> Said:
        """What is said of a task's held-out texts when the entries of some tasks may be found."""
        at = number, tuple(tasks)
        if at not in self._said:
            # Entries that may not be found change nothing: what was said once holds.
            self.library.use_all()
            found = self.library.found(self._heldout(number), [self.before + task for task in tasks])

            def choose(row: int) -> None:
                self.library.choice.take(found.entries_BK[row : row + 1], found.weights_BK[row : row + 1])

            self._said[at] = self.data.said(self.model, number, choose)
            self.library.choice.nothing()
        return self._said[at]

    def _heldout(self, number: int) -> Tensor:
        """Queries of a task's held-out texts."""
        if number not in self._queries:
            texts = self.data.asked(number)
            parts = [self.library.queries(texts[at : at + 8]) for at in range(0, len(texts), 8)]
            self._queries[number] = torch.cat(parts)
        return self._queries[number]

    def end(self) -> None:
        """Leaves the frozen model, the library beside it, and what was found for which texts."""
        names = [task.name for task in self.data.sequence.tasks]
        tasks, rows, winners = range(len(names)), [], set[int]()
        for number, name in enumerate(names):
            found = self.library.found(self._heldout(number))
            of_B = found.entries_BK[:, 0] // self.method.entries
            winners |= set(found.entries_BK[:, 0].tolist())
            shares = [f"{float((of_B == self.before + task).double().mean()):.1%}" for task in tasks]
            unknown = float((found.weights_BK.sum(dim=1) == 0).double().mean())
            rows.append((name, *shares, f"{unknown:.1%}", f"{float(found.nearest_B.mean()):.2f}"))
        columns = ("", *names, "left to the frozen model", "similarity")
        journal.note_table("For which task's entries each text was taken, by the nearest key", columns, rows)
        count = self.before * self.method.entries + len(names) * self.method.entries
        note_told(self.data, self.said, f"; {len(winners)} of {count} keys were ever the nearest")
        self.library.note()
        self.library.restore()


def key_plan(method: Slm, keys: Keys, rows: Rows, *, seed: int) -> Plan:
    """How the keys of a task are learnt.

    Args:
        method: how.
        keys: as they begin.
        rows: of each text its `queries` `(D,)`.
        seed: of their order.
    """
    return Plan(
        model=keys,
        objective=KeyPull(method.top_k, method.masked),
        stream=Batches(Repeat(Shuffle(rows, seed=seed)), batch_size=method.batch_size),
        optimizer=torch.optim.AdamW(keys.parameters(), lr=method.key_lr, weight_decay=0.01),
        schedule=schedule("linear", 0.0),
        steps=method.key_steps,
        unit="texts",
    )


def _rows(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels of each row."""
    return zip(batch["input_ids"], batch["labels"], strict=True)
