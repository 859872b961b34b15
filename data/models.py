"""Models: devices, loading, saving, and what is refused because it would break later."""

import math
import os
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import common
from data.files import die, remove

transformers.utils.logging.disable_progress_bar()  # ours are enough


def pick_device(name):
    """The torch.device that --device names."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=found if name == "auto" else name).device
    except (RuntimeError, AssertionError) as e:
        die(f"--device {name} cannot be used here: {str(e).splitlines()[0]}")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        # cuDNN's attention plans anew for each new shape, and sampling has one a token
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def autocast(device):
    """(context factory, dtype): bf16 on a GPU that has it, fp16 on older ones, float32 on a CPU."""
    dtype = torch.float32
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if has_bf16 else torch.float16
    return lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32), dtype


def load_tokenizer(name):
    """A tokenizer with a chat template that works; dies where there is none."""
    if not Path(name).exists() and (str(name).count("/") != 1 or str(name)[0] in "./~"):
        die(f"model {name} does not exist: name a folder or a hub id (OWNER/NAME)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        text = tokenizer.decode(common.prompt_ids(tokenizer, "1 + 1 = ?"))
    except Exception as e:  # tokenizers raises bare Exceptions, templates whatever they like
        die(f"model {name}: no tokenizer with a chat template that works: {e}")
    if "1 + 1 = ?" not in text:
        die(f"model {name}: its chat template leaves the problem out: {text:.200}")
    return tokenizer


def load_model(name, tokenizer, device, dtype=torch.float32):
    """A causal LM in eval mode; dies where weights are missing, or would give wrong losses.

    float32 weights are for training: in bf16 an update of 5e-6 rounds to nothing.
    """
    how = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **how)
    except Exception as e:  # safetensors has its own, and a wrong config fails in many ways
        die(f"model {name}: no weights could be loaded: {e}")
    if lost := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        die(f"model {name}: {len(lost)} weights are missing or misshapen, {lost[0]} for one")
    layers = DynamicCache(config=model.config).layers
    if not all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers):
        die(f"model {name} has layers other than attention, which sampling does not support")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        die(f"model {name}: its tokenizer has more tokens ({len(tokenizer)}) than its weights")
    if not set(end_ids(model)) & set(tokenizer.all_special_ids):
        die(f"model {name}: its end tokens {end_ids(model)} are not special in its tokenizer")
    model = model.to(device).eval()
    ids = common.prompt_ids(tokenizer, "1 + 1 = ?")
    with torch.no_grad():  # the losses go through the head; some models do more after it
        whole = model(torch.tensor([ids], device=device)).logits[0, :-1]
        ours = model.get_output_embeddings()(common.completion_hidden(model, [ids[:1]], [ids[1:]]))
    if not (whole - ours).norm() <= 0.05 * whole.norm():  # "not": so that NaN is refused, too
        die(f"model {name}: its logits are not finite, or not head(hidden states) alone")
    return model


def save_model(model, tokenizer, folder):
    """Written beside the target and renamed: `folder` is never half a model."""
    beside = f"{folder}.part"
    remove(beside)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    remove(folder)
    os.replace(beside, folder)


def end_ids(model):
    ids = model.generation_config.eos_token_id
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]


def positions(model):
    """How many tokens a sequence may have: beyond these a model writes noise, or fails."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
