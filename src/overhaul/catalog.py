"""THE table of methods: a line here is a command, a recipe step, a schema entry, a page and a row of contract tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from overhaul.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from overhaul.method import Method


@dataclass(frozen=True, slots=True)
class Entry:
    """A method by name: `target` is `module:Class` below this package, `system` the number of its sheet."""

    verb: str
    name: str
    target: str
    summary: str
    system: int | None = None

    def load(self) -> type[Method]:
        """Imports the class."""
        module, _, name = self.target.partition(":")
        return getattr(import_module(f"overhaul.{module}"), name)


VERBS = {
    "prune": "Set weights to exactly zero.",
    "shrink": "Make a model really smaller: fewer layers, heads, neurons, channels.",
    "quantize": "Store weights, or compute, in fewer bits.",
    "adapt": "Train a model, or a small part of it, on text.",
    "distill": "Train a model to predict what another one predicts.",
    "extend": "Go on pre-training: new text, new languages, without losing the old.",
    "learn": "Learn task after task without forgetting the ones before.",
    "forget": "Take the influence of some data out of a model.",
    "measure": "Numbers with intervals.",
}

ENTRIES = (
    Entry(
        "prune",
        "magnitude",
        "prune.magnitude:Magnitude",
        "Remove the weights nearest to zero, the same share of every layer; needs no data.",
    ),
    Entry(
        "prune",
        "random",
        "prune.random:RandomPruning",
        "Remove weights at random, the same share of every layer: the baseline of baselines.",
    ),
    Entry(
        "prune",
        "wanda",
        "prune.wanda:Wanda",
        "Remove the weights with the smallest magnitude times input norm, output by output; no updates.",
    ),
    Entry(
        "prune",
        "sparsegpt",
        "prune.sparsegpt:SparseGPT",
        "Remove weights by second-order saliency and correct those that stay: better than Wanda, and slower.",
    ),
    Entry(
        "shrink",
        "minitron",
        "shrink.minitron:Minitron",
        "Cut layers, heads, neurons and channels out of a model, to a shape or to a size; the result is a stock model.",
        2,
    ),
    Entry(
        "quantize",
        "int8",
        "quantize.int8:Int8",
        "Store linear layers as int8 and multiply in int8, outlier columns in 16 bit: half the memory, no training.",
        5,
    ),
    Entry(
        "quantize",
        "bct",
        "quantize.bct:Bct",
        "Store and compute everything in 8 or 4 bits with one scale per small block; needs no data.",
        8,
    ),
    Entry(
        "forget",
        "s3t",
        "forget.s3t:S3T",
        "Train adapters in shards and slices, so that an example can be taken out again exactly, and at once.",
        6,
    ),
    Entry(
        "forget",
        "ga",
        "forget.ga:GradientAscent",
        "Unlearn texts by raising their loss; with texts to retain beside them (GA, GA_GDR, GA_KLR).",
        43,
    ),
    Entry(
        "forget",
        "npo",
        "forget.npo:Npo",
        "Unlearn texts as answers that are not preferred to what the model said before (NPO, NPO_GDR, NPO_KLR).",
        43,
    ),
    Entry(
        "forget",
        "simnpo",
        "forget.simnpo:SimNpo",
        "Unlearn texts until their loss a token is high enough, whatever the model said before (SimNPO).",
        43,
    ),
    Entry(
        "forget",
        "rmu",
        "forget.rmu:Rmu",
        "Unlearn texts by misdirecting the states of one block; only the blocks up to it are trained (RMU).",
        43,
    ),
    Entry(
        "forget",
        "task-vector",
        "forget.task_vector:TaskVector",
        "Unlearn texts by learning them further and going as far the other way (task vector).",
        43,
    ),
    Entry(
        "forget",
        "whp",
        "forget.whp:Whp",
        "Unlearn texts at decoding: two networks, and off the logits what learning the texts further adds (WHP).",
        43,
    ),
    Entry("adapt", "full", "adapt.full:Full", "Train every parameter; pruned weights stay zero."),
    Entry("adapt", "lora", "adapt.lora:LoRA", "Train low-rank increments of the linear layers."),
    Entry(
        "adapt",
        "randlora",
        "adapt.randlora:RandLoRA",
        "Train full-rank increments with as few numbers as LoRA: scales of random bases that all layers share.",
        17,
    ),
    Entry(
        "adapt",
        "vera",
        "adapt.vera:VeRA",
        "Train two vectors a layer that scale random low-rank factors which all layers share.",
    ),
    Entry(
        "adapt",
        "sltrain",
        "adapt.sltrain:SLTrain",
        "Replace every linear layer by thin factors plus a sparse matrix, and train those: fewer numbers to hold.",
        53,
    ),
    Entry("adapt", "perp", "adapt.perp:Perp", "Win back a pruned model by training a small part of it.", 1),
    Entry(
        "adapt",
        "hft",
        "adapt.hft:HalfFineTuning",
        "Train a random half of the matrices and leave the other as it is: what the model knew is kept longer.",
        44,
    ),
    Entry(
        "adapt",
        "half-reset",
        "adapt.half_reset:HalfReset",
        "Put a random half of a tuned model's matrices back to its base: knowledge returns, most of the skill stays.",
        44,
    ),
    Entry(
        "adapt",
        "repair",
        "adapt.repair:Repair",
        "Scale down the singular directions of a tuned model that its base does not know; needs no data.",
        22,
    ),
    Entry(
        "adapt",
        "format",
        "adapt.format_alignment:FormatAlignment",
        "Train the chat format alone, on few examples whose answers the model knows already.",
        35,
    ),
    Entry(
        "adapt",
        "translora",
        "adapt.translora:TransLoRA",
        "Train an adapter anew on another model, from a bundle that was made while its data was there.",
        34,
    ),
    Entry(
        "distill",
        "kd",
        "distill.kd:KnowledgeDistillation",
        "Learn what a larger model predicts, word by word, instead of which word came next.",
        2,
    ),
    Entry(
        "extend",
        "cpt",
        "extend.cpt:ContinualPretraining",
        "Go on pre-training on new text, with a share of the old among it and a rate that rises and falls again.",
        9,
    ),
    Entry(
        "extend",
        "mix-cpt",
        "extend.mix_cpt:MixCPT",
        "Go on pre-training on documents mixed with instructions as plain text, held to what the model said before.",
        35,
    ),
    Entry(
        "extend",
        "upsample",
        "extend.upsample:Upsampling",
        "Go on pre-training on a mixture of texts, and towards the end on one with more of the valuable ones.",
        36,
    ),
    Entry(
        "extend",
        "stability-gap",
        "extend.stability_gap:StabilityGap",
        "Go on pre-training on the best few of the documents several times over, in the mixture that the model knows.",
        39,
    ),
    Entry(
        "extend",
        "syne",
        "extend.syne:Syne",
        "Add a language and a skill: easy text first, topics that suffer more often, and synthetic questions mixed in.",
        12,
    ),
    Entry(
        "learn",
        "bregman",
        "learn.bregman:Bregman",
        "Learn tasks, held to the past by a divergence of outputs and one of weights: EWC, ER, DER++, LwF and others.",
        4,
    ),
    Entry(
        "learn",
        "rehearsal-free",
        "learn.rehearsal_free:RehearsalFree",
        "Learn classes with no example kept: distillation, a pull to the weights before, or only some of them.",
        40,
    ),
    Entry(
        "learn",
        "clr",
        "learn.clr:Clr",
        "Learn each task with small kernels behind a frozen network's convolutions and normalisations of its own.",
        10,
    ),
    Entry(
        "learn",
        "slm",
        "learn.slm:Slm",
        "Learn each text as increments beside a frozen language model; what a question is like decides which are used.",
        38,
    ),
    Entry(
        "learn",
        "contracon",
        "learn.contracon:ConTraCon",
        "Learn each task with small kernels over a frozen transformer's attention weights and norms of its own.",
        42,
    ),
    Entry(
        "measure",
        "perplexity",
        "measure.perplexity:MeasurePerplexity",
        "Perplexity on held-out text, with a 95% interval.",
    ),
    Entry(
        "measure",
        "data-utility",
        "measure.data_utility:DataUtility",
        "What each text of a mixture is worth: losses after short runs without it, less those after runs with all.",
        36,
    ),
    Entry(
        "measure",
        "choice",
        "measure.choice:Choice",
        "Accuracy on multiple-choice questions, with a 95% interval.",
    ),
    Entry(
        "measure",
        "answers",
        "measure.answers:Answers",
        "Share of questions that are answered exactly, greedily and as plain text, with a 95% interval.",
        12,
    ),
    Entry(
        "measure",
        "accuracy",
        "measure.accuracy:MeasureAccuracy",
        "Share of labelled texts or images whose class a classifier tells, with a 95% interval.",
    ),
    Entry(
        "measure",
        "outliers",
        "measure.outliers:MeasureOutliers",
        "Dimensions of the hidden states with large values in many layers, and what is lost without them.",
        5,
    ),
    Entry(
        "measure",
        "spectra",
        "measure.spectra:MeasureSpectra",
        "Singular directions of tuned models that their base does not know, and the rank of the change.",
        22,
    ),
    Entry(
        "measure",
        "drift",
        "measure.drift:MeasureDrift",
        "How far each block has moved from the base's weights, and the bottom blocks beside the top ones.",
        39,
    ),
    Entry(
        "measure",
        "muse",
        "measure.muse:Muse",
        "What is left of texts that a model was to forget, and what was lost beside, against one retrained without.",
        43,
    ),
)


def methods(verb: str | None = None) -> Iterator[Entry]:
    """The entries of one verb, or all."""
    return (entry for entry in ENTRIES if verb in (None, entry.verb))


def find(verb: str, name: str) -> Entry:
    """The entry of a verb and a method name.

    Raises:
        UserError: there is none; the nearest name is suggested.
    """
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}", allowed=", ".join(VERBS), hint=did_you_mean(verb, VERBS))
    names = [entry.name for entry in methods(verb)]
    if name not in names:
        raise UserError(
            f"{verb} has no method {name!r}",
            allowed=", ".join(names),
            hint=did_you_mean(name, names) or f"overhaul list {verb}",
        )
    return next(entry for entry in methods(verb) if entry.name == name)


def known(verb: str, name: str) -> Entry | None:
    """The entry of a step of a lineage; None where a command took it that is no method, such as `learn export`."""
    return next((entry for entry in methods(verb) if entry.name == name), None)


def changes(entry: Entry) -> bool:
    """Whether the method writes a model (and not numbers only)."""
    from overhaul.method import Measure

    return not issubclass(entry.load(), Measure)
