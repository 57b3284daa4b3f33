"""Two processes that share the measuring: the numbers of one, one bar, one error, and a rerun that goes on after a kill."""

import json
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner
from zoo import mlp

import sarac
from sarac.cli import app
from sarac.ir import measure
from sarac.ir.errors import InputError
from sarac.ir.processes import dealt


def model() -> nn.Module:
    torch.manual_seed(0)
    return mlp(20, 30, 30, 30, 40, 40, 8)


def two(work: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """What `work` gave, raised or left undone (None) in each of two processes."""
    start = multiprocessing.get_context("fork").Process
    processes = [start(target=_run, args=(work, rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    paths = [folder / f"{rank}.pt" for rank in range(2)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def _run(work: Callable[[int, Path], Any], rank: int, folder: Path) -> None:
    try:
        found = work(rank, folder)
    except BaseException as error:  # noqa: BLE001  the other process is to see it
        found = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    torch.save(found, folder / f"{rank}.pt")
    os._exit(0)


def joined(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)


def share(rank: int, folder: Path) -> Any:
    joined(rank, folder)
    names: list[str] = []
    own: list[str] = []
    inner = measure._together
    measure._together = lambda values, chosen: own.extend(one.name for one in chosen) or inner(values, chosen)  # type: ignore[func-returns-value]
    analysis = sarac.analyze(model(), distributed=True, progress=names.append)
    again = sarac.analyze(model(), distributed=True, where="0.*")
    values = {site.name: analysis.spectrum(site.name).values for site in analysis.sites}
    return {"values": values, "own": own, "names": names, "again": again.ranks(), "json": analysis.to_json()}


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    found = two(share, tmp_path)
    assert all(isinstance(one, dict) for one in found), found
    alone = sarac.analyze(model())
    for one in found:
        assert one["json"] == alone.to_json()
        assert one["again"] == {"0.weight": alone.ranks()["0.weight"]}
        for site in alone.sites:
            assert torch.equal(one["values"][site.name], alone.spectrum(site.name).values)
    first, second = (set(one["own"]) for one in found)
    assert len(first | second) == len(alone.sites)
    assert len(first & second) <= 1  # the one that was measured again
    assert min(len(first), len(second)) >= 2
    assert len(found[0]["names"]) == len(alone.sites)
    assert found[1]["names"] == []


def fails(rank: int, folder: Path) -> Any:
    joined(rank, folder)
    broken = model()
    broken[10].weight.data[0, 0] = torch.nan if rank == 1 else 1.0  # the smaller one is rank 1's
    return sarac.analyze(broken, distributed=True, where=["0.*", "10.*"])


def crashes(rank: int, folder: Path) -> Any:
    joined(rank, folder)
    if rank == 1:
        measure.spectra = lambda *_: (_ for _ in ()).throw(ZeroDivisionError("by nothing"))
    return sarac.analyze(model(), distributed=True)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (fails, ("SpectrumError: 10.weight contains NaN",) * 2),
        (crashes, ("Process 1 failed with ZeroDivisionError: by nothing.", "ZeroDivisionError: by nothing")),
    ],
)
def test_error_of_one_process_is_the_error_of_all(
    work: Callable[[int, Path], Any], said: tuple[str, str], tmp_path: Path
) -> None:
    for one, sentence in zip(two(work, tmp_path), said, strict=True):
        assert isinstance(one, str)
        assert sentence in one.splitlines()[0]


def dies(rank: int, folder: Path) -> Any:
    joined(rank, folder)
    os.environ["SARAC_CACHE"] = str(folder / "cache")
    done = 0
    inner = measure._together

    def counted(values: list[torch.Tensor], names: list[str]) -> Any:
        nonlocal done
        done += 1
        if rank == 1 and done == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(values, names)

    measure._together = counted
    return sarac.analyze(model(), distributed=True)


def test_rerun_goes_on_where_a_killed_process_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_SMALL", 0)  # each weight on its own
    first, second = two(dies, tmp_path)
    assert second is None
    assert "Another process of the group is gone" in first
    assert "What was measured is in the cache: run it again." in first
    monkeypatch.setenv("SARAC_CACHE", str(tmp_path / "cache"))
    measured: list[str] = []
    inner = measure._together
    monkeypatch.setattr(measure, "_together", lambda values, names: measured.extend(names) or inner(values, names))
    again = sarac.analyze(model())
    kept = len(again.sites) - len(measured)
    assert kept == 5  # three of rank 0, and the two before the kill
    sarac.analyze(model())
    assert len(measured) == 1
    assert again.to_json() == sarac.analyze(model(), cache=False).to_json()


def command(rank: int, folder: Path) -> Any:
    words = ["analyze", str(folder / "model.safetensors"), "--json"]
    result = CliRunner().invoke(app, words)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_joins_and_one_process_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int, folder: Path) -> Any:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        return command(rank, folder if rank == 0 or (folder / "both").exists() else folder / "elsewhere")

    def free() -> str:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            return str(found.getsockname()[1])

    port = free()
    weights = {f"{i}.weight": torch.randn(9, 12) for i in range(6)}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "both").touch()
    speaker, other = two(work, tmp_path)
    assert speaker[0] == other[0] == 0
    assert {row["site"]: row["rank"] for row in json.loads(speaker[1])["sites"]} == sarac.analyze(
        tmp_path / "model.safetensors"
    ).ranks()
    assert "Measuring: 6/6" in speaker[2]
    assert other[1:] == ("", "")
    (tmp_path / "both").unlink()
    port = free()
    speaker, other = two(work, tmp_path)
    assert speaker[0] == other[0] == 1
    assert "elsewhere/model.safetensors" in speaker[2]  # what only the other one misses
    assert other[1:] == ("", "")


def test_works_are_dealt_by_cost() -> None:
    assert dealt([1, 9, 4, 4, 2], 2) == [[1, 0], [2, 3, 4]]
    assert dealt([3], 3) == [[0], [], []]
    costs = [7, 3, 3, 2, 2, 2, 1]
    shares = dealt(costs, 2)
    assert sorted(i for share in shares for i in share) == list(range(7))
    assert [sum(costs[i] for i in share) for share in shares] == [10, 10]


def test_distributed_without_a_group_is_told() -> None:
    with pytest.raises(InputError, match=r"distributed=True needs the process group .*init_process_group"):
        sarac.analyze(model(), distributed=True)
