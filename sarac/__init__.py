"""sarac: model surgery for PyTorch. Threshold ranks, SARA and Mo-SARA fine-tuning, merged and checked ONNX."""

import sarac.backends.peft  # noqa: F401  sarac.backends.peft.save and .load are part of the face
from sarac.backends.runtime import Runtime
from sarac.diagnosis import diagnose
from sarac.emit import export, verify
from sarac.ir.adapters import MoSara, Sara
from sarac.ir.errors import (
    CheckFailed,
    CheckpointError,
    ExportError,
    InputError,
    NotFoldable,
    PlanError,
    RewriteError,
    SaracError,
    SaracWarning,
    SpectrumError,
    TraceError,
    WeightError,
)
from sarac.ir.graph import ModelGraph, Site
from sarac.ir.materialised import accumulating
from sarac.ir.pipeline import run
from sarac.ir.plan import Plan
from sarac.ir.record import __version__ as __version__
from sarac.monitor import Monitor
from sarac.onnx_fold import fold_onnx
from sarac.planning import plan
from sarac.proof import ExportReport
from sarac.scheduling import schedule
from sarac.shelf import adapters, use
from sarac.storage import load, load_adapter, save, save_adapter
from sarac.surgery import analyze, disabled, fold, recommended_lr, transform
from sarac.swapping import save_onnx_adapter
from sarac.trace import trace
from sarac.tuning import tune

__all__ = [
    "CheckFailed",
    "CheckpointError",
    "ExportError",
    "ExportReport",
    "InputError",
    "MoSara",
    "ModelGraph",
    "Monitor",
    "NotFoldable",
    "Plan",
    "PlanError",
    "RewriteError",
    "Runtime",
    "Sara",
    "SaracError",
    "SaracWarning",
    "Site",
    "SpectrumError",
    "TraceError",
    "WeightError",
    "__version__",
    "accumulating",
    "adapters",
    "analyze",
    "diagnose",
    "disabled",
    "export",
    "fold",
    "fold_onnx",
    "load",
    "load_adapter",
    "plan",
    "recommended_lr",
    "run",
    "save",
    "save_adapter",
    "save_onnx_adapter",
    "schedule",
    "trace",
    "transform",
    "tune",
    "use",
    "verify",
]
