"""MUSE on SmolLM2 with articles about people who never were (Shi et al., ICLR 2025), at the size of a laptop.

A model learns 60 articles by heart; another one the 30 of them that are to be retained. Every method is then to forget
the other 30, and all are asked the same. What the paper says of 7B models is the target where it says it of any model;
all else is recorded. Rates and passes were chosen by hand on seed 0, on the articles to forget and to retain alone.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from bench import results
from bench.results import Row, Target

from command import overhaul
from overhaul import artifact, machine, muse
from overhaul.documents import read_columns
from overhaul.evaluate import bootstrap_interval
from overhaul.muse import Asking, Floats

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * 3600)]

SEEDS = (0, 1, 2)
SIZE = ("--seq-len", 256, "--batch-size", 2, "--evaluate", "none", "--save-every", 0)
LEARN = ("--whole", "--epochs", 10, "--lr", 2e-4, *SIZE)
QUESTIONS = 60
ASK = ("--limit", QUESTIONS)
PASSES = ("--epochs", 3, "--lr", 4e-5)
LONGER = ("--epochs", 5, "--lr", 4e-5)
NONE, GDR, KLR = (("--retain-term", name) for name in ("none", "gdr", "klr"))
METHODS: Mapping[str, tuple[str, tuple[object, ...]]] = {
    "GA": ("ga", (*NONE, *LONGER)),
    "GA + GDR": ("ga", (*GDR, *PASSES)),
    "GA + KLR": ("ga", (*KLR, *PASSES)),
    "NPO": ("npo", (*NONE, *PASSES)),
    "NPO + GDR": ("npo", (*GDR, *PASSES)),
    "NPO + KLR": ("npo", (*KLR, *PASSES)),
    "SimNPO + GDR": ("simnpo", (*GDR, *PASSES)),
    "RMU": ("rmu", ("--adaptive", "--coefficient", 5, "--retain-weight", 10, "--epochs", 5, "--lr", 7e-4)),
    "task vector": ("task-vector", (*PASSES, "--alpha", 2)),
    "WHP": ("whp", (*PASSES, "--alpha", 2)),
}
QUANTITIES = {
    "verbatim memory": "verbatim",
    "knowledge to forget": "knowledge",
    "PrivLeak": "privleak",
    "utility": "utility",
}
SETTINGS = {"model": "smollm2-135m", "data": "data fictions", "flags": " ".join(map(str, LEARN))}

Said = Mapping[str, float]
"""What `measure muse` says of a model, by metric, and `low` and `high` behind the name for its interval."""


class Chain:
    """The models of a seed, each made once.

    Args:
        root: where they lie.
        seed: of the data and of every run.
        texts: what `data` writes that is learnt and forgotten.
    """

    def __init__(self, root: Path, seed: int, texts: Sequence[object] = ("fictions",)) -> None:
        self.root, self.seed, self.data = root, seed, root / "people"
        if not self.data.exists():
            done = overhaul("data", *texts, "-o", self.data, "--seed", seed)
            assert done.code == 0, done.err

    def made(self, name: str, *words: object) -> Path:
        """The directory that a command writes."""
        out = self.root / name.replace(" ", "")
        if not out.exists():
            done = overhaul(*words, "-o", out, "--seed", self.seed)
            assert done.code == 0, done.err
        return out

    def file(self, name: str) -> Path:
        return self.data / f"{name}.jsonl"

    def target(self) -> Path:
        """Knows all."""
        return self.made("target", "adapt", "full", "smollm2-135m", "--data", self.file("known"), *LEARN)

    def retrained(self) -> Path:
        """Never saw what is to be forgotten."""
        return self.made("retrained", "adapt", "full", "smollm2-135m", "--data", self.file("retain"), *LEARN)

    def unlearned(self, name: str, *more: object) -> Path:
        """What a method made of the target."""
        method, flags = METHODS[name]
        keeps = () if method in ("task-vector", "whp") or flags[:2] == NONE else ("--retain", self.file("retain"))
        read = ("--forget", self.file("forget"), *keeps)
        return self.made(name + "".join(map(str, more)), "forget", method, self.target(), *read, *flags, *SIZE, *more)

    def said(self, *unlearned: Path, returns: Sequence[str] = ()) -> dict[Path, Said]:
        """What they are worth, the target and the retrained model among them."""
        beside = ("--unlearned", *unlearned) if unlearned else ()
        beside += ("--returns", *returns) if returns else ()
        files = {name: self.file(name) for name in ("forget", "retain", "holdout", "shots")}
        files |= {f"{name}-questions": self.file(f"{name}-questions") for name in ("forget", "retain")}
        read = [word for name, file in files.items() for word in (f"--{name}", file)]
        done = overhaul("measure", "muse", self.target(), "--retrain", self.retrained(), *beside, *read, *ASK, "--json")
        assert done.code == 0, done.err
        found: dict[Path, dict[str, float]] = {}
        for row in json.loads(done.out)["rows"]:
            of = found.setdefault(Path(row["model"]), {})
            of |= {
                row["metric"]: row["value"],
                f"{row['metric']} low": row["low"],
                f"{row['metric']} high": row["high"],
            }
        return dict(found)

    def answers(self, directory: Path, kind: str) -> Floats:
        """`(N,)`: ROUGE-L F1, in percent, of a model's answers to the questions of a kind, as `measure muse` asks."""
        read = [read_columns(str(self.file(name)), ("question", "answer")) for name in (f"{kind}-questions", "shots")]
        asked, shots = ([(question, answer) for question, answer in rows] for rows in read)
        dtype, made = machine.compute_dtype("auto", torch.device("cpu")), artifact.load(directory)
        how = Asking(prompt_tokens=1, tokens=1, answer_tokens=32, batch_size=16)
        questions = (asked[:QUESTIONS], shots[:10])
        return np.array(muse.knowledge(made.model, made.processor, *questions, how, dtype=dtype))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Chain]:
    """`chain(seed)`; with MUSE_MODELS, a directory, models that an earlier run left there are not made again."""
    root = _root(tmp_path_factory)

    @cache
    def of(seed: int) -> Chain:
        (root / str(seed)).mkdir(parents=True, exist_ok=True)
        return Chain(root / str(seed), seed)

    return of


