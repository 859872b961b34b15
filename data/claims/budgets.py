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
from report import read_json  # noqa: E402

REGIMES, FOLDER = ("obedient", "long"), FILED / "budgets"
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


def key(choice):
    return f"{choice[0]:g}, {choice[1]}"


def curve(run, choice, seed, budgets, split):
    """Train REGIME_METHOD by `choice`, look at the students: [{answers, accuracy, tokens}]."""
    regime, _, name = run.partition("_")
    rate, phase_1 = choice
    problems = common.load_problems(ROOT / ("data/long" if regime == "long" else "data"), split)
    found, once = [], METHODS[name][3]
    for budget in budgets[-1:] if once else budgets:
        folder = ROOT / f"runs/budgets/{run}-{rate:g}-{phase_1}-{split}-{seed}/{budget}"
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


def file_json(path, value):
    common.write_whole(path, json.dumps(value, indent=1) + "\n")
    print(f"{path.stem}: {value}", flush=True)


def search_all(pool, names):
    """File the searches that are not yet; {REGIME_METHOD: the best choice}."""
    todo, best = [], {}
    for name in names:
        method, tried = name.partition("_")[2], read_json(FOLDER / f"search-{name}.json")
        left = [choice for choice in choices(method) if key(choice) not in tried]
        how = 0, (SEARCHED,), "validation"
        todo += [(name, choice, pool.submit(curve, name, choice, *how)) for choice in left]
    for name, choice, future in todo:
        path = FOLDER / f"search-{name}.json"
        file_json(path, read_json(path) | {key(choice): future.result()[-1]["accuracy"]})
    for name in names:
        tried = read_json(FOLDER / f"search-{name}.json")
        best[name] = max(choices(name.partition("_")[2]), key=lambda choice: tried[key(choice)])
    return best


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--regimes", nargs="+", default=REGIMES, choices=REGIMES)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    args = p.parse_args(argv)
    os.chdir(ROOT)
    todo, how = [], (args.jobs, get_context("spawn"), torch.set_num_threads, (1,))
    with ProcessPoolExecutor(*how) as pool:
        best = search_all(pool, [f"{r}_{method}" for r in args.regimes for method in METHODS])
        for name, choice in best.items():
            for seed in range(args.seeds):
                path = FOLDER / f"{name}-{seed}.json"
                if not path.exists():
                    future = pool.submit(curve, name, choice, seed, BUDGETS, "test")
                    todo.append((path, choice, future))
        for path, choice, future in todo:
            rate = {"rate": choice[0]} | ({"phase_1": choice[1]} if "sd_zero" in path.stem else {})
            file_json(path, {**rate, "curve": future.result()})


if __name__ == "__main__":
    main()
