"""Atomic writes: files are written and flushed in a staging folder, then renamed, so that a target is never incomplete.

A folder is locked by the process that uses it. A folder that a killed process left behind is not locked any more; the
next process that creates one beside it removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType

from onnx_oamip.core.errors import OutputError
from onnx_oamip.core.regular_files import refuse_special

locks: ModuleType | None
try:
    import fcntl as locks
except ImportError:  # not on Windows
    locks = None

SCRATCH = "onnx-oamip-"
"""Prefix of folders for temporary files in ``TMPDIR``."""
STAGING = ".onnx-oamip-"
"""Prefix of folders beside an output, in which its files are written before they are renamed."""
UNLOCKED = "new-"
"""Part of the name of a folder that its process has not locked yet."""
RANDOM = 8
"""Random characters at the end of the name of a folder."""
YOUNG = 60
"""Seconds for which a folder may exist before its process has locked it."""
OLD = 86_400
"""Seconds after which a folder counts as left behind, on file systems without locks."""
_open: dict[Path, int | None] = {}
"""Folders of this process, with the file descriptor that holds the lock."""


def create_folder(parent: Path, prefix: str) -> Path:
    """Create a folder that this process locks, and remove those of the same prefix that were left behind.

    Args:
        parent: Folder to create it in.
        prefix: First part of its name; eight random characters follow.

    Returns:
        The folder.
    """
    _remove_left_behind(parent, prefix)
    unlocked = Path(tempfile.mkdtemp(prefix=f"{prefix}{UNLOCKED}", dir=parent))
    _open[unlocked] = _locked(unlocked)
    # The name that other processes look for appears with the lock already held.
    path = unlocked.with_name(prefix + unlocked.name[-RANDOM:])
    os.rename(unlocked, path)
    _open[path] = _open.pop(unlocked)
    return path


def _locked(path: Path) -> int | None:
    """Descriptor that holds the lock of a folder; None on file systems without locks."""
    if locks is None:
        return None
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):
            locks.flock(descriptor, locks.LOCK_EX | locks.LOCK_NB)
        return descriptor
    return None


def _remove_left_behind(parent: Path, prefix: str) -> None:
    """Remove folders of a prefix whose process has ended."""
    random = "?" * RANDOM
    for path in parent.glob(f"{_escaped(prefix)}{random}"):
        if path not in _open and _is_folder(path) and _is_left_behind(path):
            shutil.rmtree(path, ignore_errors=True)
    for path in parent.glob(f"{_escaped(prefix)}{UNLOCKED}{random}"):
        if path not in _open and _is_folder(path) and _age(path) > YOUNG:
            shutil.rmtree(path, ignore_errors=True)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _age(path: Path) -> float:
    """Seconds since a folder was changed; 0 if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def remove_folder(path: Path) -> None:
    """Remove a folder and release its lock.

    Args:
        path: A folder from :func:`create_folder`.
    """
    shutil.rmtree(path, ignore_errors=True)
    descriptor = _open.pop(path, None)
    if descriptor is not None:
        os.close(descriptor)


def remove_all() -> None:
    """Remove every folder of this process, for a process that ends without unwinding."""
    for path in list(_open):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Folder for temporary files, removed at the end of the block.

    Yields:
        The folder.
    """
    path = create_folder(Path(tempfile.gettempdir()), SCRATCH)
    try:
        yield path
    finally:
        remove_folder(path)


def _escaped(prefix: str) -> str:
    """The prefix as a shell pattern that matches nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in prefix)


def _is_left_behind(path: Path) -> bool:
    """True if the process that created a folder has ended."""
    if locks is None:
        return _age(path) > OLD
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        locks.flock(descriptor, locks.LOCK_EX | locks.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return _age(path) > OLD
    finally:
        os.close(descriptor)
    return True


class Batch:
    """Files that are replaced together: staged one by one, renamed by :meth:`commit` in the order they were added.

    If a rename fails, the earlier ones are undone. Only a process that is killed between two renames leaves some
    targets new and others old.
    """

    def __init__(self) -> None:
        self._folders: dict[Path, Path] = {}
        self._files: list[tuple[Path, Path]] = []

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for folder in self._folders.values():
            remove_folder(folder)

    def folder(self, target: Path) -> Path:
        """Staging folder of a target, on the same file system.

        Args:
            target: File to be replaced.

        Returns:
            The folder, created on the first call.
        """
        if target not in self._folders:
            self._folders[target] = create_folder(target.parent, STAGING)
        return self._folders[target]

    def add(self, target: Path, content: bytes, first: bool = False) -> None:
        """Write and stage a file.

        Args:
            target: File to be replaced.
            content: Its new content.
            first: Rename it before all others; after them by default.

        Raises:
            OutputError: It cannot be written; the target is unchanged.
        """
        with output_errors(target):
            staged = self.folder(target) / target.name
            staged.write_bytes(content)
            self.stage(staged, target)
        if first:
            self._files.insert(0, self._files.pop())

    def stage(self, staged: Path, target: Path) -> None:
        """Flush a file that was written to the staging folder, to replace its target.

        Args:
            staged: The new file.
            target: File to be replaced.

        Raises:
            OSError: It cannot be flushed.
            OutputError: The target is a pipe or a device, which no file may replace.
        """
        refuse_special(target, "the output", OutputError)
        with staged.open("rb+") as stream:
            os.fsync(stream.fileno())
        self._files.append((staged, target))

    def commit(self) -> None:
        """Rename all staged files.

        Raises:
            OutputError: One cannot be renamed; all targets are as they were.
        """
        done: list[tuple[Path, Path | None]] = []
        try:
            for staged, target in self._files:
                with output_errors(target):
                    done.append((target, _backup(staged, target)))
                    os.replace(staged, target)
        except BaseException:
            for target, backup in reversed(done):
                with contextlib.suppress(OSError):
                    _restore(target, backup)
            raise
        for parent in {target.parent for _, target in self._files}:
            _flush_folder(parent)
        self._files.clear()


def _backup(staged: Path, target: Path) -> Path | None:
    """Hard-link the existing target as a backup; None if there is no target."""
    if not os.path.lexists(target):
        return None
    backup = staged.with_name(f"{staged.name}.old")
    with contextlib.suppress(OSError):  # without hard links there is nothing to restore from
        os.link(target, backup, follow_symlinks=False)
    return backup


def _restore(target: Path, backup: Path | None) -> None:
    if backup is None:
        target.unlink(missing_ok=True)
    elif os.path.lexists(backup):
        os.replace(backup, target)


def _flush_folder(folder: Path) -> None:
    """Make renames durable, on systems that can flush a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turn every OSError of the block into an OutputError about a target.

    Args:
        target: File that the block writes.

    Raises:
        OutputError: The system refused an operation.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}.") from error


def write_bytes(content: bytes, path: str | os.PathLike[str]) -> None:
    """Write one file atomically.

    Args:
        content: The new content.
        path: File to be replaced or created.

    Raises:
        OutputError: It cannot be written; an existing file is unchanged.
    """
    with Batch() as batch:
        batch.add(Path(path), content)
        batch.commit()
