"""Every deliberate error of sarac: a sentence that says what, with the value; where; and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class SaracError(Exception):
    """The parent of every error that sarac raises on purpose."""


class SaracWarning(UserWarning):
    """What sarac found odd and went on with."""


class TraceError(SaracError):
    """A model, or a part of one that was named, cannot be traced."""


class SpectrumError(SaracError):
    """A weight has no usable singular values (NaN, Inf, no data)."""


class PlanError(SaracError):
    """A rule, a plan or a `where` does not fit the model or itself."""


class RewriteError(SaracError):
    """A model cannot be rewritten, or not a second time."""


class WeightError(SaracError):
    """An adapted layer's effective weight was asked for something that only a stored weight can do."""


class NotFoldable(SaracError):
    """A routed adapter has no single weight that it could be folded into."""


class CheckFailed(SaracError):
    """A verification found a difference where there must be none, or none where there must be one."""


class InputError(SaracError):
    """Example inputs, or the description of some, do not fit the model."""


class CheckpointError(SaracError):
    """A file cannot be read or written as what it should be."""


class ExportError(SaracError):
    """A model cannot be exported, or an exported file cannot be run."""


def near(name: str, known: Iterable[str], limit: int = 3) -> str:
    """A half-sentence that lists the names most like `name`, or the first few there are."""
    names = list(known)
    close = get_close_matches(name, names, n=limit, cutoff=0.4)
    if close:
        return f"Near names: {', '.join(close)}."
    return f"There are: {', '.join(names[:limit])}{', …' if len(names) > limit else ''}." if names else "There are none."
