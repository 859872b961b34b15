"""How fast and how small, beside what people would use instead: one table, in one process, peers measured in turns with ours.

    sampling   answers a second: common.sample against model.generate at its best batch size
    kl         time and peak memory of the KL and its gradient, from hidden states: ours by chunks, plain logits, TRL, liger (on a GPU)
    step       one distillation step (sample, verify, teacher, student, update): 04_self_distill.py against TRL's SDPO trainer
    stages     the five stages end to end, and what the time goes into
    scaling    time and memory against length, batch and vocabulary → data/scaling.png
    large      on a GPU only: sampling, training and memory with Qwen3-4B's shape and random weights, against the hardware's limits

Times are medians of the repeats, with the range. Memory is the peak over what was held before: of the process (Linux), or of the GPU's
allocator. A peer that is not installed is skipped: pip install trl==1.13.0; pip install liger-kernel.

    python tests/bench.py                    # 25 minutes on 2 cores; writes data/bench.json, data/scaling.png and the README's table
    python tests/bench.py sampling kl        # only these; the other parts stay as they were
    python tests/bench.py --check            # does the README hold what data/bench.json says?
"""

import argparse
import contextlib
import gc
import importlib.util
import io
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import ROOT, common, filled_in, load, rows_of  # noqa: E402

DEVICE = common.pick_device("auto")
CONTEXT, DTYPE = common.autocast(DEVICE)
BASE = ROOT / "data/base"
L_MAX = 320


# ---------------------------------------------------------------- measuring


def resident():
    """Bytes of memory of this process; nan where /proc does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return float("nan")


def measured(f):
    """(seconds, peak bytes over what was held before, result) of one call."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        result = f()
        torch.cuda.synchronize()
        return time.perf_counter() - began, torch.cuda.max_memory_allocated() - before, result
    with contextlib.suppress(
        OSError, AttributeError
    ):  # give freed memory back, or it would hide the next peak
        import ctypes

        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, done = resident(), threading.Event()
    peak = [before]

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        result = f()
    finally:
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
    return seconds, peak[0] - before, result


def no_memory(error):
    return re.search("out of memory|ALLOC_FAILED|can't allocate memory", str(error))


def in_turns(repeats, **contestants):
    """{name: {"seconds": [...], "bytes": [...]}}, all of them once, then all again; results of the last turn under "result".

    On a GPU one more turn comes first and does not count: kernels are loaded and compiled. Who needs more memory than there is, drops out.
    """
    table = {name: {"seconds": [], "bytes": [], "result": None} for name in contestants}
    for turn in range(-1 if DEVICE.type == "cuda" else 0, repeats):
        for name in list(table):
            try:
                seconds, size, table[name]["result"] = measured(contestants[name])
            except RuntimeError as e:
                if name == "ours" or not no_memory(e):
                    raise
                print(f"{name}: more memory than there is", file=sys.stderr)
                del table[name]
                continue
            if turn >= 0:
                table[name]["seconds"].append(seconds)
                table[name]["bytes"].append(size)
    return table


def installed(name):
    if importlib.util.find_spec(name):
        return True
    print(f"{name} is not installed, so it is not measured: pip install {name}", file=sys.stderr)
    return False


def qwen3(
    vocabulary,
    hidden=128,
    layers=6,
    heads=4,
    kv_heads=2,
    head_dim=32,
    intermediate=384,
    dtype=torch.float32,
):
    """Random weights in Qwen3's architecture; by default the shape of data/base. No token ends an answer."""
    config = transformers.Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.Qwen3ForCausalLM(config).to(dtype).eval()
    model.generation_config.eos_token_id = [vocabulary]
    return model


# ---------------------------------------------------------------- the contests


