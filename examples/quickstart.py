"""Every step once, on a model small enough to see through: analyze, transform, train, fold, save, load, export.

python examples/quickstart.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import sarac

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8))
x = torch.randn(512, 16)
target = 1.5 * model(x).detach()  # what is to be learnt: to answer half as loud again

# What is there: every linear weight, and the rank at which its singular values reach 60 % of their sum.
print(sarac.analyze(model, threshold=0.6))

# A model of the same class that computes the same, to the last bit; only its adapters train.
adapted = sarac.transform(model, plan="threshold:0.6")
print("unchanged by the transform:", torch.equal(adapted(x), model(x)))
trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
print("numbers that train:", sum(parameter.numel() for parameter in trained))

# Any training loop. The rate matters: what trains is the relative shift of each singular value.
optimizer = torch.optim.AdamW(trained, lr=sarac.recommended_lr(adapted))
losses = []
for _ in range(100):
    loss = nn.functional.mse_loss(adapted(x), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")

with torch.no_grad():
    # Back to plain weights under the original names and classes, with what rounding cost at each site.
    merged, report = sarac.fold(adapted, report=True)
    print("classes after fold:", [type(layer).__name__ for layer in merged])
    print(f"training changed the output by {(merged(x) - model(x)).abs().max():.2f}")
    print(f"and folding by {(merged(x) - adapted(x)).abs().max():.0e}")
    print(f"share of the delta that rounding took, at worst: {report.worst[1]:.0e} in {report.worst[0]}")
    with sarac.disabled(adapted):
        print("the base is still there:", torch.equal(adapted(x), model(x)))

    with tempfile.TemporaryDirectory() as folder:
        # A module that was built in memory has no recipe: whoever loads it brings one of the same shape.
        sarac.save(adapted, Path(folder, "model.pt"), example_inputs=x[:2])
        fresh = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8))
        loaded = sarac.load(Path(folder, "model.pt"), model=fresh)
        print("the same after save and load:", torch.equal(loaded(x), adapted(x)))

        # Folded, written as ONNX, and held against torch in ONNX Runtime at shapes that the exporter did not see.
        exported = sarac.export(adapted, Path(folder, "out.onnx"), x[:2])
        print(f"ONNX error: {exported.error:.0e} of the outputs' spread, at {len(exported.comparisons)} shapes")
