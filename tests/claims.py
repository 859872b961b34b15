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
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import analyses  # noqa: E402
import report  # noqa: E402
from conftest import MINI, ROOT, common, load, rows_of  # noqa: E402

FILED = ROOT / "data/claims"


@dataclass
class Method:
    """A row of the tables. {S}: the run with the seed's answers; {P}: that with its phase 1, made
    once; {O}: the method's own; {srt} and the like: the learning rate found for that method."""

    label: str
    commands: list
    checkpoint: str
    run: str = "{O}"  # which has the checkpoint
    patch: str = None  # of tests/ablations, for commands that write {O}
    sampled: tuple = ("responses.jsonl", "revisions.jsonl", "srt", "sd_zero")  # for it, if there
    domain: str = ""  # a key of DOMAINS


DOMAINS = {"": "", "code": " --allow-code", "obedient": " --n 1", "unasked": " --n 1"}  # for 05
ANSWER = ["01_generate.py --out {S} --seed {seed}", "02_verify.py --out {S}"]
PHASE_1 = [*ANSWER, "03_revise_sft.py --from {S} --out {P} --lr {srt}"]
REVISE = [*PHASE_1, "03_revise_sft.py --from {P} --out {O} --lr {srt}"]
DISTILL = [*PHASE_1, "04_self_distill.py --from {P} --out {O} --lr {sd_zero}"]
NO_SRT = [*ANSWER, "04_self_distill.py --from {S} --out {O} --start base --lr {sd_zero}"]
GRPO = [*ANSWER, NO_SRT[-1].replace("sd_zero", "grpo") + " --steps 130"]
FOUR_EACH = [
    "01_generate.py --n 4 --limit {limit} --out {O} --seed {seed}",
    "02_verify.py --out {O}",
]
RFT = [*FOUR_EACH, "03_revise_sft.py --lr {rft} --out {O}"]
SDFT = [*FOUR_EACH, "04_self_distill.py --start base --lr {sdft} --out {O}"]


def with_flags(commands, flags):
    return [*commands[:-1], commands[-1] + flags]


def revised(label, patch):
    return Method(label, REVISE, "srt", patch=patch)


def distilled(label, flags="", patch=None):
    return Method(label, with_flags(DISTILL, flags), "sd_zero", patch=patch)


METHODS = {
    "base": Method("base", ANSWER, "base", "{S}", sampled=()),
    "rft": Method("RFT: SFT on right answers, 4 a problem", RFT, "srt", patch="rft"),
    "grpo": Method("GRPO: 8 answers a problem", GRPO, "sd_zero", patch="grpo"),
    "sdft": Method("SDFT: the teacher reads a right answer to x", SDFT, "sd_zero", patch="sdft"),
    "srt": Method("SRT: phase 1", PHASE_1, "srt", "{P}"),
    "sd_zero": distilled("SD-Zero: phases 1 and 2"),
    "revision_only": revised("SRT, L_revision alone", "revision_only"),
    "generation_only": revised("SRT, L_generation alone", "generation_only"),
    "unfiltered": revised("SRT on all finished revisions, wrong ones too", "unfiltered"),
    "wrong_only": revised("SRT on revisions of wrong answers alone", "wrong_only"),
    "no_srt": Method("phase 2 on the base", NO_SRT, "sd_zero"),
    "no_srt_long": Method(
        "the same, as many answers", with_flags(NO_SRT, " --steps 130"), "sd_zero"
    ),
    "forward": distilled("phase 2 by forward KL", " --kl forward"),
    "mixed": distilled("phase 2 by mixed KL", " --kl mixed"),
    "top_64": distilled("by mixed KL on the top 64", " --kl mixed", "top_k_renormalised"),
    "neutral": distilled("phase 2, “rephrase” for both rewards", patch="neutral"),
    "inverted": distilled("phase 2, P_r of the other reward", patch="inverted"),
    "rounds_2": distilled("phase 2, two rounds", " --rounds 2"),
    "rounds_3": distilled("phase 2, three rounds", " --rounds 3"),
    "long": distilled("phase 2, one round as long as three", " --steps 150"),
}
for name in ("grpo", "no_srt", "no_srt_long"):  # they sample nothing in phase 1
    METHODS[name].sampled = ("sd_zero",)
for name, limit in (("rft", "2080"), ("sdft", "1280")):
    METHODS[name].commands = [c.replace("{limit}", limit) for c in METHODS[name].commands]


