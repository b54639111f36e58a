"""What moves an adapter to another model when its data is gone: teacher, judge, a few examples, and sums.

A bundle is a directory of its own kind, written aside and renamed, never a model:

    bundle.json         models with their hashes, frame, statistics, what the judge is worth, ledger
    seeds.jsonl         the only rows of the data
    judge/              a PEFT adapter that tells real prompts from written ones
    teacher/            the adapter to be moved, unless a whole model is the teacher: then its path is in bundle.json
    features.safetensors    sums of random features of held-out prompts
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from overhaul import artifact, disk, pretrained
from overhaul.discrepancy import Features, Sums
from overhaul.documents import Row, row_text
from overhaul.errors import UserError
from overhaul.synthetic import Frame

FORMAT, VERSION = "overhaul-bundle", 1
MANIFEST, SEEDS, JUDGE, TEACHER, SUMS = "bundle.json", "seeds.jsonl", "judge", "teacher", "features.safetensors"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"),
)
"""Files of a tokenizer: the only others that are copied, as anything may lie beside an adapter, its data too."""
KNOWN = {
    "statistics": ("rows", "longest_prompt", "longest_answer", "one_line_answers", "fingerprint"),
    "judge": ("auroc", "threshold"),
}
"""What has to be known of the data and of the judge."""
FEWEST_SEEDS = 2


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, and the answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model that a bundle stands on.

    Attributes:
        path: a name, an absolute path, or a folder of the bundle.
        sha256: of its weights.
        base_sha256: of the weights of the model it is an adapter of; the same hash where it is none.
    """

    path: str
    sha256: str
    base_sha256: str

    @classmethod
    def of(cls, ref: str | Path, places: Mapping[str, str] | None = None) -> Source:
        """That of a model as it lies on disk now.

        Args:
            ref: the model.
            places: where bases of adapters are now that were moved.
        """
        path = pretrained.resolve(str(ref))
        base = pretrained.resolve(_stands_on(path, places or {}))
        own, below = artifact.weights_sha256(path), artifact.weights_sha256(base)
        return cls(
            path=str(ref) if str(ref) in pretrained.NAMED else str(path.resolve()), sha256=own, base_sha256=below
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle in memory.

    Attributes:
        path: its directory.
        base: the model that the judge is an adapter of, and that prompts are measured with.
        teacher: what answers.
        seeds: the examples.
        frame: what all prompts begin and end with.
        judge: `auroc` and `threshold` among what is known of it.
        statistics: of the data: how many rows, how long prompts and answers are.
        features: the kernel of the discrepancy.
        real: sums of features of held-out prompts.
        ledger: what of the data is in here.
    """

    path: Path
    base: Source
    teacher: Source
    seeds: tuple[Example, ...]
    frame: Frame
    judge: Mapping[str, Any]
    statistics: Mapping[str, Any]
    features: Features
    real: Sums
    ledger: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Bundle:
        """The bundle in a directory; its large files are looked for, and read by `check` only.

        Raises:
            UserError: it is none, a part is missing, or what is read here is not as it was written.
        """
        path = Path(path).expanduser()
        if not (path / MANIFEST).is_file():
            raise UserError(
                f"{path} is no bundle: it has no {MANIFEST}", hint="overhaul bundle ADAPTED -o BUNDLE --data D"
            )
        stored = _manifest(path)
        try:
            return cls._of(path, stored)
        except (KeyError, TypeError, AttributeError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{path / MANIFEST} is not as it was written: {why}", hint="a sound copy of the bundle"
            ) from error

    @classmethod
    def _of(cls, path: Path, stored: dict[str, Any]) -> Bundle:
        """That of a manifest; `KeyError` or `TypeError` where this is damaged."""
        inside = [f"{JUDGE}/{name}" for name in ADAPTER]
        if stored["teacher"]["path"] == TEACHER:
            inside += [f"{TEACHER}/{name}" for name in ADAPTER]
        for part, files in (("judge", inside[:2]), ("teacher", inside[2:]), ("seeds", [SEEDS]), ("sums", [SUMS])):
            for name in files:
                if not (path / name).is_file():
                    raise UserError(f"{path} has no {part}: {name} is missing", hint="a sound copy of the bundle")
        # Other line breaks than this one may stand in a text.
        lines = [line for line in (path / SEEDS).read_bytes().split(b"\n") if line.strip()]
        if len(lines) < FEWEST_SEEDS:
            raise UserError(f"{path} has {len(lines)} seeds", allowed=f"{FEWEST_SEEDS} or more examples in {SEEDS}")
        small = [SEEDS, SUMS, *(name for name in inside if name.endswith(".json"))]
        _refuse_changed(path, {name: stored["parts"][name] for name in small})
        for missing in (name for group, names in KNOWN.items() for name in names if name not in stored[group]):
            raise KeyError(missing)
        return cls(
            path=path,
            base=Source(**stored["base"]),
            teacher=Source(**stored["teacher"]),
            seeds=tuple(Example(**json.loads(line)) for line in lines),
            frame=Frame(**stored["frame"]),
            judge=stored["judge"],
            statistics=stored["statistics"],
            features=Features(**stored["features"]),
            real=_read_sums(path, stored["real"]),
            ledger=stored["ledger"],
        )

    @property
    def teacher_path(self) -> str:
        """Where the teacher is."""
        return str(self.path / TEACHER) if self.teacher.path == TEACHER else self.teacher.path

    def refuse_missing(self, *, teacher: bool = True) -> None:
        """Raises `UserError` for a model that is not where it was; names that are fetched are left to their fetching.

        Args:
            teacher: whether this one is needed.
        """
        needed = [("base", self.base.path), ("judge's base", _stands_on(self.path / JUDGE))]
        if teacher:
            needed += [("teacher", self.teacher_path), ("teacher's base", _stands_on(Path(self.teacher_path)))]
        for what, ref in needed:
            if Path(ref).is_absolute() and not Path(ref).is_dir():
                how = "TEACHER -o NEW" if what == "teacher" else "TEACHER -o NEW --base DIR"
                raise UserError(
                    f"the {what} of {self.path}, {ref}, is not there",
                    allowed="a model where it was when the bundle was made",
                    hint=f"overhaul bundle {how} --from {self.path}",
                )

    def check(self, *, teacher: bool = True) -> None:
        """Raises `UserError` for a part that was changed, or a model that is not the one the bundle was made with.

        Args:
            teacher: whether this one is needed.
        """
        self.check_parts()
        self.refuse_missing(teacher=teacher)
        models = [("judge", self.base.path, self.base), ("teacher", self.teacher_path, self.teacher)]
        for what, ref, wanted in models if teacher else models[:1]:
            _refuse_other(what, ref, Source.of(ref), self.path, wanted)

    def check_parts(self) -> None:
        """Raises `UserError` for a part that was changed."""
        _refuse_changed(self.path, _manifest(self.path)["parts"])

    def write(self, directory: Path, places: Mapping[str, str] | None = None) -> None:
        """Writes everything into a directory that has the judge already.

        Args:
            directory: where to.
            places: where bases of adapters are now that were moved.
        """
        from safetensors.numpy import save_file

        teacher = self.teacher
        if (Path(self.teacher_path) / ADAPTER[0]).is_file():
            _copy_adapter(Path(self.teacher_path), directory / TEACHER, places or {})
            teacher = Source(path=TEACHER, sha256=teacher.sha256, base_sha256=teacher.base_sha256)
        write_lines(directory / SEEDS, [asdict(seed) for seed in self.seeds])
        save_file({"sum": self.real.sum_F}, directory / SUMS)
        files = sorted(file for file in directory.rglob("*") if file.is_file())
        stored = {
            "format": FORMAT,
            "version": VERSION,
            "base": asdict(self.base),
            "teacher": asdict(teacher),
            "frame": asdict(self.frame),
            "judge": dict(self.judge),
            "statistics": dict(self.statistics),
            "features": asdict(self.features),
            "real": {"squares": self.real.squares, "count": self.real.count},
            "ledger": dict(self.ledger),
            "parts": {str(file.relative_to(directory)): _sha256(file) for file in files},
        }
        (directory / MANIFEST).write_text(json.dumps(stored, indent=1))


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def example_of(row: Row, corpus: str) -> Example:
    """A row as prompt and answer.

    Raises:
        UserError: the row has another shape.
    """
    if len(row) != 2 or "messages" in row:
        raise UserError(
            f"{corpus} has rows with {', '.join(row)}: they are no prompts with answers",
            allowed="columns prompt and completion, or question and answer",
        )
    (prompt, _), (answer, _) = row_text(row)
    return Example(prompt, answer)


def pointed(bundle: Bundle, teacher: str, out: Path, *, base: str | None = None) -> None:
    """Writes the bundle once more with another teacher: the next link of a chain, which needs no data.

    The teacher that the bundle has is not looked for.

    Args:
        bundle: what is written once more.
        teacher: what answers from now on; the bundle's own, `BUNDLE/teacher`, will do.
        out: the new directory.
        base: where the model is now that the bundle stands on, if it was moved; a teacher that is an adapter of that
            model moves with it.

    Raises:
        UserError: no such model, another one than the bundle stands on, or it cannot be written.
    """
    own, places = pretrained.resolve(teacher), {}
    if base is not None:
        places = {bundle.base.path: str(pretrained.resolve(base).resolve())}
    new = Source.of(teacher, places)
    for read in (bundle.path, own, pretrained.resolve(_stands_on(own, places)), *map(Path, places.values())):
        artifact.check_out(out, parent=read)
    if base is None:
        bundle.check(teacher=False)
    else:
        bundle.check_parts()
        _refuse_other("judge", base, there := Source.of(base), bundle.path, bundle.base)
        bundle = replace(bundle, base=there)
    with disk.aside(out) as directory:
        _copy_adapter(bundle.path / JUDGE, directory / JUDGE, places)
        replace(bundle, teacher=new).write(directory, places)


def _refuse_other(what: str, ref: str, there: Source, path: Path, wanted: Source) -> None:
    """Raises `UserError` for a model with other weights than those that a bundle was made with."""
    if (there.sha256, there.base_sha256) != (wanted.sha256, wanted.base_sha256):
        raise UserError(
            f"{ref} is not the model that the {what} of {path} stands on: its weights have another hash",
            hint="the model that the bundle was made with",
        )


def _copy_adapter(source: Path, target: Path, places: Mapping[str, str]) -> None:
    """The two files of an adapter, and its tokenizer where it has one; the path of its base is made absolute.

    Args:
        source: the adapter.
        target: a new directory.
        places: where bases are now that were moved.
    """
    target.mkdir()
    for file in source.iterdir():
        if file.name in (*ADAPTER, *BESIDE) and file.is_file():
            shutil.copy2(file, target / file.name)
    config = json.loads((target / ADAPTER[0]).read_text())
    given = str(config["base_model_name_or_path"])
    base = Path(places.get(given, given))
    if base.is_dir() and str(base.resolve()) != given:
        config["base_model_name_or_path"] = str(base.resolve())
        (target / ADAPTER[0]).write_text(json.dumps(config, indent=2))


def _manifest(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads((path / MANIFEST).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path / MANIFEST} is not valid JSON: {error}", hint="a sound copy of the bundle") from error
    if not isinstance(stored, dict) or (stored.get("format"), stored.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path / MANIFEST} is of another format", allowed=f"{FORMAT}, version {VERSION}")
    return stored


def _stands_on(path: Path, places: Mapping[str, str] | None = None) -> str:
    """The base of an adapter, where it is now; of another model itself."""
    base = artifact.base_of(path) if (path / ADAPTER[0]).is_file() else str(path)
    return (places or {}).get(base, base)


def _refuse_changed(path: Path, parts: Mapping[str, str]) -> None:
    """Raises `UserError` for a file whose hash is another one than is given."""
    for name, wanted in parts.items():
        if not (path / name).is_file() or _sha256(path / name) != wanted:
            raise UserError(f"{path}: {name} is not as it was written", hint="a sound copy of the bundle")


def _read_sums(path: Path, stored: Mapping[str, Any]) -> Sums:
    from safetensors.numpy import load_file

    return Sums(load_file(path / SUMS)["sum"], stored["squares"], stored["count"])


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
