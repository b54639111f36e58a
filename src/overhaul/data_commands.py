"""The commands about text and images: data list, preview, questions, topics, fictions, news, stories."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from overhaul.errors import UserError, did_you_mean
from overhaul.terminal import checked, flags, json_flag, parse, print_json, quiet_libraries

Flag = tyro.conf.FlagCreatePairsOff


def data_command(arguments: list[str]) -> None:
    """`overhaul data list`, `preview CORPUS --model M`, `questions -o FILE`, `topics CORPUS --labels FILE -o DIR`, and
    `fictions -o DIR`, `news -o DIR`, `stories -o DIR`.
    """
    name = arguments[0] if arguments else "(nothing)"
    if name not in _COMMANDS:
        raise UserError(
            f"data {name} is not a command", allowed=", ".join(f"data {known}" for known in _COMMANDS),
            hint=did_you_mean(name, _COMMANDS),
        )  # fmt: skip
    _COMMANDS[name](arguments[1:])


def _data_list(arguments: list[str]) -> None:
    @dataclass
    class DataList:
        json: Annotated[Flag[bool], tyro.conf.arg(help="One JSON object on stdout.")] = False

    given = parse(
        DataList, arguments, prog="overhaul data list", description="The corpora and image sets that have a name."
    )
    from overhaul.corpora import named_corpora
    from overhaul.image_sets import named_image_sets

    corpora, image_sets = named_corpora(), named_image_sets()
    if given.json:
        print_json({"corpora": [*map(dataclasses.asdict, corpora)], "images": [*map(dataclasses.asdict, image_sets)]})
        return
    for corpus in corpora:
        print(f"{corpus.name:14} {corpus.bytes / 1e6:5.1f} MB  {corpus.what}; {corpus.licence}; {corpus.source}")
    print("\nimages:")
    for images in image_sets:
        height, width, channels = images.size
        print(
            f"{images.name:15} {images.images:6,} of {height} x {width} {'RGB ' if channels == 3 else 'grey'} "
            f"{images.classes:2} classes  {images.what}; {images.licence}; {images.source}"
        )


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


def _asked(name: str, settings: Any, arguments: list[str], *more: tuple[str, Any], json: str) -> tuple[Any, Any]:
    """What was given to a command that writes by settings, and these, checked.

    Args:
        name: of the command.
        settings: their class.
        arguments: behind the name.
        more: further fields of the command.
        json: help of `--json`.
    """
    kind = dataclasses.make_dataclass(
        f"Data{name.capitalize()}", [*more, *flags(settings), json_flag(json)], kw_only=True
    )
    where = f"data {name}"
    given: Any = parse(kind, arguments, prog=f"overhaul {where}", description=cleandoc(settings.__doc__ or ""))
    return given, checked(settings, given, where=where)


def _out(what: str, metavar: str) -> tuple[str, Any]:
    """The field of what is written."""
    return "out", Annotated[Path, tyro.conf.arg(aliases=["-o"], help=what, metavar=metavar)]


def _data_questions(arguments: list[str]) -> None:
    from overhaul.question_writing import QuestionWriting, write

    out = _out("New file of JSON lines.", "FILE")
    given, choice = _asked("questions", QuestionWriting, arguments, out, json="The ledger on stdout.")
    if not choice.is_by_rule:
        quiet_libraries()
    ledger = write(choice, given.out)
    if given.json:
        print_json(ledger)
        return
    print(f"{ledger['made']:,} pairs made by {ledger['generator']['name']}")
    for why, count in ledger["dropped"].items():
        if count:
            print(f"  {count:,} dropped: {why}")
    print("\nwritten:")
    for name, told in ledger["files"].items():
        print(f"  {shlex.quote(str(given.out.parent / name))}  {told['pairs']:,} pairs")
    print(f"  {shlex.quote(str(given.out.with_suffix('.json')))}  where they come from, and what was dropped")


def _data_topics(arguments: list[str]) -> None:
    from overhaul.topics import TopicSettings, write

    what = tyro.conf.arg(help="What to divide: a name or a path.", metavar="CORPUS")
    corpus = "corpus", Annotated[str, tyro.conf.Positional, what]
    out = _out("New directory.", "DIR")
    given, choice = _asked("topics", TopicSettings, arguments, corpus, out, json="topics.json on stdout.")
    quiet_libraries()
    told = write(given.corpus, choice, given.out)
    if given.json:
        print_json(told)
        return
    found = told["accuracy"]
    print(f"accuracy {found['value']:.1%} [{found['low']:.1%}, {found['high']:.1%}] on {found['count']} labelled pages "
          "that it has not seen\n\nwritten:")  # fmt: skip
    for name, topic in told["topics"].items():
        print(f"  {shlex.quote(str(given.out / topic['file']))}  {topic['rows']:,} rows, {topic['share']:.1%}: {name}")


def _data_fictions(arguments: list[str]) -> None:
    from overhaul.fictions import FictionSettings, write

    _data_to_forget("fictions", FictionSettings, write, arguments)


def _data_news(arguments: list[str]) -> None:
    from overhaul.forget_texts import NewsSettings, write_news

    _data_to_forget("news", NewsSettings, write_news, arguments)


def _data_stories(arguments: list[str]) -> None:
    from overhaul.forget_texts import StorySettings, write_stories

    _data_to_forget("stories", StorySettings, write_stories, arguments)


def _data_to_forget(
    name: str, settings: Any, write: Callable[[Any, Path], dict[str, int]], arguments: list[str]
) -> None:
    """A command that writes texts to be learnt and forgotten, with questions."""
    given, choice = _asked(name, settings, arguments, _out("New directory.", "DIR"), json="Rows by file on stdout.")
    told = write(choice, given.out)
    if given.json:
        print_json(told)
        return
    print("written:")
    for file, count in told.items():
        print(f"  {shlex.quote(str(given.out / file))}  {count:,} rows")


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "list": _data_list,
    "preview": _data_preview,
    "questions": _data_questions,
    "topics": _data_topics,
    "fictions": _data_fictions,
    "news": _data_news,
    "stories": _data_stories,
}
