"""What the numbers say, in sentences: the verdict, the limits, one sentence per step."""

from __future__ import annotations

from collections.abc import Sequence

from overhaul.lineage import LineageStep
from overhaul.method import TO_FORGET, TO_RETAIN
from overhaul.report.facts import FORGETTING, TASK_GAIN, Facts, Recovery, accuracies, metric, quality, recovery
from overhaul.report.numbers import as_count, as_duration, as_interval, as_percent, as_quantity, as_size, as_value
from overhaul.report.tables import before_after
from overhaul.table import Row

VISIBLY_SPARSE = 0.95
"""Below this share of non-zeros a model is called sparse; trained weights hold a few zeros by chance."""


def verdict(facts: Sequence[Facts]) -> str:
    """The outcome in one sentence: for one model what it is, for more what the last has won or lost."""
    last, gap = facts[-1], recovery(facts)
    if len(facts) == 1:
        clauses = [_description(last)]
    elif gap and last.trainable_share is not None and last is not gap.worst:
        clauses = [*_sparsity(last), f"{_won_back(gap)}, with {_cost(last)}"]
    else:
        clauses = [*_sparsity(last), _change(facts)]
    sentence = " and ".join(clauses)
    return f"{sentence[0].upper()}{sentence[1:]}."


def comparison_sentence(facts: Sequence[Facts]) -> str:
    """What is best at half the bytes of the first model, or else what is smallest; of adaptations, what they won."""
    if adapted := [one for one in facts[1:] if metric(one, TASK_GAIN) is not None]:
        return _adaptation_sentence(facts[0], adapted)
    if all(one.kind for one in facts):
        return _classifier_sentence(facts)
    reference = facts[0]
    before, size = quality(reference), reference.bytes
    others = [(one, row, one.bytes) for one in facts[1:] if (row := quality(one)) and one.bytes]
    if before is None or not size or not others:
        return f"{len(facts)} models are shown side by side, without quality or size on both ends."
    halves = [other for other in others if other[2] <= size / 2]
    if halves:
        one, row, num_bytes = min(halves, key=lambda other: other[1].value)
        lead = f"at most half the bytes of {reference.label}: {one.label} is best"
    else:
        one, row, num_bytes = min(others, key=lambda other: other[2])
        lead = f"no model has half the bytes of {reference.label}: {one.label} is smallest"
    return (
        f"{lead[0].upper()}{lead[1:]}, {row.metric} {as_quantity(row.value)} against {as_quantity(before.value)}, "
        f"with {as_percent(num_bytes / size, digits=2)} of the bytes."
    )


def _classifier_sentence(facts: Sequence[Facts]) -> str:
    """Which classifier knows most of the tasks, where the records say so."""
    known = [(one, next(iter(found.items()))) for one in facts if (found := accuracies(one))]
    if not known:
        return f"{len(facts)} classifiers are shown side by side; no record says what they know of the same tasks."
    best, (kind, row) = max(known, key=lambda pair: pair[1][1].value)
    return f"{best.label} knows most of the tasks: {as_percent(row.value)} {kind}."


def _adaptation_sentence(reference: Facts, adapted: Sequence[Facts]) -> str:
    """Which of the adaptations learnt most, and which forgot least, in nats a token."""
    gain, lost = ({one.label: metric(one, name) or 0.0 for one in adapted} for name in (TASK_GAIN, FORGETTING))
    most, least = max(gain, key=lambda label: gain[label]), min(lost, key=lambda label: lost[label])
    if gain[most] <= 0:
        return f"No model has a lower loss on the task than {reference.label}."
    lead = f"{most} gains most on the task, {as_quantity(gain[most])} nats a token,"
    if most == least:
        return f"{lead} and forgets least, {as_quantity(lost[most])}."
    return (
        f"{lead} and forgets {as_quantity(lost[most])}; {least} forgets least, {as_quantity(lost[least])}, "
        f"and gains {as_quantity(gain[least])}."
    )


def measured_sentence(rows: Sequence[Row]) -> str:
    """The first metric in one sentence: its value for one model, its range for more."""
    first = [row for row in rows if row.metric == rows[0].metric]
    low, high = (choose(first, key=lambda row: row.value) for choose in (min, max))
    name = f"{low.metric[0].upper()}{low.metric[1:]}"
    if as_value(low) == as_value(high):
        return f"{name} of {low.model if len(first) == 1 else 'every model'}: {as_value(low)}."
    return f"{name}: from {as_value(low)} ({low.model}) to {as_value(high)} ({high.model})."


