"""The paper's claims as one table: SD-Zero, its baselines and its ablations, a few commands each.

    data/claims/METHOD-SEED.json     one run: commands, metrics, answers and tokens sampled, minutes
    data/claims/search-METHOD.json   its learning rates on data/validation.jsonl, seed 0
    README.md, data/claims/README.md, *.png    tables between the markers, figures: from these alone

A method is stages run as they are, or with one of tests/ablations/*.patch. A claim is an inequality
between two methods, written in CLAIMS before the runs. It is *shown* if the 95% confidence interval
(t) of the difference, paired by seed, lies on the claimed side of 0, *opposite* if on the other.

    python tests/claims.py --seeds 3                     # goes on where it stopped: many hours
    python tests/claims.py --check                       # do tables and figures hold what is filed?
"""

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import MINI, ROOT, common, load, rows_of  # noqa: E402

import analyses  # noqa: E402, of data/claims
import report  # noqa: E402
from methods import CLAIMS, DOMAINS, METHODS  # noqa: E402

FILED = ROOT / "data/claims"


# of 04's log, kept with a run
CURVES = "accuracy", "mean_tokens", "kl", "kl_r0", "kl_r1", "said_wrong", "said_right"
# where the search of learning rates starts; in this order, for some need those of others
START = {"srt": 2e-4, "sd_zero": 1e-4, "grpo": 1e-4, "rft": 2e-4, "sdft": 1e-4}


# ---------------------------------------------------------------- one run


def places(name, seed, out, rates):
    """What the braces of METHODS stand for."""
    rates = {k: f"{rate:g}" for k, rate in rates.items()}
    domain = METHODS[name].domain
    S = out / f"{domain}{'_' if domain else ''}seed{seed}"
    own = name + (f"-{rates[name]}" if name in rates else "")
    made = {"S": S, "P": S / f"srt-{rates.get('srt')}", "O": S / own}
    return {**made, "seed": seed, "n": METHODS[name].n, **rates}