def _root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(os.environ.get("MUSE_MODELS") or tmp_path_factory.mktemp("muse"))


def _seconds(directory: Path) -> float:
    """What the step that made it took."""
    return artifact.read_record(directory)["lineage"][-1]["seconds"]


def _rows(
    page: str, name: str, told: Sequence[Said], seconds: Sequence[float], settings: object = (),
    *, seeds: Sequence[int] = SEEDS, data: str = SETTINGS["data"],
) -> list[Row]:  # fmt: skip
    """All quantities of a model, for the page of what made it."""
    slug = name.lower().replace(" + ", "-").replace(", ", "-").replace(" ", "-")
    more = {**SETTINGS, "method": settings, "data": data}
    rows = [
        Row(
            id=f"{page}/muse-{slug}-{short}",
            kind="model",
            what=f"{name}: {metric}",
            values=tuple(one[metric] for one in told),
            unit="",
            seeds=tuple(seeds),
            settings={
                **more,
                "low": [one[f"{metric} low"] for one in told],
                "high": [one[f"{metric} high"] for one in told],
            },
        )
        for metric, short in QUANTITIES.items()
    ]
    took = Row(
        id=f"{page}/muse-{slug}-seconds", kind="model", what=f"{name}: seconds", values=tuple(seconds), unit="s",
        seeds=tuple(seeds), settings=more,
    )  # fmt: skip
    return [*rows, took]


def _claim(name: str, what: str, values: Sequence[float], target: Target | None = None, unit: str = "points") -> Row:
    return Row(
        id=f"measure-muse/{name}", kind="claim", what=what, values=tuple(values), unit=unit, target=target, seeds=SEEDS,
        settings=SETTINGS,
    )  # fmt: skip


