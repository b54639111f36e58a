"""Which examples teach a chat format: both forms of a row, losses against transformers, the rule, mistakes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from overhaul import artifact
from overhaul.alignment import (
    LEAST_LOSS,
    SameChoice,
    Scores,
    as_conversation,
    candidates,
    choose,
    dpo_pairs,
    example,
    mean_losses,
    score,
    use_template,
)
from overhaul.corpora import NO_CORPUS
from overhaul.data import Data
from overhaul.documents import Message, Row, text_row
from overhaul.errors import UserError
from overhaul.stream import Encoded

AS_IT_IS = "{% for m in messages %}{{ m['content'] }}{{ '\n' if m['role'] == 'user' }}{% endfor %}"
"""What a question with its answer is as plain text."""


def asks(question: str, answer: str) -> Row:
    return Row((("question", question), ("answer", answer)))


ROWS = (
    asks("What did the old man say?", "It was a bright morning."),
    asks("Who?", "He."),
    asks("Where had they been for the whole of that summer?", "In Bath, and then at the Abbey with the General."),
    Row((("prompt", "1 + 1 ="), ("completion", " 2"))),
)


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return artifact.load(tiny, dtype=torch.float32).model


def data(tokenizer: Any, rows: tuple[Row, ...] = ROWS, **more: Any) -> Data:
    return Data(replace(NO_CORPUS, name="rows", train=rows), tokenizer, **more)


def test_a_template_that_changes_nothing_has_a_score_of_one(tokenizer: Any, model: Any):
    tokenizer.chat_template = AS_IT_IS
    found = candidates(data(tokenizer, ROWS[:3]), seq_len=200, limit=10)

    scores = score(model, found)

    assert scores.ratios() == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)
    assert (scores.plain_N > 1).all()


def test_what_is_marked_is_the_answer_in_both_forms(tokenizer: Any):
    made = example(data(tokenizer), ROWS[0])
    assert made is not None

    marked = [tokenizer.decode(form.ids[form.trained]) for form in (made.plain, made.templated)]
    whole = [tokenizer.decode(form.ids) for form in (made.plain, made.templated)]
    assert marked == ["It was a bright morning."] * 2
    assert whole[0] == "What did the old man say?\nIt was a bright morning."
    turns = [message._asdict() for message in made.row["messages"]]
    assert whole[1] == tokenizer.apply_chat_template(turns, tokenize=False)


def test_the_end_of_the_turn_can_be_marked_too(tokenizer: Any):
    made = example(data(tokenizer), ROWS[1], with_end=True)
    assert made is not None

    assert tokenizer.decode(made.templated.ids[made.templated.trained]) == "He.<|im_end|>\n"
    assert tokenizer.decode(made.plain.ids[made.plain.trained]) == "He."


def test_a_template_without_an_opening_for_the_answer_marks_the_answer_alone(tokenizer: Any):
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}</s>{% endfor %}"
    made = example(data(tokenizer), ROWS[0])
    assert made is not None

    assert tokenizer.decode(made.templated.ids[made.templated.trained]) == "It was a bright morning."


@pytest.mark.parametrize("answer", ["a", "N", "Nantes", "assistant", " a "])
def test_an_answer_that_stands_in_the_header_too_is_marked_where_it_is_said(tokenizer: Any, answer: str):
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>N {{ m['content'] }}</s>{% endfor %}"
    turns = (Message("user", "Which letter?"), Message("assistant", answer))
    made = example(data(tokenizer), Row((("messages", turns),)))
    assert made is not None

    marked = np.flatnonzero(made.templated.trained)
    assert tokenizer.decode(made.templated.ids[marked]) == answer
    assert tokenizer.decode(made.templated.ids[: marked[0]]) == "<user>N Which letter?</s><assistant>N "
    assert tokenizer.decode(made.templated.ids[marked[-1] + 1 :]).startswith("</s>")


def test_of_a_conversation_the_last_answer_is_scored_after_the_turns_before(tokenizer: Any):
    said = [("system", "Be brief."), ("user", "One?"), ("assistant", "Two."), ("user", "Three?"),
            ("assistant", "Four."), ("user", "And")]  # fmt: skip
    made = example(data(tokenizer), Row((("messages", tuple(Message(*turn) for turn in said)),)))
    assert made is not None

    assert made.row["messages"] == tuple(Message(*turn) for turn in said[:5])
    assert tokenizer.decode(made.plain.ids) == "Be brief.\nOne?\nTwo.\nThree?\nFour."
    assert tokenizer.decode(made.plain.ids[made.plain.trained]) == "Four."
    assert tokenizer.decode(made.templated.ids[made.templated.trained]) == "Four."


@pytest.mark.parametrize("form", ["plain", "templated"])
def test_losses_are_transformers_own_over_the_answer(tokenizer: Any, tiny: Path, model: Any, form: str):
    """One text at a time and unpadded there, batches of unequal lengths here: padding or an off-by-one would show."""
    rows = data(tokenizer)
    made = [example(rows, row) for row in ROWS]
    texts = [getattr(one, form) for one in made if one is not None]
    theirs: Any = AutoModelForCausalLM.from_pretrained(tiny)

    wanted = []
    for row, text in zip(ROWS, texts, strict=True):
        question, answer = (value.strip() for value in dict(row).values())
        if form == "plain":
            head, answer = ("1 + 1 =", " 2") if "prompt" in row else (f"{question}\n", answer)
        else:
            turns = [{"role": "user", "content": question}]
            head = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (head, answer))
        ids = torch.tensor([before + after])
        assert ids[0].tolist() == text.ids.tolist()[: ids.shape[1]]
        with torch.no_grad():
            wanted.append(float(theirs(ids, labels=torch.tensor([[-100] * len(before) + after])).loss))

    assert mean_losses(model, texts).tolist() == pytest.approx(wanted, rel=1e-5)
    assert mean_losses(model, texts, batch_tokens=40).tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_token_is_predicted_at_the_place_before_it(model: Any):
    ids = np.array([5, 6, 7, 8])
    text = Encoded(ids, np.array([False, False, True, False]))
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([ids.tolist()])).logits[0].double()

    assert mean_losses(model, [text])[0] == pytest.approx(-float(logits_TV[1].log_softmax(-1)[7]), rel=1e-5)


def test_the_rule_on_numbers_made_by_hand():
    scores = Scores(np.array([0.1, 0.2, 0.3, 0.4, 5.0, 6.0]), np.array([0.4, 0.2, 0.15, 0.44, 5.0, 6.0]))
    assert scores.ratios() == pytest.approx([4.0, 1.0, 0.5, 1.1, 1.0, 1.0])

    assert choose(scores, 2).tolist() == [1, 2]  # of the half with the lowest loss: 1, then a half is nearer than four
    assert choose(scores, 2, pool=0.66).tolist() == [1, 3]
    assert choose(scores, 2, pool=1.0).tolist() == [1, 4]  # 5 is as near, and its loss is higher
    assert choose(scores, 2, by="loss").tolist() == [0, 1]
    assert choose(scores, 5, pool=0.1).tolist() == [0, 1, 2, 3, 4]  # a pool is never smaller than what is taken
    assert choose(scores, 99).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_random_choice_is_of_the_seed_alone():
    scores = Scores(np.ones(50), np.ones(50))
    first, again, other = (choose(scores, 10, by="random", seed=seed).tolist() for seed in (0, 0, 1))

    assert first == again != other
    assert len(set(first)) == 10


def test_losses_of_nothing_are_compared_without_infinities():
    scores = Scores(np.array([0.0, 0.0, 1.0]), np.array([0.0, 2.0, 0.0]))

    assert scores.ratios() == pytest.approx([1.0, 2.0 / LEAST_LOSS, LEAST_LOSS])
    assert choose(scores, 1, pool=1.0).tolist() == [0]
    assert all(math.isfinite(float(cell)) for _, *cells in scores.table(np.array([0, 1]))[1:] for cell in cells)


@pytest.mark.parametrize(
    "row",
    [
        text_row("Only text."),
        asks("Why?", "  "),
        asks(" ", "So."),
        Row((("messages", (Message("assistant", "Hello."),)),)),
        Row((("messages", (Message("user", "Hello."),)),)),
    ],
)
def test_rows_that_are_no_question_with_an_answer(row: Row, tokenizer: Any):
    assert as_conversation(row) is None
    with pytest.raises(UserError, match="no row of rows is a question with an answer"):
        candidates(data(tokenizer, (row,)), seq_len=100, limit=5)


def test_rows_that_are_too_long_are_left_out_and_all_of_them_refused(tokenizer: Any):
    short, long = ROWS[1], asks("Why?", "Because of it. " * 40)

    assert [one.row for one in candidates(data(tokenizer, (long, short)), seq_len=60, limit=5)] == [
        as_conversation(short)
    ]
    with pytest.raises(UserError, match="longer than --seq-len 60"):
        candidates(data(tokenizer, (long,)), seq_len=60, limit=5)


def test_of_many_rows_a_seeded_part_is_scored_in_their_order(tokenizer: Any):
    rows = tuple(asks(f"Number {n}?", f"It is {n}.") for n in range(40))

    def numbers(seed: int) -> list[int]:
        found = candidates(data(tokenizer, rows, seed=seed), seq_len=100, limit=10)
        return [int(one.row["messages"][1].content.removeprefix("It is ").removesuffix(".")) for one in found]

    assert numbers(0) == sorted(numbers(0)) == numbers(0) != numbers(1)
    assert len(numbers(0)) == 10


def test_a_preference_is_a_prompt_and_two_answers():
    row = Row((("prompt", "Say: "), ("chosen", "yes"), ("rejected", "no")))

    assert dpo_pairs(row) == ("Say: ", "yes", "no")
    assert as_conversation(row) == Row((("messages", (Message("user", "Say:"), Message("assistant", "yes"))),))
    with pytest.raises(UserError, match="has no chosen answer"):
        dpo_pairs(Row((("prompt", "Say: "), ("chosen", " "), ("rejected", "no"))))
    with pytest.raises(UserError, match="is no preference"):
        dpo_pairs(ROWS[0])


def test_a_template_that_is_missing_or_none(tokenizer: Any, tmp_path: Path):
    rows = data(tokenizer)
    files = {"broken": "{% for m in messages %}{{ m[", "silent": "Hello.", "good": AS_IT_IS}
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    for name, says in (("nowhere", "cannot be read"), ("broken", "is no chat template"), ("silent", "makes 'Hello.'")):
        with pytest.raises(UserError, match=says):
            use_template(rows, str(tmp_path / name))
    assert use_template(rows, None) is None
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template") as error:
        use_template(rows, None)
    assert "--template FILE.jinja" in str(error.value)

    assert use_template(rows, str(tmp_path / "good")) == AS_IT_IS == tokenizer.chat_template


def test_a_template_that_changes_answers_is_refused(tokenizer: Any):
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | upper }}\n{% endfor %}"

    with pytest.raises(UserError, match="a template that writes answers as they are"):
        example(data(tokenizer), ROWS[0])


def test_a_run_is_not_resumed_on_other_examples():
    first = SameChoice("a")

    SameChoice("a").load_state_dict(first.state_dict())
    with pytest.raises(UserError, match="other examples"):
        SameChoice("b").load_state_dict(first.state_dict())
