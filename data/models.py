"""Models: devices, loading, saving, and what is refused because it would break later."""

import copy
import math
import os
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import common
from data.files import RANK, WORLD, die, remove, warn

transformers.utils.logging.disable_progress_bar()  # ours are enough
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def pick_device(name):
    """The torch.device that --device names."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=found if name == "auto" else name).device
    except (RuntimeError, AssertionError) as e:
        die(f"--device {name} cannot be used here: {str(e).splitlines()[0]}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
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
    if "<think>" in text and "</think>" not in text:
        warn(
            f"model {name}: its template opens <think>; the paper's models answer without thinking"
        )
    return tokenizer


def special_ids(tokenizer):
    """Ids of special tokens, also of those that the tokenizer's configuration does not name."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}


def turn_end(tokenizer):
    """The token with which the template ends an answer, as a list; [] where it does not say."""
    turns = [{"role": "user", "content": "1 + 1 = ?"}, {"role": "assistant", "content": "It's 2."}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # some templates refuse it
        return []
    behind = tokenizer(text.rpartition("It's 2.")[2], add_special_tokens=False)["input_ids"]
    return [i for i in behind if i in special_ids(tokenizer)][:1]


def refuse(name, config):
    """Dies where a configuration says that training or sampling would go wrong."""
    text, why = config.get_text_config(), None
    if getattr(config, "quantization_config", None):
        why = "is quantised, which cannot be trained: name the original weights"
    elif config.is_encoder_decoder:
        why = "is an encoder and a decoder, and no causal language model"
    elif "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        why = "has chunked attention, which sampling does not support"
    if why:
        die(f"model {name} {why}")


def load_model(name, tokenizer, device, dtype=torch.float32, lora=None):
    """A causal LM in eval mode; dies where weights are missing, or would give wrong losses.

    float32 weights are for training: in bf16 an update of 5e-6 rounds to nothing.
    lora: instead of them an adapter of that rank is trained, in float32; they are frozen.
    """
    dtype = autocast(device)[1] if lora else dtype
    how = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    adapter = Path(name, "adapter_config.json").exists()
    if (adapter or lora) and not find_spec("peft"):
        die(f"model {name} is an adapter, or is to have one (LoRA): pip install peft")
    try:
        if adapter and not lora:
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(name, **how).merge_and_unload()
            model.requires_grad_(True)
            info = {"missing_keys": [], "mismatched_keys": []}
        else:
            if not adapter:
                refuse(name, AutoConfig.from_pretrained(name, trust_remote_code=False))
            how["output_loading_info"] = True
            model, info = AutoModelForCausalLM.from_pretrained(name, **how)
    except Exception as e:  # safetensors has its own, and a wrong config fails in many ways
        die(f"model {name}: no weights could be loaded: {e}")
    refuse(name, model.config)  # an adapter's base, too
    if getattr(model, "_hf_peft_config_loaded", False) and not adapter:
        die(f"model {name} is an adapter: name a folder that holds it, and it is merged")
    if lost := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        die(f"model {name}: {len(lost)} weights are missing or misshapen, {lost[0]} for one")
    layers = DynamicCache(config=model.config).layers
    if not all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers):
        die(f"model {name} has layers other than attention, which sampling does not support")
    if model.get_output_embeddings() is None:
        die(f"model {name} has no output embeddings, which the losses need")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        die(f"model {name}: its tokenizer has more tokens ({len(tokenizer)}) than its weights")
    ends = [i for i in end_ids(model) if i is not None]
    ends += [i for i in turn_end(tokenizer) if i not in ends]
    if not set(ends) & special_ids(tokenizer):
        die(f"model {name}: its end tokens {ends} are not special in its tokenizer")
    if ends != end_ids(model):
        model.generation_config.eos_token_id = ends
    if model.generation_config.temperature is not None:
        model.generation_config.do_sample = True  # else it cannot be saved
    model.vocabulary = 1 + max(tokenizer.get_vocab().values())  # what is behind it is padding
    cap_outside(model)
    if dropout_off(model):
        warn(f"model {name}: the dropout of its configuration is off")
    if lora:
        add_adapters(model, name, lora, adapter)
    model = model.to(device).eval()
    ids = common.prompt_ids(tokenizer, "1 + 1 = ?")
    with torch.no_grad():  # the losses go through the head; some models do more after it
        whole = model(torch.tensor([ids], device=device)).logits[0, :-1]
        ours = model.get_output_embeddings()(common.completion_hidden(model, [ids[:1]], [ids[1:]]))
    if not (whole - ours).norm() <= 0.05 * whole.norm():  # "not": so that NaN is refused, too
        die(f"model {name}: its logits are not finite, or not head(hidden states) alone")
    return model


