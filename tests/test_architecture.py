"""The tree keeps the shape of its design: who imports whom, who owns what, how big things are, what is shipped.

Every check is a function of a root folder that returns its faults as sentences, so that each can be shown a tree with a
planted fault beside one that is just within the rule.
"""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What of sarac each module may import: names of rows above its own, or `.*` for all rows above that lie there. Since no
# row looks down, there is no cycle. A new module gets a row of its own, on purpose.
MAY_IMPORT = {
    "ir.errors": "",
    "ir.sharded": "",
    "ir.inputs": "ir.errors",
    "ir.layout": "ir.sharded",
    "ir.check": "ir.errors",
    "ir.spectrum": "ir.errors",
    "ir.terms": "",
    "ir.gram": "ir.errors ir.sharded ir.spectrum",
    "ir.certify": "ir.gram ir.spectrum",
    "ir.standing": "",
    "ir.cache": "ir.errors ir.gram ir.spectrum",
    "ir.kernels": "",
    "ir.launch": "ir.kernels",
    "ir.fused": "ir.launch",
    "ir.siblings": "",
    "ir.byhand": "ir.fused ir.siblings",
    "ir.materialised": "ir.byhand ir.fused ir.sharded ir.terms",
    "ir.schedules": "ir.byhand ir.materialised ir.siblings ir.terms",
    "ir.cost": "ir.errors ir.cache",
    "ir.routes": "ir.byhand ir.fused ir.siblings ir.terms",
    "ir.ready": "ir.cost",
    "ir.calls": "ir.byhand ir.cost ir.ready ir.routes ir.schedules ir.siblings ir.terms",
    "ir.start": "ir.errors",
    "ir.adapters": "ir.errors ir.calls ir.gram ir.terms ir.start",
    "ir.methods": "ir.errors ir.start ir.adapters",
    "ir.rule": "ir.errors ir.spectrum ir.methods",
    "ir.plan": "ir.errors ir.adapters ir.methods",
    "ir.weight": "ir.errors ir.sharded ir.layout ir.calls ir.adapters",
    "ir.guarded": "ir.calls ir.errors ir.sharded ir.weight",
    "ir.layers": "ir.guarded ir.errors ir.sharded ir.spectrum ir.terms ir.calls ir.adapters ir.weight",
    "ir.record": "ir.errors ir.adapters ir.plan ir.layers",
    "ir.match": "ir.layout ir.terms",
    "ir.graph": "ir.errors ir.inputs ir.layout ir.spectrum ir.adapters ir.plan ir.weight ir.layers ir.match",
    "ir.gates": "ir.terms ir.weight ir.layers",
    "ir.health": "ir.adapters ir.gates ir.gram ir.graph ir.layout ir.sharded ir.start ir.weight",
    "ir.clone": "ir.errors ir.sharded ir.weight ir.layers",
    "ir.processes": "ir.errors",
    "ir.measure": "ir.cache ir.certify ir.gram ir.graph ir.processes ir.spectrum",
    "ir.pipeline": "ir.*",
    "passes.analyze": "ir.*",
    "passes.choose": "ir.*",
    "passes.rewrite": "ir.*",
    "passes.fold": "ir.*",
    "backends.onnx_file": "ir.*",
    "backends.providers": "ir.*",
    "backends.placement": "backends.onnx_file backends.providers",
    "backends.binding": "ir.*",
    "backends.swap": "ir.*",
    "backends.adapter_file": "ir.*",
    "backends.tenants": "ir.* backends.adapter_file backends.binding backends.swap",
    "backends.decoding": "ir.*",
    "backends.pairing": "ir.*",
    "backends.graphs": "backends.binding backends.tenants",
    "backends.generation": "ir.* backends.binding backends.decoding backends.graphs backends.tenants",
    "backends.runtime": "ir.* backends.binding backends.decoding backends.generation backends.graphs backends.onnx_file "
    "backends.pairing backends.placement backends.providers backends.tenants",
    "backends.unseen": "ir.* backends.runtime",
    "backends.mixed": "ir.*",
    "backends.exporting": "ir.* backends.pairing",
    "backends.lift": "ir.*",
    "backends.attention": "",
    "backends.reshapes": "",
    "backends.formula": "backends.lift",
    "backends.refold": "ir.* backends.formula backends.lift backends.onnx_file",
    "backends.tidy": "ir.* backends.attention backends.lift backends.reshapes",
    "backends.stack": "",
    "backends.stamp": "backends.lift backends.stack",
    "backends.onnx": "ir.* backends.decoding backends.exporting backends.formula backends.lift backends.mixed backends.stack "
    "backends.stamp backends.swap backends.tidy",
    "backends.genai": "ir.* backends.onnx_file backends.providers",
    "backends.lora": "ir.*",
    "backends.peft": "ir.* backends.lora",
    "capture": "ir.*",
    "source": "",
    "known": "ir.* source",
    "watch": "",
    "regions": "ir.* watch",
    "trace": "ir.* capture known regions",
    "recipe": "ir.*",
    "checkpoint": "ir.*",
    "figures": "ir.*",
    "tables": "ir.* figures",
    "plots": "ir.* figures",
    "charts": "plots",
    "page": "ir.* figures",
    "tuning": "ir.* tables",
    "scheduling": "ir.* tables",
    "faults": "ir.*",
    "findings": "ir.* faults",
    "survey": "ir.* passes.* scheduling",
    "diagnosis": "ir.* charts findings survey tables",
    "unclipped": "ir.*",
    "monitor": "ir.* charts diagnosis findings survey unclipped",
    "report": "ir.* figures tables plots page scheduling",
    "text": "ir.*",
    "planning": "ir.* passes.* trace checkpoint text",
    "shelf": "ir.* checkpoint",
    "storage": "ir.* passes.* trace recipe checkpoint shelf",
    "shards": "ir.*",
    "folders": "ir.* passes.* trace recipe report shards",
    "surgery": "ir.* passes.* trace recipe report planning storage folders",
    "proof": "ir.* backends.* surgery",
    "generating": "ir.* backends.*",
    "placing": "ir.*",
    "precision": "ir.* backends.*",
    "onnx_fold": "ir.* backends.* checkpoint placing",
    "swapping": "ir.* backends.* checkpoint proof surgery",
    "serving": "ir.* backends.* proof text",
    "emit": "ir.* passes.* backends.* trace checkpoint generating onnx_fold placing precision proof serving surgery "
    "swapping text",
    "finetune": "ir.* surgery text",
    "doctor": "ir.* backends.*",
    "terminal": "ir.*",
    "arguments": "ir.* planning recipe storage",
    "plans": "ir.* passes.* trace checkpoint planning terminal arguments",
    "convert": "ir.* backends.* checkpoint shelf storage swapping",
    "commands": "ir.* backends.* diagnosis finetune onnx_fold proof surgery shelf storage emit text terminal arguments convert "
    "tuning",
    "cli": "ir.* passes.* folders trace checkpoint report scheduling surgery storage text finetune doctor terminal arguments "
    "commands plans",
}
THE_FACE = "sarac"  # its __init__ may import every row, and no row may import it
PACKAGES = {"sarac": "sarac", "sarac.passes": "passes", "sarac.backends": "backends"}
EMPTY = ("sarac.ir", "sarac.passes", "sarac.backends")  # packages whose __init__ holds nothing to import

