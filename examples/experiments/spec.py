"""One run as a value: what is trained, how, on what. Its identity names it in the file of results."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

BEST = 0.0  # a rate that stands for the best one of the search
SEARCH_SEED = 100  # of no run that is compared


@dataclass(frozen=True)
class Spec:
    """One run.

    `method` is a name of methods.py, `plan` what it takes: a rule of sarac's, behind which `|shuffled` deals its ranks to the
    wrong layers, or `r=8` of PEFT's. `task`: one of data.py, or several joined by +. `extras`: what is measured beside the
    nll: accuracy, routing, orthogonality. `kind`: run, or timing (some steps alone on the machine).
    """

    method: str
    plan: str = ""
    task: str = "gsm8k"
    seed: int = 0
    lr: float = BEST
    steps: int = 120
    batch: int = 16
    model: str = "smollm2"
    kind: str = "run"
    extras: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """A short hash of all that decides the outcome; the extras only add to it."""
        plain = {key: value for key, value in asdict(self).items() if key != "extras"}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def cell(self) -> tuple[Any, ...]:
        """What seeds and rates of one entry of a table have in common."""
        return self.method, self.plan, self.task, self.steps, self.batch, self.model, self.kind

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "Spec":
        """The spec that a line of results was made by."""
        given = dict(line["spec"])
        return cls(**{**given, "extras": tuple(given.get("extras", ()))})


def seeds(specs: Iterable[Spec], count: int = 3) -> list[Spec]:
    """Every spec with the seeds from 0 on."""
    return [replace(spec, seed=seed) for spec in specs for seed in range(count)]


def merged(specs: Iterable[Spec]) -> list[Spec]:
    """Each run once, with the extras of all that ask for it, in the order of the first."""
    found: dict[str, Spec] = {}
    for spec in specs:
        known = found.get(spec.identity, spec)
        found[spec.identity] = replace(spec, extras=tuple(sorted({*known.extras, *spec.extras})))
    return list(found.values())


def missing(specs: Iterable[Spec], lines: Iterable[Mapping[str, Any]]) -> list[Spec]:
    """The runs that no line without an error has, or has without an extra that is asked for."""
    done: dict[str, set[str]] = {}
    for line in lines:
        if "error" not in line:
            done.setdefault(line["id"], set()).update(line["spec"].get("extras", ()))
    return [spec for spec in specs if spec.identity not in done or not done[spec.identity].issuperset(spec.extras)]
