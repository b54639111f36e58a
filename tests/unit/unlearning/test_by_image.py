"""Classes of images that examples can be deleted from: known by their pixels, and gone to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageClassification, SwinConfig, SwinForImageClassification

from command import interrupted, overhaul, refused
from images import SIZE, write_own
from overhaul import artifact, forget_service
from overhaul.deletion.ensemble import Served
from overhaul.interop.classifier import classes_of
from overhaul.kinds import Kind
from overhaul.picture_rows import PIXELS, hashes_at, open_pictures
from overhaul.unlearning.slices import cell_of
from services import merge_stages, same, stages_of

LABELS = ("cat", "dog", "eel")
HOW = ("--shards", "2", "--slices", "2", "--budget", "2", "--rank", "2", "--steps", "3", "--batch-size", "2",
       "--lr", "0.01")  # fmt: skip
DECLARED = ("--classes", *LABELS)
Pictures = Mapping[str, np.ndarray]
"""Grey pixels by the name of a file in a folder of classes."""


def drawn() -> dict[str, np.ndarray]:
    dice = np.random.default_rng(0)
    return {
        f"{LABELS[n % 3]}/{n}.png": dice.integers(0, 255, (SIZE, SIZE)).astype(np.uint8) // (n % 3 + 1)
        for n in range(24)
    }


PICTURES = drawn()


def written(folder: Path, pictures: Pictures) -> Path:
    for name, pixels_HW in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_HW).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def trained(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`trained(pictures)` -> the directory that `forget s3t` wrote of some."""
    made: dict[tuple[object, ...], Path] = {}
    root = tmp_path_factory.mktemp("images")

    def of(pictures: Pictures = PICTURES, *flags: str) -> Path:
        key = (*pictures, "", *flags)
        if key not in made:
            out, data = root / f"{len(made)}", written(root / f"{len(made)}-data", pictures)
            done = overhaul("forget", "s3t", vit, "-o", out, "--data", data, *HOW, *DECLARED, *flags)
            assert done.code == 0, done.err
            assert "does not run from the middle" not in done.err
            made[key] = out
        return made[key]

    return of


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path, str], Path]:
    """`copied(directory, name)` -> a copy that may be changed."""
    return lambda directory, name: Path(shutil.copytree(directory, tmp_path / name))


def cell(name: str, tmp_path: Path) -> tuple[int, int]:
    (pixels,) = hashes_at(written(tmp_path / "cells" / name.replace("/", "-"), {"a.png": PICTURES[name]}))
    return cell_of(f"{PIXELS}={pixels}", 2, 2, seed=0)


def in_cell(wanted: tuple[int, int], tmp_path: Path) -> list[str]:
    return [name for name in PICTURES if cell(name, tmp_path) == wanted]