# Words that only one room may say, as patterns over dotted names; a name that was not imported begins with a dot.
OWNED = {
    "node.meta": (r"\.meta$", "ir.graph"),
    "SVD": (r"\.(svd|svdvals|svd_lowrank|pca_lowrank|eigh|eigvalsh)$", "ir.gram ir.certify"),
    "tracing": (r"\.(symbolic_trace|Tracer)$|^torch\.export\b", "regions capture backends.exporting"),
    "onnxruntime-genai": (r"^onnxruntime_genai\b", "backends.genai"),
    "exporting to ONNX": (r"^torch\.onnx\b|^transformers\.exporters\b", "backends.exporting backends.tidy"),
    "ONNX": (
        r"^(onnx|onnxruntime|onnx_ir|onnxscript)\b",
        "backends.onnx backends.onnx_file backends.exporting backends.lift backends.stamp backends.tidy backends.providers "
        "backends.placement backends.binding backends.runtime backends.swap backends.tenants "
        "backends.graphs backends.adapter_file backends.attention backends.reshapes backends.formula backends.refold",
    ),
}

TOP = "pyproject.toml sarac passes backends tests examples README.md Makefile LICENSE constraints.txt".split()
MADE = "build dist demo-out __pycache__ *.egg-info .*".split()
NO_ROOMS = {"utils", "util", "helpers", "helper", "common", "base", "misc"}
FILE_LINES, FUNCTION_LINES = 300, 40

