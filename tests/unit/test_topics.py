"""Topics of pages: the regression against its definition and scikit-learn's, and a corpus divided by it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from command import contents
from overhaul.errors import UserError
from overhaul.topics import PENALTIES, Labelled, ModelStates, TfIdf, TopicSettings, file_of, fit, train, write

WORDS = {
    "Sea": "ship sail harbour wave anchor deck captain storm rope tide".split(),  # noqa: SIM905
    "Law & Order": "court judge law appeal verdict jury clause statute witness trial".split(),  # noqa: SIM905
    "Kitchen": "oven butter flour salt onion recipe stew plate pan sugar".split(),  # noqa: SIM905
}
COMMON = "the a of and in it was with for on by that which".split()  # noqa: SIM905


def page(topic: str, draw: random.Random, own: float = 0.3) -> str:
    return " ".join(draw.choice(WORDS[topic] if draw.random() < own else COMMON) for _ in range(40))


def labels(path: Path, *, pages: int = 40, own: float = 0.3) -> Path:
    draw = random.Random(0)
    rows = [{"text": page(topic, draw, own), "topic": topic} for topic in WORDS for _ in range(pages)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


# The regression.


def gaussians(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    topics_N = draw.integers(0, 3, 300)
    return draw.normal(size=(300, 6)) + 0.8 * np.eye(3, 6)[topics_N], topics_N


def test_the_gradient_vanishes_at_the_minimum():
    features_ND, topics_N = gaussians()

    head = fit(features_ND, topics_N, 3, penalty=0.01)

    left_NK = head.probabilities(features_ND) - np.eye(3)[topics_N]
    gradient_DK = features_ND.T @ left_NK / len(topics_N) + 0.01 * head.weight_DK.numpy()
    assert np.abs(gradient_DK).max() < 1e-6
    assert np.abs(left_NK.mean(0)).max() < 1e-6


def test_without_anything_to_learn_from_the_shares_of_the_topics_are_predicted():
    topics_N = np.array([0, 0, 0, 1])

    head = fit(np.zeros((4, 2)), topics_N, 2, penalty=1.0)

    np.testing.assert_allclose(head.probabilities(np.ones((1, 2))), [[0.75, 0.25]], atol=1e-6)


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_probabilities_are_those_of_scikit_learn(penalty: float):
    linear_model = pytest.importorskip("sklearn.linear_model")
    features_ND, topics_N = gaussians()

    ours_NK = fit(features_ND, topics_N, 3, penalty=penalty).probabilities(features_ND)
    theirs = linear_model.LogisticRegression(C=1 / (penalty * len(topics_N)), tol=1e-10, max_iter=10_000)

    np.testing.assert_allclose(ours_NK, theirs.fit(features_ND, topics_N).predict_proba(features_ND), atol=1e-4)


def test_the_accuracy_is_that_of_scikit_learn_on_tf_idf(tmp_path: Path):
    """With the penalty chosen on the same pages, and the accuracy taken on the same others."""
    linear_model, metrics = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.metrics")
    labelled, encoder = Labelled.read(labels(tmp_path / "labels.jsonl", pages=150, own=0.05)), TfIdf()
    learn, choose, test = labelled.divided(0)
    seen, topics_N = np.concatenate([learn, choose]), labelled.topics_N

    ours = train(labelled, encoder, seed=0)
    features_ND = encoder.features(labelled.texts)

    def theirs(penalty: float, part: np.ndarray) -> Any:
        made = linear_model.LogisticRegression(C=1 / (penalty * len(part)), max_iter=2000)
        return made.fit(features_ND[part], topics_N[part])

    def loss(penalty: float) -> float:
        return metrics.log_loss(topics_N[choose], theirs(penalty, learn).predict_proba(features_ND[choose]))

    expected = (theirs(min(PENALTIES, key=loss), seen).predict(features_ND[test]) == topics_N[test]).mean()
    assert 0.6 < expected < 1
    assert abs(ours.accuracy.value - expected) <= 0.02
    assert ours.accuracy.count == len(test) == 90


# Labelled pages.


def test_each_topic_gives_the_same_shares_to_learn_choose_and_test(tmp_path: Path):
    labelled = Labelled.read(labels(tmp_path / "labels.jsonl"))

    learn, choose, test = labelled.divided(0)

    assert sorted([*learn, *choose, *test]) == list(range(120))
    counts = [np.bincount(labelled.topics_N[part]).tolist() for part in (learn, choose, test)]
    assert counts == [[26] * 3, [6] * 3, [8] * 3]
    assert labelled.divided(1)[2].tolist() != test.tolist()


def test_the_test_pages_are_not_learnt_from(tmp_path: Path):
    """Their labels can be anything: the classifier is the same."""
    labelled = Labelled.read(labels(tmp_path / "labels.jsonl"))
    _, _, test = labelled.divided(0)
    wrong_N = labelled.topics_N.copy()
    wrong_N[test] = (wrong_N[test] + 1) % 3

    texts = [page("Sea", random.Random(9))]
    features = np.random.default_rng(0).normal(size=(120, 4)) + np.eye(3, 4)[labelled.topics_N]

    class Fixed:
        def fit(self, texts: Any) -> None:
            assert len(texts) == 120 - len(test)

        def features(self, texts: Any) -> np.ndarray:
            return features if len(texts) == 120 else features[:1]

        def to_json(self) -> dict[str, Any]:
            return {}

    # The division goes by the labels, so that of the right ones is kept.
    class Divided(Labelled):
        def divided(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return labelled.divided(seed)

    right = train(labelled, Fixed(), seed=0)
    wrong = train(Divided(labelled.texts, labelled.names, wrong_N), Fixed(), seed=0)

    np.testing.assert_array_equal(right.probabilities(texts), wrong.probabilities(texts))
    assert right.accuracy.value + wrong.accuracy.value <= 1


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([(str(n), "x") for n in range(5)], "knows one topic alone: x"),
        ([(str(n), "x") for n in range(9)] + [("z", "y")], r"too few pages of y \(1\)"),
        ([("a", "x"), ("a", "y")], "a page is both 'x' and 'y'"),
        ([(f"{t}{n}", t) for t in ("A b", "a-b") for n in range(5)], "A b, a-b"),
        ([(f"{t}{n}", t) for t in ("Other", "a") for n in range(5)], "no file of their own: Other"),
        ([(f"{t}{n}", t) for t in ("++", "a") for n in range(5)], r"no file of their own: \+\+"),
    ],
    ids=["one topic", "few pages", "two topics", "one file", "other", "no letters"],
)
def test_labels_that_will_not_do(rows: list[tuple[str, str]], says: str, tmp_path: Path):
    (tmp_path / "labels.jsonl").write_text("\n".join(json.dumps({"text": t, "topic": k}) for t, k in rows))

    with pytest.raises(UserError, match=says):
        Labelled.read(tmp_path / "labels.jsonl")


# A corpus divided.


def test_a_corpus_is_divided_and_every_row_is_in_one_file(tiny: Path, tmp_path: Path):
    draw = random.Random(1)
    truth = [draw.choice(list(WORDS)) for _ in range(90)]
    rows: list[dict[str, Any]] = [{"text": page(topic, draw)} for topic in truth]
    rows[0] = {"question": "Where does the ship anchor?", "answer": page(truth[0], draw)}
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    choice = TopicSettings(labels=str(labels(tmp_path / "labels.jsonl")), model=str(tiny), least=0.0, dtype="fp32")

    told = write(str(tmp_path / "corpus.jsonl"), choice, tmp_path / "out")

    assert json.loads((tmp_path / "out" / "topics.json").read_text()) == told
    assert contents(tmp_path / "out").keys() == {
        *("sea.jsonl", "law-order.jsonl", "kitchen.jsonl", "other.jsonl", "topics.json"),
    }
    found = {}
    for name, topic in told["topics"].items():
        lines = (tmp_path / "out" / topic["file"]).read_text().splitlines()
        assert topic["rows"] == len(lines)
        found |= {row["row"]: row for row in map(json.loads, lines) if row["topic"] == name}
    assert sorted(found) == list(range(90))
    assert all(rows[number].items() <= row.items() for number, row in found.items())
    right = sum(found[number]["topic"] == topic for number, topic in enumerate(truth)) / 90
    assert right > 0.6  # a third by chance
    assert abs(right - told["accuracy"]["value"]) < 0.25


def test_columns_that_are_not_read_are_found_by_the_number_of_the_row(tmp_path: Path):
    pytest.importorskip("sklearn")
    draw = random.Random(1)
    rows = [{"text": page(topic, draw), "url": f"page/{n}"} for n, topic in enumerate([*WORDS, *WORDS])]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    choice = TopicSettings(labels=str(labels(tmp_path / "labels.jsonl")), encoder="tfidf")

    told = write(str(tmp_path / "corpus.jsonl"), choice, tmp_path / "out")

    names = [topic["file"] for topic in told["topics"].values()]
    found = [json.loads(line) for name in names for line in (tmp_path / "out" / name).read_text().splitlines()]
    assert len(found) == len(rows)
    for row in found:
        assert row.keys() == {"text", "topic", "probability", "row"}
        assert row["text"] == rows[row["row"]]["text"]


def test_a_page_that_fits_no_topic_is_other(tmp_path: Path):
    pytest.importorskip("sklearn")
    draw = random.Random(2)
    texts = [page("Sea", draw, own=1.0), "entirely unknown vocabulary everywhere"]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    choice = TopicSettings(labels=str(labels(tmp_path / "labels.jsonl", own=0.9)), encoder="tfidf", least=0.9)

    told = write(str(tmp_path / "corpus.jsonl"), choice, tmp_path / "out")

    assert {name: topic["rows"] for name, topic in told["topics"].items()} == {
        **{"Kitchen": 0, "Law & Order": 0, "Sea": 1, "other": 1},
    }
    (row,) = map(json.loads, (tmp_path / "out" / "other.jsonl").read_text().splitlines())
    assert (row["text"], row["topic"], row["row"]) == (texts[1], "other", 1)
    assert row["probability"] < 0.9


def test_the_same_seed_writes_the_same_bytes(tiny: Path, tmp_path: Path):
    own = labels(tmp_path / "labels.jsonl", pages=10)
    choice = TopicSettings(labels=str(own), model=str(tiny), tokens=16, dtype="fp32")

    (tmp_path / "corpus.jsonl").write_text("\n".join((tmp_path / "labels.jsonl").read_text().splitlines()[::9]))
    for name in ("first", "again"):
        write(str(tmp_path / "corpus.jsonl"), choice, tmp_path / name)

    assert contents(tmp_path / "first") == contents(tmp_path / "again")


def test_states_are_standardised_by_the_pages_that_are_learnt_from(tiny: Path):
    draw = random.Random(0)
    texts = [page(topic, draw) for topic in WORDS for _ in range(20)]
    encoder = ModelStates(TopicSettings(labels="", model=str(tiny), dtype="fp32"))

    encoder.fit(texts)
    features_ND = encoder.features(texts)

    np.testing.assert_allclose(features_ND.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(features_ND.std(0), 1, atol=1e-6)
    alone_ND = np.concatenate([encoder.features([text]) for text in texts[:3]])
    np.testing.assert_allclose(alone_ND, features_ND[:3], atol=1e-3)
    assert torch.get_default_dtype() == torch.float32


def test_topics_have_files_that_any_system_can_name():
    assert [file_of(name) for name in ("Law & Order", "Bücher/Alt", "C++", "..")] == [
        *("law-order.jsonl", "bücher-alt.jsonl", "c.jsonl", ".jsonl"),
    ]


def test_mistakes_are_refused_before_anything_is_computed(tmp_path: Path):
    own = str(labels(tmp_path / "labels.jsonl"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    none = TopicSettings(labels=own, model="no/such/model")

    with pytest.raises(UserError, match="out exists"):
        write("sample", none, tmp_path / "out")
    with pytest.raises(UserError, match="neither a name nor an existing path"):
        write("nowhere", none, tmp_path / "new")
    with pytest.raises(UserError, match=r"nowhere.jsonl is no file"):
        write("sample", TopicSettings(labels="nowhere.jsonl"), tmp_path / "new")
    with pytest.raises(UserError, match="--encoder tfidf does not read --model"):
        write("sample", TopicSettings(labels=own, encoder="tfidf", model="a"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    with pytest.raises(UserError, match=r"overhaul\[topics\]"):
        TfIdf()