def sampling(repeats):
    tokenizer = common.load_tokenizer(BASE)
    model = common.load_model(BASE, tokenizer, DEVICE)
    prompts = [
        common.prompt_ids(tokenizer, x["problem"])
        for x in common.load_problems(ROOT / "data", "train", 512)
    ]

    def generate(prompts, rows):
        answers = []
        for b in range(0, len(prompts), rows):
            part = prompts[b : b + rows]
            T = max(map(len, part))
            ids = torch.tensor([[0] * (T - len(p)) + p for p in part], device=DEVICE)
            mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in part], device=DEVICE)
            with CONTEXT():
                out = model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=L_MAX,
                    pad_token_id=tokenizer.pad_token_id,
                )[:, T:].tolist()
            ends = [
                next((j for j, t in enumerate(y) if t in common.end_ids(model)), L_MAX - 1)
                for y in out
            ]
            answers += [y[: end + 1] for y, end in zip(out, ends)]
        return answers

    best = min((64, 128, 256, 512), key=lambda rows: measured(lambda: generate(prompts, rows))[0])
    table = in_turns(
        repeats,
        ours=lambda: common.sample(model, prompts, range(len(prompts)), L_MAX),
        generate=lambda: generate(prompts, best),
    )
    lengths = {name: [len(y) for y in row["result"]] for name, row in table.items()}
    note = "; ".join(
        f"{name}: {np.mean(n):.0f} ± {np.std(n) / len(n) ** 0.5:.0f} tokens, a tenth above {np.percentile(n, 90):.0f}"
        for name, n in lengths.items()
    )
    return [
        entry(
            "sampling",
            f"{len(prompts)} answers of data/base; generate: {best} rows",
            table,
            note,
            len(prompts),
            "answers/s",
        )
    ]


def kl(repeats):
    stage, rows = load("04_self_distill.py"), []
    for V, H, N in ((151936, 1024, 4096), (400, 128, 4096)):
        g = torch.Generator().manual_seed(0)
        hidden, other = (torch.randn(N, H, generator=g).to(DEVICE) for _ in range(2))
        head, teacher_head = (torch.nn.Linear(H, V, bias=False, device=DEVICE) for _ in range(2))
        teacher_head.requires_grad_(False)

        def run(backward):
            def one():
                h = hidden.clone().requires_grad_()
                total = backward(h)
                head.zero_grad()  # or the next one would find the head's gradient there already
                return float(total), h.grad.norm().item()

            return one

        def ours(h):
            return stage.kl_backward(h, head, other, teacher_head, "reverse", N, CONTEXT).sum() / N

        def naive(h):
            with CONTEXT():
                logits, teacher_logits = head(h), teacher_head(other)
            loss = stage.token_kl(logits, teacher_logits).sum() / N
            loss.backward()
            return loss.detach()

        contestants = {"ours": run(ours), "plain logits": run(naive)}
        if installed("trl"):
            from trl.experimental.sdpo.loss_utils import compute_full_logit_self_distillation_loss

            def trl(h):
                with CONTEXT():  # in which its log_softmax is float32, too
                    loss = (
                        compute_full_logit_self_distillation_loss(
                            head(h), teacher_head(other), distillation_alpha=1.0
                        ).sum()
                        / N
                    )
                loss.backward()
                return loss.detach()

            contestants["TRL"] = run(trl)
        if DEVICE.type == "cuda" and installed("liger_kernel"):
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

            liger_loss = LigerFusedLinearJSDLoss(
                weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0
            )

            def liger(h):
                with CONTEXT():  # its cross-entropy has weight 0, and is computed all the same
                    none = torch.zeros(N, dtype=torch.long, device=DEVICE)
                    loss = liger_loss(h, head.weight, other, teacher_head.weight, none, None, None)
                loss.backward()
                return loss.detach()

            contestants["liger"] = run(liger)
        table = in_turns(repeats, **contestants)
        note = "; ".join(
            f"{name}: loss {row['result'][0]:.6f}, ‖∂L/∂h‖ {row['result'][1]:.4e}"
            for name, row in table.items()
        )
        rows.append(entry("kl", f"{N} positions, V = {V:,}, H = {H}", table, note))
        del hidden, other, head, teacher_head, contestants, table
    return rows


def step(repeats):
    tokenizer = common.load_tokenizer(BASE)
    size, prefix = (
        64,
        [
            common.prompt_ids(tokenizer, x["problem"])
            for x in common.load_problems(ROOT / "data", "train", 64)
        ],
    )
    model = common.load_model(BASE, tokenizer, DEVICE)
    attempts = [
        tokenizer.decode(y, skip_special_tokens=True)
        for y in common.sample(model, prefix, range(size), L_MAX)
    ]
    contestants = {"ours": lambda: steps_of_ours(repeats + 1, size)}
    if installed(
        "trl"
    ):  # rows a forward pass: all at once, or in parts; ours fills passes of 2,048 tokens
        for rows in (64, 16, 8):
            contestants[f"TRL, {rows} rows"] = lambda rows=rows: steps_of_trl(
                repeats + 1, size, rows, tokenizer, attempts
            )
    turns = [{name: f() for name, f in contestants.items()} for _ in range(2)]
    table = {
        name: {
            "seconds": [s for turn in turns for s in turn[name]["seconds"]],
            "bytes": [b for turn in turns for b in turn[name]["bytes"]],
            "tokens": np.mean([turn[name]["tokens"] for turn in turns]),
        }
        for name in contestants
    }
    note = "the first step of two runs is left out; tokens an answer: " + ", ".join(
        f"{name} {row['tokens']:.0f}" for name, row in table.items()
    )
    return [
        entry(
            "step", f"data/base, {size} answers of at most {L_MAX} tokens, reverse KL", table, note
        )
    ]


