"""S3T on a model of four blocks: what is deleted leaves what would be there without it, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command import overhaul
from overhaul import artifact
from overhaul.deletion.book import FOLDER, Book, key_of
from overhaul.documents import Row, text_row
from overhaul.layers.masked import MaskedLinear
from overhaul.unlearning.slices import cell_of, divided
from overhaul.unlearning.stagewise import groups_of

HOW = ("--shards", "2", "--slices", "2", "--budget", "2", "--rank", "2", "--steps", "3", "--batch-size", "2",
       "--seq-len", "16", "--evaluate", "none")  # fmt: skip
NAMES = ("alder", "birch", "cedar", "dogwood", "elm", "fir", "ginkgo", "hazel", "ironwood", "juniper", "larch", "maple")
TEXTS = [f"Machine {n} is called {name}, and stands in room {n * 7 % 31}." for n, name in enumerate(NAMES)]


@pytest.fixture(scope="module")
def trained(make_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`trained(texts)` -> the directory that `forget s3t` wrote of some texts, in this order."""
    made: dict[tuple[object, ...], Path] = {}
    root = tmp_path_factory.mktemp("s3t")

    def of(texts: Sequence[str] = TEXTS, *flags: str) -> Path:
        key = (*texts, "", *flags)
        if key not in made:
            out, data = root / f"{len(made)}", root / f"{len(made)}.jsonl"
            data.write_text("".join(json.dumps({"text": t, "user": t.split()[3]}) + "\n" for t in texts))
            done = overhaul("forget", "s3t", make_tiny(), "-o", out, "--data", data, *HOW, *flags)
            assert done.code == 0, done.err
            made[key] = out
        return made[key]

    return of


def stages(directory: Path) -> dict[tuple[int, tuple[int, ...]], dict[str, torch.Tensor]]:
    with Book(directory) as book:
        return {(one.shard, one.sequence): load_file(directory / FOLDER / one.file) for one in book.stages()}


def cell(text: str) -> tuple[int, int]:
    return cell_of(text_row(text).id, 2, 2, seed=0)


def without(texts: Iterable[str], *cells: tuple[int, int]) -> list[str]:
    return [text for text in texts if cell(text) not in cells]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_beginning_of_every_sequence_is_trained(trained: Callable[..., Path]):
    found = stages(trained())
    assert found.keys() == {(shard, order) for shard in range(2) for order in [(0,), (0, 1), (1,), (1, 0)]}
    top = found[0, (0,)]
    assert all(".layers.1." in name for name in top), "the first stage is at the top"
    assert all(".layers.0." in name for name in found[0, (0, 1)])
    assert all(tensor.abs().max() > 0 for tensor in top.values()), "and is trained"


@pytest.mark.parametrize("cache", ["--cache", "--no-cache"])
def test_deleting_an_example_leaves_what_is_trained_without_it(trained: Callable[..., Path], cache: str):
    """Bit for bit, and with the data in another order: whatever is left is as if the example had never been there."""
    whole = trained(TEXTS, cache)
    gone = next(text for text in TEXTS if cell(text) == (0, 1))
    rest = trained([text for text in reversed(TEXTS) if text != gone], cache)
    with Book(whole) as book:
        left = book.survivors()
        left.delete(*cell(gone))
    before, after = stages(whole), stages(rest)
    kept = {(shard, order) for shard in range(2) for order in left.stages(shard)}
    assert kept == {(0, (0,)), *((1, order) for order in [(0,), (0, 1), (1,), (1, 0)])}
    for key in kept:
        assert same(before[key], after[key])
    for key in before.keys() - kept:
        assert not same(before[key], after[key]), "what was trained with it differs: the test can fail"


def test_states_that_are_kept_change_nothing_but_the_time(trained: Callable[..., Path]):
    kept, whole = stages(trained(TEXTS, "--cache")), stages(trained(TEXTS, "--no-cache"))
    for key, tensors in kept.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, whole[key][name], rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was(trained: Callable[..., Path], make_tiny: Callable[..., Path]):
    before, after = (load_file(path / "model.safetensors") for path in (make_tiny(), trained()))
    assert same(before, after)