def on_code(name, rate=""):
    """The same in the second domain, with the rates found for the first, or phase 2 at another."""
    method = METHODS[name]
    commands = [c.replace("{sd_zero}", rate or "{sd_zero}") for c in method.commands]
    commands = [c.replace(".py", ".py --allow-code") for c in commands]
    commands[0] += " --data data/code"
    label = f"short functions, {method.label}" + f", at {rate}" * bool(rate)
    new = replace(method, label=label, commands=commands, domain="code")
    METHODS[f"code_{name}" + f"_{rate}" * bool(rate)] = new


for which in "base rft srt sd_zero no_srt sd_zero:1e-4 sd_zero:5e-5 no_srt:1e-4".split():
    on_code(*which.split(":"))
on_code("no_srt_long", "1e-4")

BIT = {  # what the teacher of phase 2 is told
    "base": ("base", None),
    "srt": ("SRT: phase 1", None),
    "true": ("phase 2 on the base, the true P_r", None),
    "one": ("phase 2 on the base, “rephrase” for both rewards", "neutral"),
    "opposite": ("phase 2 on the base, P_r of the other reward", "inverted"),
}


def on_regime(regime, name):
    """With another base: 800 problems and 03's own rate for phase 1; phase 2 on the base, 40 steps
    at 2e-4. All but the teacher of phase 2 is told the truth: that of 02, 03 and 05, too."""
    label, patch = BIT[name]
    method = METHODS[name if name in METHODS else "no_srt"]
    commands = [c.replace("{sd_zero}", "2e-4 --steps 40") for c in method.commands]
    commands = [c.replace(" --lr {srt}", "") for c in commands]
    commands[0] += f" --limit 800 --model data/{regime}/base"
    how = {"label": f"{regime}, {label}", "commands": commands, "patch": patch, "domain": regime}
    METHODS[f"{regime}_{name}"] = replace(method, **how)


REGIMES = "obedient", "unasked"
for regime in REGIMES:
    for name in BIT:
        on_regime(regime, name)

