"""Which topic a page is about: a classifier trained on labelled pages, and a corpus divided by it.

After Llama-3-SynE (Chen et al., 2024), whose classifier of topics is a small BERT and not published. Here it is a
multinomial logistic regression on the mean of a model's last hidden states, or on TF-IDF.

Letters of shapes: N texts, D features, K topics.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import Field

from overhaul import disk
from overhaul.corpora import every_row
from overhaul.documents import Row, as_plain_text, json_line, read_columns
from overhaul.errors import UserError
from overhaul.method import Fraction, Natural, Positive, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from overhaul.evaluate import Estimate

OTHER, MANIFEST = "other", "topics.json"
PENALTIES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""L2 penalties that are tried, per labelled page."""
TESTED, CHOSEN = 0.2, 0.15
"""Shares of the labelled pages of each topic that measure the accuracy, and that choose the penalty."""
FEWEST = 4
"""Labelled pages of a topic: some to learn from, one to choose by, one to test."""
WORDS = 5000
"""Of TF-IDF's vocabulary, the most frequent ones."""
BATCH = 256
"""Rows of the corpus that are looked at together."""
LEAST_DEVIATION = 1e-6
"""Of a dimension of the states, whose vectors have norm 1: less is rounding, and not to be made large."""


class TopicSettings(Settings):
    """A corpus divided by topic, by a classifier that is trained on labelled pages."""

    labels: str = Field(description="Table with the columns text and topic: the labelled pages.")
    field: str | None = Field(None, description="Column of the corpus that holds the text.")
    encoder: Literal["model", "tfidf"] = Field("model", description="What makes numbers of a text.")
    model: str = Field("smollm2-135m", description="Whose mean hidden states a text is told by.")
    tokens: Positive = Field(256, description="Of a text, that the model reads: its beginning.")
    least: Fraction = Field(0.5, description="Probability of its topic from which on a page is of it; below: other.")
    seed: Natural = Field(0, description="Of the division of the labelled pages.")
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="Of matrix products.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N.")

    def refuse_unread(self) -> None:
        """Raises `UserError` for settings of a model where none is asked."""
        given = self.model_dump(exclude_defaults=True)
        unread = [f"--{name}" for name in ("model", "tokens", "dtype", "device") if name in given]
        if self.encoder != "model" and unread:
            raise UserError(f"--encoder {self.encoder} does not read {', '.join(unread)}", hint="--encoder model")


class Encoder(Protocol):
    """Makes numbers of texts."""

    def fit(self, texts: Sequence[str]) -> None:
        """Learns from the texts that the classifier is trained on, and from no others."""
        ...

    def features(self, texts: Sequence[str]) -> np.ndarray:
        """`(N, D)`, fp64."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What it is, in plain data."""
        ...


class ModelStates:
    """The mean of a model's last hidden states, each dimension with the mean and deviation of the training texts."""

    def __init__(self, choice: TopicSettings) -> None:
        from overhaul import artifact, generation, machine

        device = machine.pick_device(choice.device)
        self._dtype = machine.compute_dtype(choice.dtype, device)
        self._made = artifact.load(choice.model, device=device, dtype=machine.weights_dtype(self._dtype))
        self._tokens = min(choice.tokens, generation.longest(self._made.model))
        self._mean_D, self._deviation_D = np.zeros(1), np.ones(1)

    def fit(self, texts: Sequence[str]) -> None:
        """Takes means and deviations."""
        states_ND = self._states(texts)
        self._mean_D, self._deviation_D = states_ND.mean(0), np.maximum(states_ND.std(0), LEAST_DEVIATION)

    def features(self, texts: Sequence[str]) -> np.ndarray:
        """`(N, D)`, fp64."""
        return (self._states(texts) - self._mean_D) / self._deviation_D

    def to_json(self) -> dict[str, Any]:
        """Its name and the hash of its weights."""
        return {"model": self._made.name, "sha256": self._made.weights_sha256, "tokens": self._tokens}

    def _states(self, texts: Sequence[str]) -> np.ndarray:
        from overhaul.generation import mean_states

        # Texts of like length share a batch, so that little is padded.
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        states_ND = mean_states(
            self._made.model,
            self._made.processor,
            [texts[place] for place in order],
            tokens=self._tokens,
            dtype=self._dtype,
        )
        return states_ND[np.argsort(order)].astype(np.float64)


class TfIdf:
    """Weights of the most frequent words, by scikit-learn."""

    def __init__(self) -> None:
        if importlib.util.find_spec("sklearn") is None:
            raise UserError("--encoder tfidf is scikit-learn's, which is not installed",
                            hint="pip install 'overhaul[topics]', or --encoder model")  # fmt: skip
        text = importlib.import_module("sklearn.feature_extraction.text")
        self._inner = text.TfidfVectorizer(max_features=WORDS, sublinear_tf=True)

    def fit(self, texts: Sequence[str]) -> None:
        """Learns the words and how many texts have them."""
        try:
            self._inner.fit(texts)
        except ValueError as error:
            raise UserError(f"the labelled pages have no words: {error}", allowed="pages with text") from error

    def features(self, texts: Sequence[str]) -> np.ndarray:
        """`(N, D)`, fp64."""
        return self._inner.transform(texts).toarray()

    def to_json(self) -> dict[str, Any]:
        """How many words it knows."""
        return {"tfidf": len(self._inner.vocabulary_)}