def test_a_model_knows_what_it_learnt_and_leaks_it(chain: Callable[[int], Chain]):
    told = []
    for seed in SEEDS:
        of = chain(seed)
        said = of.said()
        told.append((said[of.target()], said[of.retrained()]))
    for place, name in enumerate(("target", "retrained")):
        seconds = [_seconds(getattr(chain(seed), name)()) for seed in SEEDS]
        results.record(_rows("measure-muse", name, [one[place] for one in told], seconds))
    above = [one["verbatim memory"] - other["verbatim memory"] for one, other in told]
    results.hold(*[
        _claim("known", "Verbatim memory of what was learnt", [one["verbatim memory"] for one, _ in told],
               Target(">=", 80)),
        _claim("above", "Verbatim memory of what was learnt, above a model's that never saw it", above,
               Target(">=", 40)),
        _claim("leaks", "PrivLeak of the model that learnt all", [one["PrivLeak"] for one, _ in told],
               Target("<=", -80), ""),
        _claim("nothing", "PrivLeak of the retrained model", [one["PrivLeak"] for _, one in told], Target("==", 0), ""),
    ])  # fmt: skip


def test_every_method_is_asked_the_same(chain: Callable[[int], Chain]):
    """One table of all; ascent alone forgets everything, and NPO beside texts to retain keeps what it should."""
    told: dict[str, list[Said]] = {name: [] for name in ("target", "retrained", *METHODS)}
    for seed in SEEDS:
        of = chain(seed)
        made = {name: of.unlearned(name) for name in METHODS}
        said = of.said(*made.values())
        for name, out in {"target": of.target(), "retrained": of.retrained(), **made}.items():
            told[name].append(said[out])
    for name, (method, flags) in METHODS.items():
        seconds = [_seconds(chain(seed).unlearned(name)) for seed in SEEDS]
        results.record(_rows(f"forget-{method}", name, told[name], seconds, " ".join(map(str, flags))))

    def of_target(name: str) -> list[float]:
        return [one["utility"] / whole["utility"] for one, whole in zip(told[name], told["target"], strict=True)]

    below = [
        one["verbatim memory"] - other["verbatim memory"]
        for one, other in zip(told["GA"], told["retrained"], strict=True)
    ]
    results.hold(*[
        _claim("ga-verbatim", "Verbatim memory after GA, above the retrained model's", below, Target("<", 0)),
        _claim("ga-utility", "Utility after GA, of the target's", of_target("GA"), Target("<", 0.3), "share"),
        _claim("npo-gdr-utility", "Utility after NPO + GDR, of the target's", of_target("NPO + GDR"),
               Target(">=", 0.8), "share"),
    ])  # fmt: skip


ALPHAS = (0.5, 1, 2, 4, 8)


@pytest.mark.parametrize("name", ["task vector", "WHP"])
def test_a_larger_alpha_forgets_more(chain: Callable[[int], Chain], name: str):
    """What is known of the texts falls with alpha: the stopping rule asks at each, as none is enough."""
    curves = []
    for seed in SEEDS:
        of = chain(seed)
        method, _ = METHODS[name]
        rule = ("--stop.questions", of.file("forget-questions"), "--stop.shots", of.file("shots"), "--stop.limit", 60)
        words = ("forget", method, of.target(), "--forget", of.file("forget"), *PASSES, *SIZE, *rule, "--stop.at", 0)
        out = of.made(f"{name} sweep", *words, "--alpha", *ALPHAS)
        (table,) = [one for one in artifact.read_record(out)["tables"] if "knowledge, %" in one["columns"]]
        curves.append([float(row[table["columns"].index("knowledge, %")]) for row in table["rows"]])
    slug = name.lower().replace(" ", "-")
    rises = [max(after - before for before, after in pairwise(curve)) for curve in curves]
    rows = [
        _claim(f"{slug}-alpha-{alpha:g}", f"Knowledge to forget, {name}, alpha {alpha:g}", [c[place] for c in curves])
        for place, alpha in enumerate((0, *ALPHAS))
        if all(place < len(curve) for curve in curves)
    ]
    results.hold(
        *[*rows, _claim(f"{slug}-rise", f"... largest rise from one alpha to the next, {name}", rises, Target("<=", 0))]
    )