PUBLIC = set(
    "analyze transform fold fold_onnx export save load save_adapter save_onnx_adapter load_adapter use "
    "accumulating adapters diagnose disabled recommended_lr schedule tune trace run plan Plan Sara MoSara SaracError TraceError "
    "SpectrumError PlanError RewriteError WeightError NotFoldable "
    "Monitor CheckFailed InputError CheckpointError ExportError SaracWarning ExportReport ModelGraph "
    "Runtime Site verify __version__".split()
)


def modules(root: Path) -> dict[str, Path]:
    """The product's import names and files; a package goes by its own name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(tree: ast.Module) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Line and dotted name of every import, in functions and by `import_module` too, with the name that it binds."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    first = alias.name.partition(".")[0]
                    yield node.lineno, alias.name, {alias.asname: alias.name} if alias.asname else {first: first}
            case ast.ImportFrom(module=parent, names=names, level=level):
                for alias in names:
                    full = f"{'.' * level}{parent or ''}.{alias.name}"
                    yield node.lineno, full, {alias.asname or alias.name: full}
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(func).endswith(("import_module", "__import__")):
                    yield node.lineno, name, {}


def said(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import and attribute, in full where its root was imported, else from the dot on."""
    roots: dict[str, str] = {}
    for line, full, bound in imported(tree):
        roots |= bound
        yield line, full
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, dotted(node, roots)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            yield from ((node.lineno, f".{arg.value}") for arg in node.args if isinstance(arg, ast.Constant))


def dotted(node: ast.expr, roots: Mapping[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, roots)}.{node.attr}"
    return roots.get(node.id, "") if isinstance(node, ast.Name) else ""


def allowed(table: Mapping[str, str]) -> dict[str, set[str]]:
    """Every row's imports with `.*` written out; names that are no row above stay as they are."""
    above: list[str] = []
    rows = {}
    for row, names in table.items():
        rows[row] = {name for want in names.split() for name in ([n for n in above if fnmatch(n, want)] or [want])}
        above.append(row)
    return rows


def table_faults(table: Mapping[str, str]) -> list[str]:
    """The walls that no row may open: nothing looks down, ir knows ir alone, passes know no pass and no backend."""
    faults, above = [], set()
    for row, names in allowed(table).items():
        layer = row.partition(".")[0]
        walls = {
            "ir": ("ir.",),
            "passes": ("ir.",),
            "backends": ("ir.", "backends."),
            "trace": ("ir.", "capture", "known", "regions"),
            "known": ("ir.", "source"),
            "regions": ("ir.", "watch"),
            **dict.fromkeys(("capture", "source", "watch"), ("ir.",)),
        }.get(layer, ("",))
        faults += [f"{row} may not be given {name}" for name in names if name not in above or not name.startswith(walls)]
        above.add(row)
    return faults


def row_faults(root: Path) -> list[str]:
    """Modules without a row in the table, and rows without a module."""
    rows = {f"sarac.{row}" for row in MAY_IMPORT} | {THE_FACE, *EMPTY}
    there = set(modules(root))
    return [f"{name} has no row" for name in there - rows] + [f"the row of {name} has no file" for name in rows - there]


