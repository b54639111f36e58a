"""What all learning with a bank for each task does, of images or of texts: begin, keep, tell tasks apart, report."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from overhaul import journal, machine
from overhaul.banks import Banked, Sockets, refuse_known
from overhaul.evaluate import wilson_interval
from overhaul.learners.learner import Learner
from overhaul.table import Row

if TYPE_CHECKING:
    from overhaul.banking import BankLearning

Parent = Literal["none", "first", "most_similar"]


class BankKeeper(Learner):
    """Keeps a bank for each task, and finds the task of an example that comes without it.

    Args:
        method: how.
        model: the frozen model, into which the sockets go.
        data: the tasks.
        sockets: where banks go.
        parent: the bank that a task begins as: none, but the frozen model; the first one; or the one that is nearest to
            the task, the older of two that are equally near.

    Raises:
        UserError: the model has no place for them, or its directory has a bank for a task of the same name.
    """

    whole_first = False
    """Whether the first task trains the whole model."""

    def __init__(
        self, method: BankLearning, model: nn.Module, data: Any, sockets: Sockets, *, parent: Parent = "none"
    ) -> None:
        super().__init__(model, data)
        self.method, self.parent, self.banked = method, parent, Banked(model, sockets)
        if (start := method.start) is not None:
            self.banked.read(start)
        self.before = len(self.banked.banks)
        refuse_known((task.name for task in data.sequence.tasks), {bank.name for bank in self.banked.banks})
        self._doubts: dict[tuple[int, int, bool], Tensor] = {}
        self._similar: dict[int, list[float]] = {}

    def _is_whole(self, number: int) -> bool:
        return self.whole_first and number == 0

    def _parent_of(self, number: int) -> int | None:
        """The place of the bank that a task begins as."""
        there = range(len(self.banked.banks))
        if self.parent == "none" or not there:
            return None
        if self.parent == "first":
            return 0
        similar = self._similar[number] = []
        for place in there:
            self.banked.use(place)
            similar.append(self.nearness(number))
        return similar.index(max(similar))

    nearness_is: str
    """What `nearness` tells, for the report."""

    @abstractmethod
    def nearness(self, number: int) -> float:
        """How well the model knows a task that is to be learnt, with the bank in use: the larger the better."""

    @abstractmethod
    def shown(self, nearness: float) -> str:
        """As it is shown in the report."""

    def _seed(self, number: int) -> int:
        """By the run's seed and the task's name, so that a task's bank is the same wherever in an order it stands."""
        return machine.derived_seed(self.data.seed, self.data.sequence.tasks[number].name)

    def kept_bytes(self) -> dict[str, int]:
        return {"banks": sum(bank.nbytes for bank in self.banked.banks)}

    def identified(self, number: int, tasks: Sequence[int], *, by_views: bool = True) -> Tensor:
        """`(N,)`: of a task's held-out examples, the task among some that each is taken for.

        Args:
            number: of the task whose examples they are.
            tasks: among which is chosen.
            by_views: whether other views of an example count as well, where the method has any.
        """
        doubts_TN = torch.stack([self._doubt(number, task, by_views and self.method.views > 0) for task in tasks])
        return torch.tensor(list(tasks))[doubts_TN.argmin(dim=0)]

    def _doubt(self, number: int, task: int, by_views: bool) -> Tensor:
        """`(N,)`: how much a task's bank doubts the held-out examples of another one, asked once."""
        if (at := (number, task, by_views)) not in self._doubts:
            self._doubts[at] = self.doubt(number, task, by_views)
        return self._doubts[at]

    @abstractmethod
    def doubt(self, number: int, task: int, by_views: bool) -> Tensor:
        """`(N,)`: how much a task's bank doubts each held-out example of a task.

        Args:
            number: of the task whose examples they are.
            task: whose bank is asked.
            by_views: whether other views of an example count as well.
        """

    def end(self) -> None:
        """Leaves the frozen model, its banks beside it, and how well tasks were told."""
        if len(self.data.sequence.tasks) > 1:
            self._note_identified()
        if self.parent != "none":
            self._note_parents()
        self.banked.note()
        self.banked.restore()

    def _note_identified(self) -> None:
        """The confusion of tasks, and the share of examples whose task was told, by one view and by several."""
        names = [task.name for task in self.data.sequence.tasks]
        tasks = range(len(names))
        views = f"{self.method.plain_views + self.method.views} views"
        ways = {"one view": False} | ({views: True} if self.method.views else {})
        taken = {way: [self._taken_for(number, by) for number in tasks] for way, by in ways.items()}
        for way, counts_TT in taken.items():
            right, count = sum(counts_T[n] for n, counts_T in enumerate(counts_TT)), sum(map(sum, counts_TT))
            low, high = wilson_interval(right, count)
            what: Any = {"model": self.data.model, "metric": f"tasks told, {way}", "count": count}
            journal.note_metric(Row(value=right / count, low=low, high=high, **what))
        rows = [
            (name, *(" / ".join(_share(counts_TT[n], other) for counts_TT in taken.values()) for other in tasks))
            for n, name in enumerate(names)
        ]  # fmt: skip
        by = f": by {' / by '.join(ways)}" if len(ways) > 1 else ""
        journal.note_table(f"Which task examples were taken for, each row a task{by}", ("", *names), rows)

    def _taken_for(self, number: int, by_views: bool) -> list[int]:
        """Of a task's held-out examples, how many are taken for each task."""
        tasks = range(len(self.data.sequence.tasks))
        chosen_N = self.identified(number, tasks, by_views=by_views)
        return [int((chosen_N == task).sum()) for task in tasks]

    def _note_parents(self) -> None:
        """What each task began as, and what it could have begun as."""
        banks, most = self.banked.banks, max(map(len, self._similar.values()), default=0)
        rows = [
            (
                bank.name,
                bank.parent or ("the whole model" if self._is_whole(number) else "the frozen model"),
                *map(self.shown, similar),
                *[""] * (most - len(similar)),
            )
            for number, bank in enumerate(banks[self.before :])
            for similar in [self._similar.get(number, [])]
        ]
        title = "What each task began as" + (f", and {self.nearness_is}" if most else "")
        journal.note_table(title, ("", "began as", *(bank.name for bank in banks[:most])), rows)


def _share(counts_T: Sequence[int], task: int) -> str:
    return f"{counts_T[task] / sum(counts_T):.1%}"