def deleted(directory: Path, *flags: object) -> dict[str, Any]:
    done = overhaul("forget", "delete", directory, *flags, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def pixels() -> Tensor:
    """What the processor makes of all pictures."""
    images_NHW = torch.tensor(np.stack([*PICTURES.values()])).float()
    return (images_NHW[:, None] / 255 - 0.5) / 0.5


@torch.no_grad()
def logits(directory: Path, *, served: bool = True) -> Tensor:
    model: Any = artifact.load(directory, kinds=(Kind.IMAGE_CLASSIFIER,), with_library=served).model
    return model(pixel_values=pixels()).logits


@pytest.mark.parametrize("cache", ["--cache", "--no-cache"])
def test_a_deletion_leaves_tensors_and_logits_that_are_trained_without_the_picture(
    trained: Callable[..., Path], copied: Callable[[Path, str], Path], tmp_path: Path, cache: str
):
    """Bit for bit, heads included: the other run has files of other names and never saw it."""
    gone, other, *_ = in_cell((0, 1), tmp_path)
    others = [(name, image) for name, image in reversed(PICTURES.items()) if name != gone]
    renamed = {f"{name.split('/')[0]}/{n}.bmp": image for n, (name, image) in enumerate(others)}
    whole, rest = copied(trained(PICTURES, cache), "whole"), copied(trained(renamed, cache), "rest")
    assert not torch.equal(logits(whole), logits(rest)), "what was trained with it differs: the test can fail"

    for directory, name in ((whole, gone), (rest, other)):
        picture = written(tmp_path / f"of-{directory.name}", {"x.tiff": PICTURES[name]})
        assert deleted(directory, "--images", picture)["examples"] == 1
    before, after = stages_of(whole), stages_of(rest)
    assert before.keys() == after.keys() == {(0, (0,)), *((1, order) for order in [(0,), (0, 1), (1,), (1, 0)])}
    assert all(same(before[key], after[key]) for key in before)
    assert torch.equal(logits(whole), logits(rest))
    assert forget_service.verify(whole)["stages"] == 5


def test_states_that_are_kept_change_nothing_but_the_time(trained: Callable[..., Path]):
    kept, whole = (stages_of(trained(PICTURES, "--dtype", "fp32", flag)) for flag in ("--cache", "--no-cache"))
    assert any(tensor.abs().max() > 0 for tensor in kept[0, (0,)].values())
    for key, tensors in kept.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, whole[key][name], rtol=1e-3, atol=1e-4)


def test_the_head_is_that_of_the_last_stage_that_is_left(
    trained: Callable[..., Path], copied: Callable[[Path, str], Path], tmp_path: Path
):
    model = copied(trained(), "model")
    heads = {key: tensors["classifier.weight"] for key, tensors in stages_of(model).items()}
    assert len({tuple(head.flatten().tolist()) for head in heads.values()}) == 8, "each stage has its own"

    made = artifact.load(model, kinds=(Kind.IMAGE_CLASSIFIER,))
    served, inner = Served(made.model, model), made.model
    head: Any = inner.get_submodule("classifier")
    assert torch.equal(head.own["weight"], torch.stack([heads[0, (0, 1)], heads[1, (0, 1)]]))
    name = in_cell((0, 1), tmp_path)[0]
    deleted(model, "--images", written(tmp_path / "gone", {"a.png": PICTURES[name]}) / "a.png")
    served.refresh()
    assert torch.equal(head.own["weight"], torch.stack([heads[0, (0,)], heads[1, (0, 1)]]))


