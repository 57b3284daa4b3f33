"""The terminal: results go to stdout, all that is said on the way to stderr; an error becomes a sentence, and a bar is
drawn only where somebody can see it move.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text
from transformers.utils import logging as transformers_logging
from typer.core import TyperCommand, TyperGroup

from sarac.ir.errors import PlanError, SaracError, SaracWarning
from sarac.ir.processes import first

_ERR = Console(stderr=True)
_UNSEEN_WIDTH = 130  # of what goes into a pipe or a file, where cutting a name off would lose it


class Commands(TyperGroup):
    """A group of commands in which every error that sarac raises on purpose is a sentence and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a plan that does not fit is wrong use (2), any other SaracError a failure (1)."""
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():
            warnings.showwarning = _shown(warnings.showwarning)
            try:
                return super().invoke(ctx)
            except SaracError as error:
                _say("Error: ", "bold red", str(error))
                raise typer.Exit(2 if isinstance(error, PlanError) else 1) from error


class Swapping(TyperCommand):
    """A command with an option --swappable that may stand without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give the option its value where it has none."""
        valued = [f"{word}=whole" if word == "--swappable" and after not in ("whole", "rowwise") else word
                  for word, after in zip(args, [*args[1:], ""], strict=True)]  # fmt: skip
        return super().parse_args(ctx, valued)


def show(as_json: bool, document: str, *parts: RenderableType) -> None:
    """Print the result on stdout: the JSON document, or the parts."""
    if as_json:
        typer.echo(document)
        return
    console = Console(width=width())
    for part in parts:
        if isinstance(part, Table):
            _fit(part, console)
        console.print(part, soft_wrap=isinstance(part, str), highlight=False, markup=False)


def width() -> int:
    """How wide what goes to stdout may be."""
    console = Console()
    return console.width if console.is_terminal or "COLUMNS" in os.environ else _UNSEEN_WIDTH


@contextmanager
def meter(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A function to call at every step with a word on it: a bar on a terminal, else a line at every tenth of the way."""
    if _ERR.is_terminal and first():
        words = TextColumn("{task.fields[note]}", markup=False, table_column=Column(ratio=1, no_wrap=True))
        columns = ("{task.description}", BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), words)
        with Progress(*columns, console=_ERR, transient=True, expand=True) as progress:
            task = progress.add_task(title, total=total, note="")
            yield lambda note: progress.update(task, advance=1, note=note)
        return
    done = 0

    def step(note: str) -> None:
        nonlocal done
        done += 1
        if done * 10 // total > (done - 1) * 10 // total:
            _say(f"{title}: ", "", f"{done}/{total} {note}")

    yield step


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Say what takes its time and cannot say how much of it is done."""
    if _ERR.is_terminal and first():
        with _ERR.status(f"{what} …"):
            yield
    else:
        _say(f"{what} …", "", "")
        yield


def _fit(table: Table, console: Console) -> None:
    """Give a table that is too wide for the terminal no frame, whole numbers, and names that go on in the next line."""
    if Measurement.get(console, console.options.update(width=10**4), table).maximum <= console.width:
        return
    table.box, table.padding, table.header_style = None, (0, 1, 0, 0), "bold underline"
    for column in table.columns:
        column.no_wrap, column.overflow = column.justify == "right", "fold"


def _say(head: str, style: str, sentence: str) -> None:
    if first():
        _ERR.print(Text.assemble((head, style), sentence), soft_wrap=True)


def _shown(otherwise: Callable[..., None]) -> Callable[..., None]:
    """How a warning is shown: one of sarac's as its sentence alone."""

    def show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, SaracWarning):
            _say("Warning: ", "yellow", str(message))
        else:
            otherwise(message, category, *place)

    return show_warning
