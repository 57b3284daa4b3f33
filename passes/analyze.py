"""Measure the singular values of every linear weight; a fact of the site, mirrored into its nodes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from sarac.ir.cache import store
from sarac.ir.gram import Wanted
from sarac.ir.graph import ModelGraph, Site
from sarac.ir.measure import measure, weights
from sarac.ir.spectrum import require_share


@dataclass(frozen=True)
class Analyze:
    """Compute every site's spectrum and write the rank at `threshold` into `node.meta`.

    `names` limits it to these sites; `progress` is called with a site's name before its turn. `distributed` deals the weights
    out over the initialised process group, all of whose processes call this. `wanted` says what is kept beside a site's values.
    """

    threshold: float = 0.6
    names: frozenset[str] | None = None
    progress: Callable[[str], None] | None = None
    distributed: bool = False
    wanted: Callable[[Site], Wanted | None] | None = None
    exact: ClassVar[bool] = True

    def __call__(self, graph: ModelGraph) -> ModelGraph:
        """The graph with spectra; a weight with NaN or Inf is a SpectrumError that names it."""
        require_share(self.threshold)
        names = [
            name for name, site in graph.sites.items() if site.spectrum is None and (self.names is None or name in self.names)
        ]
        spectra = measure(weights(graph, names, self.wanted), cache=store(), progress=self.progress, distributed=self.distributed)
        return graph.with_spectra(spectra, self.threshold)
