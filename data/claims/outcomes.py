"""The two-outcome model of phase 2, tested: where an answer can go right (R) or wrong (W), does
what one batch of answers shows before training foretell what training does?

It can at three kinds of tokens: the first that tells the right reading of an edit (in functions, of
a step) from the usual mistake; the first word of a line, which says which edit comes next; and,
after the last edit, the box that ends the attempt, or one more edit. There, in answers y of the
student at its start, z = log π(R) − log π(W) given x, y_<t, and T, the same of the teacher, which
has read y: T(R|R) where y went right, T(R|W) where it went wrong. At fixed answers reverse KL pulls
z to the mean of T over them. So the drift foretold is mean(T) − mean(z), choice by choice; the
drift that came is the change of mean(z), on the same answers, after 5 and 20 steps. On *long*,
*longer* and functions (*code*: readings alone) phase 2 starts from SRT.

    outcomes/REGIME_TOLD.json   {choice: {n, p, z, T_R, T_W, foretold, after_5, after_20}}
    outcomes/doubts.json        {base or SRT: {edits a problem: {what was read: share}}}
    outcomes/pointing.json      {regime: {answers, kl_on_it, kl_by_line_end, chance}}

The second file is about the long base. Of the tokens of right answers that the generator is sure of
it has the share that the reviser doubts (04's check), by the length of problems: does it come from
two copies of an answer in one text, from phase 1, or from revisions that are longer than those that
the base has read (its texts have 480 tokens: a second attempt at seven edits rarely fits)? The
third: in wrong answers of SRT, is the token at which telling the truth changes most, by
KL(told the truth ‖ told the opposite), the first wrong digit?

    python data/claims/outcomes.py    # after claims.py: it needs its runs of seed 0; minutes
"""

import json
import random
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
import analyses  # noqa: E402
from claims import FILED  # noqa: E402
from conftest import ROOT, common, completion_logits, load, rows_of  # noqa: E402
from methods import BIT, LONGER  # noqa: E402

STEPS, ANSWERS, BOX = (5, 20), 256, "\\boxed"


def choices(row, edits, tokenizer):
    """[(choice, did y go right?, place of the token that says so, its id for R, its ids for W)] of
    the first attempt: how an edit is read, and see next_edits()."""
    ends = np.cumsum([len(tokenizer.decode([t])) for t in row["response_ids"]])
    found = next_edits(row, edits, tokenizer, ends)
    for name, right, usual, stated in analyses.lines_of(row, edits):
        at = next((i for i, (a, b) in enumerate(zip(right, usual)) if a != b), None)
        if at is not None and stated[0] in (right, usual):
            place = int(np.searchsorted(ends, stated.start() + at, "right"))
            r, w = (tokenizer.convert_tokens_to_ids(reading[at]) for reading in (right, usual))
            found.append((name, stated[0] == right, place, r, [w]))
    return found


def readings_of_program(row, ops, tokenizer):
    """The same of a program, of its steps alone: lines that are right or the usual mistake."""
    steps = re.search("it should (.*)\\.$", row["problem"])[1].split(", then ")
    program, found = re.match("(?s)```python.*?(```|$)", row["response"]), []
    for step, stated in zip(steps, re.finditer("(?m)^ *xs = (.*)$", program[0] if program else "")):
        n = re.search(r"\d+|$", step)[0]
        name = next(name for name in ops if step in (name, name.format(n=n)))
        readings = [reading.format(n=n) for reading in ops[name][:2]]
        if stated[1] not in readings:
            break
        before = row["response"][: stated.start(1)]
        r, w = (tokenizer(before + reading)["input_ids"] for reading in readings)
        at = next(i for i, (a, b) in enumerate(zip(r, w)) if a != b)
        if row["response_ids"][: at + 1] in (r[: at + 1], w[: at + 1]):
            found.append((name, stated[1] == readings[0], at, r[at], [w[at]]))
    return found