def test_logits_are_the_mean_of_one_classifier_for_each_shard(trained: Callable[..., Path]):
    """Plain transformers, each with one shard's adapters merged and its last head."""
    directory, found = trained(PICTURES, "--dtype", "fp32"), []
    for shard in range(2):
        model = AutoModelForImageClassification.from_pretrained(directory).eval()
        merge_stages(model, directory, (0,), (0, 1), shard=shard)
        with torch.no_grad():
            found.append(model(pixel_values=pixels()).logits)
    torch.testing.assert_close(logits(directory), torch.stack(found).mean(dim=0), rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3, "the shards differ"


def test_accuracy_is_that_of_the_mean_and_of_what_is_held_out(trained: Callable[..., Path], vit: Path, tmp_path: Path):
    """A folder with train/ and test/ is learnt in its first part and measured on its second."""
    names = [*PICTURES]
    parts = {f"{'test' if n % 4 == 3 else 'train'}/{name}": PICTURES[name] for n, name in enumerate(names)}
    data, out = written(tmp_path / "data", parts), tmp_path / "out"
    done = overhaul("forget", "s3t", vit, "-o", out, "--data", data, *HOW, *DECLARED, "--tags", "file", "--seed", 2)
    assert done.code == 0, done.err
    assert sum(one["examples"] for one in forget_service.status(out)["shards"]) == 18

    told = json.loads(overhaul("measure", "accuracy", out, "--task", data, "--dtype", "fp32", "--json").out)
    by_name = dict(zip(names, logits(out).argmax(dim=1).tolist(), strict=True))
    assert {one["image"].removeprefix("test/"): one["answer"] for one in told["details"]} == {
        name: LABELS[by_name[name]] for name in names[3::4]
    }
    hits = [by_name[name] == LABELS.index(name.split("/")[0]) for name in names[3::4]]
    assert (told["rows"][0]["value"], told["rows"][0]["count"]) == (sum(hits) / 6, 6)
    whole = written(tmp_path / "whole", PICTURES)
    told = json.loads(overhaul("measure", "accuracy", out, "--task", whole, "--limit", 20, "--json").out)
    assert told["rows"][0]["count"] == 20, "where nothing is held out, all are measured"

    assert deleted(out, "--where", f"file=train/{names[0]}")["examples"] == 1
    refused(overhaul("forget", "delete", out, "--where", f"file=test/{names[3]}"), "no example has file=")


def test_copies_go_together_whatever_their_file_and_label(
    trained: Callable[..., Path], copied: Callable[[Path, str], Path], tmp_path: Path
):
    image_HW = PICTURES["cat/0.png"]
    model = copied(trained({**PICTURES, "cat/again.bmp": image_HW, "dog/other.png": image_HW}), "model")
    coloured = Image.fromarray(image_HW).convert("RGB")
    coloured.save(tmp_path / "coloured.png")
    told = deleted(model, "--images", tmp_path / "coloured.png")
    assert (told["examples"], told["rows"]) == (2, 3), "two labels, one of them twice"
    assert len({tuple(one) for one in forget_service.log(model)[1]["slices"]}) == 1
    assert deleted(model, "--images", tmp_path / "coloured.png")["before"] == 2


def test_a_request_may_be_of_many_pictures_until_nothing_is_left(
    trained: Callable[..., Path], copied: Callable[[Path, str], Path], vit: Path, tmp_path: Path
):
    model, every = copied(trained(), "model"), written(tmp_path / "every", PICTURES)
    assert deleted(model, "--images", every, "--dry-run")["is_gone"]
    np.savez(tmp_path / "every.npz", images=np.stack([*PICTURES.values()]), labels=np.arange(24))
    told = deleted(model, "--images", tmp_path / "every.npz")
    assert (told["examples"], told["is_gone"]) == (24, True)
    with pytest.raises(artifact.UserError, match="nothing is left of"):
        logits(model)
    assert logits(model, served=False).abs().max() == 0, "the head of declared classes has seen nothing"


def test_a_head_of_the_same_classes_is_left_as_it_was(vit: Path, bars: Path, tmp_path: Path):
    """Its head is for 2 classes, 0 and 1, and bars have 4."""
    refused(
        overhaul("forget", "s3t", vit, "-o", tmp_path / "no", "--data", bars, *HOW),
        "60 of 120 examples have a label that is none of the classes, such as '2'", "allowed: 0, 1",
    )  # fmt: skip
    pictures = {f"{LABELS.index(name.split('/')[0]) % 2}/{name[4:]}": image for name, image in PICTURES.items()}
    data, out = written(tmp_path / "data", pictures), tmp_path / "out"
    done = overhaul("forget", "s3t", vit, "-o", out, "--data", data, *HOW)
    assert done.code == 0, done.err
    assert same(*(load_file(path / "model.safetensors") for path in (vit, out)))
    assert classes_of(artifact.load(out, kinds=(Kind.IMAGE_CLASSIFIER,)).model) == ("0", "1")


def test_a_run_that_is_resumed_has_the_same_adapters_and_heads(trained: Callable[..., Path], vit: Path, tmp_path: Path):
    data, out = written(tmp_path / "data", PICTURES), tmp_path / "out"
    words = ("forget", "s3t", vit, "-o", out, "--data", data, *HOW, *DECLARED, "--save-every", "1")
    assert interrupted(lambda seen: len(seen) == 5, *words).code != 0
    done = overhaul(*words, "--resume")
    assert done.code == 0, done.err
    whole, resumed = stages_of(trained()), stages_of(out)
    assert whole.keys() == resumed.keys()
    assert all(same(whole[key], resumed[key]) for key in whole)


def test_a_table_has_users_whose_pictures_are_in_one_slice(vit: Path, tmp_path: Path):
    contents = [path.read_bytes() for path in sorted(written(tmp_path / "data", PICTURES).rglob("*.png"))]
    users = [f"user {n % 6}" for n in range(24)]
    columns = {"image": contents, "label": [LABELS[n % 3] for n in range(24)], "user": users}
    table, out = tmp_path / "data.parquet", tmp_path / "out"
    pa.parquet.write_table(pa.table(columns), table)
    flags = ("--data", table, "--tags", "user", "--together", "user", "--seed", 6)
    done = overhaul("forget", "s3t", vit, "-o", out, *HOW, *DECLARED, *flags)
    assert done.code == 0, done.err
    told = deleted(out, "--where", "user=user 3")
    assert told["examples"] == 4
    assert forget_service.log(out)[1]["slices"] == [list(cell_of("user=user 3", 2, 2, seed=6))]


def test_a_dry_run_and_a_preview_of_time_leave_nothing(vit: Path, tmp_path: Path):
    data, out = written(tmp_path / "data", PICTURES), tmp_path / "out"
    done = overhaul("forget", "s3t", vit, "-o", out, "--data", data, *HOW, *DECLARED, "--dry-run")
    assert done.code == 0, done.err
    assert "3 steps, 6 images in each stage" in done.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--classes", "cat", "dog"), "8 of 24 examples have a label that is none of the classes, such as 'eel'"),
        (("--classes", "cat", "dogs", "eel"), "such as 'dog'"),
        (("--classes", "cat"), "classes has cat alone"),
        ((*DECLARED, "--label-field", "label"), "--label-field label is of texts"),
        ((*DECLARED, "--seq-len", "64"), "--seq-len 64 is of texts"),
        ((*DECLARED, "--field", "text"), "--field text is of texts"),
        ((*DECLARED, "--tags", "user"), "is a folder of pictures, and has no column 'user'"),
        ((*DECLARED, "--data", "digits", "--tags", "file"), "digits has no columns, and so no file"),
        ((*DECLARED, "--data", "sample"), "images 'sample' are neither a name nor an existing path"),
        ((*DECLARED, "--evaluate", "sample"), "--evaluate is of models that predict words"),
        ((*DECLARED, "--slices", "3"), "3 slices for 2 blocks"),
        ((*DECLARED, "--cache-gb", "0.000001"), "up to --cache-gb 1e-06"),
    ],
)
def test_what_does_not_fit_is_refused(vit: Path, tmp_path: Path, flags: tuple[str, ...], told: str):
    data, out = written(tmp_path / "data", PICTURES), tmp_path / "out"
    refused(overhaul("forget", "s3t", vit, "-o", out, "--data", data, *HOW, *flags), told)
    assert not out.exists()


