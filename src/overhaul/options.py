"""What a run needs beside the method: data, seed, device, how to judge the result."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from overhaul.method import Natural, Positive, Settings

DEFAULT_CORPUS = "sample"
PASSING_OPTIONS = {"resume", "dry_run", "track"}
"""Options of one call, which are no part of what was done to the model."""


class Options(Settings):
    """Settings of a run that are not the method's."""

    data: str | None = Field(
        default=None, description="Corpus to calibrate or train on: a name, a file or a directory."
    )
    field: str | None = Field(default=None, description="Column of the corpus that holds the text.")
    whole: bool = Field(
        default=False, description="Train on every row of --data: nothing is held out of it to measure on."
    )
    evaluate: str | None = Field(
        default=None,
        description="Corpus whose held-out part judges the result: default that of --data, or none for no table.",
    )
    watch: tuple[str, ...] = Field(
        default=(), description="Further corpora: the loss on their held-out parts, before, while training, and after."
    )
    evaluate_windows: Positive = Field(default=16, description="Held-out windows scored before and after.")
    evaluate_seq_len: int = Field(default=512, gt=1, description="Tokens per held-out window.")
    seed: Natural = Field(default=0, description="Of every random choice.")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="Of matrix products; auto is bf16 where it is fast."
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:N.")
    resume: bool = Field(default=False, description="Go on from the checkpoint in OUT.")
    dry_run: bool = Field(default=False, description="Say what would be done, and do nothing.")
    track: Literal["tensorboard", "trackio", "wandb"] | None = Field(
        default=None, description="Mirror metrics.jsonl to a tracker that is installed."
    )
