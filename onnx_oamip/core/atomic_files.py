"""Files in the making: written and flushed in a folder aside, then renamed, so that nothing is ever half there.

A folder aside is locked by the process that uses it. One that a killed process left has no lock any more, and whoever
makes the next of that name removes it.
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

locks: ModuleType | None
try:
    import fcntl as locks
except ImportError:  # not on Windows
    locks = None

SCRATCH = "onnx-oamip-"
"""How folders for temporary files begin, in ``TMPDIR``."""
YOUNG = 60
"""Seconds in which a folder may be there before its lock is."""
OLD = 86_400
"""Seconds after which a folder counts as left behind where locks do not work."""
_open: dict[Path, int | None] = {}


def make(parent: Path, prefix: str) -> Path:
    """A new folder, locked by this process; those of the same prefix that nobody holds any more are removed."""
    for path in parent.glob(f"{_literal(prefix)}????????"):
        if path.is_dir() and not path.is_symlink() and path not in _open and _left(path):
            shutil.rmtree(path, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    _open[path] = None
    with contextlib.suppress(OSError):
        if locks is not None:
            held = os.open(path, os.O_RDONLY)
            _open[path] = held
            locks.flock(held, locks.LOCK_EX | locks.LOCK_NB)
    return path


def remove(path: Path) -> None:
    """Remove a folder that ``make`` created."""
    shutil.rmtree(path, ignore_errors=True)
    held = _open.pop(path, None)
    if held is not None:
        os.close(held)


def remove_all() -> None:
    """Remove every folder of this process: it is about to end without unwinding."""
    for path in list(_open):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for temporary files."""
    path = make(Path(tempfile.gettempdir()), SCRATCH)
    try:
        yield path
    finally:
        remove(path)


def _literal(prefix: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in prefix)


def _left(path: Path) -> bool:
    """Whether the process that made a folder is gone."""
    try:
        age = time.time() - path.stat().st_mtime
        if age < YOUNG or locks is None:
            return age > OLD
        held = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        locks.flock(held, locks.LOCK_EX | locks.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return age > OLD
    finally:
        os.close(held)
    return True


class Batch:
    """Files that belong together: written aside one by one, renamed by :meth:`commit` in the order they were added.

    Where that fails, those already renamed become what they were. Only a process that is killed between two renames
    leaves the first new and the rest old.
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
            remove(folder)

    def folder(self, target: Path) -> Path:
        """The folder aside for a target, on the same file system."""
        if target not in self._folders:
            self._folders[target] = make(target.parent, f".{target.name}.")
        return self._folders[target]

    def add(self, target: Path, content: bytes, first: bool = False) -> None:
        """Write a file aside, to be renamed last, or ``first``. Raises OutputError, and the target is as it was."""
        with telling(target):
            made = self.folder(target) / target.name
            made.write_bytes(content)
            self.take(made, target)
        if first:
            self._files.insert(0, self._files.pop())

    def take(self, made: Path, target: Path) -> None:
        """Flush a file that was written aside; it is to become ``target``. Raises OSError."""
        with made.open("rb+") as stream:
            os.fsync(stream.fileno())
        self._files.append((made, target))

    def commit(self) -> None:
        """Rename all. Raises OutputError, and all targets are as they were."""
        done: list[tuple[Path, Path | None]] = []
        try:
            for made, target in self._files:
                with telling(target):
                    done.append((target, _kept(made, target)))
                    os.replace(made, target)
        except BaseException:
            for target, old in reversed(done):
                with contextlib.suppress(OSError):
                    _restore(target, old)
            raise
        for parent in {target.parent for _, target in self._files}:
            _flush(parent)
        self._files.clear()


def _kept(made: Path, target: Path) -> Path | None:
    """A second name for what is at ``target``; None where nothing is."""
    if not os.path.lexists(target):
        return None
    old = made.with_name(f"{made.name}.old")
    with contextlib.suppress(OSError):  # a file system without links: nothing to restore from
        os.link(target, old, follow_symlinks=False)
    return old


def _restore(target: Path, old: Path | None) -> None:
    if old is None:
        target.unlink(missing_ok=True)
    elif os.path.lexists(old):
        os.replace(old, target)


def _flush(folder: Path) -> None:
    """Make renames last, where a folder can be flushed."""
    with contextlib.suppress(OSError):
        held = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(held)
        finally:
            os.close(held)


@contextlib.contextmanager
def telling(target: Path) -> Iterator[None]:
    """What the system refuses about a target, as an OutputError."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}.") from error


def write_bytes(content: bytes, path: str | os.PathLike[str]) -> None:
    """Write one file: it is either complete or as it was. Raises OutputError."""
    with Batch() as batch:
        batch.add(Path(path), content)
        batch.commit()