def steps_of_ours(n, size):
    """Seconds of each step but the first, as 04 logs them, tokens an answer, and the peak of the whole run."""
    stage = load("04_self_distill.py")
    with tempfile.TemporaryDirectory() as out, quiet():
        (Path(out) / "none.jsonl").write_text(
            json.dumps({"id": "none", "problem": "none", "response_ids": [1], "reward": 0}) + "\n"
        )
        flags = ["--srt", BASE, "--verified", Path(out) / "none.jsonl", "--out", out]
        _, peak, _ = measured(
            lambda: stage.main(
                [
                    *map(str, flags),
                    "--steps",
                    str(n),
                    "--batch-size",
                    str(size),
                    "--show-every",
                    "999",
                ]
            )
        )
        log = rows_of(Path(out) / "distill.jsonl")
    return {
        "seconds": list(np.diff([m["seconds"] for m in log])),
        "bytes": [peak],
        "tokens": np.mean([m["mean_tokens"] for m in log[1:]]),
    }


def steps_of_trl(n, size, rows, tokenizer, attempts):
    """The same with TRL. Its teacher reads an attempt and our P_r as feedback on each answer: sequences as long as ours."""
    from datasets import Dataset
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    problems = common.load_problems(ROOT / "data", "train", size * n)
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": x["problem"]}],
                "answer": x["answer"],
                "privileged_context": attempts[i % size],
            }
            for i, x in enumerate(problems)
        ]
    )

    def reward(completions, completion_ids, answer, **_):
        lengths.extend(map(len, completion_ids))
        return [
            float(common.verify({"answer": a}, c[0]["content"])[0])
            for c, a in zip(completions, answer)
        ]

    at, lengths = [], []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            at.append(time.perf_counter())

    def train():
        config = SDPOConfig(
            output_dir=out,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=size // rows,
            max_steps=n,
            num_generations=1,
            scale_rewards="none",
            max_completion_length=L_MAX,
            temperature=1.0,
            learning_rate=2e-4,
            distillation_mode="full_logits",
            distillation_alpha=1.0,
            distillation_is_clip=None,
            teacher_model_kind="base",
            use_successful_as_teacher=False,
            include_environment_feedback=True,
            reprompt_template="{prompt}{feedback}",
            feedback_template="\n\n{feedback_raw}" + common.delimiter(0),
            bf16=DTYPE == torch.bfloat16,
            fp16=DTYPE == torch.float16,
            gradient_checkpointing=False,
            use_cpu=DEVICE.type == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10**6,
        )
        model = common.load_model(BASE, tokenizer, DEVICE)
        model.config._name_or_path = str(BASE)
        SDPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Clock()],
        ).train()

    with tempfile.TemporaryDirectory() as out, quiet():
        _, peak, _ = measured(train)
    return {"seconds": list(np.diff(at)), "bytes": [peak], "tokens": np.mean(lengths[size:])}


@contextlib.contextmanager
def quiet():
    """Without the scripts' own lines and bars, unless one fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except BaseException:
        print(said.getvalue()[-2000:], file=sys.stderr)
        raise


def stages(repeats):
    """The README's command with no flag, but in one process, its functions timed from outside."""
    spent, seconds = dict.fromkeys(("sampling", "verifying", "teacher", "student"), 0.0), {}

    def timed(f, name):
        def g(*a, **k):
            began = time.perf_counter()
            try:
                return f(*a, **k)
            finally:
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()
                spent[name() if callable(name) else name] += time.perf_counter() - began

        return g

    parts = {
        "sample": "sampling",
        "verify_all": "verifying",
        "backward_through_head": "student",
        "kl_backward": "student",
        "completion_hidden": lambda: "student" if torch.is_grad_enabled() else "teacher",
    }
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        for name in sorted(p.name for p in ROOT.glob("0?_*.py")):
            stage, at = load(name), time.perf_counter()
            for f, what in parts.items():
                if hasattr(stage, f) and not (
                    f == "backward_through_head" and hasattr(stage, "kl_backward")
                ):  # 04's is inside kl_backward
                    real = getattr(stage, f)
                    setattr(
                        stage,
                        f,
                        timed(
                            real if f != "verify_all" else lambda *a, real=real: list(real(*a)),
                            what,
                        ),
                    )  # it is lazy
            with quiet():
                stage.main(["--out", out])
            seconds[name[:2]] = time.perf_counter() - at
    whole = time.perf_counter() - began
    spent["other"] = whole - sum(spent.values())
    return [
        {
            "part": "stages",
            "case": "the five stages, no flags",
            "minutes": whole / 60,
            "stage_seconds": seconds,
            "share": {k: v / whole for k, v in spent.items()},
        }
    ]