SERVICE = ("--tags", "publisher", "--together", "publisher", "--shards", 1, "--slices", 2, "--budget", 2, "--rank", 16,
           "--epochs", 10, "--lr", 1e-3, *SIZE)  # fmt: skip


def test_what_was_deleted_is_as_strange_as_what_was_never_seen(chain: Callable[[int], Chain], tmp_path: Path):
    """S3T through the same report: PrivLeak within its own interval of the retrained model's, and what it costs."""
    told: dict[str, list[Said]] = {"S3T": [], "S3T, deleted": []}
    seconds: dict[str, list[float]] = {"S3T": [], "S3T, deleted": []}
    for seed in SEEDS:
        of = chain(seed)
        kept = of.made("S3T", "forget", "s3t", "smollm2-135m", "--data", of.file("known"), *SERVICE)
        # What is deleted is gone: another run of the claim needs it again.
        service = Path(shutil.copytree(kept, tmp_path / str(seed)))
        publisher = json.loads(of.file("forget").read_text().splitlines()[0])["publisher"]
        began = time.perf_counter()
        done = overhaul("forget", "delete", service, "--where", f"publisher={publisher}")
        assert done.code == 0, done.err
        seconds["S3T, deleted"].append(time.perf_counter() - began)
        seconds["S3T"].append(_seconds(kept))
        said = of.said(kept, service)
        for name, out in {"S3T": kept, "S3T, deleted": service}.items():
            told[name].append(said[out])
    for name, ones in told.items():
        results.record(_rows("forget-s3t", name, ones, seconds[name], " ".join(map(str, SERVICE))))
    off = [max(one["PrivLeak low"], -one["PrivLeak high"], 0) for one in told["S3T, deleted"]]
    results.hold(*[
        _claim("s3t-leaks", "PrivLeak after an S3T deletion, how far 0 is outside its interval", off,
               Target("==", 0), ""),
    ])  # fmt: skip


WAYS = ("int8", "int4", "relearn")


def test_whether_the_knowledge_returns(chain: Callable[[int], Chain]):
    """The seventh check, ours; what happens to the retrained model is what a way does by itself."""
    told: dict[str, list[Said]] = {"NPO + GDR": [], "retrained": []}
    for seed in SEEDS:
        of = chain(seed)
        unlearned = of.unlearned("NPO + GDR")
        said = of.said(unlearned, returns=WAYS)
        told["NPO + GDR"].append(said[unlearned])
        told["retrained"].append(said[of.retrained()])
    results.hold(*[
        _claim(
            f"back-{name}-{way}-{QUANTITIES[metric]}".lower().replace(" + ", "-"),
            f"{metric.capitalize()} that returns to {name} after {way}",
            [one[f"{metric} after {way}"] - one[metric] for one in ones],
        )
        for name, ones in told.items()
        for way in WAYS
        for metric in ("verbatim memory", "knowledge to forget")
    ])  # fmt: skip


REQUESTS = 4
"""A recipe of the project makes them one after the other: `recipes/requests.yaml`."""


