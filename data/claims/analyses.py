"""What only a claim needs, from rows of eval.jsonl: the columns of metrics_of(), whether a wrong
answer's KL points to its first mistake, and whether a program is on its task."""

import math
import re

import numpy as np

from conftest import common, load


def metrics_of(rows, p_r):
    """Of one checkpoint's rows, greedy ones left out; null over nothing. phrases: those said after
    an attempt; wrong_after_*: of those after a wrong (right) one, how many say "wrong"."""
    rows, by_problem = [row for row in rows if not row["greedy"]], {}
    for row in rows:
        by_problem.setdefault(row["id"], []).append(row["reward"])
    n, said = len(next(iter(by_problem.values()))), judgements(rows, p_r)
    right = [sum(rewards) for rewards in by_problem.values()]
    asked = [row for row in rows if row.get("kl") and row["finished"]]
    return {
        "k": n,
        "pass_at": [mean([pass_at_k(n, c, k) for c in right]) for k in range(1, n + 1)],
        "median_tokens": float(np.median([len(row["response_ids"]) for row in rows])),
        "phrases": len(said) / len(rows),
        "phrases_true": mean([says == true for says, true in said]),
        "wrong_after_wrong": mean([says == 0 for says, true in said if true == 0]),
        "wrong_after_right": mean([says == 0 for says, true in said if true == 1]),
        "kl_wrong": spread_of([row["kl"] for row in asked if not row["reward"]]),
        "kl_right": spread_of([row["kl"] for row in asked if row["reward"]]),
    }


def mean(values):
    return float(np.mean(values)) if len(values) else None


