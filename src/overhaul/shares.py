"""Shares of a mixture as people write them down: `CORPUS=SHARE` one by one, or groups with shares of their own in YAML.

What the shares at the top leave belongs to whoever reads them: in `extend` to the text of --data.

zh: {share: 0.2, of: {web-zh.jsonl: 0.7, books-zh.jsonl: 0.3}}
en: {share: 0.8, of: {web-en.jsonl: 0.6, code.jsonl: 0.4}}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

YAML = (".yaml", ".yml")
Shares = dict[str, float]


def spelled_out(entries: Any) -> Any:
    """Entries, or one, with YAML files replaced by what they say: a record has the shares and not the file's name.

    Raises:
        ValueError: a file cannot be read, or holds no shares.
    """
    if isinstance(entries, str):
        entries = (entries,)
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, str) for entry in entries):
        return entries  # whoever checks types will say so
    found: list[str] = []
    for entry in entries:
        is_file = entry.endswith(YAML)
        found += [f"{path}={share!r}" for path, share in read(Path(entry)).items()] if is_file else [entry]
    return tuple(found)


Mixture = Annotated[tuple[str, ...], BeforeValidator(spelled_out)]
"""A field of shares: what `parse` reads."""


def parse(entries: Iterable[str]) -> Shares:
    """Shares by corpus from what was typed.

    Args:
        entries: `CORPUS=SHARE`, shares above 0 and at most 1.

    Raises:
        ValueError: an entry is something else, a corpus comes twice, or all shares together are above 1.
    """
    found: Shares = {}
    for corpus, share in map(_pair, entries):
        if corpus in found:
            raise ValueError(f"{corpus} comes twice")
        found[corpus] = share
    if above(total := math.fsum(found.values()), 1):
        raise ValueError(f"the shares {_sum(found)} sum to {total:g}, which is more than 1")
    return found


def _pair(entry: str) -> tuple[str, float]:
    corpus, sign, share = entry.rpartition("=")
    try:
        number = float(share)
    except ValueError:
        number = math.nan
    if not sign or not corpus or not 0 < number <= 1:
        raise ValueError(f"{entry!r} is no CORPUS=SHARE with a share above 0 and at most 1, such as sample=0.25")
    return corpus, number


def read(file: Path) -> Shares:
    """Shares from a YAML file: corpora with numbers, or groups `{share:, of:}` of such.

    The shares in a group sum to 1, those at the top to 1 or less: what they leave has no name there.

    Raises:
        ValueError: there is no such file, it is no mapping, or a level sums to something else.
    """
    import yaml

    try:
        told = yaml.load(file.read_text("utf-8"), Loader=_loader())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {error}") from error
    return flat(told, str(file), whole=False)


def _loader() -> Any:
    """YAML's safe loader, for which a key that comes twice is a mistake."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            if twice := [name for name in names if names.count(name) > 1]:
                raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} comes twice", node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def flat(told: Any, where: str, *, whole: bool = True) -> Shares:
    """Shares by corpus from groups within groups.

    Args:
        told: corpus or group -> share, or `{"share": number, "of": mapping like this one}`.
        where: what to call it in an error.
        whole: whether its shares must sum to 1, as those in groups do, or to no more than that.

    Raises:
        ValueError: it is something else, or a level has another sum.
    """
    if not isinstance(told, Mapping) or not told:
        raise ValueError(f"{where}: {told!r} is no mapping of corpora or groups to shares")
    own, found = {}, {}
    for name, value in told.items():
        inside = isinstance(value, Mapping)
        if inside and set(value) != {"share", "of"}:
            raise ValueError(f"{where}: the group {name} has {', '.join(map(str, value))}; a group has share and of")
        own[name] = share = _number(value["share"] if inside else value, f"{where}: the share of {name}")
        below = flat(value["of"], f"{where}, {name}") if inside else {str(name): 1.0}
        for corpus, part in below.items():
            if corpus in found:
                raise ValueError(f"{where}: {corpus} comes twice")
            found[corpus] = share * part
    total = math.fsum(own.values())
    if above(total, 1) or (whole and above(1, total)):
        raise ValueError(f"{where}: the shares {_sum(own)} sum to {total:g}, not to 1{'' if whole else ' or less'}")
    return found


def _number(share: Any, what: str) -> float:
    """A share; YAML reads 5e-1 as text."""
    try:
        number = math.nan if isinstance(share, bool) else float(share)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number <= 1:
        raise ValueError(f"{what} is {share!r}; it is a number above 0 and at most 1")
    return number


def volumes(stages: Iterable[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Tokens of each corpus over stages of (tokens, shares by corpus)."""
    found: dict[str, float] = {}
    for tokens, shares in stages:
        for corpus, share in shares.items():
            found[corpus] = found.get(corpus, 0.0) + tokens * share
    return found


def fed_back(shares: Mapping[str, float], change: Mapping[str, float], strength: float) -> Shares:
    """Shares with more for topics that became worse (Chen et al., 2024; the formula is ours, the paper gives none).

    d_i = change_i / sum_j |change_j|,  r_i' = r_i (1 + strength d_i), within r_i / 2 and 2 r_i, as parts of their sum,
    which can move a share a little further.

    Args:
        shares: r, by topic.
        change: perplexity now less that before, by topic.
        strength: a, 0 or more.

    Returns:
        Shares with the same sum.

    Raises:
        ValueError: a change is no number.
    """
    if odd := [topic for topic in shares if not math.isfinite(change[topic])]:
        raise ValueError(f"the perplexity of {odd[0]} is not finite")
    size = math.fsum(abs(change[topic]) for topic in shares) or 1.0
    factors = {topic: min(max(1 + strength * change[topic] / size, 0.5), 2.0) for topic in shares}
    scale = math.fsum(shares.values()) / math.fsum(shares[topic] * factors[topic] for topic in shares)
    return {topic: share * factors[topic] * scale for topic, share in shares.items()}


def above(number: float, limit: float) -> bool:
    """Whether it is, by more than sums of floating-point numbers are off."""
    return number > limit and not math.isclose(number, limit, abs_tol=1e-9)


def _sum(shares: Mapping[str, float]) -> str:
    return " + ".join(f"{share:g} of {name}" for name, share in shares.items())