def next_edits(row, edits, tokenizer, ends):
    """The same of which edit comes next, by its first word, and of the box after the last."""
    asked = re.match(r"Start with \d+: (.*?)\.", row["problem"])[1].split(", then ")
    words, found, at = {name.split()[0] for name in edits}, [], 0
    for step, name in enumerate([*asked, BOX], 1):
        said = re.compile(r"(Take \d+ and )?([a-z ]+|\\boxed)").match(row["response"], at)
        if not said:
            break
        space = " " if said[1] else ""  # which the token has with it
        ids = {word: tokenizer(space + word)["input_ids"][0] for word in words}
        ids |= {} if said[1] else {BOX: tokenizer(BOX)["input_ids"][0]}
        r = ids.pop(name.split()[0], None)
        place = int(np.searchsorted(ends, said.start(2), "right"))
        if r is not None:
            what = "the end" if name == BOX else f"edit {step}"
            right = said[2].split()[0] == name.split()[0]
            found.append((what, right, place, r, [*ids.values()]))
        at = row["response"].find("\n", at) + 1
        if said[2] != name or not at:
            break
    return found


@torch.no_grad()
def log_odds(stage, model, rows, prefix, chosen):
    """log π(R) − log π(W) at each choice of each row, after the row's `prefix`."""
    found, head = [], model.get_output_embeddings()
    for row, choices_of_row in zip(rows, chosen):
        logits = head(stage.hidden_after(prefix, [row], model))  # [N, V]
        for _, _, at, r, w in choices_of_row:
            found.append((logits[at, r] - logits[at, w].logsumexp(0)).item())
    return np.array(found)


def outcomes(regime, told, out):
    """What is filed of a regime and a teacher."""
    stage = load("04_self_distill.py", BIT[told][1])
    run = out / ("seed0" if regime == "truthful" else f"{regime}_seed0")
    start, base, data, flags = "base", ROOT / f"data/{regime}/base", "data", ""
    read, readings = choices, load("data/make_data.py").EDITS
    if regime in ("long", "longer", "code"):
        run, start, data, flags = next(run.glob("srt-*")), "srt", "data/long", LONGER
        base = run / "srt"
    if regime == "code":
        data, flags = "data/code", " --allow-code"
        read, readings = readings_of_program, load("data/make_code.py").OPS
    tokenizer, cpu = common.load_tokenizer(base), torch.device("cpu")
    model = common.load_model(base, tokenizer, cpu)
    problems = common.load_problems(ROOT / data, "validation", ANSWERS, "bubblewrap")
    how = {"seed": 0, "max_new_tokens": 480, "temperature": 1.0, "top_p": 1.0, "batch_rows": 384}
    how = SimpleNamespace(p_r=common.P_R, out=run, **how)
    rows = stage.rollouts(model, tokenizer, problems, 0, how)
    chosen = [read(row, readings, tokenizer) for row in rows]
    z, T = (log_odds(stage, model, rows, p, chosen) for p in ("generator", "reviser"))
    after = {}
    for steps in STEPS:
        own = run / f"{told}-{steps}-steps"
        said = f"--from {run} --out {own} --start {start} --lr 2e-4 --steps {steps}{flags}"
        stage.main(said.split())
        student = common.load_model(own / "sd_zero", tokenizer, cpu)
        after[f"after_{steps}"] = log_odds(stage, student, rows, "generator", chosen) - z
    names, went_right = (np.array(x) for x in list(zip(*sum(chosen, [])))[:2])
    filed = {}
    for what in sorted(set(names)):
        of = names == what
        r, w = of & went_right, of & ~went_right
        means = {"p": went_right[of], "z": z[of], "T_R": T[r], "T_W": T[w]}
        means |= {"foretold": (T - z)[of]} | {name: v[of] for name, v in after.items()}
        means = {name: round(float(v.mean()), 3) for name, v in means.items() if len(v)}
        filed[what] = {"n": int(of.sum()), **means}
    return filed


