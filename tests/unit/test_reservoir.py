"""A memory of examples: a uniform sample, exact under resume, drawn independently."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from overhaul.errors import UserError
from overhaul.reservoir import Reservoir, WithMemory, remembered
from overhaul.stream import Batch, Map, Repeat, Rows


def examples(start: int, count: int) -> dict[str, torch.Tensor]:
    labels = torch.arange(start, start + count)
    return {"pixel_values": labels[:, None, None].float().expand(-1, 2, 2), "labels": labels}


def numbers(count: int = 7) -> Batch:
    rows = Rows(list(range(count)), name="numbers", fingerprint="f")
    made = Map(Repeat(rows), lambda number: {"labels": torch.tensor(number)}, name="tensor")
    return Batch(made, batch_size=2)


def test_all_are_kept_until_it_is_full_and_each_keeps_what_belongs_to_it():
    memory = Reservoir(8, seed=0)
    memory.insert(examples(0, 5))
    memory.insert(examples(5, 3))
    assert memory.held["labels"].tolist() == list(range(8))

    memory.insert(examples(8, 200))

    assert len(memory) == 8
    assert memory.seen == 208
    assert torch.equal(memory.held["pixel_values"][:, 0, 0], memory.held["labels"].float())


def test_every_example_is_kept_as_often_as_any_other():
    kept = np.zeros(40)
    for seed in range(2_000):
        memory = Reservoir(10, seed=seed)
        memory.insert({"labels": torch.arange(40)})
        kept[memory.held["labels"].numpy()] += 1

    assert kept.sum() == 2_000 * 10
    # Counts of 2,000 draws with probability 1/4, negatively correlated by a little.
    assert stats.chisquare(kept).pvalue > 0.001


def test_one_by_one_and_in_batches_are_the_same():
    whole, single = Reservoir(6, seed=3), Reservoir(6, seed=3)
    whole.insert(examples(0, 50))
    for number in range(50):
        single.insert(examples(number, 1))

    assert torch.equal(whole.held["labels"], single.held["labels"])


def test_a_memory_that_was_saved_goes_on_to_the_same_bits():
    one = Reservoir(6, seed=3)
    one.insert(examples(0, 4))
    two = Reservoir(6, seed=99)
    two.load_state_dict(one.state_dict())
    for memory in (one, two):
        memory.insert(examples(4, 60))

    assert torch.equal(one.held["labels"], two.held["labels"])
    assert torch.equal(one.draw(3)["labels"], two.draw(3)["labels"])


def test_logits_of_a_head_that_has_grown_are_wider():
    memory = Reservoir(4, seed=0)
    memory.insert({"labels": torch.zeros(2, dtype=torch.long), "logits": torch.ones(2, 3)})
    memory.insert({"labels": torch.ones(2, dtype=torch.long), "logits": torch.full((2, 5), 2.0)})

    assert memory.held["logits"].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[2] * 5] * 2


def test_other_names_than_before_are_an_error():
    memory = Reservoir(4, seed=0)
    memory.insert(examples(0, 2))

    with pytest.raises(ValueError, match=r"holds \['labels', 'pixel_values'\], and was given \['labels'\]"):
        memory.insert({"labels": torch.arange(2)})


def test_a_draw_has_no_example_twice_and_all_where_fewer_are_there():
    memory = Reservoir(8, seed=0)
    memory.insert(examples(0, 5))

    assert sorted(memory.draw(8)["labels"].tolist()) == list(range(5))
    assert len(set(memory.draw(4)["labels"].tolist())) == 4


def test_batches_come_with_independent_draws_once_something_is_there():
    memory = Reservoir(32, seed=0)
    stream = WithMemory(numbers(), memory, count=4, draws=2)
    assert set(next(stream)) == {"labels"}

    memory.insert(examples(0, 32))
    batch = next(stream)

    one, two = remembered(batch), remembered(batch, 2)
    assert set(one) == set(two) == {"labels", "pixel_values"}
    assert one["labels"].tolist() != two["labels"].tolist()
    assert remembered(batch, 3) == {}


def test_the_stream_with_its_memory_goes_on_to_the_same_bits():
    one = WithMemory(numbers(), Reservoir(4, seed=0), count=2)
    two = WithMemory(numbers(), Reservoir(4, seed=5), count=2)
    for stream in (one,):
        for _ in range(3):
            one.memory.insert({"labels": next(stream)["labels"]})
    two.load_state_dict(one.state_dict())

    for _ in range(5):
        left, right = next(one), next(two)
        assert all(torch.equal(left[name], right[name]) for name in left)
        for stream, batch in ((one, left), (two, right)):
            stream.memory.insert({"labels": batch["labels"]})


def test_a_draw_that_is_larger_than_the_memory_is_refused():
    with pytest.raises(UserError, match="a draw of 5 examples from a memory of 4"):
        WithMemory(numbers(), Reservoir(4, seed=0), count=5)


def test_of_two_examples_with_one_slot_the_later_stays():
    """Offered at once, examples end where they would one after the other."""
    many = {"labels": torch.arange(200), "pixels": torch.arange(400.0).view(200, 2)}
    at_once, one_by_one = Reservoir(5, seed=3), Reservoir(5, seed=3)
    at_once.insert(many)
    for row in range(200):
        one_by_one.insert({name: tensor[row : row + 1] for name, tensor in many.items()})

    assert all(torch.equal(at_once.held[name], one_by_one.held[name]) for name in many)
    assert torch.equal(at_once.held["pixels"][:, 0], 2.0 * at_once.held["labels"])
