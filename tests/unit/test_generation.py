"""Many texts at once are the same texts one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from overhaul import artifact, evaluate
from overhaul.generation import continuations, mean_states

PROMPTS = ("The capital of", "It was a bright morning, and the old man", "Call me", "a")


@pytest.fixture(scope="module")
def made(make_tiny: Any) -> Any:
    return artifact.load(make_tiny(tie=False))


def test_a_batch_of_any_size_gives_what_each_prompt_gives_alone(made: Any):
    alone = [evaluate.generate(made.model, made.processor, prompt, tokens=6) for prompt in PROMPTS]

    for batch_size in (1, 3, 32):
        assert continuations(made.model, made.processor, PROMPTS, tokens=6, batch_size=batch_size) == alone


def test_a_seed_gives_the_same_samples_and_leaves_the_generator_alone(made: Any):
    before = torch.get_rng_state()
    first, again, other = (continuations(made.model, made.processor, PROMPTS, tokens=8, seed=s) for s in (1, 1, 2))

    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), before)


def test_one_line_ends_with_the_line(made: Any):
    free = continuations(made.model, made.processor, ["a"] * 64, tokens=48, seed=0)
    lines = continuations(made.model, made.processor, ["a"] * 64, tokens=48, seed=0, one_line=True)

    assert any("\n" in text for text in free)
    assert not any("\n" in text for text in lines)


def test_of_a_text_without_its_end_nothing_is_left(made: Any):
    how: dict[str, Any] = {"seed": 0, "one_line": True}
    lines = continuations(made.model, made.processor, ["a"] * 32, tokens=48, **how)
    finished, earlier = (
        continuations(made.model, made.processor, ["a"] * 32, tokens=tokens, finished=True, **how)
        for tokens in (48, 24)
    )

    assert all(line in ("", whole) for line, whole in zip(finished, lines, strict=True))
    assert 0 < sum(map(bool, earlier)) < sum(map(bool, finished)) < sum(map(bool, lines))
    assert set(earlier) <= set(finished)  # with more room the same texts end as they did


def test_the_models_own_habits_of_generating_have_no_part_in_it(make_tiny: Any):
    made = artifact.load(make_tiny(tie=False))
    model: Any = made.model
    plain = continuations(model, made.processor, PROMPTS, tokens=12)

    for habit in ({"repetition_penalty": 5.0}, {"num_beams": 3}, {"no_repeat_ngram_size": 1}, {"max_length": 3}):
        model.generation_config = GenerationConfig(**habit)

        assert continuations(model, made.processor, PROMPTS, tokens=12) == plain
        assert model.generation_config.to_diff_dict().items() >= habit.items()


def test_a_state_does_not_depend_on_the_texts_beside_it(made: Any):
    together_ND = mean_states(made.model, made.processor, PROMPTS)
    alone_ND = np.concatenate([mean_states(made.model, made.processor, [prompt]) for prompt in PROMPTS])

    np.testing.assert_allclose(together_ND, alone_ND, atol=1e-6)
    np.testing.assert_allclose((together_ND**2).sum(1), 1, rtol=1e-5)


def test_states_of_the_beginning_are_those_of_a_text_that_ends_there(made: Any):
    ids = made.processor(PROMPTS[1])["input_ids"]
    beginning = made.processor.decode(ids[:5])
    assert made.processor(beginning)["input_ids"] == ids[:5]

    np.testing.assert_allclose(
        mean_states(made.model, made.processor, PROMPTS[1:2], tokens=5),
        mean_states(made.model, made.processor, [beginning]),
        atol=1e-6,
    )


def test_a_tiny_path_is_enough(tiny: Path):
    made = artifact.load(tiny)

    assert continuations(made.model, made.processor, [], tokens=2) == []