def scaling(repeats):
    """Sampling, and teacher, student and KL of one step, against answer length, batch and vocabulary."""
    stage, rows = load("04_self_distill.py"), []

    def case(L, B, V):
        model, teacher = qwen3(V), qwen3(V).requires_grad_(False)
        rng = np.random.default_rng(0)
        prompts, answers = ([rng.integers(0, V, n).tolist() for _ in range(B)] for n in (32, L))

        def train():  # as 04 has it: the teacher of the whole step first
            parts, y = (
                common.micro_batches(list(range(B)), lambda i: 2 * L + 48, 2048),
                lambda part: [answers[i] for i in part],
            )
            with torch.no_grad(), CONTEXT():
                of_teacher = [
                    common.completion_hidden(
                        teacher, [prompts[i] + answers[i] + prompts[i][:16] for i in part], y(part)
                    )
                    for part in parts
                ]
            for part, hidden_t in zip(parts, of_teacher):
                with CONTEXT():
                    hidden = common.completion_hidden(model, [prompts[i] for i in part], y(part))
                heads = model.get_output_embeddings(), teacher.get_output_embeddings()
                stage.kl_backward(hidden, heads[0], hidden_t, heads[1], "reverse", B * L, CONTEXT)

        table = in_turns(
            repeats,
            sampling=lambda: len(common.sample(model, prompts, range(B), L)),
            training=train,
        )
        return {
            "part": "scaling",
            "L": L,
            "B": B,
            "V": V,
            **{
                name: {"seconds": statistics.median(t["seconds"]), "bytes": max(t["bytes"])}
                for name, t in table.items()
            },
        }

    axes = {
        "L": [(L, 8, 400) for L in (256, 512, 1024, 2048, 4096)],
        "B": [(256, B, 400) for B in (4, 8, 16, 32, 64, 128)],
        "V": [(256, 8, V) for V in (400, 4000, 40000, 151936)],
    }
    for axis, cases in axes.items():
        rows += [{"axis": axis, **case(*c)} for c in cases]
    return rows


QWEN3_4B = dict(
    vocabulary=151936, hidden=2560, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=9728
)


