"""Mo-SARA: several sets of singular-value shifts and a router that mixes them for each input; exported with its router.

python examples/mosara.py
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import nn

import sarac


def trained(adapted: nn.Module, x: torch.Tensor, target: torch.Tensor) -> float:
    """Fit the adapters and return the last loss."""
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=sarac.recommended_lr(adapted))
    for _ in range(150):
        loss = nn.functional.mse_loss(adapted(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


torch.manual_seed(0)
model = nn.Linear(32, 32)
x = torch.randn(512, 32)

# A task with two halves: one wants some singular values doubled, the other wants them gone.
u, s, v = torch.linalg.svd(model.weight.detach())
double, without = (u @ torch.diag(s * factor) @ v for factor in (2.0, 0.0))
with torch.no_grad():
    first = (x @ v[0] > 0)[:, None]
    target = torch.where(first, x @ double.T, x @ without.T) + model.bias

sara = sarac.transform(model, plan="threshold:1.0")
mosara = sarac.transform(model, plan="threshold:1.0,sets=5", method="mosara")
print(f"loss with one set of shifts: {trained(sara, x, target):.4f}")
print(f"loss with five and a router: {trained(mosara, x, target):.4f}")

# What depends on the input is no single weight, and sarac says so instead of approximating in silence.
try:
    sarac.fold(mosara)
except sarac.NotFoldable as error:
    print("fold:", error)
merged, report = sarac.fold(mosara, routing="mean", calibration=[x], report=True)
print(f"fold at the mean of the gates: relative error {report.approximation:.2f}")

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    file = Path(folder, "routed.onnx")
    report = sarac.export(mosara, file, x[:2])
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x[:7].numpy()})
    print("routed in the file:", report.routed)
    print(f"ONNX differs from torch by {(torch.from_numpy(found) - mosara(x[:7])).abs().max():.0e}")
    print(f"ONNX differs from the base by {(torch.from_numpy(found) - model(x[:7])).abs().max():.2f}")
