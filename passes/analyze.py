"""Measure the singular values of every linear weight; a fact of the site, mirrored into its nodes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from sarac.ir.gram import spectrum
from sarac.ir.graph import ModelGraph
from sarac.ir.spectrum import Spectrum, require_share


@dataclass(frozen=True)
class Analyze:
    """Compute every site's spectrum and write the rank at `threshold` into `node.meta`.

    `names` limits it to these sites; `progress` is called with a site's name before its turn.
    """

    threshold: float = 0.6
    names: frozenset[str] | None = None
    progress: Callable[[str], None] | None = None
    exact: ClassVar[bool] = True

    def __call__(self, graph: ModelGraph) -> ModelGraph:
        """The graph with spectra; a weight with NaN or Inf is a SpectrumError that names it."""
        require_share(self.threshold)
        spectra: dict[str, Spectrum] = {}
        for name, site in graph.sites.items():
            if site.spectrum is None and (self.names is None or name in self.names):
                if self.progress is not None:
                    self.progress(name)
                spectra[name] = spectrum(graph.weight(site), name)
        return graph.with_spectra(spectra, self.threshold)
