"""The doctor: every fault by name, each with one command, and none where there is none."""

import json
import shutil
from importlib import metadata

import onnxruntime
import pytest
import torch

from sarac import doctor

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
BOTH = {CPU: "ok", CUDA: "ok"}
TOOLKITS = {"onnxruntime": "13.0", "torch": "13.0", "driver": "13.1"}


@pytest.fixture(autouse=True)
def _no_gpu_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.mark.parametrize(
    ("running", "cuda", "toolkits", "fault", "remedy"),
    [
        (BOTH, ["H100"], {}, None, ""),
        (BOTH, ["H100"], {"driver": "13.0"}, None, ""),
        (BOTH, ["H100"], {"onnxruntime": "13.2"}, None, ""),
        ({CPU: "ok", CUDA: "no libcublas"}, [], {"torch": "12.8", "driver": "12.4"}, None, ""),
        ({CPU: "ok", CUDA: "no libcublas"}, ["H100"], {}, "libcublas", "pip install 'onnxruntime-gpu[cuda,cudnn]'"),
        ({CPU: "ok"}, ["H100"], {"onnxruntime": None}, "without CUDA", "--force-reinstall 'onnxruntime-gpu[cuda,cudnn]'"),
        ({CPU: "broken"}, [], {}, "CPU", "pip install --force-reinstall onnxruntime"),
        (BOTH, ["H100"], {"torch": "12.8"}, "and torch for CUDA 12.8", "pip install --upgrade --force-reinstall torch"),
        (BOTH, ["H100"], {"onnxruntime": "12.6"}, "for CUDA 12.6 and torch", "--force-reinstall onnxruntime-gpu"),
        ({CPU: "ok", CUDA: "no driver"}, ["H100"], {"driver": "12.9"}, "runs CUDA 12.9 at most", "install nvidia-driver-580"),
    ],
)  # fmt: skip
def test_a_fault_has_one_name_and_one_remedy(running, cuda, toolkits, fault, remedy) -> None:
    found = list(doctor._faults(running, cuda, {**TOOLKITS, **toolkits}))
    assert [fault in said and remedy in command for said, command in found] == ([] if fault is None else [True])


def test_a_gpu_that_torch_does_not_see_is_torchs_fault_unless_the_driver_is_too_old(monkeypatch) -> None:
    assert list(doctor._faults(BOTH, [], TOOLKITS)) == []
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    ((fault, remedy),) = doctor._faults(BOTH, [], TOOLKITS)
    assert "torch does not see" in fault
    assert remedy == "pip install --force-reinstall torch"
    ((fault, remedy),) = doctor._faults(BOTH, [], {**TOOLKITS, "driver": "12.4"})
    assert "the driver runs CUDA 12.4" in fault


@pytest.mark.parametrize(
    ("installed", "remedy"),
    [
        (["onnxruntime"], None),
        (["onnxruntime-gpu", "onnxruntime-genai"], None),
        (
            ["onnxruntime", "onnxruntime-gpu"],
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
        ),
        (
            ["onnxruntime", "onnxruntime-gpu", "onnxruntime-genai"],
            "pip uninstall -y onnxruntime onnxruntime-gpu onnxruntime-genai"
            " && pip install onnxruntime-gpu onnxruntime-genai-cuda",
        ),
        (
            ["onnxruntime", "onnxruntime-openvino"],
            "pip uninstall -y onnxruntime onnxruntime-openvino && pip install onnxruntime",
        ),
    ],
)
def test_two_runtimes_in_one_folder_are_seen(installed: list[str], remedy: str | None, monkeypatch) -> None:
    def version(name: str) -> str:
        if name in installed:
            return "1.30"
        raise metadata.PackageNotFoundError(name)

    bringing = [name for name in installed if name != "onnxruntime-genai"]
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"onnxruntime": bringing})
    faults = [row for row in doctor.diagnose().faults if "over each other" in row[0]]
    assert [command for _, command in faults] == ([] if remedy is None else [remedy])
    assert all(f"{name} 1.30" in fault for fault, _ in faults for name in bringing)
    asking = "as onnxruntime-genai asks for plain onnxruntime"
    assert all((asking in fault) == ("onnxruntime-genai" in installed) for fault, _ in faults)


@pytest.mark.parametrize(
    ("genai", "remedy"),
    [
        (["onnxruntime-genai-cuda"], None),
        (["onnxruntime-genai", "onnxruntime-genai-cuda"], "onnxruntime-genai-cuda"),
        ([], None),
    ],
)
def test_the_generator_is_shown_and_seen_twice(genai: list[str], remedy: str | None, monkeypatch) -> None:
    packages = {"onnxruntime": ["onnxruntime-gpu"], "onnxruntime_genai": genai}
    monkeypatch.setattr(metadata, "version", lambda name: "1.30")
    monkeypatch.setattr(metadata, "packages_distributions", lambda: packages)
    found = doctor.diagnose()
    assert [name for name in found.versions if "genai" in name] == genai
    told = [row for row in found.faults if "over each other" in row[0]]
    removed = " ".join(genai)
    assert told == (
        []
        if remedy is None
        else [
            (
                "onnxruntime-genai 1.30 and onnxruntime-genai-cuda 1.30 are installed over each other",
                f"pip uninstall -y {removed} && pip install {remedy}",
            )
        ]
    )


def test_the_versions_of_cuda_stand_side_by_side() -> None:
    found = doctor.diagnose()
    assert found.toolkits["onnxruntime"] == (onnxruntime.cuda_version or None)
    assert found.toolkits["torch"] == torch.version.cuda
    assert (found.toolkits["driver"] is None) <= (not found.cuda)
    assert onnxruntime.package_name in found.versions
    assert json.loads(found.to_json())["toolkits"] == found.toolkits