def run(name, seed, out, rates, split="test", miniature=False):
    """One method with one seed: its commands, then 05. Returns what is filed under data/claims."""
    method, at = METHODS[name], places(name, seed, out, rates)
    told = DOMAINS[method.domain][-1]
    evaluate = f"05_eval.py --from {method.run} --checkpoints {method.checkpoint} --split "
    evaluated, looked_at = (at["S"] / f"eval-{part}-{at['O'].name}" for part in (split, "readings"))
    commands = [*method.commands, f"{evaluate}{split}{told} --out {evaluated}"]
    if method.domain not in ("", "code"):
        few = told.replace("400", "200") + " --no-greedy --no-revise"
        commands.append(f"{evaluate}validation{few} --out {looked_at}")
    commands = [c.format(**at) for c in commands]
    stage = patched_stage(method.patch)
    evaluated.mkdir(parents=True, exist_ok=True)
    with open(evaluated / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        for command in commands:
            print(f"\n$ python {command}", flush=True)
            script, *flags = shlex.split(command)
            own = script == stage and f"--out {at['O']}" in command
            try:
                module = load(script, method.patch if own else None)
                vars(module).update(method.constants if own else {})
                module.main([*flags, *(MINI[int(script[:2])] if miniature else [])])
            except SystemExit:
                raise RuntimeError(f"{command}: failed, see the end of {log.name}") from None

    folder = Path(method.run.format(**at))
    entries = common.read_run(folder)["made"]
    made = [artifact for artifact in method.sampled if artifact in entries]
    counts = [count(folder, artifact) for artifact in made if artifact != "srt"]
    seconds = sum(entries[artifact]["seconds"] for artifact in made)
    training = {}
    if method.checkpoint == "sd_zero":
        steps = rows_of(folder / "distill.jsonl")
        for key in CURVES:
            training[key] = [round(m[key], 4) if m[key] is not None else None for m in steps]
    summary = json.loads((evaluated / "summary.json").read_text())[0]
    rows = rows_of(evaluated / "eval.jsonl")
    there = looked_at / "eval.jsonl"
    tokenizer = common.load_tokenizer(common.read_run(folder)["settings"]["model"])
    return {
        "method": name,
        "label": method.label,
        "seed": seed,
        "patch": method.patch,
        "commands": [f"python {c}".replace(f"{ROOT}/", "") for c in commands],
        "metrics": {**summary, **analyses.metrics_of(rows, common.P_R), "checkpoint": name},
        "answers": sum(n for n, _ in counts),
        "tokens": sum(t for _, t in counts),
        "minutes": round(seconds / 60, 2),
        "commit": entries[method.checkpoint].get("commit"),
        "threads": torch.get_num_threads(),
        "mistakes": analyses.mistakes(rows, tokenizer),
        "off_task": analyses.off_task(rows),
        "training": training,
        **({"readings": analyses.readings(rows_of(there))} if there.exists() else {}),
    }


def patched_stage(patch):
    """The script that a patch changes."""
    text = (ROOT / f"tests/ablations/{patch}.patch").read_text() if patch else ""
    return re.search(r"^\+\+\+ b/(\S+)", text, re.M)[1] if patch else None


def count(folder, artifact):
    """(answers, tokens) sampled for an artifact of a run."""
    if artifact == "sd_zero":
        steps = rows_of(folder / "distill.jsonl")
        answers = [round(m["tokens"] / m["mean_tokens"]) for m in steps]
        return sum(answers), sum(m["tokens"] for m in steps)
    field = "revised_ids" if artifact == "revisions.jsonl" else "response_ids"
    lengths = [len(row[field]) for row in rows_of(folder / artifact)]
    return len(lengths), sum(lengths)


def search(name, out, found, miniature):
    """Half of START's rate, it, twice it, and on while the best is at an end, on the validation
    split, with seed 0."""
    start, accuracy = START[name], {}
    todo = [start] if miniature else [0.5 * start, start, 2 * start]
    while todo:
        rate = todo.pop(0)
        filed = run(name, 0, out, {**found, name: rate}, "validation", miniature)
        accuracy[rate] = filed["metrics"]["accuracy"]
        best = max(accuracy, key=accuracy.get)
        if not todo and not miniature and len(accuracy) < 6:
            todo = [rate for rate in (0.5 * best, 2 * best) if rate not in accuracy][:1]
    return {"rate": best, "accuracy": accuracy}


# ---------------------------------------------------------------- all runs


def needs(name):
    """The searches whose rates a method's commands name."""
    text = " ".join(METHODS[name].commands)
    return [k for k in START if f"{{{k}}}" in text or k == "srt" and "{P}" in text]


def file_what_is_missing(seed, methods, filed, out, miniature):
    """All runs of a seed, one after the other; seed None: the searches that they need. Returns
    what failed."""
    os.chdir(ROOT)
    failed, wanted = [], methods
    if seed is None:
        wanted = [k for k in START if any(k in needs(name) for name in methods)]
        wanted = [k for k in START if k in wanted or any(k in needs(w) for w in wanted)]
    for name in tqdm(wanted, desc="searches" if seed is None else f"seed {seed}"):
        path = filed / (f"search-{name}.json" if seed is None else f"{name}-{seed}.json")
        searched = {k: filed / f"search-{k}.json" for k in START}
        rates = {k: json.loads(p.read_text())["rate"] for k, p in searched.items() if p.exists()}
        if path.exists():
            continue
        try:
            how = name, out, rates, miniature
            result = (
                search(*how) if seed is None else run(name, seed, out, rates, "test", miniature)
            )
            common.write_whole(path, json.dumps(result, indent=1) + "\n")
        except Exception as e:
            failed.append(f"{path.stem}: {type(e).__name__}: {e}")
    return failed


def run_all(methods, seeds, filed, out, jobs, miniature):
    """The searches, then the seeds, `jobs` of them at a time, a thread each."""
    filed.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    what = methods, filed, out, miniature
    left = [f"{m}-{seed}" for seed in range(seeds) for m in methods]
    left = sum(not (filed / f"{name}.json").exists() for name in left)
    print(f"{left} runs to make, of 3 to 12 minutes each, {jobs} at a time")
    failed = file_what_is_missing(None, *what)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        todo = [pool.submit(file_what_is_missing, seed, *what) for seed in range(seeds)]
        failed += sum((future.result() for future in todo), [])
    if failed:
        sys.exit("\n".join(["failed, and tried again by the same command:", *failed]))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, default=3, help="so many, from 0; 0: only write the tables")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="seeds at a time")
    p.add_argument("--out", type=Path, default=Path("runs/claims"), help="a folder per seed below")
    p.add_argument("--check", action="store_true", help="run nothing; compare with what is filed")
    p.add_argument("--miniature", action="store_true", help="tiny; files its results below --out")
    args = p.parse_args(argv)
    out = args.out.resolve()
    if args.check:
        with tempfile.TemporaryDirectory() as scratch:
            differs = report.check(FILED, CLAIMS, Path(scratch))
        sys.exit(f"not what data/claims gives: {differs}; see --seeds 0" if differs else 0)
    filed = out / "filed" if args.miniature else FILED
    if args.seeds:
        run_all(args.methods, args.seeds, filed, out, args.jobs, args.miniature)
    report.write(filed, CLAIMS, out if args.miniature else ROOT)


if __name__ == "__main__":
    main()
