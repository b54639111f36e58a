from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from command import overhaul, refused
from overhaul.measure.spectra import EPS_SWEEP

TRAIN = ["--data", "sample", "--steps", "8", "--seq-len", "32", "--lr", "1e-2", "--evaluate", "none", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERHAUL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tuned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "lora"
    assert overhaul("adapt", "lora", tiny, "-o", out, *TRAIN, "--rank", "2").code == 0
    return out


def measured(*arguments: object) -> dict:
    done = overhaul("measure", "spectra", *arguments, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def totals(found: dict) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in found["rows"]}


def test_every_matrix_has_a_record_and_the_totals_are_their_sums(tiny: Path, tuned: Path):
    found = measured(tiny, tuned)

    records, total = found["details"], totals(found)
    assert len(records) == 14
    assert {"shape", "k", "eps", "count", "stable_rank", "entropy_rank", "relative_change", "strength"} <= records[
        0
    ].keys()
    assert total["intruders"] == sum(record["count"] for record in records) > 0
    assert total["intruders per 1,000 vectors"] == pytest.approx(
        1000 * total["intruders"] / sum(r["k"] for r in records)
    )
    for record in records:
        assert record["count"] == len(record["intruders"])
        assert all(one["projection"] < 0.5 and 0 < one["energy"] < 1 for one in record["intruders"])
        assert 1 <= record["stable_rank"] <= record["entropy_rank"] <= 2.01  # what rank 2 allows
        assert record["base_sha256"] != record["tuned_sha256"]


def test_sweeps_and_maps_agree_with_the_totals(tiny: Path, tuned: Path):
    found = measured(tiny, tuned)

    over_eps, over_k = found["curves"]
    intruders = totals(found)["intruders"]
    assert over_eps["y"][EPS_SWEEP.index(0.5)] == over_k["y"][-1] == intruders
    assert over_eps["y"] == sorted(over_eps["y"])
    assert over_k["y"] == sorted(over_k["y"])
    counts, _, cosines = found["maps"]
    assert sum(value for _, value in counts["values"]) == intruders
    assert len(cosines["values"]) == 100


def test_several_models_are_measured_against_the_first(tiny: Path, tuned: Path, tmp_path: Path):
    assert overhaul("adapt", "full", tiny, "-o", tmp_path / "full", *TRAIN, "--lr", "1e-4").code == 0

    found = measured(tiny, tuned, tmp_path / "full")

    counts = {row["model"]: row["value"] for row in found["rows"] if row["metric"] == "intruders"}
    assert counts[str(tuned)] > counts[str(tmp_path / "full")] == 0


def test_nothing_trained_is_said(tiny: Path):
    found = measured(tiny, tiny)

    assert totals(found)["intruders"] == totals(found)["matrices changed"] == 0
    assert any("nothing was trained" in note for note in found["notes"])


def test_a_k_that_is_too_large_is_clamped_and_said(tiny: Path, tuned: Path):
    found = measured(tiny, tuned, "--k", "50")

    assert {record["k"] for record in found["details"]} == {32, 50}  # keys and values have 32 rows
    assert any("k 50 is more than 4 matrices have" in note for note in found["notes"])


def test_the_page_has_every_matrix_and_the_pictures(tiny: Path, tuned: Path, tmp_path: Path):
    assert overhaul("measure", "spectra", tiny, tuned, "--html", tmp_path / "page.html").code == 0

    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure") == 5  # two sweeps, three maps
    assert page.count("model.layers.1.mlp.down_proj") > 2
    assert "details.csv" in page


def test_compare_shows_a_line_for_a_model_whose_base_is_known(tiny: Path, tuned: Path):
    words = ["compare", tiny, tuned, "--windows", "2", "--seq-len", "32"]

    with_line, without = (json.loads(overhaul(*words, *more, "--json").out) for more in (["--spectra"], []))
    told = overhaul(*words, "--spectra")

    (line,) = with_line["spectra"]
    assert (line["model"], line["base"]) == (str(tuned), str(tiny))
    assert line["intruders"] == totals(measured(tiny, tuned))["intruders"]
    assert "spectra" not in without
    assert f"{line['intruders']:g} intruders" in told.out


def test_a_base_of_zeros_gives_numbers_that_json_and_pictures_know(tiny: Path, tmp_path: Path):
    zeros = tmp_path / "zeros"
    zeros.mkdir()
    for file in tiny.iterdir():
        (zeros / file.name).write_bytes(file.read_bytes())
    weights = load_file(tiny / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"].zero_()
    save_file(weights, zeros / "model.safetensors", metadata={"format": "pt"})
    page = tmp_path / "page.html"

    there, back = (overhaul("measure", "spectra", *pair, "--json") for pair in ((zeros, tiny), (tiny, zeros)))
    done = overhaul("measure", "spectra", zeros, tiny, "--html", page)

    assert (there.code, back.code, done.code) == (0, 0, 0), there.err + back.err + done.err
    assert "Infinity" not in there.out + back.out
    assert "NaN" not in there.out + back.out
    assert not {"inf", "nan"} & set(page.read_text().replace('"', " ").split())


def test_that_rounding_has_a_rank_of_its_own_is_said(make_tiny, tmp_path: Path):
    half = make_tiny(dtype="bfloat16")
    done = overhaul("adapt", "lora", half, "-o", tmp_path / "lora", *TRAIN)
    assert done.code == 0, done.err

    assert "stored in bfloat16: rounding" in overhaul("measure", "spectra", half, tmp_path / "lora").out


# Mistakes.


def test_one_model_alone(tiny: Path):
    refused(overhaul("measure", "spectra", tiny), "alone has no difference")


@pytest.mark.parametrize("eps", ["0", "1", "-0.5", "1.5"])
def test_eps_out_of_range(tiny: Path, eps: str):
    refused(overhaul("measure", "spectra", tiny, tiny, "--eps", eps), "eps")


def test_values_that_are_not_numbers_are_named_in_either_model(tiny: Path, tuned: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(tiny / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})

    for pair in ((broken, tuned), (tiny, broken)):
        refused(overhaul("measure", "spectra", *pair), str(broken), "layers.0.self_attn.q_proj.weight", "1 values")