# the paper's claim | metric | the method that has more of it > that has less | what it says
CLAIMS = """
C1 | accuracy | sd_zero > srt | SD-Zero is better than SRT
C1 | accuracy | srt > rft | SRT is better than RFT (which had more answers)
C1 | accuracy | srt > grpo | SRT is better than GRPO (which had more answers)
C1 | accuracy | sd_zero > rft | SD-Zero is better than RFT
C1 | accuracy | sd_zero > grpo | SD-Zero is better than GRPO
C1 | accuracy | sd_zero > sdft | SD-Zero is better than SDFT
C1 | accuracy | rft > base | RFT is better than the base
C1 | accuracy | grpo > base | GRPO is better than the base
C2 | correction_rate | srt > base | SRT mends more of its wrong answers than the base
C2 | correction_rate | sd_zero > srt | SD-Zero mends more of its wrong answers than SRT
C3 | mean_tokens | srt > base | SRT's answers are longer than the base's
C3 | mean_tokens | srt > sd_zero | SD-Zero's answers are shorter than SRT's
C4 | accuracy | srt > generation_only | both SRT losses are better than L_generation alone
C4 | accuracy | srt > revision_only | both SRT losses are better than L_revision alone
C4 | correction_rate | srt > generation_only | both SRT losses mend more than L_generation alone
C4 | correction_rate | srt > revision_only | both SRT losses mend more than L_revision alone
C5 | accuracy | sd_zero > no_srt | phase 2 needs phase 1
C5 | accuracy | sd_zero > no_srt_long | phase 2 needs phase 1, at the same number of answers
C6 | kl | srt > srt | KL sits in fewer tokens of wrong answers than of right ones
C7 | accuracy | rounds_2 > sd_zero | a second round, the teacher synchronised, adds
C7 | accuracy | rounds_3 > rounds_2 | a third round adds
C7 | accuracy | rounds_3 > long | three rounds are better than one as long
C8 | pass_at_k | srt > base | pass@k rises too: SRT over the base
C8 | pass_at_k | sd_zero > srt | pass@k rises too: SD-Zero over SRT
C9 | accuracy | srt > unfiltered | unfiltered revisions hurt
C10 | phrases | srt > base | SRT says more control phrases than the base
C10 | phrases | srt > sd_zero | SD-Zero says fewer control phrases than SRT
C1 | accuracy | code_sd_zero > code_srt | functions: SD-Zero is better than SRT
C1 | accuracy | code_srt > code_rft | functions: SRT is better than RFT
C1 | accuracy | code_sd_zero > code_rft | functions: SD-Zero is better than RFT
C2 | correction_rate | code_srt > code_base | functions: SRT mends more than the base
C3 | mean_tokens | code_srt > code_sd_zero | functions: SD-Zero's are shorter than SRT's
C5 | accuracy | code_sd_zero > code_no_srt | functions: phase 2 needs phase 1
C1 | accuracy | code_sd_zero_1e-4 > code_srt | functions, 1e-4: SD-Zero is better than SRT
C1 | accuracy | code_sd_zero_1e-4 > code_rft | functions, 1e-4: SD-Zero is better than RFT
C3 | mean_tokens | code_srt > code_sd_zero_1e-4 | functions, 1e-4: SD-Zero's are shorter
C5 | accuracy | code_sd_zero_1e-4 > code_no_srt_1e-4 | functions, 1e-4: phase 2 needs phase 1
C5 | accuracy | code_sd_zero_1e-4 > code_no_srt_long_1e-4 | functions, 1e-4: and at as many answers
– | accuracy | sd_zero > neutral | the true P_r is better than one P_r for both
– | accuracy | sd_zero > inverted | the true P_r is better than the other reward's
bit | accuracy | obedient_srt > obedient_base | obedient: phase 1 is better than the base
bit | accuracy | obedient_true > obedient_base | obedient: phase 2, told the truth, learns
bit | accuracy | obedient_true > obedient_one | obedient: the truth is better than one P_r for both
bit | accuracy | obedient_one > obedient_opposite | obedient: one P_r is better than the opposite
bit | accuracy | obedient_base > obedient_opposite | obedient: told the opposite, it unlearns
bit | accuracy | unasked_srt > unasked_base | unasked: phase 1 is better than the base
bit | accuracy | unasked_true > unasked_base | unasked: phase 2, told the truth, learns
bit | accuracy | unasked_true > unasked_one | unasked: the truth is better than one P_r for both
bit | accuracy | unasked_one > unasked_opposite | unasked: one P_r is better than the opposite
"""
CLAIMS = [re.split(r" \| | > ", line) for line in CLAIMS.strip().splitlines()]
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
    return {"S": S, "P": S / f"srt-{rates.get('srt')}", "O": S / own, "seed": seed, **rates}


def run(name, seed, out, rates, split="test", miniature=False):
    """One method with one seed: its commands, then 05. Returns what is filed under data/claims."""
    method, at = METHODS[name], places(name, seed, out, rates)
    evaluate = f"05_eval.py --from {method.run} --checkpoints {method.checkpoint} --split "
    evaluated, looked_at = (at["S"] / f"eval-{part}-{at['O'].name}" for part in (split, "readings"))
    commands = [*method.commands, f"{evaluate}{split}{DOMAINS[method.domain]} --out {evaluated}"]
    if method.domain in REGIMES:
        few = "--limit 200 --n 1 --no-greedy --no-revise"
        commands.append(f"{evaluate}validation {few} --out {looked_at}")
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
    failed = file_what_is_missing(None, *what)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        todo = [pool.submit(file_what_is_missing, seed, *what) for seed in range(seeds)]
        failed += sum((future.result() for future in todo), [])
    if failed:
        sys.exit("\n".join(["failed, and tried again by the same command:", *failed]))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, default=3, help="so many, from 0; 0: only write the tables")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="seeds at a time")
    p.add_argument("--out", type=Path, default=Path("runs/claims"), help="a folder per seed below")
    p.add_argument("--check", action="store_true", help="run nothing; compare with what is filed")
    p.add_argument("--miniature", action="store_true", help="tiny; files its results below --out")
    args = p.parse_args(argv)
    out = args.out.resolve()
    if args.check:
        with tempfile.TemporaryDirectory() as scratch:
            differs = report.check(FILED, METHODS, CLAIMS, Path(scratch))
        sys.exit(f"not what data/claims gives: {differs}; see --seeds 0" if differs else 0)
    filed = out / "filed" if args.miniature else FILED
    if args.seeds:
        run_all(args.methods, args.seeds, filed, out, args.jobs, args.miniature)
    report.write(filed, METHODS, CLAIMS, out if args.miniature else ROOT)


if __name__ == "__main__":
    main()