@dataclass(frozen=True, slots=True)
class Head:
    """A multinomial logistic regression: `softmax(x W + b)`."""

    weight_DK: Tensor
    bias_K: Tensor

    def probabilities(self, features_ND: np.ndarray) -> np.ndarray:
        """`(N, K)`, fp64."""
        import torch

        return torch.softmax(torch.from_numpy(features_ND) @ self.weight_DK + self.bias_K, 1).numpy()


def fit(features_ND: np.ndarray, topics_N: np.ndarray, num_topics: int, *, penalty: float) -> Head:
    """Minimises `mean cross-entropy + penalty / 2 * |W|^2` by L-BFGS, from zero; the bias has no penalty.

    It is convex: scikit-learn's `LogisticRegression` with `C = 1 / (penalty * N)` has the same minimum.

    Args:
        features_ND: fp64.
        topics_N: whole numbers below `num_topics`.
        num_topics: K.
        penalty: above 0.
    """
    import torch

    x_ND, y_N = torch.from_numpy(features_ND), torch.from_numpy(topics_N)
    weight_DK = torch.zeros(x_ND.shape[1], num_topics, dtype=torch.float64, requires_grad=True)
    bias_K = torch.zeros(num_topics, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_DK, bias_K], max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x_ND @ weight_DK + bias_K, y_N)
        loss = loss + penalty / 2 * weight_DK.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return Head(weight_DK.detach(), bias_K.detach())


