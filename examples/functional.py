"""A module of one's own, without one nn.Linear: parameters that F.linear, @ and matmul read.

python examples/functional.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sarac


class Mixer(nn.Module):
    """Gated feed-forward over plain parameters."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(hidden, width) / width**0.5)  # (out, in), as F.linear takes it
        self.gate = nn.Parameter(torch.randn(width, hidden) / width**0.5)  # (in, out), as x @ W takes it
        self.down = nn.Parameter(torch.randn(width, hidden) / hidden**0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        gated = F.silu(x @ self.gate) * F.linear(x, self.up)
        return x + torch.matmul(gated, self.down.t()) + self.bias


torch.manual_seed(0)
model = nn.Sequential(Mixer(24, 48), nn.LayerNorm(24), Mixer(24, 48))
x = torch.randn(512, 24)
target = 1.5 * model(x).detach()  # what is to be learnt: to answer half as loud again

# The graph of a region: its linear nodes carry the facts of their weights.
region = sarac.analyze(model).graph.regions["0"]
for node in region.train.nodes:
    if "sarac" in node.meta:
        print(f"{node.name:8} {node.meta['sarac']}")

adapted = sarac.transform(model, plan="threshold:0.6", where="*.up", also_train="*.bias")
print("only these train:", [name for name, parameter in adapted.named_parameters() if parameter.requires_grad])
adapted = sarac.transform(model, plan="threshold:0.6")
print("unchanged by the transform:", torch.equal(adapted(x), model(x)))

optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=sarac.recommended_lr(adapted))
losses = []
for _ in range(60):
    loss = F.mse_loss(adapted(x), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")

with torch.no_grad():
    # Law 2: whoever reads the weight gets the one that the model now computes with.
    by_hand = F.linear(x, adapted[0].up)
    print(f"up as it is read differs from the base's by {(by_hand - F.linear(x, model[0].up)).abs().max():.2f}")
    merged = sarac.fold(adapted)
    print(f"and from the merged one by {(by_hand - F.linear(x, merged[0].up)).abs().max():.0e}")
    print(f"training changed the output by {(merged(x) - model(x)).abs().max():.2f}")
    print(f"and folding by {(merged(x) - adapted(x)).abs().max():.0e}")
