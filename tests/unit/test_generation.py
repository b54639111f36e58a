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


SHOTS = "".join(f"Question: What is {n} and {n}?\nAnswer: {2 * n}\n\n" for n in range(4))


def test_what_all_prompts_begin_with_is_read_once_and_changes_nothing(made: Any, monkeypatch: pytest.MonkeyPatch):
    prompts = [f"{SHOTS}Question: {prompt}\nAnswer:" for prompt in PROMPTS]
    alone = [evaluate.generate(made.model, made.processor, prompt, tokens=6) for prompt in prompts]
    read: list[int] = []
    forward = type(made.model.model).forward

    def counted(self: Any, input_ids: Any = None, **given: Any) -> Any:
        read.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **given)

    monkeypatch.setattr(type(made.model.model), "forward", counted)
    for batch_size in (1, 3, 32):
        assert continuations(made.model, made.processor, prompts, tokens=6, batch_size=batch_size) == alone
        shared = read[0]
        assert shared >= len(made.processor(SHOTS)["input_ids"]) - 1
        assert sum(read) < 2 * shared + sum(len(made.processor(p)["input_ids"]) - shared + 32 for p in prompts)
        read.clear()


def test_a_model_that_writes_by_the_whole_text_reads_each_whole(make_tiny: Any):
    made = artifact.load(make_tiny(tie=False))
    model: Any = made.model
    generate, given = model.generate, []
    model.generate = lambda **how: given.append(how) or generate(**how)

    continuations(model, made.processor, [SHOTS + prompt for prompt in PROMPTS], tokens=2)

    assert all(how["past_key_values"] is None for how in given)


def test_a_text_ends_with_the_words_that_end_it(made: Any):
    free = continuations(made.model, made.processor, ["a"] * 32, tokens=48, seed=0, batch_size=1)
    word = free[0][10:13]
    ended = continuations(made.model, made.processor, ["a"] * 32, tokens=48, seed=0, batch_size=1, until=(word,))

    assert any(len(text) < len(whole) for text, whole in zip(ended, free, strict=True))
    first, whole = ended[0], free[0]
    assert whole.startswith(first)
    assert first.find(word) == whole.find(word) >= 0
    assert word not in first[: first.find(word) + len(word) - 1]


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