def import_faults(root: Path) -> list[str]:
    """Imports that the table does not allow, relative ones, and passes or backends under a bare name."""
    known, rows = modules(root), allowed(MAY_IMPORT)
    faults = []
    for module, path in known.items():
        may = {f"sarac.{name}" for name in (rows if module == THE_FACE else rows.get(module.removeprefix("sarac."), ()))}
        for line, full in dict.fromkeys((line, full) for line, full, _ in imported(parse(path))):
            if full.partition(".")[0] not in ("sarac", "passes", "backends", ""):
                continue
            parts = full.split(".")
            target = next((n for n in (".".join(parts[:i]) for i in range(len(parts), 0, -1)) if n in known), full)
            if target not in may:
                faults.append(f"{module}:{line} imports {target}")
    return faults


def word_faults(root: Path) -> list[str]:
    """Words that belong to another room."""
    faults = []
    for module, path in modules(root).items():
        names = set(said(parse(path)))
        for word, (pattern, owners) in OWNED.items():
            if module.removeprefix("sarac.") not in owners.split():
                faults += [f"{module}:{line} says {name} ({word})" for line, name in names if re.search(pattern, name)]
    return faults


def size_faults(root: Path) -> list[str]:
    """Product files and functions that are too long."""
    faults = []
    for module, path in modules(root).items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        faults += [f"{module} has {lines} lines"] if lines > FILE_LINES else []
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                faults += [f"{module}.{node.name} has {length} lines"] if length > FUNCTION_LINES else []
    return faults


def place_faults(root: Path) -> list[str]:
    """Things at the top that the design does not know, and files whose name says nothing of what is in them."""
    strangers = [p.name for p in root.iterdir() if p.name not in TOP and not any(fnmatch(p.name, m) for m in MADE)]
    folders = [root / name for name in (*PACKAGES.values(), "tests", "examples")]
    vague = [path for folder in folders for path in folder.rglob("*") if path.stem in NO_ROOMS]
    return [f"{name} lies at the top" for name in strangers] + [f"{path.relative_to(root)} is no name" for path in vague]


def face_faults(root: Path) -> list[str]:
    """A face that does more than re-export, or that shows other names than the public ones."""
    faults, names, bound = [], set(), set()
    path = root / "sarac" / "__init__.py"
    for node in parse(path).body if path.exists() else ():
        match node:
            case ast.ImportFrom() | ast.Import():
                bound |= {alias.asname or alias.name for alias in node.names}
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                names = set(ast.literal_eval(value))
            case ast.Assign(targets=[ast.Name(id="__version__")]) | ast.Expr(value=ast.Constant()):
                pass
            case _:
                faults.append(f"the face does something of its own in line {node.lineno}")
    faults += [f"{name} is shown and not public" for name in names - PUBLIC]
    faults += [f"{name} is public and not shown" for name in PUBLIC - names]
    return faults + [f"{name} is shown and not imported" for name in names - bound - {"__version__"}]


def wheel_faults(root: Path, work: Path) -> list[str]:
    """What a wheel built from `root` has too much or too little."""
    source = work / "source"
    shutil.copytree(root, source, ignore=shutil.ignore_patterns(*MADE, "tests", "examples"))
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(work),
    ]
    subprocess.run([*build, str(source)], check=True, stdin=subprocess.DEVNULL)
    (wheel,) = work.glob("*.whl")
    there = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    folders = {package: package.replace(".", "/") for package in PACKAGES}
    wanted = {
        f"{folders[package]}/{path.relative_to(root / folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in (root / folder).rglob("*.py")
    } | {"sarac/py.typed", "sarac/plan.schema.json", "sarac/page.html"}
    return [f"{name} should not be in it" for name in there - wanted] + [f"{name} is missing" for name in wanted - there]


CHECKS = [row_faults, import_faults, word_faults, size_faults, place_faults, face_faults]


@pytest.mark.parametrize("check", CHECKS)
def test_tree_keeps_the_design(check: Callable[[Path], list[str]]) -> None:
    assert check(ROOT) == []


