"""An adapted model inside a Lightning module: fit, validate, checkpoint, resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from user.methods import FOLDABLE, METHODS, base, batch, fresh
from zoo import close, differ, outputs, torchvision_operator, trainables

import sarac

torchvision_operator()  # Lightning takes torchmetrics, which takes torchvision where there is one
lightning = pytest.importorskip("pytorch_lightning")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def module(method: str) -> Any:
    class Tuning(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = fresh(method)

        def training_step(self, tokens: Tensor, _: int) -> Tensor:
            return self.model(input_ids=tokens, labels=tokens).loss

        def validation_step(self, tokens: Tensor, _: int) -> None:
            self.log("loss", self.model(input_ids=tokens, labels=tokens).loss)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=sarac.recommended_lr(self.model))

    return Tuning()


def engine(folder: Path, steps: int) -> Any:
    return lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, enable_checkpointing=False, num_sanity_val_steps=0, val_check_interval=2, limit_val_batches=1,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_fits_validates_and_resumes(tmp_path: Path, method: str) -> None:
    # All alike, since Lightning begins its loader anew in the middle of an epoch.
    rows = torch.utils.data.DataLoader([batch(4)] * 4, batch_size=None)
    once, run = module(method), engine(tmp_path, 4)
    run.fit(once, rows, rows)
    loss = run.callback_metrics["loss"].item()
    close(torch.tensor(loss), once.model(input_ids=batch(4), labels=batch(4)).loss)
    half, first = module(method), engine(tmp_path, 2)
    first.fit(half, rows)
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = module(method)
    engine(tmp_path, 4).fit(again, rows, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    state, start = again.model.state_dict(), module(method).model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in once.model.state_dict().items())
    assert {name for name, tensor in start.items() if not torch.equal(tensor, state[name])} == trainables(once.model)
    differ(outputs(half.model.eval(), batch()).logits, outputs(again.model.eval(), batch()).logits)


@pytest.mark.parametrize("method", FOLDABLE)
def test_fitted_model_folds(tmp_path: Path, method: str) -> None:
    tuned = module(method)
    engine(tmp_path, 2).fit(tuned, torch.utils.data.DataLoader(batch(8), batch_size=2))
    merged = sarac.fold(tuned.model.eval())
    close(outputs(merged, batch()).logits, outputs(tuned.model, batch()).logits)
    differ(outputs(merged, batch()).logits, outputs(base(), batch()).logits)