def limits(facts: Sequence[Facts]) -> tuple[str, ...]:
    """What the last model does worse than the first, and what its zeros do not buy; one sentence each."""
    reference, last = facts[0], facts[-1]
    if reference is last:
        return ()
    table = before_after(facts)
    sentences = [
        f"{column}: {after} in {last.label}, {before} in {reference.label}."
        for column, before, after in zip(table.columns, table.rows[0], table.rows[-1], strict=True)
        if after.worse
    ]
    if _sparsity(last) and reference.bytes and last.bytes and last.bytes >= reference.bytes:
        sentences.append(
            f"Zeros are stored like other numbers: the weights take {as_size(last.bytes)}, as before, "
            "and run no faster without a kernel for sparse matrices."
        )
    return tuple(sentences)


def step_sentence(step: LineageStep) -> str:
    """`prune wanda with sparsity 0.5, on 16,384 tokens of austen, in 21 s.`, without default settings."""
    settings = ", ".join(f"{name} {step.fields[name]}" for name in step.non_default if name in step.fields)
    parts = [f"{step.verb} {step.method}" + (f" with {settings}" if settings else "")]
    if step.data:
        parts.append(f"on {step.data.tokens:,} {step.data.unit} of {step.data.name}")
    if step.seconds is not None:
        parts.append(f"in {as_duration(step.seconds)}")
    return ", ".join(parts) + "."


def _description(facts: Facts) -> str:
    size = f", {as_size(facts.bytes)} on disk" if facts.bytes else ""
    quality = f", perplexity {as_interval(facts.perplexity)}" if facts.perplexity else ""
    corpus = f" on {facts.corpus}" if facts.perplexity and facts.corpus else ""
    return f"{facts.label} has {as_count(facts.parameters)} parameters{size}{quality}{corpus}"


def _sparsity(facts: Facts) -> list[str]:
    """The clause about zeros, or nothing for a dense model."""
    if facts.nonzero_share_blocks is None or facts.nonzero_share_blocks > VISIBLY_SPARSE:
        return []
    zeros = 1 - facts.nonzero_share_blocks
    amount = "half" if abs(zeros - 0.5) < 0.005 else as_percent(zeros)
    return [f"{amount} of the block weights are zero"]


def _won_back(gap: Recovery) -> str:
    share = gap.shares[-1][1]
    amount = "all" if share >= 1 else as_percent(share, digits=2)
    return f"{amount} of the lost log-perplexity is back"


def _cost(facts: Facts) -> str:
    trained = f"{as_percent(facts.trainable_share, digits=2)} of the parameters trained"
    return f"{trained} in {as_duration(facts.seconds)}" if facts.seconds is not None else trained


def _change(facts: Sequence[Facts]) -> str:
    before, after = facts[0], facts[-1]
    if known := accuracies(after):
        shares = " and ".join(f"{as_percent(row.value)} {kind}" for kind, row in known.items())
        return f"after all tasks the accuracy of {after.label} is {shares}"
    if forgotten := _forgotten(facts):
        return forgotten
    if not (before.perplexity and after.perplexity):
        return f"{len(facts)} models are shown side by side, without perplexity on both ends"
    factor = as_quantity(after.perplexity.value / before.perplexity.value, digits=3)
    return (
        f"perplexity went from {as_quantity(before.perplexity.value)} ({before.label}) "
        f"to {as_quantity(after.perplexity.value)} ({after.label}), {factor} times as much"
    )


def _forgotten(facts: Sequence[Facts]) -> str:
    """How the losses on texts to forget and to retain have changed in the last step; empty where none was to forget."""
    said = []
    for row in facts[-1].metrics:
        before = metric(facts[-2], row.metric)
        if before is not None and row.metric.endswith((f" ({TO_FORGET})", f" ({TO_RETAIN})")):
            said.append(f"the {row.metric} went from {as_quantity(before)} to {as_quantity(row.value)}")
    return f"{' and '.join(said)} nats a token" if any(f"({TO_FORGET})" in one for one in said) else ""