def pass_at_k(n, c, k):
    """Chance that k of n answers, c of them right, drawn without replacement, hold a right one."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def judgements(rows, p_r):
    """(said, true) of each control phrase after an attempt with an answer: 1 right, 0 wrong."""
    attempts = []  # (row, said, text of the attempt before)
    for row in rows:
        start, found = 0, []
        for bit in (0, 1):
            found += [(m.start(), bit) for m in re.finditer(re.escape(p_r[bit]), row["response"])]
        for at, said in sorted(found):
            attempts.append((row, said, row["response"][start:at]))
            start = at + len(p_r[said])
    graded = common.verify_all([row for row, _, _ in attempts], [text for _, _, text in attempts])
    pairs = zip(attempts, graded)
    return [(said, true) for (_, said, _), (true, verdict, _) in pairs if verdict != "no_answer"]


def spread_of(kls):
    """Means over answers, each a list of nats a token; null without any.

    nats: of a whole answer; top: the share of them in the 5, 10, 20, 50% of its tokens that have
    the most; position: nats a token in each tenth of the answer.
    """
    answers = []
    for values in kls:
        v = np.maximum(values, 0)  # rounding can make a KL slightly negative
        if v.sum() > 0:
            share = np.append(0, np.sort(v)[::-1].cumsum()) / v.sum()
            top = np.interp(np.array([0.05, 0.1, 0.2, 0.5]) * len(v), range(len(v) + 1), share)
            cuts = [len(v) * i // 10 for i in range(11)]
            tenths = [v[a : max(b, a + 1)].mean() for a, b in zip(cuts, cuts[1:])]
            answers.append((v.sum(), top, tenths))
    if not answers:
        return None
    nats, top, position = (np.mean(x, 0) for x in zip(*answers))
    top, position = top.tolist(), position.tolist()
    return {"answers": len(answers), "nats": float(nats), "top": top, "position": position}


def first_mistake(row, edits):
    """(start of the last attempt, of its first wrong digit, end of that line), in characters.

    None if the mistake cannot be known. Known are attempts whose lines apply the problem's edits in
    turn, each to the number that the line before it states.
    """
    number, names = re.match(r"Start with (\d+): (.*?)\.", row["problem"]).groups()
    phrase = "|".join(map(re.escape, common.P_R.values()))
    begin = at = max([0, *(m.end() for m in re.finditer(rf"({phrase})\s*", row["response"]))])
    lines = row["response"][begin:].splitlines(keepends=True)
    for name, line in zip([*names.split(", then "), "boxed"], lines):
        stated = list(re.finditer(r"\d+", line))
        copied = all(m[0] == number for m in stated[:-1])  # "Take 37512 and reverse, which ..."
        if name not in line or not stated or len(number) < 2 or not copied:
            return None
        last, right = stated[-1], edits[name][0](number) if name in edits else number
        if last[0] != right:
            wrong = [i for i, (a, b) in enumerate(zip(last[0], right)) if a != b]
            same = wrong[0] if wrong else min(len(last[0]), len(right))
            return begin, at + last.start() + same, at + len(line) - 1
        number, at = last[0], at + len(line)
    return None


def lines_of(row, edits):
    """Of the first attempt's lines that keep to the problem: (edit, the right reading of the number
    that the line before states, the usual mistake, the match of what this line states)."""
    number, names = re.match(r"Start with (\d+): (.*?)\.", row["problem"]).groups()
    end = 0
    for name, line in zip(names.split(", then "), row["response"].splitlines(keepends=True)):
        begin, end = end, end + len(line)
        stated = list(re.compile(r"\d+").finditer(row["response"], begin, end))
        if name not in line or not stated or len(number) < 2:
            break
        yield name, *(reading(number) for reading in edits[name][:2]), stated[-1]
        number = stated[-1][0]


def readings(rows):
    """Of first attempts, edit by edit, where right and usual reading differ: how many read it
    rightly, as usual, and otherwise."""
    edits = load("data/make_data.py").EDITS
    counts = {name: [0, 0, 0] for name in edits}
    for row in rows:
        for name, right, usual, stated in lines_of(row, edits):
            if right != usual:
                counts[name][[right, usual, stated[0]].index(stated[0])] += 1
    return counts


def mistakes(rows, tokenizer):
    """Of wrong answers' last attempts: is the token with the most KL (the largest KL reward) the
    first mistake, or before the next line? For the first domain, whose mistakes can be known."""
    edits, found = load("data/make_data.py").EDITS, []
    for row in rows:
        known = row["kind"] == "math" and row.get("kl") and row["finished"] and not row["reward"]
        place = first_mistake(row, edits) if known else None
        if place:
            ends = np.cumsum([len(tokenizer.decode([t])) for t in row["response_ids"]])
            attempt = [j for j, end in enumerate(ends) if end > place[0]]
            inside = [j for j in attempt if place[1] < ends[j] <= place[2] + 1]
            inside = inside or [len(ends) - 1]  # the end came too early
            kl = max(attempt, key=row["kl"].__getitem__)
            reward = max(attempt, key=row["kl_reward"].__getitem__)
            chance = len(inside) / len(attempt)
            found.append((kl == inside[0], kl in inside, reward in inside, chance))
    keys = "kl_on_it", "kl_by_line_end", "reward_by_line_end", "chance"
    means = np.mean(found, 0).tolist() if found else [None] * 4
    return {"answers": len(found), **dict(zip(keys, means))}


def off_task(rows):
    """Of sampled answers, the share that does something else than the problem asks for, in turn;
    one can be wrong and on its task. Of programs: whose lines are not, one by one, readings of the
    problem's steps, right or mistaken, with any number; else: whose first attempt is not."""
    ops, edits = load("data/make_code.py").OPS, load("data/make_data.py").EDITS
    found = []

    def pattern(text):
        return re.escape(text).replace(r"\{n\}", r"\d+")

    def readings(step):
        both = [op[:2] for name, op in ops.items() if re.fullmatch(pattern(name), step)]
        return "|".join(map(pattern, sum(both, ())))

    for row in rows:
        if row["kind"] == "code" and not row["greedy"]:
            steps = re.search("it should (.*)\\.$", row["problem"])[1].split(", then ")
            program = row["response"].split("```python")[-1]
            lines = re.findall("^ *xs = (.*)$", program, re.MULTILINE)
            fits = [re.fullmatch(readings(step), line) for step, line in zip(steps, lines)]
            found.append(len(lines) != len(steps) or not all(fits))
        elif row["problem"].startswith("Start with") and not row["greedy"]:
            kept = list(lines_of(row, edits))
            found.append(len(kept) < row["problem"].count(", then ") + 1)
    return mean(found)