def test_table_opens_no_wall() -> None:
    assert table_faults(MAY_IMPORT) == []


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ("ir.errors", "ir.inputs"),
        ("ir.graph", "ir.pipeline"),
        ("ir.pipeline", "trace"),
        ("passes.fold", "ir.* passes.analyze"),
        ("passes.fold", "backends.onnx"),
        ("backends.peft", "passes.fold"),
        ("trace", "ir.* passes.fold"),
        ("surgery", "cli"),
        ("cli", "sarac"),
    ],
)
def test_table_that_opens_a_wall_is_seen(row: str, names: str) -> None:
    assert [fault for fault in table_faults({**MAY_IMPORT, row: names}) if fault.startswith(row)]


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A small tree without a fault: every module of the table, empty, and a face that shows what is public."""
    for name in (THE_FACE, *EMPTY, *(f"sarac.{row}" for row in MAY_IMPORT)):
        package = max((p for p in PACKAGES if name == p or name.startswith(f"{p}.")), key=len)
        parts = name.removeprefix(package).strip(".").split(".")
        folder = tmp_path / PACKAGES[package]
        path = folder / "__init__.py" if name == package else folder.joinpath(*parts).with_suffix(".py")
        path = folder / "ir" / "__init__.py" if name == "sarac.ir" else path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    shown = sorted(PUBLIC)
    (tmp_path / "sarac/__init__.py").write_text(f"from sarac.surgery import {', '.join(shown)}\n__all__ = {shown}\n")
    return tmp_path


@pytest.mark.parametrize("check", CHECKS)
def test_sound_tree_has_no_fault(check: Callable[[Path], list[str]], sound: Path) -> None:
    assert check(sound) == []


def function(lines: int) -> str:
    return "def f():\n" + "    pass\n" * (lines - 1)


FOLD, TORCH, FX = "passes/fold.py", "import torch\n", "from torch import fx\n"
PLANTED = [
    # check, file, a text that breaks the rule, what is said of it, a text that only just keeps the rule
    (row_faults, "passes/prune.py", "", "sarac.passes.prune has no row", None),
    (import_faults, "sarac/ir/errors.py", "import sarac.ir.graph", "sarac.ir.graph", "import sarac_friend"),
    (
        import_faults,
        "sarac/ir/plan.py",
        "from sarac.ir import layers",
        "sarac.ir.layers",
        "from sarac.ir import adapters",
    ),
    (
        import_faults,
        "sarac/ir/graph.py",
        "def f():\n    from sarac.trace import g",
        "sarac.trace",
        "import sarac.ir.plan",
    ),
    (import_faults, FOLD, "from sarac.passes.analyze import A", "passes.analyze", "from sarac.ir.graph import Site"),
    (import_faults, FOLD, "from sarac.passes import analyze", "passes.analyze", "from sarac.ir import graph"),
    (import_faults, FOLD, "from passes import analyze", "passes.analyze", "from bypasses import analyze"),
    (import_faults, FOLD, "from . import analyze", "analyze", "import analyze"),
    (import_faults, FOLD, "from sarac.backends import onnx", "sarac.backends.onnx", "import onnx"),
    (
        import_faults,
        "backends/onnx.py",
        "from sarac.passes import fold",
        "passes.fold",
        "import sarac.backends.lift",
    ),
    (import_faults, "backends/peft.py", "import_module('sarac.surgery')", "surgery", "import_module('sarac.ir.plan')"),
    (
        import_faults,
        "sarac/trace.py",
        "from sarac.passes.fold import Fold",
        "passes.fold",
        "import sarac.ir.graph as g",
    ),
    (import_faults, "sarac/surgery.py", "import sarac", "sarac", "import sarac.passes.fold"),
    (import_faults, "sarac/surgery.py", "from sarac import transform", "sarac", "from sarac import report"),
    (word_faults, "passes/choose.py", "node.meta['rank'] = 3", "node.meta", "node.metadata['rank'] = 3"),
    (word_faults, "passes/choose.py", "getattr(node, 'meta')", "node.meta", "torch.device('meta')"),
    (word_faults, "passes/choose.py", "node.meta.get('rank')", "node.meta", "meta = {}\nmeta.get('rank')"),
    (word_faults, "sarac/ir/plan.py", TORCH + "torch.linalg.svd(w)", "SVD", TORCH + "torch.linalg.qr(w)"),
    (
        word_faults,
        "sarac/ir/plan.py",
        "from torch.linalg import eigh as e",
        "SVD",
        "from torch.linalg import qr as eigh",
    ),
    (word_faults, "passes/analyze.py", "w.svd()", "SVD", "svd = spectrum(w)"),
    (word_faults, "passes/rewrite.py", FX + "fx.symbolic_trace(m)", "tracing", FX + "fx.Node"),
    (word_faults, "passes/rewrite.py", "from torch.fx import Tracer", "tracing", "node.graph.tracer"),
    (
        word_faults,
        "sarac/surgery.py",
        "from torch.export import export",
        "tracing",
        "from sarac.backends import export",
    ),
    (word_faults, "sarac/surgery.py", "import torch as t\nt.export.export(m)", "tracing", "backends.export(m)"),
    (word_faults, "sarac/capture.py", TORCH + "torch.onnx.export(m)", "to ONNX", TORCH + "torch.export.export(m)"),
    (word_faults, "backends/runtime.py", TORCH + "torch.onnx.export(m)", "to ONNX", "import onnxruntime"),
    (word_faults, "sarac/cli.py", "import onnxruntime as ort", "(ONNX)", "from importlib import metadata\nmetadata"),
    (
        word_faults,
        "sarac/report.py",
        "def f():\n    from onnx import g",
        "(ONNX)",
        "from sarac.backends import onnx\nonnx.g",
    ),
    (size_faults, "sarac/report.py", "\n" * 301, "301 lines", "\n" * 300),
    (size_faults, "sarac/report.py", function(41), "f has 41 lines", function(40)),
    (place_faults, "sarac/ir/utils.py", "", "sarac/ir/utils.py is no name", None),
    (place_faults, "tests/helpers/shapes.py", "", "tests/helpers is no name", None),
    (place_faults, "scripts/run.py", "", "scripts lies at the top", None),
    (face_faults, "sarac/__init__.py", "__all__ = ['fold']", "transform is public and not shown", None),
    (face_faults, "sarac/__init__.py", "__all__ = ['fold']", "fold is shown and not imported", None),
    (face_faults, "sarac/__init__.py", "__all__ = ['extra']", "extra is shown and not public", None),
    (face_faults, "sarac/__init__.py", "SOUND\ndef extra(): ...", "something of its own", "SOUND\n__version__ = '1'"),
]


@pytest.mark.parametrize(("check", "file", "bad", "fault", "good"), PLANTED)
def test_planted_fault_is_seen_and_its_neighbour_is_not(
    check: Callable[[Path], list[str]], file: str, bad: str, fault: str, good: str | None, sound: Path
) -> None:
    path = sound / file
    before = path.read_text() if path.exists() else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    if good is not None:
        path.write_text(good.replace("SOUND", before))
        assert check(sound) == []
    path.write_text(bad.replace("SOUND", before))
    assert [line for line in check(sound) if fault in line]


def test_missing_module_is_seen(sound: Path) -> None:
    (sound / "passes/fold.py").unlink()
    assert row_faults(sound) == ["the row of sarac.passes.fold has no file"]


def test_wheel_holds_the_product_alone(tmp_path: Path) -> None:
    assert wheel_faults(ROOT, tmp_path) == []


def test_wheel_with_a_stranger_and_a_gap_is_seen(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("LICENSE", "README.md"):
        (sound / name).touch()
    config = (ROOT / "pyproject.toml").read_text()
    listed = ", ".join(f'"{name}"' for name in tomllib.loads(config)["tool"]["setuptools"]["packages"])
    (sound / "pyproject.toml").write_text(config.replace(listed, '"sarac", "sarac.ir", "sarac.passes", "passes"'))
    faults = wheel_faults(sound, tmp_path_factory.mktemp("wheel"))
    assert "passes/fold.py should not be in it" in faults
    assert "sarac/backends/onnx.py is missing" in faults
