"""Sampling, 03's loss, 04 and 05 on a pretended GPU, whose tensors do not mix with the CPU's: most of what would break on a first real one.

It says "pretend:0" for its device, and computes on the CPU. In a process of its own, which test_pipeline.py starts: torch has to know a
device before its first backward pass. By hand: pytest tests/pretended_gpu.py
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)
from transformers import AutoModelForCausalLM

import common
from conftest import ROOT, rows_of

GPU = "pretend"
TINY = [
    "--srt",
    "start",
    "--verified",
    "none.jsonl",
    "--batch-size",
    "2",
    "--max-new-tokens",
    "6",
    "--data",
    str(ROOT / "data"),
]


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


class OnGPU(torch.Tensor):
    """A tensor of the pretended GPU: `numbers`, a CPU tensor, holds what is in it."""

    @staticmethod
    def __new__(cls, numbers):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device(GPU, 0),
        )
        self.numbers = numbers
        return self

    def tolist(self):
        return self.cpu().tolist()

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
    return (
        {k: each(x, change) for k, x in value.items()} if isinstance(value, dict) else change(value)
    )


def compute(op, args, kwargs):
    """Run an operator of torch on the CPU; its results are on the pretended GPU if its tensors are, or if it is told so."""
    tensors, devices = [], []
    each(
        [args, kwargs],
        lambda x: (
            tensors
            if isinstance(x, torch.Tensor)
            else devices
            if isinstance(x, torch.device)
            else []
        ).append(x),
    )
    on_gpu = any(isinstance(t, OnGPU) for t in tensors)
    if op is torch.ops.aten.copy_.default:
        on_gpu = isinstance(args[0], OnGPU)
    elif devices:
        on_gpu = devices[0].type == GPU
    elif on_gpu and not all(
        isinstance(t, OnGPU) or t.dim() == 0 and any(t is x for x in args[1:]) for t in tensors
    ):  # CUDA, or stricter
        raise RuntimeError(
            f"{op}: tensors on two devices: {[(tuple(t.shape), str(t.device)) for t in tensors]}"
        )
    on_cpu = lambda x: (
        x.numbers
        if isinstance(x, OnGPU)
        else torch.device("cpu")
        if isinstance(x, torch.device)
        else x
    )
    given = {id(on_cpu(t)): t for t in tensors}

    def result(x):
        if not isinstance(x, torch.Tensor):
            return x
        if (
            id(x) in given and isinstance(given[id(x)], OnGPU) == on_gpu
        ):  # in place: the tensor that was given, not another one
            return given[id(x)]
        x = x.clone() if id(x) in given else x  # moved: shares nothing
        return OnGPU(x) if on_gpu else x

    return each(op(*each(args, on_cpu), **each(kwargs, on_cpu)), result)


@pytest.fixture()
def gpu(stages, monkeypatch, tmp_path, tokenizer):
    """The device; the stages use it, and write what they save from the CPU. They start from the embedded base's first layer."""
    if not hasattr(torch, GPU):
        _setup_privateuseone_for_python_backend(GPU, Backend())
    monkeypatch.chdir(tmp_path)
    one_layer = AutoModelForCausalLM.from_pretrained(
        ROOT / "data/base", num_hidden_layers=1, layer_types=["full_attention"]
    )
    common.save_model(one_layer, tokenizer, "start")
    Path("none.jsonl").write_text(
        json.dumps({"id": "none", "problem": "none", "response_ids": [1], "reward": 0}) + "\n"
    )
    save_model, save = common.save_model, torch.save

    def save_from_cpu(model, tokenizer, folder):
        on_cpu = common.load_model("start", tokenizer, torch.device("cpu"))
        on_cpu.load_state_dict({name: x.cpu() for name, x in model.state_dict().items()})
        save_model(on_cpu, tokenizer, folder)

    for stage in (stages[4], stages[5]):
        monkeypatch.setattr(stage, "pick_device", lambda name: torch.device(GPU, 0))
    monkeypatch.setattr(stages[4], "save_model", save_from_cpu)
    monkeypatch.setattr(
        torch,
        "save",
        lambda state, path: save(
            each(state, lambda x: x.cpu() if isinstance(x, torch.Tensor) else x), path
        ),
    )
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


def test_sampling_and_the_srt_losses_keep_to_the_models_device(gpu, stages, tokenizer, problems):
    model = common.load_model("start", tokenizer, torch.device("cpu"))
    on_gpu = copy.deepcopy(model).to(gpu)
    prompts = [common.prompt_ids(tokenizer, x["problem"]) for x in problems[:5]]
    assert common.sample(on_gpu, prompts, range(5), 6, batch_rows=2) == common.sample(
        model, prompts, range(5), 6, batch_rows=2
    )

    tuples = [
        stages[3].sequence(
            {**x, "response_ids": [9, 8, 7], "reward": i, "revised_ids": [6, 5, 2]},
            tokenizer,
            common.P_R,
        )
        for i, x in enumerate(problems[:2])
    ]
    losses = [stages[3].srt_backward(m, tuples, "srt", 100, 200) for m in (model, on_gpu)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for p, q in zip(model.parameters(), on_gpu.parameters(), strict=True):
        assert q.grad.device == gpu and torch.allclose(p.grad, q.grad.cpu(), atol=1e-6)


def test_distillation_on_a_gpu_is_that_on_the_cpu_and_goes_on_after_an_interruption(
    gpu, stages, tmp_path, monkeypatch
):
    command = [
        *TINY,
        "--save-every",
        "1",
        "--steps",
        "1",
        "--rounds",
        "2",
        "--offload-teacher",
        "--gradient-checkpointing",
        "--out",
    ]
    update, calls = common.update, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(stages[4], "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stages[4].main([*command, str(tmp_path / "gpu")])
    stages[4].main([*command, str(tmp_path / "gpu")])
    monkeypatch.setattr(stages[4], "pick_device", lambda name: torch.device("cpu"))
    stages[4].main([*command, str(tmp_path / "cpu")])
    assert len(calls) == 5
    for a, b in zip(
        *(rows_of(tmp_path / device / "distill.jsonl") for device in ("gpu", "cpu")), strict=True
    ):
        for key in a.keys() - {"seconds"}:
            assert a[key] == (
                pytest.approx(b[key], rel=1e-3, abs=1e-6) if isinstance(b[key], float) else b[key]
            ), key


def test_grpo_and_evaluation_run_on_a_gpu(gpu, stages, tmp_path):
    stages[4].main(
        [*TINY, "--steps", "1", "--objective", "grpo", "--n", "2", "--out", str(tmp_path)]
    )
    stages[5].main(
        [
            "--checkpoints",
            "one=start",
            "--data",
            str(ROOT / "data"),
            "--limit",
            "1",
            "--n",
            "1",
            "--k",
            "1",
            "--max-new-tokens",
            "8",
            "--out",
            str(tmp_path),
        ]
    )
    assert json.loads((tmp_path / "summary.json").read_text())[0]["problems"] == 1