def test_copies_and_order_decide_nothing_about_who_is_where():
    rows = [text_row(text) for text in TEXTS]
    one, other = divided(rows, 2, 2, seed=0), divided([*reversed(rows), rows[0]], 2, 2, seed=0)
    assert [[m.row for m in members] for members in one.values()] == [
        [m.row for m in members] for members in other.values()
    ]
    copies = {member.row: member.copies for members in other.values() for member in members}
    assert copies.pop(rows[0]) == 2
    assert set(copies.values()) == {1}


def of_users(*pairs: tuple[str, str]) -> list[Row]:
    return [replace(text_row(text), tags=(("user", user),)) for text, user in pairs]


def test_examples_of_a_user_are_in_one_slice():
    rows = of_users(*((text, f"user {number % 6}") for number, text in enumerate(TEXTS)))
    found = divided(rows, 2, 1, seed=0, together="user")
    for cell, members in found.items():
        for member in members:
            assert cell_of("=".join(member.tags[0]), 2, 1, seed=0) == cell
    assert {member.row for members in found.values() for member in members} == set(rows)
    assert found != divided(rows, 2, 1, seed=0)


def test_a_text_of_two_users_goes_with_the_first_and_leaves_others_where_they_are():
    own, shared = [(TEXTS[n], "b") for n in range(3)] + [(TEXTS[n], "a") for n in (3, 4)], TEXTS[5]
    both = of_users(*own, (shared, "b"), (shared, "a"))
    one, without = (divided(rows, 1, 2, seed=3, together="user") for rows in (both, of_users(*own)))
    where = next(cell for cell, members in one.items() if shared in {m.row["text"] for m in members})
    assert where == cell_of("user=a", 1, 2, seed=3)
    assert {cell: [m.row for m in members if m.copies == 1] for cell, members in one.items()} == {
        cell: [m.row for m in members] for cell, members in without.items()
    }


def test_a_user_who_is_deleted_costs_one_slice_and_leaves_what_is_trained_without_them(
    make_tiny: Callable[..., Path], tmp_path: Path
):
    def made(name: str, texts: Sequence[str]) -> Path:
        data, out = tmp_path / f"{name}.jsonl", tmp_path / name
        rows = [{"text": text, "user": f"user {TEXTS.index(text) % 6}"} for text in texts]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ("--data", data, "--tags", "user", "--together", "user", "--seed", 6)
        done = overhaul("forget", "s3t", make_tiny(), "-o", out, *HOW, *flags)
        assert done.code == 0, done.err
        return out

    whole, rest = made("whole", TEXTS), made("rest", [text for text in TEXTS if TEXTS.index(text) % 6 != 3])
    done = overhaul("forget", "delete", whole, "--where", "user=user 3")
    assert done.code == 0, done.err
    left, wanted = stages(whole), stages(rest)
    hit = cell_of("user=user 3", 2, 2, seed=6)
    assert left.keys() == {(shard, order) for shard, order in wanted if shard != hit[0] or order == (1 - hit[1],)}, (
        "what was trained with that slice is gone, and nothing else"
    )
    assert all(same(left[key], wanted[key]) for key in left)


def test_all_slices_are_as_likely():
    cells = [cell_of(Row((("text", str(number)),)).id, 3, 4, seed=5) for number in range(12_000)]
    counts = torch.zeros(3, 4)
    for where in cells:
        counts[where] += 1
    assert counts.min() > 1000 - 5 * 31
    assert counts.max() < 1000 + 5 * 31


def test_examples_can_be_asked_for_by_columns(trained: Callable[..., Path]):
    with Book(trained(TEXTS, "--tags", "user")) as book:
        found = book.find(("user", "called"))
        assert len(found.there) == len(TEXTS)
        assert book.find_content(text_row(TEXTS[0]).id).there[0] in found.there