def large(repeats, shape=QWEN3_4B, square=8192, lengths=(1024, 4096, 8192, 16384, 32768), n=256):
    """On one GPU: the longest answer that trains, tokens a second in sampling, MFU in training, each against limits measured beside it."""
    if shape is QWEN3_4B and (
        DEVICE.type != "cuda" or torch.cuda.get_device_properties(DEVICE).total_memory < 75e9
    ):
        print("large: no GPU of 80 GB here, so it is not measured", file=sys.stderr)
        return []
    stage, rng, rows = load("04_self_distill.py"), np.random.default_rng(0), []
    warm = lambda f: (f(), measured(lambda: [f() for _ in range(20)])[0] / 20)[1]  # seconds a call
    x, y = torch.randn(2, square, square, device=DEVICE)
    bandwidth = 2 * 4 * square**2 / warm(lambda: y.copy_(x))  # bytes a second, read and written
    x, y = x.to(DTYPE), y.to(DTYPE)
    limit = (
        2 * square**3 / warm(lambda: torch.mm(x, x, out=y))
    )  # floating-point operations a second
    del x, y
    held = lambda: torch.cuda.memory_allocated() if DEVICE.type == "cuda" else resident()
    student, teacher = qwen3(**shape), qwen3(**shape, dtype=DTYPE).requires_grad_(False)
    parameters, V, layers = (
        sum(p.numel() for p in student.parameters()),
        shape["vocabulary"],
        shape["layers"],
    )
    of_head = V * shape["hidden"]  # also the embedding
    for B in (16, 64):
        prompts = [rng.integers(0, V, 2 * n).tolist() for _ in range(B)]
        common.sample(student, prompts, range(B), 8)  # loads kernels
        there, runs = (
            held(),
            [
                measured(lambda: common.sample(student, prompts, range(B), n))
                for _ in range(repeats)
            ],
        )
        seconds, peak = statistics.median(s for s, _, _ in runs), max(b for _, b, _ in runs)
        cache = (
            B * (2 * n + n / 2) * 2 * layers * shape["kv_heads"] * shape["head_dim"]
        )  # entries, at its middle length
        rows.append(
            {
                "part": "large",
                "case": f"sampling, {B} rows, {n} tokens after {2 * n}",
                "tokens a second": n * B / seconds,
                "share of the bandwidth (prefill's time counted)": n
                * DTYPE.itemsize
                * (parameters + cache)
                / seconds
                / bandwidth,
                "peak GB": (there + peak) / 1e9,
            }
        )
    student.activation_checkpointing_enable()
    student.train()
    optimizer, head = (
        torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True),
        teacher.get_output_embeddings(),
    )
    prompt = rng.integers(0, V, 256).tolist()
    for L in lengths:
        y = rng.integers(0, V, L).tolist()

        def train():
            teacher.to(DEVICE)
            with torch.no_grad(), CONTEXT():
                hidden_t = common.completion_hidden(teacher, [prompt + y + prompt[:16]], [y])
            teacher.to("cpu")
            head.to(DEVICE)
            with CONTEXT():
                hidden = common.completion_hidden(student, [prompt], [y])
            stage.kl_backward(
                hidden, student.get_output_embeddings(), hidden_t, head, "reverse", L, CONTEXT
            )
            optimizer.step()
            optimizer.zero_grad()

        case = {"part": "large", "case": f"a training step on one answer of {L} tokens"}
        try:
            train()  # makes Adam's state
            there, runs = held(), [measured(train) for _ in range(repeats)]
        except RuntimeError as e:
            if not no_memory(e):
                raise
            rows.append({**case, "fits": "no"})
            break
        seconds, peak = statistics.median(s for s, _, _ in runs), max(b for _, b, _ in runs)
        moving = statistics.median(
            measured(lambda: (teacher.to(DEVICE), teacher.to("cpu")))[0] for _ in range(repeats)
        )
        width, length = shape["heads"] * shape["head_dim"], len(prompt) + L
        forward = lambda T: (
            2 * ((parameters - of_head) * T + of_head * L) + 4 * layers * width * T**2 / 2
        )
        flops = 3 * forward(length) + forward(
            length + L + 16
        )  # the student's forward and backward, not recomputed; the teacher's forward
        rows.append(
            {
                **case,
                "seconds": seconds,
                "of these moving the teacher between the memories": moving,
                "tokens a second": L / seconds,
                "MFU of the rest": flops / (seconds - moving) / limit,
                "peak GB": (there + peak) / 1e9,
            }
        )
    return rows + [
        {
            "part": "large",
            "case": "limits, measured",
            "copy GB/s": bandwidth / 1e9,
            "matmul TFLOP/s": limit / 1e12,
        }
    ]


# ---------------------------------------------------------------- the table and the figure


