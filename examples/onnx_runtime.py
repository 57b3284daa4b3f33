"""A sentence encoder to ONNX and into ONNX Runtime, at shapes that the exporter did not see.

python examples/onnx_runtime.py
"""

import json
import tempfile
from pathlib import Path

import onnxruntime
import torch
from transformers import BertConfig, BertModel

import sarac

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = BertModel(BertConfig(vocab_size=200, initializer_range=0.2, **sizes)).eval()
adapted = sarac.transform(model, plan="rank:8")


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random token ids without padding, as keyword arguments of the model."""
    ids = torch.randint(0, 200, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=sarac.recommended_lr(adapted))
for _ in range(10):  # any objective: here the first number of every token's vector is pushed up
    (-adapted(**tokens(8, 16)).last_hidden_state[..., 0].mean()).backward()
    optimizer.step()
    optimizer.zero_grad()

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    file = Path(folder, "out.onnx")
    # merge=True insists on plain weights. Nothing is written unless the file computes what the model computes.
    report = sarac.export(adapted, file, tokens(2, 16), merge=True)
    for row in report.comparisons:
        print(f"verified at {row.inputs}: error {row.onnx_error:.0e}")

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch, length in [(1, 5), (3, 40)]:
        inputs = tokens(batch, length)
        found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
        gap = (torch.from_numpy(found) - adapted(**inputs).last_hidden_state).abs().max()
        base = (torch.from_numpy(found) - model(**inputs).last_hidden_state).abs().max()
        print(f"{batch} x {length}: {gap:.0e} from the adapted model, {base:.2f} from the base")

    # The file says of itself what it is and how it was checked.
    metadata = session.get_modelmeta().custom_metadata_map
    plan = json.loads(metadata["sarac.plan"])
    print("made by the rule", plan["rule"], "for", len(plan["sites"]), "sites")
    print("versions:", metadata["sarac.versions"])
