"""A transformers model through transformers' own Trainer; then the adapter alone, saved and put on the base again.

python examples/trainer.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import sarac

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=97, num_key_value_heads=2, max_position_embeddings=64, **sizes))

# What is to be learnt: counting, modulo 97.
sequences = (torch.randint(0, 97, (512, 1)) + torch.arange(16)) % 97
rows = [{"input_ids": ids, "labels": ids} for ids in sequences]

# The model was never trained, so its output head trains whole; it travels in the adapter file.
adapted = sarac.transform(model, plan="threshold:0.6", also_train="lm_head.weight")
print("still a", type(adapted).__name__)

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        learning_rate=sarac.recommended_lr(adapted),
        num_train_epochs=4,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(adapted, arguments, train_dataset=rows[:448], eval_dataset=rows[448:])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"loss on rows it has not seen: {before:.3f} -> {after:.3f}")

    # The adapter file holds the trained numbers and the base's hash, so it is small and fits this base alone.
    file = Path(folder, "adapter.safetensors")
    sarac.save_adapter(adapted, file)
    print(f"adapter: {file.stat().st_size / 1e3:.0f} kB, model: {sum(p.nbytes for p in model.parameters()) / 1e3:.0f} kB")
    again = sarac.load_adapter(model, file).eval()
    with torch.no_grad():
        ids = sequences[:4]
        print("the same after save_adapter and load_adapter:", torch.equal(again(ids).logits, adapted.eval()(ids).logits))
    print("generated:", sarac.fold(again).generate(ids[:1, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist())
    print("expected: ", ids[0, :12].tolist())
