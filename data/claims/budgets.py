"""What an answer buys: accuracy on test problems against all answers sampled for training, those of
phase 1, of revisions and of demonstrations, too.

    data/claims/budgets/REGIME_METHOD-SEED.json    {rate, curve: [{answers, accuracy, tokens}, …]}
    data/claims/budgets/search-REGIME_METHOD.json  {choice: accuracy of validation answers}, seed 0

Each method has three learning rates on validation problems, with seed 0 and SEARCHED answers; how
much of them SD-Zero spends on phase 1 is chosen there, too, at the middle rate: two tries more. Its
budgets are met to 6%, but for the least, which phase 1 makes 1,140. Where a method allows it a
curve is one training, looked at on its way; RFT and SDFT train once for each budget.

    python data/claims/budgets.py --regimes obedient --seeds 3    # goes on where it stopped; hours
"""

import argparse
import json
import os
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from claims import FILED, count, patched_stage  # noqa: E402
from conftest import ROOT, common, load  # noqa: E402
from methods import DOMAINS, LONGER  # noqa: E402

BUDGETS, SEARCHED = (1024, 2048, 4096, 8192), 4096
ANSWER = "01_generate.py --seed {seed} --limit {first} {regime} --out {S}", "02_verify.py --out {S}"
FOUR = ANSWER[0].replace("--limit", "--n 4 --limit"), ANSWER[1]
PHASE_2 = "04_self_distill.py --from {S} --out {O} --lr {rate} --steps {steps} --save-every 4"
FROM_BASE = PHASE_2 + " --start base"
METHODS = {  # commands, patch of the last, middle learning rate, does a training go by all budgets?
    "rft": ([*FOUR, "03_revise_sft.py --from {S} --out {O} --lr {rate}"], "rft", 8e-4, False),
    "sdft": ([*FOUR, FROM_BASE], "sdft", 4e-4, False),
    "grpo": ([*ANSWER, FROM_BASE], "grpo", 2e-4, True),
    "no_srt": ([*ANSWER, FROM_BASE], None, 2e-4, True),
    "sd_zero": ([*ANSWER, "03_revise_sft.py --out {S}", PHASE_2], None, 2e-4, True),
}
PHASE_1 = 100, 200, 400  # problems of SD-Zero's phase 1: about 3.5 answers each
COUNTED = {"rft": ["responses.jsonl"], "sdft": ["responses.jsonl"], "grpo": [], "no_srt": []}
COUNTED["sd_zero"] = ["responses.jsonl", "revisions.jsonl"]


def choices(name):
    """What is searched: (learning rate, problems of phase 1)."""
    middle = METHODS[name][2]
    rates = [(rate, PHASE_1[1]) for rate in (middle / 2, middle, 2 * middle)]
    return rates + [(middle, n) for n in PHASE_1[::2] if name == "sd_zero"]


def sizes(name, budget, phase_1):
    """(problems that are answered first, steps of phase 2) for so many answers."""
    if name == "rft":
        return budget // 4, 0
    if name == "sdft":
        return budget // 32 * 5, budget // 512 * 3  # 5/8 are demonstrations, four a problem
    return phase_1 if name == "sd_zero" else 64, budget // 64


def curve(regime, name, choice, seed, budgets, split, out):
    """Train by `choice` and look at the students: [{answers, accuracy, tokens}], a budget each."""
    rate, phase_1 = choice
    problems = common.load_problems(ROOT / ("data/long" if regime == "long" else "data"), split)
    found, once = [], METHODS[name][3]
    for budget in budgets[-1:] if once else budgets:
        folder = out / f"{regime}_{name}-{rate:g}-{phase_1}-{split}-{seed}" / str(budget)
        first, steps = sizes(name, budget, phase_1)
        at = {"S": folder / "first", "O": folder, "steps": steps}
        at |= {"seed": seed, "regime": DOMAINS[regime][1], "rate": f"{rate:g}", "first": first}
        for answers, student in train(name, at, budgets):
            found.append({"answers": answers, **look(student, problems, seed)})
    return found


