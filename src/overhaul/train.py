"""THE loop: one function runs every plan, on one process or many.

A method that trains returns a `Plan`; nothing else in this project contains a training loop.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from overhaul import checkpoint, machine, sharding
from overhaul.artifact import TRACKED
from overhaul.errors import Diverged, Interrupted, UserError
from overhaul.interop.fused import fused
from overhaul.ledger import Seen, merged
from overhaul.method import Training
from overhaul.objective import Batch, Forward, Mean, Objective, weighted_mean
from overhaul.optim import per_layer
from overhaul.progress import Bar, interruptible
from overhaul.schedules import Schedule
from overhaul.stream import Drawn, Stream, num_items
from overhaul.watch import Watcher

FREE_ON_RESUME = ("save_every", "keep", "eval_every")

_COUNTED = ("step", "tokens", "seconds")
"""What in a point of the history counts on from the first point."""

_SEEN = "seen/"
"""In a point of the history, what the tokens of a mixture's source are called begins so."""

_TERM = "loss/"
"""In a point of the history, what the mean of a term is called begins so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to train on what, under which update rule.

    Attributes:
        model: the model with its trainable parameters marked by `requires_grad`.
        objective: `(forward, batch) -> Terms`.
        stream: micro-batches, mappings of tensors.
        optimizer: any torch optimizer; it is called with a closure.
        schedule: share of the run -> factor of the peak rate.
        watchers: change something on a timetable.
        finish: applied to the model after the last step: merges adapters, drops masks, or makes another model of it.
        helpers: children of the model that are trained with it and that `finish` takes away, by name.
        probes: numbers about the model by name, taken whenever it is evaluated.
        hands_on: whether its optimizer goes on in the next plan: then a checkpoint behind the last step holds it too.
        steps: so many, where plans of one method are not equally long; None for those of the settings.
        unit: of what is counted: tokens, or examples: images, texts.
        told: hears what was done, when all of it is; also where a run that is resumed finds it done.
        starts_over: whether the weights it begins with have learnt nothing of what the model was trained on before.
    """

    model: nn.Module
    objective: Objective
    stream: Stream
    optimizer: torch.optim.Optimizer
    schedule: Schedule = lambda share: 1.0
    watchers: tuple[Watcher, ...] = ()
    finish: Callable[[nn.Module], nn.Module] = lambda model: model
    helpers: tuple[str, ...] = ()
    probes: tuple[Callable[[nn.Module], Mapping[str, float]], ...] = ()
    hands_on: bool = False
    steps: int | None = None
    unit: str = "tokens"
    told: Callable[[History], None] = lambda history: None
    starts_over: bool = False

    @property
    def num_trained(self) -> int:
        """Trainable parameters, without those of the helpers."""
        aside = {p for name in self.helpers for p in self.model.get_submodule(name).parameters()}
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad and p not in aside)


@dataclass(slots=True)
class History:
    """One point per optimizer step, as written to `metrics.jsonl`, and what was read: of each text, and document.

    `tokens` counts what the plan's `unit` says, which may be images; `starts_over` is as of the plan.
    """

    points: list[dict[str, Any]] = field(default_factory=list)
    ledger: tuple[Drawn, ...] = ()
    seen: tuple[Seen, ...] = ()
    starts_over: bool = False
    trainable_parameters: int = 0
    optimizer_bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    unit: str = "tokens"

    @classmethod
    def joined(cls, stages: Sequence[History], *, in_parts: bool = False) -> History:
        """The histories of plans run one after the other: points say their stage, costs add up.

        Args:
            stages: one history a plan.
            in_parts: each trained another part of the model; else all went through the whole, and steps count on.
        """
        points: list[dict[str, Any]] = []
        for number, stage in enumerate(stages, 1):
            last = points[-1] if points and not in_parts else {}
            counted = [{key: point[key] + last[key] for key in _COUNTED if key in last} for point in stage.points]
            told = {"stage": number} if len(stages) > 1 else {}
            points += [point | counts | told for point, counts in zip(stage.points, counted, strict=True)]
        return cls(
            points,
            ledger=stages[-1].ledger if stages else (),
            seen=merged(seen for stage in stages for seen in stage.seen),
            starts_over=any(stage.starts_over for stage in stages),
            trainable_parameters=(sum if in_parts else max)(stage.trainable_parameters for stage in stages),
            optimizer_bytes=max((stage.optimizer_bytes for stage in stages), default=0),
            tokens=sum(stage.tokens for stage in stages),
            seconds=sum(stage.seconds for stage in stages),
            unit=stages[0].unit if stages else "tokens",
        )