def machine():
    """What the figures were taken on: the GPU's name, or the CPU's and the number of threads."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next(
        (line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    name = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"{torch.get_num_threads()} cores, {name}"
    )
    return (
        f"{name}, torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    )


def entry(part, case, table, note, per=None, unit=None):
    """A row of data/bench.json: median and range of seconds, peak bytes, for each contestant."""
    return {
        "part": part,
        "case": case,
        "per": per,
        "unit": unit,
        "note": note,
        "runs": {
            name: {
                "turns": len(t["seconds"]),
                "seconds": statistics.median(t["seconds"]),
                "low": min(t["seconds"]),
                "high": max(t["seconds"]),
                "bytes": max(t["bytes"]),
            }
            for name, t in table.items()
        },
    }


def markdown(rows, machine):
    turns = sorted(
        {t.get("turns", 0) for row in rows if "runs" in row for t in row["runs"].values()}
    )
    lines = [
        f"{machine}; medians of {' or '.join(map(str, turns)) or 'the'} turns, lowest to highest in brackets; memory: the peak over what was "
        "held before, highest of the turns.",
        "",
        "| | | time | peak memory | time ÷ ours | memory ÷ ours |",
        "|---|---|--:|--:|--:|--:|",
    ]
    size = lambda b: "–" if b != b else f"{b / 1e9:.2f} GB" if b >= 1e8 else f"{b / 1e6:.0f} MB"
    for row in (r for r in rows if "runs" in r):
        ours = row["runs"]["ours"]
        for name, t in row["runs"].items():
            cell = f"{t['seconds']:.3g} s ({t['low']:.3g}–{t['high']:.3g})"
            if row["per"]:
                cell = f"{row['per'] / t['seconds']:.3g} {row['unit']} ({row['per'] / t['high']:.3g}–{row['per'] / t['low']:.3g})"
            lines.append(
                f"| {row['part'] + ': ' + row['case'] if t is ours else ''} | {name} | {cell} | {size(t['bytes'])} | "
                + (
                    "| |"
                    if t is ours
                    else f"{t['seconds'] / ours['seconds']:.2f} | {t['bytes'] / ours['bytes']:.1f} |"
                )
            )
    lines += [
        f"\n{row['part']}, {row['case'].split(';')[0]}: {row['note']}."
        for row in rows
        if row.get("note")
    ]
    for row in rows:
        if row["part"] == "stages":
            each = ", ".join(f"{k} {s:.0f} s" for k, s in row["stage_seconds"].items())
            share = ", ".join(f"{k} {v:.0%}" for k, v in row["share"].items())
            lines += [
                "",
                f"The five stages end to end, no flags, in one process: {row['minutes']:.1f} minutes ({each}). "
                f"The time goes into: {share} (teacher: 05's KL too; other: loading, tokenising, files, the optimiser's steps, "
                "figures).",
            ]
        elif row["part"] == "large":
            values = [
                f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                for k, v in row.items()
                if k not in ("part", "case")
            ]
            lines += ["", f"{row['case']}: {', '.join(values)}"]
    return "\n".join(lines)


def plot(rows, path):
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(9, 5), layout="constrained", sharey="row")
    plain = lambda v, _: f"{v:g}" if v < 10000 else f"{v / 1000:.0f}K"
    titles = {
        "L": "tokens an answer (8 answers, V = 400)",
        "B": "answers (256 tokens, V = 400)",
        "V": "vocabulary (8 answers, 256 tokens)",
    }
    for column, (axis, title) in enumerate(titles.items()):
        cases = [r for r in rows if r.get("axis") == axis]
        x = [r[axis] for r in cases]
        for name, style in (("sampling", "ko-"), ("training", "k^--")):
            axes[0, column].loglog(x, [r[name]["seconds"] for r in cases], style, label=name)
            axes[1, column].loglog(x, [max(r[name]["bytes"], 1) / 1e6 for r in cases], style)
        first = cases[0]["training"]["seconds"]
        axes[0, column].loglog(
            x, [first * v / x[0] for v in x], color="0.6", linestyle=":", label="linear"
        )
        axes[1, column].set_xlabel(title)
        for row in (0, 1):
            axes[row, column].set_xticks(x, [plain(v, 0) for v in x])
            axes[row, column].minorticks_off()
            axes[row, column].yaxis.set_major_formatter(plain)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory, MB")
    axes[0, 0].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["sampling", "kl", "step", "stages", "scaling", "large"]
    p.add_argument("parts", nargs="*", choices=[*names, []], help="default: all")
    p.add_argument("--repeats", type=int, default=3, help="turns (default: 3)")
    p.add_argument(
        "--check", action="store_true", help="only compare README.md with data/bench.json"
    )
    args = p.parse_args(argv)
    path, here, failed = ROOT / "data/bench.json", machine(), []
    read = lambda: json.loads(path.read_text()) if path.exists() else {}
    for part in () if args.check else args.parts or names:
        try:
            rows = globals()[part](args.repeats)
        except (Exception, SystemExit):
            traceback.print_exc()  # the others all the same
            failed.append(part)
            continue
        print(json.dumps(rows, indent=1), flush=True)
        others = [row for row in read().get(here, []) if row["part"] != part]
        common.write_json(
            path, {**read(), here: sorted(others + rows, key=lambda row: names.index(row["part"]))}
        )  # one entry a machine
        if part == "scaling" and DEVICE.type == "cpu":
            plot(rows, ROOT / "data/scaling.png")
    results, readme = (
        read(),
        (ROOT / "README.md").read_text(),
    )  # only now: either may have been edited during the half hour
    table = "\n\n".join(markdown(rows, name) for name, rows in results.items())
    new = filled_in(readme, "bench", table)
    if args.check:
        sys.exit(
            0
            if new == readme
            else "README.md does not hold the table that data/bench.json gives; run: python tests/bench.py"
        )
    (ROOT / "README.md").write_text(new)
    print(table)
    sys.exit(f"these parts failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