def test_a_pruned_model_keeps_its_zeros_and_what_it_learns_can_be_deleted(
    make_tiny: Callable[..., Path], tmp_path: Path
):
    pruned, out, data = tmp_path / "pruned", tmp_path / "out", tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for words in (
        ("prune", "magnitude", make_tiny(), "-o", pruned, "--sparsity", 0.5, "--evaluate", "none"),
        ("forget", "s3t", pruned, "-o", out, "--data", data, *HOW),
    ):
        done = overhaul(*words)
        assert done.code == 0, done.err
    before, after = artifact.load(pruned), artifact.load(out)
    masks = {name: layer.mask for name, layer in before.model.named_modules() if isinstance(layer, MaskedLinear)}
    assert masks
    for name, mask in masks.items():
        layer: Any = after.model.get_submodule(name)
        assert torch.equal(layer.mask, mask)
    assert same(before.model.state_dict(), after.model.state_dict())

    ids_BT = torch.arange(20)[None] + 5
    served = artifact.load(out, with_library=True).model
    learnt = served(ids_BT).logits
    assert not torch.equal(learnt, after.model(ids_BT).logits)
    gone = tmp_path / "gone.jsonl"
    gone.write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    assert overhaul("forget", "delete", out, "--text", gone).code == 0
    assert not torch.equal(artifact.load(out, with_library=True).model(ids_BT).logits, learnt)


@pytest.mark.parametrize(
    ("blocks", "count", "uneven", "wanted"),
    [
        (4, 2, False, (range(2, 4), range(2))),
        (3, 3, False, (range(2, 3), range(1, 2), range(1))),
        (5, 2, True, (range(2, 5), range(2))),
        (4, 1, False, (range(4),)),
    ],
)
def test_groups_of_blocks_from_the_top(blocks: int, count: int, uneven: bool, wanted: tuple[range, ...]):
    assert groups_of(blocks, count, uneven=uneven) == wanted


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--slices", "3", "--budget", "7"), "budget 7 is more than the orders of 3 slices; use up to 6"),
        (("--slices", "3"), "3 slices for 2 blocks"),
        (("--sequences", "matched"), "needs deletion_prior"),
        (("--deletion-prior", "nowhere.txt"), "is read by sequences matched and conditional"),
        (("--sequences", "matched", "--deletion-prior", "nowhere.txt"), "cannot be read"),
        (("--shards", "40"), "without any"),
        (("--targets", "nothing_proj"), "no linear layer is called 'nothing_proj'"),
        (("--tags", "nobody"), "has no column 'nobody'"),
        (("--together", "user"), "together user is none of tags (none); use tags user"),
        (("--eval-every", "1"), "is no model yet"),
        (("--cache-gb", "0.000001"), "up to --cache-gb 1e-06"),
    ],
)
def test_what_does_not_fit_is_refused(
    make_tiny: Callable[..., Path], tmp_path: Path, flags: tuple[str, ...], told: str
):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    done = overhaul("forget", "s3t", make_tiny(), "-o", tmp_path / "out", "--data", data, *HOW, *flags)
    assert done.code != 0
    assert told in " ".join(done.err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [("--slices", "3"), ("--sequences", "matched", "--deletion-prior", "nowhere.txt")])
def test_slices_that_do_not_fit_are_refused_before_anything_is_measured(
    make_tiny: Callable[..., Path], tmp_path: Path, flags: tuple[str, ...]
):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    words = ("forget", "s3t", make_tiny(), "-o", tmp_path / "out", "--data", data, "--evaluate", "sample")
    done = overhaul(*words, *flags)
    assert done.code != 0
    assert "measuring" not in done.err


def test_a_key_is_of_the_content(trained: Callable[..., Path]):
    with Book(trained()) as book:
        assert len({book.key_of(text_row(text).id) for text in TEXTS}) == len(TEXTS)
        assert key_of(b"one", "text") != key_of(b"other", "text")
