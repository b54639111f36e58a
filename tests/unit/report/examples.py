"""A pruned and won-back model with invented numbers, as the tests of the report read it."""

from __future__ import annotations

import math
import random

from overhaul.lineage import DataUsed, LineageStep, Parent
from overhaul.report.facts import Facts, LayerFacts, Report, curves_of_history
from overhaul.table import Row

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
PROMPTS = ("It is a truth universally acknowledged", "The capital of France is", "def fibonacci(n):")


def perplexity(model: str, value: float, spread: float = 0.04) -> Row:
    """A perplexity with an interval of +- `spread`."""
    low, high = value * (1 - spread), value * (1 + spread)
    return Row(model=model, metric="perplexity", value=value, low=low, high=high, count=32_704)


def layers(num_blocks: int, sparsity: float | None, error: float | None) -> tuple[LayerFacts, ...]:
    """Errors grow with depth, and are highest in down_proj."""
    return tuple(
        LayerFacts(
            name=f"model.layers.{block}.{projection}",
            sparsity=sparsity,
            error=error and error * (1 + block / num_blocks) * (1.6 if projection == "mlp.down_proj" else 0.7),
        )
        for block in range(num_blocks)
        for projection in PROJECTIONS
    )


def three_facts(num_blocks: int = 2) -> tuple[Facts, ...]:
    """Dense, pruned to half, won back: 85% of the logarithm of 28 -> 1197 is won back at 49.1."""
    dense = Facts(
        label="dense",
        path="smollm2-135m",
        parameters=134_515_008,
        nonzero_share_blocks=1.0,
        nonzero_share_all=1.0,
        bytes=269_060_552,
        dtype="bfloat16",
        perplexity=perplexity("smollm2-135m", 28.05),
        corpus="austen",
        seq_len=512,
        tokens_per_second=3412.4,
        decode_tokens_per_second=31.2,
        generations=tuple((prompt, ", that a single man in possession of a good fortune.") for prompt in PROMPTS),
    )
    pruned = Facts(
        label="pruned",
        path="out/pruned",
        parameters=134_515_008,
        nonzero_share_blocks=0.5,
        nonzero_share_all=0.6053,
        bytes=269_060_552,
        dtype="bfloat16",
        perplexity=perplexity("out/pruned", 1197.3),
        corpus="austen",
        seq_len=512,
        tokens_per_second=3398.0,
        decode_tokens_per_second=31.0,
        peak_rss_bytes=1_210_000_000,
        seconds=20.84,
        layers=layers(num_blocks, 0.5, 0.08),
        generations=tuple((prompt, " the the the of of and and, and the the.") for prompt in PROMPTS),
    )
    won_back = Facts(
        label="won back",
        path="out/won-back",
        parameters=134_515_008,
        nonzero_share_blocks=0.5,
        nonzero_share_all=0.6053,
        bytes=269_060_552,
        dtype="bfloat16",
        perplexity=perplexity("out/won-back", 49.1),
        corpus="austen",
        seq_len=512,
        tokens_per_second=3405.0,
        decode_tokens_per_second=31.4,
        peak_rss_bytes=2_460_000_000,
        seconds=130.2,
        trainable_parameters=2_442_240,
        trainable_share=0.01816,
        optimizer_bytes=19_537_920,
        layers=layers(num_blocks, 0.5, None),
        generations=tuple((prompt, ", that a man of a large fortune must be wanted.") for prompt in PROMPTS),
    )
    return dense, pruned, won_back


def history(num_steps: int = 100) -> list[dict[str, float]]:
    """Training points: a noisy falling loss, a rate that rises for ten steps and falls linearly."""
    noise = random.Random(0)
    return [
        {
            "step": step,
            "tokens": step * 2048,
            "loss": 3.6 + 3.2 * math.exp(-step / 12) + noise.gauss(0, 0.07),
            "lr": 5e-4 * min(step / 10, (num_steps - step) / (num_steps - 10)),
            "grad_norm": 0.6 + 6 * math.exp(-step / 6) + noise.random() * 0.1,
            "seconds": 1.3 * step,
        }
        for step in range(1, num_steps + 1)
    ]


def full_report(num_blocks: int = 2) -> Report:
    """Every section filled."""
    prune = LineageStep(
        verb="prune",
        method="wanda",
        fields={"sparsity": 0.5, "pattern": None, "samples": 32, "seq_len": 512},
        non_default=("samples",),
        parents=(Parent(path="smollm2-135m", hash="8f41d2c09be77a60"),),
        data=DataUsed(name="austen", fingerprint="51c2a9e04417", tokens=16_384),
        seed=0,
        seconds=20.84,
        peak_rss_bytes=1_210_000_000,
        command="overhaul prune wanda smollm2-135m -o out/pruned --samples 32 --data austen",
    )
    perp = LineageStep(
        verb="adapt",
        method="perp",
        fields={"train": "norms mask_lora", "rank": 8, "train.steps": 100, "train.lr": 0.0005},
        non_default=("train.steps", "train.lr"),
        parents=(Parent(path="out/pruned", hash="c07e55aa31f0b982"),),
        data=DataUsed(name="austen", fingerprint="a9b1c4d27788", tokens=204_800),
        seed=0,
        seconds=130.2,
        peak_rss_bytes=2_460_000_000,
        command="overhaul adapt perp out/pruned -o out/won-back --data austen --steps 100 --lr 5e-4",
    )
    return Report(
        title="Half of smollm2-135m",
        facts=three_facts(num_blocks),
        lineage=(prune, perp),
        curves=curves_of_history(history()),
        recipe_yaml="model: smollm2-135m\nsteps:\n  - prune: {method: wanda}\n  - adapt: {method: perp}\n",
        commands=(prune.command, perp.command),
        environment={"python": "3.11.9", "torch": "2.13.0", "hardware": "2 cores, 8 GB"},
        warnings=("12 lines of the corpus were longer than a window and were cut.",),
    )
