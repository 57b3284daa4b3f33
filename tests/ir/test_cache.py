"""The cache: what is kept is found again to the last bit, and nothing that happens to its folder is an error."""

import itertools
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import mlp, same

import sarac
from sarac.ir import cache
from sarac.ir.cache import Store, digest, key, pack, unpack
from sarac.ir.errors import InputError, SaracWarning
from sarac.ir.gram import spectrum

DECOMPOSITIONS = [(torch.linalg, "svd"), (torch.linalg, "svdvals"), (torch.linalg, "eigh"), (torch.linalg, "eigvalsh")]
DECOMPOSITIONS += [(np.linalg, "eigh"), (np.linalg, "eigvalsh")]  # type: ignore[list-item]  # another module


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SARAC_CACHE", str(tmp_path / "kept"))
    cache._told.clear()
    yield tmp_path / "kept"
    cache._told.clear()


def forbid(patch: pytest.MonkeyPatch) -> None:
    """Let every decomposition fail from now on."""
    for module, name in DECOMPOSITIONS:
        patch.setattr(module, name, lambda *_, **__: (_ for _ in ()).throw(AssertionError("a decomposition")))


class Mixed(nn.Module):
    """A linear layer, a convolution and a stack of matrices."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(12, 9, dtype=dtype), nn.Conv2d(3, 8, 2, dtype=dtype)
        self.experts = nn.Parameter(torch.randn(3, 7, 9, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->beo", self.linear(x), self.experts)


# What is kept.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["sara", "mosara"])
def test_second_transform_decomposes_nothing_and_is_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, dtype: torch.dtype
) -> None:
    model = Mixed(dtype).eval()
    once = sarac.transform(model, method=method, where="linear*" if method == "mosara" else "*").state_dict()
    assert len(list(folder.glob("*.safetensors"))) > 1
    forbid(monkeypatch)
    again = sarac.transform(model, method=method, where="linear*" if method == "mosara" else "*").state_dict()
    for name, tensor in once.items():
        assert torch.equal(tensor, again[name]), name
    with pytest.raises(AssertionError, match="a decomposition"):
        sarac.transform(model, method=method, where="linear*", cache=False)
    model.linear.weight.data[0, 0] += 0.5
    with pytest.raises(AssertionError, match="a decomposition"):
        sarac.transform(model, method=method, where="linear*")


def test_the_cache_changes_no_bit_of_what_comes_out(folder: Path) -> None:
    model = mlp(9, 12, 5)
    with_it, without = (sarac.transform(model, cache=on).state_dict() for on in (True, False))
    assert all(torch.equal(tensor, without[name]) for name, tensor in with_it.items())
    other = sarac.transform(model, "threshold:0.3").state_dict()
    assert any(other[name].shape != tensor.shape for name, tensor in with_it.items())


def test_analysis_is_kept_and_is_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixed(torch.float32)
    once = sarac.analyze(model, where="*")
    forbid(monkeypatch)
    again = sarac.analyze(model, where="*")
    for site in once.sites:
        assert torch.equal(once.spectrum(site.name).values, again.spectrum(site.name).values)
    assert once.to_json() == again.to_json()
    with pytest.raises(AssertionError, match="a decomposition"):
        sarac.analyze(model, where="*", cache=False)


def test_equal_bytes_of_another_dtype_or_shape_are_another_weight() -> None:
    weight = torch.randn(4, 6)
    assert digest(weight) == digest(weight.clone()) == digest(weight.T.contiguous().T)
    assert digest(weight) != digest(weight + 1e-6)
    content = digest(weight) or ""
    keys = {
        key(content, torch.float32, (4, 6), "all values"), key(content, torch.int32, (4, 6), "all values"),
        key(content, torch.float32, (6, 4), "all values"), key(content, torch.float32, (4, 6), "vectors 2"),
    }  # fmt: skip
    assert len(keys) == 4
    assert digest(weight.to("meta")) is None


def test_hash_does_not_depend_on_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 5).T
    whole = digest(weight)
    monkeypatch.setattr(cache, "_PIECE", 64)
    assert digest(weight) == whole


def test_a_stack_and_every_field_come_back() -> None:
    weight = torch.randn(3, 5, 8)
    found = spectrum(weight)
    back = unpack(*pack(found), (3, 5, 8))
    assert back is not None
    assert torch.equal(back.values, found.values)
    assert (back.floor, back.how, back.note) == (found.floor, found.how, found.note)
    assert [one.rank_at(0.6) for one in back.parts] == [one.rank_at(0.6) for one in found.parts]
    assert unpack(*pack(found), (2, 5, 8)) is None
    assert unpack(*pack(found), (3, 4, 8)) is None


# What happens to it.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


def other(path: Path) -> None:
    Store(path.parent).put("another", {"0.values": torch.ones(3)}, [{"floor": 0.0}])
    foreign = next(one for one in path.parent.glob("*.safetensors") if one != path)
    foreign.replace(path)


DAMAGES = {
    "cut off": cut, "empty": lambda path: path.write_bytes(b""), "a bit": flip, "another entry": other,
    "no safetensors": lambda path: path.write_text("hello"),
    "foreign": lambda path: save_file({"0.values": torch.ones(9)}, path),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_removed_and_measured_anew(folder: Path, damage: str) -> None:
    model = nn.Linear(7, 9)
    expected = sarac.analyze(model).spectrum("weight").values
    (entry,) = folder.glob("*.safetensors")
    sound = entry.read_bytes()
    DAMAGES[damage](entry)
    assert entry.read_bytes() != sound
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sarac.analyze(model).spectrum("weight").values, expected)
    assert entry.read_bytes() == sound


def test_entry_of_right_name_and_wrong_values_is_not_believed(folder: Path) -> None:
    store, model = Store(folder), nn.Linear(7, 9)
    entry = key(digest(model.weight) or "", torch.float32, (9, 7), "all values")
    for values in (torch.ones(6).double(), torch.arange(7).double(), torch.full((7,), torch.nan).double(), torch.ones(7)):
        store.put(entry, {"0.values": values}, [{"floor": 0.0}])
        same(sarac.analyze(model).spectrum("weight").values, spectrum(model.weight).values)
        store.drop(entry)
    store.put(entry, {"0.values": torch.ones(7).double()}, [{"floor": 0.0}])
    assert float(sarac.analyze(model).spectrum("weight").values.sum()) == 7.0  # one that could be true is believed


def test_full_or_unwritable_folder_is_one_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("a file where the folder should be")
    with pytest.warns(SaracWarning, match=r"kept takes nothing more .*SARAC_CACHE") as told:
        assert len(sarac.analyze(mlp(5, 6, 7)).sites) == 2
    assert len(told) == 1
    folder.unlink()
    monkeypatch.setattr(cache, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    cache._told.clear()
    with pytest.warns(SaracWarning, match="No space left on device"):
        sarac.analyze(mlp(5, 6, 7))
    assert list(folder.iterdir()) == []


def test_least_recently_used_go_first(tmp_path: Path) -> None:
    store = Store(tmp_path, 9000)
    sizes = torch.zeros(250, dtype=torch.float64)
    for i in range(4):
        store.put(str(i), {"x": sizes + i}, None)
        path = store._path(str(i))
        stamp = 1_000_000 + i
        os.utime(path, (stamp, stamp))
    assert store.get("0") is not None  # used now
    (tmp_path / "mine.txt").write_text("not an entry")
    store.put("4", {"x": sizes}, None)
    kept = [i for i in range(5) if store.get(str(i)) is not None]
    assert kept[0] == 0
    assert kept[-1] == 4
    assert 1 not in kept
    assert sum(size for _, size, _ in store.entries()) <= 9000
    store.put("large", {"x": torch.zeros(2000, dtype=torch.float64)}, None)
    assert store.get("large") is None
    assert store.clear()[0] == len(kept)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("77", 77), ("", 10**10)])
def test_limit_is_read(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    monkeypatch.setenv("SARAC_CACHE_LIMIT", text)
    assert cache.limit() == size
    monkeypatch.setenv("SARAC_CACHE_LIMIT", "much")
    with pytest.raises(InputError, match=r"'much', which is no size: give bytes, or for example 5GB"):
        cache.limit()


def test_folder_is_the_users_usual_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("SARAC_CACHE", "")
    seen = {}
    for system in ("linux", "darwin", "win32"):
        monkeypatch.setattr(sys, "platform", system)
        seen[system] = cache.folder()
    assert seen["linux"] == tmp_path / ".cache/sarac"
    assert seen["darwin"] == tmp_path / "Library/Caches/sarac"
    assert seen["win32"] == tmp_path / "AppData/Local/sarac/Cache"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.folder() == tmp_path / "x/sarac"
    monkeypatch.setenv("SARAC_CACHE", "off")
    assert cache.folder() is None
    assert cache.store() is None


def write_for_ever(folder: Path, value: float) -> None:
    store = Store(folder, 60_000)
    for i in itertools.count():
        store.put(str(i % 40), {"x": torch.full((400,), value)}, None)


def test_two_processes_and_a_kill_leave_whole_entries_only(tmp_path: Path) -> None:
    start = multiprocessing.get_context("fork").Process
    writers = [start(target=write_for_ever, args=(tmp_path, value)) for value in (1.0, 2.0)]
    store, seen = Store(tmp_path, 60_000), set()
    for writer in writers:
        writer.start()
    try:
        while len(seen) < 2:
            for i in range(40):
                found = store.get(str(i))
                seen.update(found[0]["x"].unique().tolist() if found is not None else [])
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    assert seen == {1.0, 2.0}
    whole = store.entries()
    assert whole
    assert all((load_file(path)["x"] == load_file(path)["x"][0]).all() for _, _, path in whole)
    assert sum(size for _, size, _ in whole) < 2 * 60_000
