"""Sampling, 03's loss, 04 and 05 on a pretended GPU, whose tensors do not mix with the CPU's:
most of what would break on a first real one. It says "pretend:0" for its device, and computes on
the CPU. test_pipeline.py runs this in a process of its own: torch has to know a device before its
first backward pass. By hand: pytest tests/pretended_gpu.py
"""

import copy
import json

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import common
from conftest import ROOT, rows_of

GPU = "pretend"
TINY = ["--max-new-tokens", "6", "--data", str(ROOT / "data")]


class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


class OnGPU(torch.Tensor):
    """A tensor of the pretended GPU: `numbers`, a CPU tensor, holds what is in it."""

    @staticmethod
    def __new__(cls, numbers):
        how = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset()}
        how |= {"dtype": numbers.dtype, "device": torch.device(GPU, 0)}
        self = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, **how)
        self.numbers = numbers
        return self

    def tolist(self):
        return self.numbers.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return compute(op, args, kwargs or {})


class WithGPU(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return compute(op, args, kwargs or {})


def each(value, change):
    """`value` with all that its lists, tuples and dictionaries hold changed."""
    if isinstance(value, (list, tuple)):
        return type(value)(each(x, change) for x in value)
    if isinstance(value, dict):
        return {k: each(x, change) for k, x in value.items()}
    return change(value)


def compute(op, args, kwargs):
    """Run an operator of torch on the CPU; its results are on the pretended GPU if its tensors
    are, or if it is told so."""
    found = []
    each([args, kwargs], found.append)
    tensors = [x for x in found if isinstance(x, torch.Tensor)]
    devices = [x for x in found if isinstance(x, torch.device)]
    on_gpu = any(isinstance(t, OnGPU) for t in tensors)
    if op is torch.ops.aten.copy_.default:
        on_gpu = isinstance(args[0], OnGPU)
    elif devices:
        on_gpu = devices[0].type == GPU
    elif on_gpu:
        for t in tensors:  # CUDA, or stricter
            number = t.dim() == 0 and any(t is x for x in args[1:])
            if not isinstance(t, OnGPU) and not number:
                raise RuntimeError(f"{op}: on two devices: {[x.device for x in tensors]}")

    def on_cpu(x):
        if isinstance(x, OnGPU):
            return x.numbers
        return torch.device("cpu") if isinstance(x, torch.device) else x

    given = {id(on_cpu(t)): t for t in tensors}

    def result(x):
        if not isinstance(x, torch.Tensor):
            return x
        known = given.get(id(x))
        if known is not None and isinstance(known, OnGPU) == on_gpu:
            return known  # in place: the tensor that was given, not another one
        x = x if known is None else x.clone()  # moved: shares nothing
        return OnGPU(x) if on_gpu else x

    return each(op(*each(args, on_cpu), **each(kwargs, on_cpu)), result)


@pytest.fixture()
def gpu(stages, monkeypatch, tmp_path, tokenizer):
    """The device, which 04 and 05 use, saving from the CPU; there is a run of 01 in "run"."""
    if not hasattr(torch, GPU):
        backend_registration._setup_privateuseone_for_python_backend(GPU, Backend())
    monkeypatch.chdir(tmp_path)
    how = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}  # of the embedded base
    one_layer = AutoModelForCausalLM.from_pretrained(ROOT / "data/base", **how)
    common.save_model(one_layer, tokenizer, "start")
    stages[1].main([*TINY, "--model", "start", "--limit", "1", "--out", "run"])
    save_model, save = common.save_model, torch.save

    def save_model_from_cpu(model, tokenizer, folder):
        on_cpu = common.load_model("start", tokenizer, torch.device("cpu"))
        on_cpu.load_state_dict({name: x.cpu() for name, x in model.state_dict().items()})
        save_model(on_cpu, tokenizer, folder)

    def save_from_cpu(state, path):
        save(each(state, lambda x: x.cpu() if isinstance(x, torch.Tensor) else x), path)

    monkeypatch.setattr(stages[4], "pick_device", lambda name: torch.device(GPU, 0))
    monkeypatch.setattr(stages[5], "pick_device", lambda name: torch.device(GPU, 0))
    monkeypatch.setattr(stages[4], "save_model", save_model_from_cpu)
    monkeypatch.setattr(torch, "save", save_from_cpu)
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    with WithGPU():
        yield torch.device(GPU, 0)
    torch._C._set_only_lift_cpu_tensors(False)
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_the_pretended_gpu_computes_as_the_cpu_and_refuses_to_mix(gpu):
    a = torch.arange(6.0, device=gpu, requires_grad=True)
    (a[1:] * 2).sum().backward()
    assert a.device == gpu and a.grad.device == gpu and a.grad.tolist() == [0, 2, 2, 2, 2, 2]
    with pytest.raises(RuntimeError, match="two devices"):
        a + torch.ones(6)
    with pytest.raises(RuntimeError, match="two devices"):
        a[torch.tensor([0, 1])]


def test_sampling_and_the_srt_loss_keep_to_the_models_device(gpu, stages, tokenizer, problems):
    model = common.load_model("start", tokenizer, torch.device("cpu"))
    on_gpu = copy.deepcopy(model).to(gpu)
    prompts = [common.prompt_ids(tokenizer, x["problem"]) for x in problems[:5]]
    how = {"seeds": range(5), "max_new_tokens": 6, "batch_rows": 2}
    assert common.sample(on_gpu, prompts, **how) == common.sample(model, prompts, **how)
    tuples = []
    for reward in (0, 1):
        row = {**problems[0], "response_ids": [9, 8, 7], "reward": reward, "revised_ids": [6, 2]}
        tuples.append(stages[3].sequence(row, tokenizer, common.P_R))
    loss, on_gpu_loss = (stages[3].srt_backward(m, tuples, 100, 200) for m in (model, on_gpu))
    assert loss == pytest.approx(on_gpu_loss, rel=1e-5)
    for p, q in zip(model.parameters(), on_gpu.parameters(), strict=True):
        assert q.grad.device == gpu and torch.allclose(p.grad, q.grad.cpu(), atol=1e-6)


def test_distillation_on_a_gpu_is_that_on_the_cpu_and_goes_on_after_an_interruption(
    gpu, stages, monkeypatch
):
    steps = ["--start", "base", "--batch-size", "2", "--steps", "1", "--rounds", "2"]
    saving = ["--save-every", "1", "--offload-teacher", "--gradient-checkpointing"]
    command = [*TINY, *steps, *saving, "--from", "run", "--out"]
    stops = iter([False, True])  # in the second step

    def update(*args):
        if next(stops, False):
            raise KeyboardInterrupt
        return common.update(*args)

    monkeypatch.setattr(stages[4], "update", update)
    with pytest.raises(KeyboardInterrupt):
        stages[4].main([*command, "gpu"])
    stages[4].main([*command, "gpu"])
    monkeypatch.setattr(stages[4], "pick_device", lambda name: torch.device("cpu"))
    stages[4].main([*command, "cpu"])
    for a, b in zip(rows_of("gpu/distill.jsonl"), rows_of("cpu/distill.jsonl"), strict=True):
        assert a.pop("problems") == b.pop("problems") and a.pop("seconds") > 0
        assert a == {key: pytest.approx(b[key], rel=1e-3, abs=1e-6) for key in a}


def test_evaluation_runs_on_a_gpu(gpu, stages):
    flags = ["--test-data", str(ROOT / "data"), "--limit", "1", "--n", "1"]
    stages[5].main([*TINY, *flags, "--out", "run"])
    assert json.load(open("run/summary.json"))[0]["problems"] == 1