@dataclass(frozen=True, slots=True)
class Labelled:
    """Labelled pages: their texts, the names of the topics in order, and the number of each page's topic."""

    texts: tuple[str, ...]
    names: tuple[str, ...]
    topics_N: np.ndarray

    @classmethod
    def read(cls, path: str | Path) -> Labelled:
        """A table with `text` and `topic`; pages that are met again are left out.

        Raises:
            UserError: it cannot be read; a page has two topics; fewer than two topics, or too few pages of one; two
                topics would have the same file.
        """
        topic_of: dict[str, str] = {}
        for text, topic in read_columns(path, ("text", "topic")):
            topic = topic.strip()
            if topic_of.setdefault(text, topic) != topic:
                raise UserError(
                    f"{path}: a page is both {topic_of[text]!r} and {topic!r}: {text[:60]!r}",
                    allowed="one topic for each page",
                )
        counts = Counter(topic_of.values())
        names = tuple(sorted(counts))
        files = Counter(file_of(name) for name in (*names, OTHER))
        if alike := [name for name in names if files[file_of(name)] > 1 or file_of(name) == ".jsonl"]:
            raise UserError(
                f"{path}: topics that have no file of their own: {', '.join(alike)}",
                allowed=f"names with letters or digits in which they differ, and none called {OTHER}",
            )
        few = [f"{name} ({count})" for name, count in sorted(counts.items()) if count < FEWEST]
        if few or len(names) < 2:
            raise UserError(
                f"{path}: too few pages of {', '.join(few)}"
                if few
                else f"{path} knows one topic alone: {', '.join(names)}",
                allowed=f"two topics or more, with at least {FEWEST} different pages of each",
            )
        numbers = {name: number for number, name in enumerate(names)}
        return cls(tuple(topic_of), names, np.array([numbers[topic] for topic in topic_of.values()]))

    def divided(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places of the pages to learn from, to choose by and to test with: of each topic the same shares."""
        learn, choose, test = [], [], []
        for number in range(len(self.names)):
            own = np.flatnonzero(self.topics_N == number)
            own = own[np.argsort([_order(seed, self.texts[place]) for place in own])]
            tested, chosen = max(1, round(TESTED * len(own))), max(1, round(CHOSEN * len(own)))
            test += list(own[:tested])
            choose += list(own[tested : tested + chosen])
            learn += list(own[tested + chosen :])
        return np.array(sorted(learn)), np.array(sorted(choose)), np.array(sorted(test))


def _order(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()


def file_of(topic: str) -> str:
    """The name of a topic's file."""
    name = re.sub(r"\W+", "-", topic.casefold()).strip("-")
    return f"{name}.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Classifier:
    """What tells topics apart, and how well.

    Attributes:
        encoder, head, names: texts to features to probabilities of these topics.
        penalty: the one under which the pages to choose by had the least cross-entropy.
        tried: the cross-entropy under each, in nats a page.
        accuracy: on pages that neither trained nor chose, with Wilson's 95% interval.
        by_topic: the same for each topic.
    """

    encoder: Encoder
    head: Head
    names: tuple[str, ...]
    penalty: float
    tried: Mapping[float, float]
    accuracy: Estimate
    by_topic: Mapping[str, Estimate]

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """`(N, K)`."""
        return self.head.probabilities(self.encoder.features(texts))


def train(labelled: Labelled, encoder: Encoder, *, seed: int) -> Classifier:
    """Learns to tell the topics apart; the penalty is chosen on pages that are then learnt from too."""
    learn, choose, test = labelled.divided(seed)
    topics_N, num_topics = labelled.topics_N, len(labelled.names)
    encoder.fit([labelled.texts[place] for place in np.concatenate([learn, choose])])
    features_ND = encoder.features(labelled.texts)
    tried = {}
    for penalty in PENALTIES:
        head = fit(features_ND[learn], topics_N[learn], num_topics, penalty=penalty)
        # The probabilities decide which pages are of no topic, so it is them that must be good, not the ranks alone.
        right_N = head.probabilities(features_ND[choose])[np.arange(len(choose)), topics_N[choose]]
        tried[penalty] = float(-np.log(np.maximum(right_N, 1e-300)).mean())
    penalty = min(PENALTIES, key=lambda one: tried[one])
    both = np.sort(np.concatenate([learn, choose]))
    head = fit(features_ND[both], topics_N[both], num_topics, penalty=penalty)
    hits_N = head.probabilities(features_ND[test]).argmax(1) == topics_N[test]
    by_topic = {name: _share(hits_N[topics_N[test] == number]) for number, name in enumerate(labelled.names)}
    return Classifier(
        encoder=encoder,
        head=head,
        names=labelled.names,
        penalty=penalty,
        tried=tried,
        accuracy=_share(hits_N),
        by_topic=by_topic,
    )


def _share(hits_N: np.ndarray) -> Estimate:
    from overhaul.evaluate import Estimate, wilson_interval

    low, high = wilson_interval(int(hits_N.sum()), len(hits_N))
    return Estimate(float(hits_N.mean()), low, high, len(hits_N))


def write(corpus: str, choice: TopicSettings, out: Path) -> dict[str, Any]:
    """Divides a corpus into a file for each topic, in a new directory, with `topics.json`.

    Rows keep the columns that a corpus is read by (`text`, or those of another of `documents.SHAPES`) and get `topic`,
    `probability`, and their number `row` in the corpus, by which other columns can be found there; these are left out.

    Returns:
        What stands in `topics.json`.

    Raises:
        UserError: `out` is there and not empty; labels, corpus or model cannot be read; scikit-learn is missing.
    """
    if disk.is_taken(out):
        raise UserError(f"{out} exists", hint="another directory; nothing is ever overwritten")
    choice.refuse_unread()
    labelled, rows = Labelled.read(choice.labels), every_row(corpus, choice.field)
    rows = itertools.chain([next(rows)], rows)  # the first is read now: what cannot be read is refused at once
    with disk.aside(out) as made:
        classifier = train(labelled, TfIdf() if choice.encoder == "tfidf" else ModelStates(choice), seed=choice.seed)
        counts = Counter(dict.fromkeys((*labelled.names, OTHER), 0))
        files = {name: (made / file_of(name)).open("w", encoding="utf-8") for name in counts}
        digest = hashlib.sha256()
        try:
            for row, number, topic, probability in _tagged(rows, choice, classifier):
                digest.update(row.id.encode())
                counts[topic] += 1
                line = _columns(row) | {"topic": topic, "probability": round(probability, 4), "row": number}
                files[topic].write(json_line(line))
        finally:
            for file in files.values():
                file.close()
        told = {
            "corpus": {"path": corpus, "rows": counts.total(), "fingerprint": digest.hexdigest()[:16]},
            "topics": {
                name: {"file": file_of(name), "rows": count, "share": count / counts.total()}
                for name, count in counts.items()
            },
            "accuracy": asdict(classifier.accuracy),
            "accuracy of topics": {name: asdict(found) for name, found in classifier.by_topic.items()},
            "labels": {
                "pages": len(labelled.texts),
                "sha256": hashlib.sha256(Path(choice.labels).read_bytes()).hexdigest(),
            },
            "encoder": classifier.encoder.to_json(),
            "penalty": classifier.penalty,
            "cross-entropy under penalties": {f"{penalty:g}": nats for penalty, nats in classifier.tried.items()},
            "settings": choice.model_dump(mode="json"),
        }
        (made / MANIFEST).write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return told


def _tagged(
    rows: Iterable[Row], choice: TopicSettings, classifier: Classifier
) -> Iterator[tuple[Row, int, str, float]]:
    """Every row, its number, its topic and the probability of its likeliest topic."""
    numbered = enumerate(rows)
    while batch := list(itertools.islice(numbered, BATCH)):
        probabilities_NK = classifier.probabilities([as_plain_text(row)["text"] for _, row in batch])
        for (number, row), own_K in zip(batch, probabilities_NK, strict=True):
            best = int(own_K.argmax())
            topic = classifier.names[best] if own_K[best] >= choice.least else OTHER
            yield row, number, topic, float(own_K[best])


def _columns(row: Row) -> dict[str, Any]:
    """The row as JSON has it."""
    return {
        name: value if isinstance(value, str) else [turn._asdict() for turn in value] for name, value in row.columns
    }