class _Loss(nn.Module):
    """The model and its objective as one module, so that a data-parallel wrapper sees one forward call."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> dict[str, Mean]:
        return self.objective(Forward(self.model, batch), batch)


def train(
    plan: Plan,
    settings: Training,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    state_dir: Path | None = None,
    resume: bool = False,
    goes_on: bool = False,
    asked: dict[str, Any] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    track: str | None = None,
    quiet: bool = False,
) -> History:
    """Runs the optimizer steps of `plan`, or of the settings, in place.

    Args:
        plan: what to do.
        settings: how long, how fast.
        seed: kept in the checkpoint's manifest; the caller has seeded before building the plan.
        dtype: type of the matrix products (autocast).
        state_dir: where checkpoints go; None writes none.
        resume: go on from the newest checkpoint in `state_dir`, bit for bit.
        goes_on: other plans follow: a checkpoint after the last step too, so that resuming need not run this one again.
        asked: further settings that must not change on resume.
        evaluate: numbers about the model by name, taken every `settings.eval_every` steps with those of the probes.
        track: a tracker that accelerate knows, to which every point is mirrored.
        quiet: no progress.

    Raises:
        UserError: nothing is trainable, the settings changed on resume, or training `Diverged`.
        Interrupted: Ctrl-C; a checkpoint was written.
    """
    num_trained, device = _num_trained(plan), next(plan.model.parameters()).device
    accelerator = Accelerator(cpu=device.type == "cpu", log_with=track, project_dir=state_dir)
    if track:
        accelerator.init_trackers(TRACKED, config={name: str(value) for name, value in settings.model_dump().items()})
    loss, trained = sharding.distribute(accelerator, whole := _Loss(plan.model, plan.objective), plan.optimizer)
    plan = replace(plan, model=trained.model)
    run = _Run(plan, settings, accelerator, loss, dtype)
    steps = run.steps
    run.history.trainable_parameters = num_trained
    asked = {"seed": seed, **settings.model_dump(), **(asked or {})}
    first = run.load(state_dir, asked) if resume and state_dir else 0
    plan.model.train()
    for watcher in plan.watchers:
        watcher.start(plan.model)
    began = time.perf_counter() - run.history.seconds
    with (
        interruptible() as interrupted,
        fused(plan.model),
        run.updates(),
        Bar("training", steps, done=first, quiet=quiet or not accelerator.is_main_process) as bar,
    ):
        for step, point in run.steps_after(first):
            run.history.seconds = time.perf_counter() - began
            if settings.eval_every and step % settings.eval_every == 0:
                point |= run.looked(*([evaluate] if evaluate else []), *plan.probes)
            run.history.points.append(point | {"seconds": round(run.history.seconds, 3)})
            accelerator.log(point, step=step)
            bar.step(_told(point, run.history, plan.unit))
            due = settings.save_every and step % settings.save_every == 0 and step < steps
            stop = run.agreed(interrupted)
            if state_dir and (due or stop):
                run.save(state_dir, step, asked)
            if stop:
                raise Interrupted(f"stopped after step {step} of {steps}")
    run.set_rates(1.0)  # a later plan with the same optimizer finds its peak rates there
    for watcher in plan.watchers:
        watcher.end(plan.model)
    run.note_end()
    if state_dir and goes_on and settings.save_every and first < steps:
        run.save(state_dir, steps, asked, is_done=True)
    sharding.gather(trained, into=whole)
    whole.eval()
    for tracker in accelerator.trackers:
        tracker.finish()
    plan.told(run.history)
    return run.history


def _num_trained(plan: Plan) -> int:
    """Parameters that are trained; raises `UserError` where there are none, or the optimizer holds frozen ones."""
    if not plan.num_trained:
        raise UserError("nothing is trainable: the plan selects no parameter", hint="select at least one group")
    if any(not parameter.requires_grad for group in plan.optimizer.param_groups for parameter in group["params"]):
        raise UserError("the optimizer holds frozen parameters", hint="an optimizer that is made after the freezing")
    return plan.num_trained


class _Run:
    """One training run: what changes from step to step."""

    def __init__(
        self, plan: Plan, settings: Training, accelerator: Accelerator, loss: nn.Module, dtype: torch.dtype
    ) -> None:
        self.plan, self.settings, self.accelerator, self.loss, self.dtype = (
            plan,
            settings,
            accelerator,
            loss,
            dtype,
        )
        self.trainable = [p for group in plan.optimizer.param_groups for p in group["params"]]
        self.device = self.trainable[0].device
        self.peak_rates = [group["lr"] for group in plan.optimizer.param_groups]
        self.history = History(unit=plan.unit)
        self.steps = settings.steps if plan.steps is None else plan.steps
        self.number = 0
        plan.stream.count_anew()  # it may go on where that of another run ended
        self.take_norm: per_layer.TakeNorm | None = None

    def steps_after(self, done: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """The steps after so many with their points, up to the last one or until a watcher says that it is over.

        Raises:
            Diverged: and no watcher put the model back; where one does, the last point tells it.
        """
        for step in range(done + 1, self.steps + 1):
            if any(watcher.is_over() for watcher in self.plan.watchers):
                return
            try:
                point = self.step(step)
            except Diverged:
                if not self._is_put_back(step):
                    raise
                return
            yield step, point

    @contextlib.contextmanager
    def updates(self) -> Iterator[None]:
        """Inside, parameters are updated all at once after the backward pass, or one by one within it."""
        if not self.settings.per_layer:
            yield
            return
        with per_layer.updating(self.plan.optimizer, self._refuse_not_finite) as self.take_norm:
            yield

    def _is_put_back(self, step: int) -> bool:
        """Whether a watcher gave the model weights of before a step that diverged."""
        # Of several processes the others may be waiting for this one's gradients.
        watchers = self.plan.watchers if self.accelerator.num_processes == 1 else ()
        good = next((n for n in (watcher.put_back(self.plan.model, step) for watcher in watchers) if n), None)
        if good is not None:
            self.history.points[-1] |= {"diverged": step, "weights_of": good}
        return good is not None

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step; returns its point of the history."""
        self.number = step
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        drawn = [next(self.plan.stream) for _ in range(self.settings.accumulate * processes)]
        counts = _sum_counts([self.plan.objective.counts(batch) for batch in drawn])
        own = [{key: value.to(self.device) for key, value in batch.items()} for batch in drawn[rank::processes]]
        factor = self.plan.schedule((step - 0.5) / self.steps)
        self.set_rates(factor)
        totals: dict[str, Tensor] = {}
        norm = torch.zeros(())

        def closure() -> Tensor:
            nonlocal totals, norm
            self.plan.optimizer.zero_grad(set_to_none=True)
            totals, loss = self._backward(own, counts, step)
            norm = self.take_norm() if self.take_norm else self._clip()
            return loss

        self.plan.optimizer.step(closure)  # pyright: ignore - torch types the closure as returning float
        for watcher in self.plan.watchers:
            watcher.step(self.plan.model, step)
        self.history.tokens += sum(num_items(batch, self.plan.unit) for batch in drawn)
        means = {name: float(total) / max(counts[name], 1) for name, total in totals.items()}
        weights = {name: weight for name, (weight, _) in self.plan.objective.named().items()}
        self.plan.objective.stepped(means)
        return {
            "step": step,
            "tokens": self.history.tokens,
            "loss": sum(weights[name] * mean for name, mean in means.items()),
            **{f"{_TERM}{name}": mean for name, mean in means.items()},
            "lr": self.peak_rates[0] * factor,
            "grad_norm": float(norm),
            **{f"{_SEEN}{drawn.name}": drawn.tokens for drawn in self.plan.stream.ledger()},
        }

    def set_rates(self, factor: float) -> None:
        """The learning rates, as a share of their peaks."""
        for group, peak in zip(self.plan.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor

    def _backward(
        self, own: list[dict[str, Tensor]], counts: dict[str, int], step: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the mean over all micro-batches and processes; returns the totals and the loss."""
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(own):
            last = index == len(own) - 1
            with contextlib.nullcontext() if last else sharding.without_sync(self.loss):
                with machine.autocast(self.device, self.dtype):
                    terms = self.loss(batch)
                loss = weighted_mean(terms, counts)
                if not torch.isfinite(loss):
                    raise Diverged(**_blame(self.plan, batch, step, index, self.dtype))
                # Data-parallel wrappers average gradients over processes; this makes it a sum.
                (loss * self.accelerator.num_processes).backward()
            for name, mean in terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + mean.total.detach().float()
        if self.accelerator.num_processes > 1:
            reduced = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum")
            sums = dict(zip(sums, reduced, strict=True))
        weights = {name: weight for name, (weight, _) in self.plan.objective.named().items()}
        return sums, torch.stack([weights[name] * total / max(counts[name], 1) for name, total in sums.items()]).sum()

    def looked(self, *looks: Callable[[nn.Module], Mapping[str, float]]) -> dict[str, float]:
        """What all of them find in the model as it is now."""
        found: dict[str, float] = {}
        if not looks:
            return found
        self.plan.model.eval()
        with sharding.callable_parts(self.loss):
            for look in looks:
                found |= look(self.plan.model)
        self.plan.model.train()
        return found

    def _clip(self) -> Tensor:
        limit = self.settings.clip or math.inf
        norm = sharding.whole(torch.nn.utils.clip_grad_norm_(self.trainable, limit))
        self._refuse_not_finite(norm)
        return norm

    def _refuse_not_finite(self, norm: Tensor) -> None:
        """Raises `Diverged`, naming the first parameter whose gradient is not finite."""
        if torch.isfinite(norm):
            return
        names = [n for n, p in self.plan.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        raise Diverged(
            f"the gradient is not finite at step {self.number}, " + (f"first in {names[0]}" if names else "as a whole"),
            hint="a lower --lr, or --dtype fp32; checkpoints written before are kept",
        )

    def agreed(self, interrupted: threading.Event) -> bool:
        """Whether any process was interrupted: then all stop after the same step."""
        if self.accelerator.num_processes == 1:
            return interrupted.is_set()
        if interrupted.is_set():
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def note_end(self) -> None:
        """Puts into the history what was read, and what the optimizer holds."""
        self.history.ledger, self.history.seen = self.plan.stream.ledger(), self.plan.stream.seen()
        self.history.optimizer_bytes, self.history.starts_over = self.optimizer_bytes(), self.plan.starts_over

    def optimizer_bytes(self) -> int:
        """What the optimizer holds by now, on this process."""
        states = self.plan.optimizer.state.values()
        # By identity: a table of 8-bit states is one for all parameters.
        tensors = {id(v): v for state in states for v in state.values() if isinstance(v, Tensor)}
        held = sum(tensor.nbytes for tensor in tensors.values())
        # One that was left out of a checkpoint, as all was done, holds nothing any more.
        return held or self.history.optimizer_bytes

    def save(self, state_dir: Path, step: int, asked: dict[str, Any], *, is_done: bool = False) -> None:
        """Writes a checkpoint: all processes put it together, the first one writes.

        When all is done, the watchers' work too, the checkpoint is there alone, without an optimizer that ends here.
        """
        self.history.optimizer_bytes = self.optimizer_bytes()
        tensors = sharding.whole(checkpoint.trained_tensors(self.plan.model))
        state = {
            "optimizer": None
            if is_done and not self.plan.hands_on
            else sharding.whole(self.plan.optimizer.state_dict()),
            "stream": self.plan.stream.state_dict(),
            "watchers": [watcher.state_dict() for watcher in self.plan.watchers],
            "random": machine.rng_state(),
            "history": self.history,
        }
        if self.accelerator.is_main_process:
            keep = 1 if is_done else self.settings.keep
            checkpoint.write(state_dir, step, tensors=tensors, state=state, asked=_plain(asked), keep=keep)

    def load(self, state_dir: Path, asked: dict[str, Any]) -> int:
        """Goes on from the newest checkpoint; returns the steps it had done, 0 where there is none."""
        newest = checkpoint.newest(state_dir)
        if newest is None:
            return 0
        checkpoint.refuse_changes(newest, _plain(asked), free=FREE_ON_RESUME)
        state = checkpoint.read(newest, self.plan.model)
        self.plan.optimizer.state.clear()
        if state["optimizer"]:
            sharding.load_optimizer(self.plan.optimizer, state["optimizer"])
        self.plan.stream.load_state_dict(state["stream"])
        for watcher, saved in zip(self.plan.watchers, state["watchers"], strict=True):
            watcher.load_state_dict(saved)
        machine.set_rng_state(state["random"])
        self.history = state["history"]
        last = self.history.points[-1]
        self.plan.objective.stepped({key[len(_TERM) :]: mean for key, mean in last.items() if key.startswith(_TERM)})
        return newest.step


def _told(point: dict[str, Any], history: History, unit: str) -> str:
    """What the progress line says of a step."""
    heldout = f"  perplexity {point['perplexity']:.2f}" if "perplexity" in point else ""
    return f"loss {point['loss']:.3f}{heldout}  {history.tokens / history.seconds:.0f} {unit}/s"


def _plain(asked: dict[str, Any]) -> dict[str, Any]:
    """As it will be read back from JSON, so that tuples and paths compare equal."""
    return json.loads(json.dumps(asked, default=str))


def _sum_counts(counts: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(count[name] for count in counts) for name in counts[0]}


def _blame(plan: Plan, batch: Batch, step: int, micro_batch: int, dtype: torch.dtype) -> dict[str, str]:
    """The error for a loss that is not finite: runs the batch again and names the first module to go wrong."""
    first: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple | list) else [output]
            if not first and any(isinstance(t, Tensor) and not t.isfinite().all() for t in tensors):
                first.append(name)

        return hook

    hooks = [m.register_forward_hook(look(n)) for n, m in plan.model.named_modules() if not list(m.children())]
    with torch.no_grad(), machine.autocast(next(plan.model.parameters()).device, dtype):
        plan.objective(Forward(plan.model, batch), batch)
    for hook in hooks:
        hook.remove()
    where = f"the first module with a bad output is {first[0]}" if first else "all hidden states are finite"
    return {
        "given": f"the loss is not finite at step {step}, micro-batch {micro_batch}; {where}",
        "hint": "a lower --lr, --dtype fp32, or a look at the data; checkpoints written before are kept",
    }
