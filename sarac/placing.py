"""Files put in place: made aside, and swapped in as one unit, so that a reader finds the old export or the new one."""

import glob
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sarac.ir.errors import ExportError

_ASIDE = ".aside"  # what marks a folder that is being written
_FORGOTTEN = 24 * 3600.0  # seconds after which it has lost its writer


def _data_of(target: Path) -> list[Path]:
    """The files of weights beside exports of this name."""
    name = re.compile(rf"{re.escape(target.name)}(\.\d+)?\.data")
    return sorted(path for path in target.parent.iterdir() if name.fullmatch(path.name))


def free_data(target: Path) -> str:
    """A name for the weights that no export has: the one that stands here is whole until the new one names its own."""
    taken = {path.name for path in _data_of(target)}
    names = (f"{target.name}{f'.{number}' if number else ''}.data" for number in range(len(taken) + 1))
    return next(name for name in names if name not in taken)


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A folder beside the target, gone afterwards."""
    if target.is_dir():
        raise ExportError(f"{target} is a folder: name a file in it, for example {target / 'model.onnx'}.")
    try:
        for left in target.parent.glob(f".{glob.escape(target.name)}.*{_ASIDE}"):
            if time.time() - left.stat().st_mtime > _FORGOTTEN:  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=_ASIDE))
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror}. Choose a folder that exists and is yours.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def placed(files: tuple[Path, ...], target: Path) -> tuple[Path, ...]:
    """Put the files in place, the one that names the others last; then what the export that stood here had beside it goes."""
    places = tuple(target.parent / file.name for file in files)
    try:
        for file, place in reversed(list(zip(files, places, strict=True))):
            file.replace(place)
        for old in set(_data_of(target)) - set(places):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {error.strerror}.") from error
    return places
