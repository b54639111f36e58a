"""The commands about a model that examples can be deleted from: forget delete, status, verify."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from overhaul.errors import UserError
from overhaul.terminal import parse, print_json

Flag = tyro.conf.FlagCreatePairsOff
_Directory = Annotated[
    Path, tyro.conf.Positional, tyro.conf.arg(help="Model directory that forget s3t wrote.", metavar="DIR")
]
_Json = Annotated[Flag[bool], tyro.conf.arg(help="One JSON object on stdout.")]


def forget_delete_command(arguments: list[str]) -> None:
    """`overhaul forget delete DIR --where COLUMN=VALUE --text FILE --images PATH`."""

    @dataclass
    class ForgetDelete:
        directory: _Directory
        where: Annotated[
            tuple[str, ...], tyro.conf.arg(help="COLUMN=VALUE: examples with one of these, by columns of --tags.")
        ] = ()
        text: Annotated[Path | None, tyro.conf.arg(help="File of examples, exactly as the data has them.")] = None
        images: Annotated[
            Path | None,
            tyro.conf.arg(help="A picture, or a folder or a table of them, exactly as the data has them."),
        ] = None
        field: Annotated[str | None, tyro.conf.arg(help="The column of it that holds the text; as in training.")] = None
        by: Annotated[str | None, tyro.conf.arg(help="Who asked for it, for the log; none: the user here.")] = None
        reason: Annotated[str | None, tyro.conf.arg(help="Why, for the log.")] = None
        dry_run: Annotated[Flag[bool], tyro.conf.arg(help="Tell what would be deleted.")] = False
        json: _Json = False

    about = "Take examples out of a model, at once and exactly: nothing is left that was trained with them."
    given = parse(ForgetDelete, arguments, prog="overhaul forget delete", description=about)
    from overhaul.forget_service import delete

    done = delete(
        given.directory,
        where=[_pair(one) for one in given.where],
        texts=given.text,
        images=given.images,
        field=given.field,
        by=given.by,
        reason=given.reason,
        dry_run=given.dry_run,
    )
    if given.json:
        print_json(dataclasses.asdict(done))
        return
    would = "would be " if given.dry_run else ""
    print(f"{done.examples} examples ({done.rows} rows of the data) {would}deleted, {done.stages} stages {would}erased")
    if done.before:
        print(f"{done.before} were deleted before")
    if done.is_gone:
        print("no shard has anything left: training on what is left of the data is needed, with overhaul forget s3t")
    elif done.shards_gone:
        told = ", ".join(map(str, done.shards_gone))
        print(f"shard {told} has no surviving sequence: the others answer; retraining is needed to have it again")
    if done.hash:
        print(f"\nlog entry {done.hash}\n  keep it elsewhere: overhaul forget verify "
              f"{shlex.quote(str(given.directory))} --head {done.hash}")  # fmt: skip


def _pair(given: str) -> tuple[str, str]:
    name, sign, value = given.partition("=")
    if not sign or not name:
        raise UserError(f"--where {given}", allowed="COLUMN=VALUE", hint="--where user=17")
    return name, value


def forget_status_command(arguments: list[str]) -> None:
    """`overhaul forget status DIR`."""

    @dataclass
    class ForgetStatus:
        directory: _Directory
        log: Annotated[Flag[bool], tyro.conf.arg(help="The audit log too, one JSON object a line.")] = False
        json: _Json = False

    about = "What is left of a model that examples can be deleted from."
    given = parse(ForgetStatus, arguments, prog="overhaul forget status", description=about)
    from overhaul.forget_service import log, status

    found = status(given.directory)
    if given.json:
        print_json(found | ({"log": log(given.directory)} if given.log else {}))
        return
    for one in found["shards"]:
        print(
            f"shard {one['shard']}: {one['examples']:,} examples, {one['stages_in_use']} of {one['stages_of']} stages "
            f"in use, {one['sequences_left']} of {one['sequences']} sequences left"
        )
    print(f"{found['deleted']:,} examples deleted; {found['stages']} stages, {found['bytes'] / 1e6:.2f} MB, are kept")
    print(
        f"a new model of this shape lasts {found['expected_deletions']:.1f} deletions on average, if they hit all "
        "slices alike"
    )
    if given.log:
        for entry in log(given.directory):
            print_json(entry)


def forget_verify_command(arguments: list[str]) -> None:
    """`overhaul forget verify DIR --head HASH`."""

    @dataclass
    class ForgetVerify:
        directory: _Directory
        head: Annotated[str | None, tyro.conf.arg(help="Hash of a log entry that was kept elsewhere.")] = None
        json: _Json = False

    about = "Whether a model is as its audit log tells: no entry changed, no file but those that were trained."
    given = parse(ForgetVerify, arguments, prog="overhaul forget verify", description=about)
    from overhaul.forget_service import verify

    found = verify(given.directory, head=given.head)
    if given.json:
        print_json(found)
        return
    print(f"{found['entries']} log entries, each sealing those before it; {found['stages']} stages are as trained, and "
          f"no others are there\nlast entry {found['head']}")  # fmt: skip
