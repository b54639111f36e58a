"""Shares of a mixture as people write them down: `CORPUS=SHARE` one by one, or groups with shares of their own in YAML.

zh: {share: 0.2, of: {web-zh.jsonl: 0.7, books-zh.jsonl: 0.3}}
en: {share: 0.8, of: {web-en.jsonl: 0.6, code.jsonl: 0.4}}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

YAML = (".yaml", ".yml")
Shares = dict[str, float]


def parse(entries: Iterable[str]) -> Shares:
    """Shares by corpus from what was typed.

    Args:
        entries: `CORPUS=SHARE`, shares above 0 and at most 1, or a YAML file of shares.

    Raises:
        ValueError: an entry is neither, a corpus comes twice, or all shares together are above 1.
    """
    found: Shares = {}
    for entry in entries:
        for corpus, share in (read(Path(entry)) if entry.endswith(YAML) else dict([_pair(entry)])).items():
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
    """Shares from a YAML file: corpora with numbers, or groups `{share:, of:}` of such, which sum to 1 at every level.

    Raises:
        ValueError: there is no such file, it is no mapping, or a level sums to something else.
    """
    import yaml

    try:
        told = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {error}") from error
    return flat(told, str(file))


def flat(told: Any, where: str) -> Shares:
    """Shares by corpus from groups within groups.

    Args:
        told: corpus or group -> share, or `{"share": number, "of": mapping like this one}`.
        where: what to call it in an error.

    Raises:
        ValueError: it is something else, or a level does not sum to 1.
    """
    if not isinstance(told, Mapping) or not told:
        raise ValueError(f"{where}: {told!r} is no mapping of corpora or groups to shares")
    own, found = {}, {}
    for name, value in told.items():
        inside = isinstance(value, Mapping)
        if inside and set(value) != {"share", "of"}:
            raise ValueError(f"{where}: the group {name} has {', '.join(map(str, value))}; a group has share and of")
        share = value["share"] if inside else value
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"{where}: the share of {name} is {share!r}; it is a number above 0 and at most 1")
        own[name] = share
        below = flat(value["of"], f"{where}, {name}") if inside else {str(name): 1.0}
        for corpus, part in below.items():
            if corpus in found:
                raise ValueError(f"{where}: {corpus} comes twice")
            found[corpus] = share * part
    if not math.isclose(total := math.fsum(own.values()), 1, abs_tol=1e-9):
        raise ValueError(f"{where}: the shares {_sum(own)} sum to {total:g}, not to 1")
    return found


def volumes(stages: Iterable[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Tokens of each corpus over stages of (tokens, shares by corpus)."""
    found: dict[str, float] = {}
    for tokens, shares in stages:
        for corpus, share in shares.items():
            found[corpus] = found.get(corpus, 0.0) + tokens * share
    return found


def fed_back(shares: Mapping[str, float], change: Mapping[str, float], strength: float) -> Shares:
    """Shares with more for topics that became worse (Chen et al., 2024; the formula is ours, the paper gives none).

    d_i = change_i / sum_j |change_j|,  r_i' = r_i (1 + strength d_i), within r_i / 2 and 2 r_i, as parts of their sum.

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