@pytest.mark.parametrize("growing", [False, True], ids=["sustainability", "scalability"])
def test_requests_that_follow_each_other_or_grow(chain: Callable[[int], Chain], growing: bool):
    """C5 and C6: what NPO + GDR leaves after one to four quarters of the texts, and utility's slope a quarter."""
    name = "growing" if growing else "requests"
    told: dict[str, list[list[Floats]]] = {"forget": [], "retain": []}
    for seed in SEEDS:
        of = chain(seed)
        made, lines = [of.target()], of.file("forget").read_text().splitlines()
        for number in range(1, REQUESTS + 1):
            part = of.root / f"{name}-{number}.jsonl"
            part.write_text("".join(f"{line}\n" for place, line in enumerate(lines) if _is_of(place, number, growing)))
            begins = made[0] if growing else made[-1]
            read = ("--forget", part, "--retain", of.file("retain"), *GDR, *PASSES, *SIZE)
            made.append(of.made(f"{name} {number}", "forget", "npo", begins, *read))
        for kind, states in told.items():
            states.append([of.answers(one, kind) for one in made])
    what = "quarters at once" if growing else "requests, one after the other"
    rows = [
        _claim(f"{name}-{number}-{short}", f"{metric}, {number} of 4 {what}", [float(s[number].mean()) for s in states])
        for number in range(1, REQUESTS + 1)
        for (short, metric), states in zip(
            {"knowledge": "Knowledge to forget", "utility": "Utility"}.items(), told.values(), strict=True
        )
    ]
    # A slope is linear in what is fitted: that of the mean is the mean of those of the questions.
    slopes = [np.polyfit(range(REQUESTS + 1), np.stack(states), 1)[0] for states in told["retain"]]
    ends = [bootstrap_interval(slopes_N) for slopes_N in slopes]
    results.hold(
        *rows,
        _claim(f"{name}-slope", f"Slope of utility a quarter, {what}", [float(slopes_N.mean()) for slopes_N in slopes]),
        _claim(f"{name}-slope-low", f"... lower end of its 95% interval over questions, {what}", [e[0] for e in ends]),
        _claim(f"{name}-slope-high", f"... upper end of its 95% interval over questions, {what}", [e[1] for e in ends]),
    )


def _is_of(place: int, number: int, growing: bool) -> bool:
    """Whether a text is of a request: its own quarter, or all up to it."""
    return place % REQUESTS < number if growing else place % REQUESTS == number - 1


REAL: Mapping[str, tuple[object, ...]] = {
    "news": ("news", "--forget", 50, "--retain", 50, "--holdout", 50, "--words", 120),
    "books": ("stories", "--forget", 5, "--retain", 5, "--holdout", 5, "--passages", 20),
}
REAL_SEEDS = (0,)
"""Minutes of training stand behind each row; the rates are those of the articles about people who never were."""


@pytest.mark.parametrize("name", REAL)
def test_real_articles_and_books(tmp_path_factory: pytest.TempPathFactory, name: str):
    """News with gaps as questions; stories with readers' questions, and passages of novels to be known by heart."""
    root, data = _root(tmp_path_factory), " ".join(map(str, ("data", *REAL[name])))
    told: dict[str, list[Said]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in REAL_SEEDS:
        (root / f"{name}-{seed}").mkdir(parents=True, exist_ok=True)
        of = Chain(root / f"{name}-{seed}", seed, REAL[name])
        made = {one: of.unlearned(one) for one in ("GA", "NPO + GDR", "SimNPO + GDR", "WHP")}
        said = of.said(*made.values())
        for one, out in {"target": of.target(), "retrained": of.retrained(), **made}.items():
            told.setdefault(one, []).append(said[out])
            seconds.setdefault(one, []).append(_seconds(out))
    for one in told:
        results.record(_rows(f"{name}-muse", one, told[one], seconds[one], seeds=REAL_SEEDS, data=data))
    above = [
        a["verbatim memory"] - b["verbatim memory"] for a, b in zip(told["target"], told["retrained"], strict=True)
    ]
    what = f"Verbatim memory of {name}, above a model's that never saw them"
    results.hold(
        Row(id=f"{name}-muse/above", kind="claim", what=what, values=tuple(above), unit="points",
            target=Target(">", 0), seeds=REAL_SEEDS, settings={**SETTINGS, "data": data})
    )  # fmt: skip