def test_models_without_equal_blocks_are_refused(cnn: Path, vit: Path, tmp_path: Path):
    data, out, swin = written(tmp_path / "data", PICTURES), tmp_path / "out", tmp_path / "swin"
    config = SwinConfig(image_size=SIZE, patch_size=1, num_channels=1, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
                        window_size=2)  # fmt: skip
    SwinForImageClassification(config).save_pretrained(swin)
    shutil.copy(vit / "preprocessor_config.json", swin)
    for model, told in ((cnn, "has no blocks with linear layers"), (swin, "have different shapes")):
        refused(overhaul("forget", "s3t", model, "-o", out, "--data", data, *HOW, *DECLARED), told, "ViT, DeiT")


def test_pictures_that_the_model_cannot_read_are_refused(vit: Path, tmp_path: Path):
    words = ("-o", tmp_path / "out", *HOW, *DECLARED)
    colours = {name: np.stack([image, image, 255 - image], axis=-1) for name, image in PICTURES.items()}
    refused(
        overhaul("forget", "s3t", vit, "--data", written(tmp_path / "colours", colours), *words),
        "the images have colours, and the model reads grey ones",
    )
    as_it_is = Path(shutil.copytree(vit, tmp_path / "as-it-is"))
    settings = json.loads((vit / "preprocessor_config.json").read_text())
    (as_it_is / "preprocessor_config.json").write_text(json.dumps(settings | {"do_resize": False}))
    large = {name: image.repeat(2, axis=0) for name, image in PICTURES.items()}
    refused(
        overhaul("forget", "s3t", as_it_is, "--data", written(tmp_path / "large", large), *words),
        "cannot read images of 16 x 8 (height x width)",
    )
    several = {**PICTURES, "eel/z.png": PICTURES["cat/0.png"].repeat(2, axis=0)}
    refused(
        overhaul("forget", "s3t", as_it_is, "--data", written(tmp_path / "several", several), *words),
        "images come out of the model's image processor as 8 x 8 and 16 x 8",
    )