def add_adapters(model, name, rank, there):
    """LoRA in all linear layers: "default" is trained, unless it is there already from its start,
    "teacher" is its copy for as_teacher()."""
    from peft import LoraConfig

    model.name_or_path = str(Path(name).resolve() if Path(name).exists() else name)
    for adapter in ("teacher",) if there else ("default", "teacher"):
        if there and model.peft_config["default"].r != rank:
            die(f"model {name} has an adapter of rank {model.peft_config['default'].r}, not {rank}")
        where = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        config = LoraConfig(r=rank, lora_alpha=2 * rank, **where)
        model.add_adapter(copy.deepcopy(model.peft_config["default"]) if there else config, adapter)
    model.set_adapter("default")
    for name, p in model.named_parameters():
        if ".default." in name or ".teacher." in name:
            p.data = p.data.float()  # peft makes them as the weights are: half, on a GPU


@contextmanager
def as_teacher(model):
    """While it lasts a model with adapters is the teacher; any other is what it was."""
    adapters = getattr(model, "_hf_peft_config_loaded", False)
    if adapters:
        model.set_adapter("teacher")
    yield
    if adapters:
        model.set_adapter("default")


def check_memory(name, device, teacher_on_device=False, lora=None):
    """Says what training takes, by formula, before anything is loaded; dies where it cannot fit.

    Of n parameters in bytes: weights 4n, gradients 4n, Adam 8n, of which each of several GPUs has
    its share; in half precision the teacher 2n and, while sampling, when there are no gradients, a
    copy 2n. Several GPUs hold two such copies each, one to sample from and one that autocast makes,
    and at the start 6n. LoRA: weights 2n, and no other teacher. Activations come on top.
    """
    if WORLD > 1 and (lora or autocast(device)[1] == torch.float16):
        die("--lora trains on one GPU" if lora else "several GPUs need bfloat16, which is not here")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        refuse(name, config)
        with torch.device("meta"):  # shapes only
            n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception:  # an adapter, or what load_model() will tell
        return
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    half = 2 if device.type == "cuda" else 4
    teacher, ours = teacher_on_device * half * n, 16 * n / WORLD
    if WORLD > 1:
        ours = max(ours + 2 * half * n, (4 + half) * n)
    if lora:
        teacher, ours = 0, half * n
    said = f"{n / 1e9:.1f}B parameters: training takes {(ours + teacher) / 1e9:.0f} GB"
    said += f" plus activations; there are {there / 1e9:.0f} GB"
    if ours > there:
        die(f"model {name}: {said}; --lora takes less, or more GPUs (torchrun)")
    if ours + teacher > 0.9 * there:
        offload = "--offload-teacher or " if teacher else ""
        warn(f"{said}; {offload}--gradient-checkpointing takes less")
    elif n > 1e8:
        print(said)


def cap_outside(model):
    """Soft-capped logits (Gemma 2): the head itself caps them, so that chunks of them are, too."""
    config = model.config.get_text_config()
    if cap := getattr(config, "final_logit_softcapping", None):
        config.final_logit_softcapping, model.softcap = None, cap
        if hasattr(model, "final_logit_softcapping"):
            model.final_logit_softcapping = None
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda head, h, logits: cap * torch.tanh(logits / cap))


def dropout_off(model):
    """Sampling and the losses see the same model. Was there any?"""
    found = False
    for module in model.modules():
        for key, value in list(vars(module).items()):
            rate = key == "p" and isinstance(module, torch.nn.Dropout) or "dropout" in key
            if rate and isinstance(value, float) and value > 0:
                setattr(module, key, 0.0)
                found = True
    return found


def save_model(model, tokenizer, folder):
    """Written beside the target and renamed: `folder` is never half a model."""
    beside = f"{folder}.part"
    remove(beside)
    state = get_model_state_dict(model, options=WHOLE)  # of a sharded model: gathered, by all ranks
    if RANK:
        return
    names = dict(model.named_parameters(remove_duplicate=False)).keys()
    for tied in names - dict(model.named_parameters()).keys():
        del state[tied]
    config = model.config.get_text_config()
    if cap := getattr(model, "softcap", None):
        config.final_logit_softcapping = cap
    model.save_pretrained(beside, state_dict=state)
    if cap:
        config.final_logit_softcapping = None
    tokenizer.save_pretrained(beside)
    remove(folder)
    os.replace(beside, folder)


def end_ids(model):
    ids = model.generation_config.eos_token_id
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]


def positions(model):
    """How many tokens a sequence may have: beyond these a model writes noise, or fails.

    Where rope's frequencies change with the length, as many as leave them as they are.
    """
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        most = min(most, rope.get("original_max_position_embeddings") or most)
    return most
