"""Perplexity over windows."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from command import overhaul
from overhaul.evaluate import bootstrap_interval, next_token_nll, perplexity


@pytest.fixture
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny)


@pytest.fixture(name="windows_NT")
def windows():
    return torch.randint(512, (6, 32), generator=torch.Generator().manual_seed(0))


def test_where_all_tokens_are_alike_it_is_the_size_of_the_vocabulary(model, windows_NT):
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()

    found = perplexity(model, windows_NT).estimate

    assert (found.low, found.value, found.high) == pytest.approx((512, 512, 512))
    assert found.count == 6 * 31


def test_it_is_exp_of_the_loss_that_transformers_computes(model, windows_NT):
    with torch.no_grad():
        loss = model(input_ids=windows_NT, labels=windows_NT).loss.item()

    assert perplexity(model, windows_NT).estimate.value == pytest.approx(math.exp(loss), rel=1e-6)


def test_the_batch_does_not_change_it(model, windows_NT):
    estimates = [perplexity(model, windows_NT, batch_size=size).estimate for size in (1, 4, 6)]

    assert [one.value for one in estimates] == pytest.approx([estimates[0].value] * 3, rel=1e-6)
    assert [one.low for one in estimates] == pytest.approx([estimates[0].low] * 3, rel=1e-6)


def test_a_model_that_changes_its_logits_is_scored_through_its_own_forward(model, windows_NT):
    fused_BL = next_token_nll(model, windows_NT)
    model.config.logit_scale = 0.5  # a Llama knows no such setting: its logits stay, only the way to them changes

    torch.testing.assert_close(next_token_nll(model, windows_NT), fused_BL)


def test_it_depends_on_what_came_before_alone(model, windows_NT):
    changed_NT = windows_NT.clone()
    changed_NT[:, 20:] = 0

    torch.testing.assert_close(next_token_nll(model, changed_NT)[:, :19], next_token_nll(model, windows_NT)[:, :19])


def test_the_interval_is_that_of_a_mean():
    values_N = np.random.default_rng(0).normal(3.0, 2.0, 400)

    low, high = bootstrap_interval(values_N)

    half = 1.96 * values_N.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values_N.mean() - half, values_N.mean() + half), abs=0.03)


def test_the_command_prints_one_object(tiny):
    done = overhaul("measure", "perplexity", tiny, "--seq-len", 64, "--windows", 4, "--json")

    (row,) = json.loads(done.out)["rows"]
    assert (row["model"], row["metric"], row["count"]) == (str(tiny), "perplexity", 4 * 63)
    assert row["low"] < row["value"] < row["high"]