def test_pictures_of_several_sizes_are_each_brought_to_that_of_the_model(vit: Path, tmp_path: Path):
    """And stay known by the pixels that they had."""
    several = {**PICTURES, "eel/z.png": PICTURES["cat/0.png"].repeat(3, axis=1)}
    data, out = written(tmp_path / "data", several), tmp_path / "out"
    done = overhaul("forget", "s3t", vit, "-o", out, "--data", data, *HOW, *DECLARED)
    assert done.code == 0, done.err
    assert deleted(out, "--images", data / "eel" / "z.png")["examples"] == 1


def test_requests_that_cannot_be_met_are_refused(
    trained: Callable[..., Path], copied: Callable[[Path, str], Path], tmp_path: Path
):
    model = copied(trained(), "model")
    strange = written(tmp_path / "strange", {"a.png": PICTURES["cat/0.png"], "b.png": PICTURES["cat/0.png"] // 2})
    broken = written(tmp_path / "broken", {"a.png": PICTURES["cat/0.png"], "b.png": PICTURES["cat/0.png"]})
    (broken / "b.png").write_text("no picture")
    for flags, told in (
        (("--images", strange), "1 of 2 examples in"),
        (("--images", broken), "1 pictures of"),
        (("--images", tmp_path / "none"), "are neither a name nor an existing path"),
        (("--text", tmp_path / "a.jsonl"), "this model learnt images"),
        (("--where", "user=1"), "examples of this model cannot be asked for by 'user'"),
        ((), "nothing is named to be deleted"),
    ):
        refused(overhaul("forget", "delete", model, *flags), told)
    assert forget_service.status(model)["deleted"] == 0


def test_a_model_of_texts_has_no_pictures(tiny: Path, tmp_path: Path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"text": f"Number {n} is here."}) + "\n" for n in range(12)))
    done = overhaul("forget", "s3t", tiny, "-o", out, "--data", data, *HOW, "--seq-len", 16, "--evaluate", "none")
    assert done.code == 0, done.err
    refused(overhaul("forget", "delete", out, "--images", data), "this model learnt texts")


def test_blocks_of_a_convolutional_transformer_are_run_from_the_middle(tmp_path: Path):
    data, out = written(tmp_path / "data", PICTURES), tmp_path / "out"
    model = write_own(tmp_path / "cct", "cct")
    done = overhaul("forget", "s3t", model, "-o", out, "--data", data, *HOW, *DECLARED)
    assert done.code == 0, done.err
    assert "does not run from the middle" not in done.err
    before = logits(out)
    deleted(out, "--images", data / "cat" / "0.png")
    assert not torch.equal(logits(out), before)


def test_pixels_are_those_of_the_rows(tmp_path: Path):
    data = written(tmp_path / "data", PICTURES)
    assert [row.tags[0] for row in open_pictures(str(data)).train] == [(PIXELS, one) for one in hashes_at(data)]
