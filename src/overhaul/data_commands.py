"""The commands about text: data list, data preview."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from overhaul.errors import UserError
from overhaul.terminal import parse, print_json

Flag = tyro.conf.FlagCreatePairsOff


def data_command(arguments: list[str]) -> None:
    """`overhaul data list` and `overhaul data preview CORPUS --model M`."""
    if arguments[:1] == ["list"]:
        _data_list(arguments[1:])
    elif arguments[:1] == ["preview"]:
        _data_preview(arguments[1:])
    else:
        raise UserError(
            f"data {' '.join(arguments[:1]) or '(nothing)'} is not a command",
            allowed="data list, data preview CORPUS --model M",
        )


def _data_list(arguments: list[str]) -> None:
    @dataclass
    class DataList:
        json: Annotated[Flag[bool], tyro.conf.arg(help="One JSON object on stdout.")] = False

    given = parse(DataList, arguments, prog="overhaul data list", description="The corpora that have a name.")
    from dataclasses import asdict

    from overhaul.corpora import named_corpora

    corpora = named_corpora()
    if given.json:
        print_json({"corpora": [asdict(corpus) for corpus in corpora]})
        return
    for corpus in corpora:
        print(f"{corpus.name:14} {corpus.bytes / 1e6:5.1f} MB  {corpus.what}; {corpus.licence}; {corpus.source}")


def _data_preview(arguments: list[str]) -> None:
    @dataclass
    class Preview:
        corpus: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="Name, file or directory.", metavar="CORPUS")]
        model: Annotated[str, tyro.conf.arg(help="Whose tokenizer reads it.")] = "smollm2-135m"
        field: Annotated[str | None, tyro.conf.arg(help="Column that holds the text.")] = None
        split: Annotated[Literal["train", "calib", "heldout"], tyro.conf.arg(help="Which part.")] = "train"
        windows: Annotated[int, tyro.conf.arg(help="How many windows.")] = 2
        seq_len: Annotated[int, tyro.conf.arg(help="Tokens per window.")] = 128
        json: Annotated[Flag[bool], tyro.conf.arg(help="One JSON object on stdout.")] = False

    given = parse(
        Preview,
        arguments,
        prog="overhaul data preview",
        description="Windows as the model will see them, trained tokens marked.",
    )
    from overhaul.preview import preview

    shown = preview(
        given.corpus,
        given.model,
        field=given.field,
        split=given.split,
        windows=given.windows,
        seq_len=given.seq_len,
    )
    if given.json:
        print_json(shown)
        return
    print(
        f"{shown['corpus']} ({shown['licence']}): {shown['train']} documents train, {shown['calib']} calibrate, "
        f"{shown['heldout']} are held out"
    )
    for note in shown["notes"]:
        print(f"note: {note}")
    for number, window in enumerate(shown["windows"], 1):
        print(
            f"\nwindow {number}: {window['trained']} of {window['tokens']} tokens are trained on, the others in [[ ]]"
        )
        print(window["text"])