def train(name, at, budgets):
    """Run the commands; [(answers sampled, folder of the model)]: of a training that goes by all
    budgets at the saves nearest to each, else at its end."""
    commands, patch, _, once = METHODS[name]
    at["O"].mkdir(parents=True, exist_ok=True)
    before, ends = 0, []
    longer = LONGER.split() if "data/long" in at["regime"] else []
    with open(at["O"] / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        for command in commands:
            script = command.split()[0]
            module = load(script, patch if script == patched_stage(patch) else None)
            if script.startswith("04"):
                before = sum(count(at["S"], artifact)[0] for artifact in COUNTED[name])
                if once:
                    ends = sorted({max(1, round((b - before) / 256)) * 4 for b in budgets})
                    at["steps"] = ends[-1] + 1  # so that the last is saved, too
                    keep_students(module, ends)
            flags = shlex.split(command.format(**at))[1:]
            module.main(flags if script.startswith("02") else flags + longer)
    if name == "rft":
        return [(count(at["S"], "responses.jsonl")[0], at["O"] / "srt")]
    if name == "sdft":
        return [(before + count(at["O"], "sd_zero")[0], at["O"] / "sd_zero")]
    return [(before + 64 * end, at["O"] / f"after-{end}") for end in ends]


def keep_students(stage, steps):
    """04 keeps a copy of its student after these of its steps, where it saves its state."""
    save = stage.save

    def and_keep(folder, history, tokenizer, args, state, last):
        if len(history) in steps:
            common.save_model(state["model"], tokenizer, folder.with_name(f"after-{len(history)}"))
        save(folder, history, tokenizer, args, state, last)

    stage.save = and_keep


def look(folder, problems, seed):
    """Accuracy and length of one sampled answer to each problem."""
    tokenizer = common.load_tokenizer(folder)
    model = common.load_model(folder, tokenizer, torch.device("cpu"))
    prompts = [common.prompt_ids(tokenizer, x["problem"]) for x in problems]
    seeds = [common.row_seed(seed, "budgets", x["id"]) for x in problems]
    answers = common.sample(model, prompts, seeds, 480)
    texts = [tokenizer.decode(y, skip_special_tokens=True) for y in answers]
    right = [reward for reward, _, _ in common.verify_all(problems, texts)]
    tokens = sum(map(len, answers)) / len(answers)
    return {"accuracy": sum(right) / len(right), "tokens": round(tokens, 1)}


# ---------------------------------------------------------------- all


def searched(regime, name, choice, out):
    found = curve(regime, name, choice, 0, (SEARCHED,), "validation", out)
    return found[-1]["accuracy"]


def key(choice):
    return f"{choice[0]:g}, {choice[1]}"


def read(path):
    return json.loads(path.read_text()) if path.exists() else {}


def file_json(path, value):
    common.write_whole(path, json.dumps(value, indent=1) + "\n")
    print(f"{path.stem}: {value}", flush=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    both = ["obedient", "long"]
    p.add_argument("--regimes", nargs="+", default=both, choices=both)
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    p.add_argument("--out", type=Path, default=ROOT / "runs/budgets")
    p.add_argument("--filed", type=Path, default=FILED / "budgets")
    args = p.parse_args(argv)
    out = args.out.resolve()
    os.chdir(ROOT)
    args.filed.mkdir(parents=True, exist_ok=True)
    wanted = [(regime, name) for regime in args.regimes for name in args.methods]
    searches = {pair: args.filed / "search-{}_{}.json".format(*pair) for pair in wanted}
    how = args.jobs, get_context("spawn"), torch.set_num_threads, (1,)
    with ProcessPoolExecutor(*how) as pool:
        todo = []
        for pair, path in searches.items():
            for choice in choices(pair[1]):
                if key(choice) not in read(path):
                    todo.append((path, choice, pool.submit(searched, *pair, choice, out)))
        for path, choice, future in todo:
            file_json(path, read(path) | {key(choice): future.result()})
        todo = []
        for pair, path in searches.items():
            found = {choice: read(path)[key(choice)] for choice in choices(pair[1])}
            best = max(found, key=found.get)
            for seed in range(args.seeds):
                path = args.filed / "{}_{}-{}.json".format(*pair, seed)
                if not path.exists():
                    run = pool.submit(curve, *pair, best, seed, BUDGETS, "test", out)
                    todo.append((path, best, run))
        for path, best, future in todo:
            rate = {"rate": best[0]} | ({"phase_1": best[1]} if "sd_zero" in path.stem else {})
            file_json(path, {**rate, "curve": future.result()})


if __name__ == "__main__":
    main()
