"""Sharded tensors are known where there are such, and nothing is loaded where there are none."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sarac.ir.sharded import fsdp_class, is_sharded


def test_what_is_loaded_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharded(torch.Tensor):
        pass

    plain, sharded = torch.ones(2), torch.ones(2).as_subclass(Sharded)
    for name in ("tensor", "fsdp"):
        monkeypatch.delitem(sys.modules, f"torch.distributed.{name}", raising=False)
    assert [is_sharded(plain), is_sharded(sharded), fsdp_class()] == [False, False, None]
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", SimpleNamespace(DTensor=Sharded))
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", SimpleNamespace(FSDPModule=Sharded))
    assert [is_sharded(plain), is_sharded(sharded), fsdp_class()] == [False, True, Sharded]


def test_import_of_sarac_and_its_commands_loads_no_more_than_it_needs() -> None:
    slow = {
        "torch.distributed.tensor",
        "torch.distributed.fsdp",
        "transformers.models.auto.modeling_auto",
        "torch._dynamo",
        "peft",
    }
    slow |= {"transformers.modeling_utils", "torchao"}  # what an annotation of the commands once loaded
    code = f"import sarac.cli, sys; print(sorted({slow!r} & set(sys.modules)), 'transformers' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["[]", "True"]