@torch.no_grad()
def doubts(folder, edits, problems=96):
    """{what the reviser has read before y: of the sure tokens of right answers, the share that it
    doubts}, for problems of so many edits."""
    stage, digits = load("04_self_distill.py"), load("data/make_data.py")
    tokenizer, rng, asked = common.load_tokenizer(folder), random.Random(5), []
    model = common.load_model(folder, tokenizer, torch.device("cpu"))
    for i in range(problems):
        x = digits.make_long_problem(rng, edits)
        x = {"id": str(i), "problem": digits.problem_text(*x), "answer": digits.solve(*x)}
        asked.append({**x, "kind": "math"})
    how = {"seed": 0, "max_new_tokens": 480, "temperature": 1.0, "top_p": 1.0, "batch_rows": 384}
    how = SimpleNamespace(p_r=common.P_R, out=folder, **how)
    rows = stage.rollouts(model, tokenizer, asked, 0, how)
    for row, other in zip(rows, [*rows[1:], rows[0]]):
        x, y, z = row["problem"], row["response_ids"], other["response_ids"]
        row["told the truth"] = row["reviser"]
        row["told the opposite"] = common.revision_ids(tokenizer, x, y, 0)
        row["another problem's answer"] = common.revision_ids(tokenizer, x, z, 1)
    right, head, found = [r for r in rows if r["reward"]], model.get_output_embeddings(), {}
    y = torch.tensor(sum((r["response_ids"] for r in right), []))
    log_p = stage.log_probs(head, stage.hidden_after("generator", right, model), y)
    sure = log_p.exp() > stage.SURE
    for read in ("told the truth", "told the opposite", "another problem's answer"):
        log_t = stage.log_probs(head, stage.hidden_after(read, right, model), y)
        doubted = (sure & (log_t < log_p - stage.DOUBT)).sum() / sure.sum()
        found[read] = round(doubted.item(), 4)
    return {"right answers": len(right), **found}


def doubts_by_length(folder):
    return {edits: doubts(folder, edits) for edits in (3, 5, 7)}


@torch.no_grad()
def pointing(regime, out):
    """Where the KL of the truth against the opposite is largest, of three seeds' wrong answers."""
    stage, found = load("04_self_distill.py"), []
    for run in sorted(out.glob(f"{regime}_seed?")):
        folder = next(run.glob("srt-*")) / "srt"
        tokenizer = common.load_tokenizer(folder)
        model = common.load_model(folder, tokenizer, torch.device("cpu"))
        rows = rows_of(run / f"eval-test-{regime}_srt/eval.jsonl")
        rows = [row for row in rows if row.get("kl") and not row["reward"]]
        for row in rows:
            y, both = row["response_ids"], []
            for told in (0, 1):
                prefix = common.revision_ids(tokenizer, row["problem"], y, told)
                both.append(completion_logits(model, [prefix], [y]))
            row["kl"] = stage.token_kl(*both).tolist()
        found.append(analyses.mistakes(rows, tokenizer))
    n = [seed["answers"] for seed in found]
    hits = {key: [seed[key] for seed in found] for key in ("kl_on_it", "kl_by_line_end", "chance")}
    return {"answers": sum(n), **{k: float(np.average(v, weights=n)) for k, v in hits.items()}}


def file_once(name, make):
    """File what make() returns, if it is not there yet."""
    path = FILED / f"outcomes/{name}.json"
    if not path.exists():
        common.write_whole(path, json.dumps(make(), indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = ROOT / "runs/claims"
    for regime in ("truthful", "obedient", "unasked", "long", "longer", "code"):
        for told in ("true", "one", "opposite"):
            file_once(f"{regime}_{told}", partial(outcomes, regime, told, runs))
    folders = {"base": ROOT / "data/long/base"}
    folders["SRT"] = next((runs / "long_seed0").glob("srt-*/srt"))
    file_once("doubts", lambda: {name: doubts_by_length(f) for name, f in folders.items()})
    both = "obedient", "long"
    file_once("pointing", lambda: {regime: pointing(regime, runs) for regime in both})
