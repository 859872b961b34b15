"""Stage 5 of SD-Zero: did it learn, and what?

base, srt/ and sd_zero/ answer the test problems, verify, and revise each of their own answers once (generate-then-revise).
→ eval.jsonl     a row an answer: the fields of 01 and 02, {checkpoint, greedy}, and those of 03 for its revision; sample -1 is greedy.
                 Sample 0 also has, a number a token: kl = KL(π(· | x, y_<t) ‖ π(· | x, y, P_r, y_<t)), the checkpoint in both roles,
                 and kl_reward = log π(y_t | x, y_<t) - log π(y_t | x, y, P_r, y_<t): above 0 where the reviser would not write y_t
                 (both empty where x, y, P_r, y is longer than the model's positions)
→ summary.json   a row a checkpoint; columns below
→ stages.png     accuracy and length by stage;  token_kl.html  whole answers, tokens coloured by kl_reward; two of them on the terminal

    accuracy         avg@n: mean over n sampled answers a problem;  NAME_se: a rate's standard error, problems being the units
    mean_tokens, median_tokens, finished   of the sampled answers;  revised_accuracy: of their revisions
    pass_at_k        chance that one of k answers is right (unbiased estimate from n);  greedy: accuracy of greedy decoding
    maj_at_n         (mathematics) is the most frequent of n answers right?
    correction_rate  wrong answers that the revision makes right;  spoiling_rate: right ones that it makes wrong
    phrases          control phrases that an answer says unasked;  phrases_true: share of them that are true
    wrong_after_wrong, wrong_after_right   of the phrases said after a wrong (right) attempt, how many say "wrong"; equal means by chance
    pass_at          pass@1 to pass@n
    kl_wrong, kl_right   of finished wrong and right answers: nats an answer; top, the share of them in the 5, 10, 20, 50% of its tokens
                         that have the most; position, nats a token in each tenth of the answer

    python 05_eval.py
    python 05_eval.py --checkpoints base=data/base mine=runs/other/srt --n 8 --k 8 --eval runs/demo/eval_mine.jsonl
"""

import html
import math
import re
import time
from pathlib import Path

from common import (append_jsonl, arguments, at_least, autocast, check_ids, claim, completion_hidden, die, end_ids, finish, load_model,
                    load_problems, load_tokenizer, meta_file, micro_batches, parse, pick_device, positions, problem_file, prompt_ids,
                    read_jsonl, revision_ids, row_seed, run, SAME, sample, same_answer, SCHEMA, stop_if_ungraded, verify_all, write_json)

import numpy as np
import torch
from tqdm import tqdm


# ---------------------------------------------------------------- answers and revisions

def evaluate(name, folder, tokenizer, problems, done, path, device, args):
    """Rows of one checkpoint: n sampled answers and a greedy one for each problem; the sampled ones are revised once."""
    tasks = [(x, k) for k in range(-1, args.n) for x in problems]                   # k = -1: greedy
    if [(r["id"], r["sample"]) for r in done] != [(x["id"], k) for x, k in tasks[:len(done)]]:
        die(f"{path} does not hold these problems in their order; remove it to make it again")
    if len(done) == len(tasks):
        return done
    model, p_r = load_model(folder, tokenizer, device), {1: args.p_r_right, 0: args.p_r_wrong}

    def answer(batch, prefixes, stage, temperature):
        seeds = [row_seed(args.seed, stage, x["id"], k) for x, k in batch]          # the same noise for every checkpoint: paired
        out = sample(model, prefixes, seeds, args.max_new_tokens, temperature, args.batch_rows, progress)
        texts = [tokenizer.decode(y, skip_special_tokens=True) for y in out]
        verdicts = verify_all([x for x, _ in batch], texts)
        return [(y, text, y[-1] in end_ids(model), *verdict) for y, text, verdict in zip(out, texts, verdicts)]

    block = 4 * args.batch_rows
    start = len(done) // block * block      # a torn block is sampled again, so that an answer's neighbours are those that it would have had
    progress = tqdm(total=len(tasks) - start + sum(k >= 0 for _, k in tasks[start:]), desc=name, unit="answer")     # revisions too
    for b in range(start, len(tasks), block):
        batch, rows = tasks[b:b + block], []
        for greedy in (True, False):
            part = [(x, k) for x, k in batch if (k < 0) == greedy]
            answers = answer(part, [prompt_ids(tokenizer, x["problem"]) for x, _ in part], "eval", 0.0 if greedy else args.temperature)
            for (x, k), (y, text, finished, reward, verdict, extracted) in zip(part, answers):
                rows.append({"checkpoint": name, **x, "sample": k, "greedy": greedy, "response": text, "response_ids": y,
                             "finished": finished, "reward": reward, "verdict": verdict, "extracted": extracted})
        sampled = [r for r in rows if not r["greedy"]]
        prefixes = [revision_ids(tokenizer, r["problem"], r["response_ids"], r["reward"], p_r) for r in sampled]
        revisions = answer([(r, r["sample"]) for r in sampled], prefixes, "eval revision", args.temperature)
        for r, (y, text, finished, reward, verdict, _) in zip(sampled, revisions):
            r.update(p_r=p_r[r["reward"]], revised=text, revised_ids=y, revised_finished=finished, revised_reward=reward,
                     revised_verdict=verdict)
        first = [r for r in sampled if r["sample"] == 0]
        for r, of_row in zip(first, reviser_kl(model, tokenizer, first, p_r)):
            r.update(of_row)
        rows = rows[max(0, len(done) - b):]
        append_jsonl(path, rows)
        done = done + rows
        progress.set_postfix(right=f"{np.mean([r['reward'] for r in rows]):.0%}")
    progress.close()
    return done


@torch.no_grad()
def reviser_kl(model, tokenizer, rows, p_r):
    """{kl, kl_reward} of each row's answer, a number a token; one model is the student and, having read the answer and P_r, the teacher.

    Empty where this is longer than the model's positions.
    """
    out, head, at_once, (context, _) = [{"kl": [], "kl_reward": []}] * len(rows), model.get_output_embeddings(), 2**25 // len(tokenizer), \
        autocast(model.device)
    revisers = [revision_ids(tokenizer, r["problem"], r["response_ids"], r["reward"], p_r) for r in rows]
    length = lambda i: len(revisers[i]) + len(rows[i]["response_ids"])
    for part in micro_batches([i for i in range(len(rows)) if length(i) <= positions(model)], length, 4096):
        y = [rows[i]["response_ids"] for i in part]
        generator, reviser = [prompt_ids(tokenizer, rows[i]["problem"]) for i in part], [revisers[i] for i in part]
        kls, rewards, tokens = [], [], torch.tensor(sum(y, []), device=model.device)                                            # [N]
        with context():
            student, teacher = completion_hidden(model, generator, y), completion_hidden(model, reviser, y)                     # [N, H]
            for s, t, token in zip(student.split(at_once), teacher.split(at_once), tokens.split(at_once)):
                log_s, log_t = head(s).float().log_softmax(-1), head(t).float().log_softmax(-1)                                 # [n, V]
                kls.append((log_s.exp() * (log_s - log_t)).sum(-1))
                rewards.append((log_s - log_t).gather(-1, token[:, None])[:, 0])
        lengths = list(map(len, y))
        for i, kl, reward in zip(part, torch.cat(kls).split(lengths), torch.cat(rewards).split(lengths)):
            out[i] = {"kl": [round(v, 4) for v in kl.tolist()], "kl_reward": [round(v, 4) for v in reward.tolist()]}
    return out


# ---------------------------------------------------------------- from rows to numbers

def pass_at_k(n, c, k):
    """Chance that k of n answers, c of them right, drawn without replacement, hold a right one."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def judgements(rows, p_r):
    """(said, true) for each control phrase that one of these answers says after an attempt with an answer: 1 right, 0 wrong."""
    attempts = []       # (row, said, text of the attempt before)
    for row in rows:
        start = 0
        for i, said in sorted((m.start(), bit) for bit in (0, 1) for m in re.finditer(re.escape(p_r[bit]), row["response"])):
            attempts.append((row, said, row["response"][start:i]))
            start = i + len(p_r[said])
    graded = verify_all([row for row, _, _ in attempts], [text for _, _, text in attempts])
    return [(said, true) for (_, said, _), (true, verdict, _) in zip(attempts, graded) if verdict != "no_answer"]


def spread_of(kls):
    """Where answers have their KL, each a list of nats a token: the means over answers that summary.json has; null without any."""
    kls = [np.maximum(v, 0) for v in kls if sum(v) > 0]     # rounding can make a KL slightly negative
    if not kls:
        return None
    top = lambda v, share: np.interp(share * len(v), range(len(v) + 1), np.append(0, np.sort(v)[::-1].cumsum())) / v.sum()
    tenths = [[v[len(v) * i // 10:max(len(v) * (i + 1) // 10, len(v) * i // 10 + 1)].mean() for i in range(10)] for v in kls]
    return {"answers": len(kls), "nats": float(np.mean([v.sum() for v in kls])),
            "top": [float(np.mean([top(v, share) for v in kls])) for share in (0.05, 0.1, 0.2, 0.5)],
            "position": np.mean(tenths, 0).tolist()}


def majority(rows):
    """Of one problem's answers: is the most frequent one right? Equal ones are one, as the verifier has it; a tie counts in part."""
    votes = []      # [a row, number of rows whose answer is its]
    for r in (r for r in rows if r["extracted"] is not None):
        same = lambda a: r["reward"] == a["reward"] and (r["reward"] or r["extracted"] == a["extracted"] or r["verdict"] == a["verdict"] ==
                                                         "wrong" and same_answer(a["extracted"], r["extracted"]) == "correct")
        vote = next((v for v in votes if same(v[0])), None)
        if not vote:
            votes.append(vote := [r, 0])
        vote[1] += 1
    first = [r["reward"] for r, n in votes if n == max(n for _, n in votes)]
    return sum(first) / max(1, len(first))


def rate(by_problem, value, among=lambda r: True):
    """(mean of value(row) over the rows among which, its standard error with problems as the units); (None, None) over nothing."""
    sums = np.array([(sum(values), len(values)) for rows in by_problem for values in [[float(value(r)) for r in rows if among(r)]]])
    total, count = sums.sum(0)
    if not count:
        return None, None
    residuals = sums[:, 0] - total / count * sums[:, 1]
    return total / count, math.sqrt((residuals ** 2).sum() * len(sums) / (len(sums) - 1)) / count if len(sums) > 1 else None


def median(by_problem):
    """(median of numbers, its standard error by 200 bootstrap samples of the problems)."""
    rng, n = np.random.default_rng(0), len(by_problem)
    draws = [np.median(np.concatenate([by_problem[i] for i in rng.integers(n, size=n)])) for _ in range(200)]
    return float(np.median(np.concatenate(by_problem))), float(np.std(draws, ddof=1)) if n > 1 else None


def summarise(name, rows, k, p_r):
    """The checkpoint's row of summary.json; a rate over nothing is null."""
    mean = lambda values: float(np.mean(values)) if len(values) else None
    by_problem, greedy = {}, {}
    for r in rows:
        (greedy if r["greedy"] else by_problem).setdefault(r["id"], []).append(r)
    rows, by_problem = [r for r in rows if not r["greedy"]], list(by_problem.values())
    n, said = len(by_problem[0]), judgements(rows, p_r)
    pass_at = lambda k: [[pass_at_k(n, sum(r["reward"] for r in of), k)] for of in by_problem]
    rates = {"accuracy": rate(by_problem, lambda r: r["reward"]), "pass_at_k": rate(pass_at(k), float),
             "maj_at_n": rate([[majority(of)] for of in by_problem], float) if all(r["kind"] == "math" for r in rows) else (None, None),
             "greedy": rate(greedy.values(), lambda r: r["reward"]), "mean_tokens": rate(by_problem, lambda r: len(r["response_ids"])),
             "median_tokens": median([[len(r["response_ids"]) for r in of] for of in by_problem]),
             "finished": rate(by_problem, lambda r: r["finished"]), "revised_accuracy": rate(by_problem, lambda r: r["revised_reward"]),
             "correction_rate": rate(by_problem, lambda r: r["revised_reward"], lambda r: not r["reward"]),
             "spoiling_rate": rate(by_problem, lambda r: 1 - r["revised_reward"], lambda r: r["reward"])}
    return {"checkpoint": name, "problems": len(by_problem), "n": n, "k": k, **{key: value for key, (value, _) in rates.items()},
            "phrases": len(said) / len(rows), "phrases_true": mean([s == t for s, t in said]),
            "wrong_after_wrong": mean([s == 0 for s, t in said if t == 0]), "wrong_after_right": mean([s == 0 for s, t in said if t == 1]),
            **{f"{key}_se": error for key, (_, error) in rates.items()}, "pass_at": [rate(pass_at(k), float)[0] for k in range(1, n + 1)],
            "kl_wrong": spread_of([r["kl"] for r in rows if r.get("kl") and r["finished"] and not r["reward"]]),
            "kl_right": spread_of([r["kl"] for r in rows if r.get("kl") and r["finished"] and r["reward"]])}


def print_table(summary):
    """A column a checkpoint, each rate with its standard error over problems."""
    columns = [c for c in summary[0] if c not in ("problems", "n", "k", "pass_at", "kl_wrong", "kl_right") and not c.endswith("_se")]
    number = lambda v: v if isinstance(v, str) else f"{v:.3f}" if v < 10 else f"{v:.1f}"
    cell = lambda v, error: "–" if v is None else number(v) if error is None else f"{number(v)} ± {number(error)}"
    print(f"\n{summary[0]['problems']} problems, n = {summary[0]['n']}, k = {summary[0]['k']}")
    for c in columns:
        print(f"{c:18}" + "".join(f"{cell(row[c], row.get(c + '_se')):>18}" for row in summary))


# ---------------------------------------------------------------- figures

def plot_stages(summary, path):
    from matplotlib import pyplot as plt
    names = [r["checkpoint"] for r in summary]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    left.bar(names, [r["accuracy"] for r in summary], yerr=[r["accuracy_se"] or 0 for r in summary], capsize=4, color="0.75",
             edgecolor="black", label="answer")
    left.plot(names, [r["revised_accuracy"] for r in summary], "k^", label="after its own revision")
    left.plot(names, [r["greedy"] for r in summary], "kx", label="greedy")
    left.set(title="accuracy", ylim=(0, 1.05))
    left.legend(fontsize=8)
    right.bar(names, [r["mean_tokens"] for r in summary], color="0.75", edgecolor="black")
    right.set(title="tokens an answer")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def coloured(row, tokenizer, paint):
    """The answer's text, paint(token's text, strength in [-1, 1], kl_reward) joined; 1 nat and more is full strength."""
    return "".join(paint(tokenizer.decode([t]), max(-1.0, min(1.0, k)), k) for t, k in zip(row["response_ids"], row["kl_reward"]))


def on_terminal(text, strength, _):
    """Red, where the reviser would not write this token; blue, where it would all the more. A line break ends the colour."""
    shade = round(5 * abs(strength))                                                    # 256-colour cube, 0 to 5
    colour = 16 + (36 * 5 + 7 * (5 - shade) if strength > 0 else 5 + 42 * (5 - shade))
    return "\n".join(f"\x1b[30;48;5;{colour}m{piece}\x1b[0m" if shade and piece else piece for piece in text.split("\n"))


def in_html(text, strength, kl_reward):
    if abs(strength) < 0.05:
        return html.escape(text)
    colour, shown = "255,0,0" if strength > 0 else "0,0,255", html.escape(text).replace("\n", "⏎\n")
    return f'<span style="background:rgba({colour},{abs(strength):.2f})" title="{kl_reward:+.2f} nats">{shown}</span>'


def show_token_kl(rows, tokenizer, path):
    """Four wrong and four right answers of about median length into an HTML page; the first of each to the terminal, too."""
    page = ["<!DOCTYPE html><meta charset='utf-8'><title>token KL reward</title><style>pre{border:1px solid; padding:1em}</style>"
            "<p>Red: the reviser, who has read the answer and its reward, would not write this token. Blue: it would all the more."]
    for bit in (0, 1):
        kind = sorted((r for r in rows if r.get("kl") and r["finished"] and r["reward"] == bit), key=lambda r: len(r["response_ids"]))
        for i, r in enumerate(kind[len(kind) // 2:][:4]):
            reference = f"a = {r['answer']}, " if r["answer"] else ""
            title = f"{r['checkpoint']}: {r['problem']}  [{reference}r = {r['reward']}, KL {sum(r['kl']):.2f} nats]"
            page.append(f"<p>{html.escape(title)}<pre>{coloured(r, tokenizer, in_html)}</pre>")
            if i == 0:
                print(f"\n── {title}\n{coloured(r, tokenizer, on_terminal)}")
    path.write_text("\n".join(page), encoding="utf-8")


def main(argv=None):
    p = arguments(__doc__, limit=400)
    g = p.add_argument_group("evaluation")
    g.add_argument("--split", default="test", help="split of --data (default: test)")
    g.add_argument("--checkpoints", nargs="+", metavar="NAME=MODEL", help="default: base=MODEL srt=OUT/srt sd_zero=OUT/sd_zero")
    g.add_argument("--eval", default=None, help="file to write (default: OUT/eval.jsonl)")
    g.add_argument("--summary", default=None, help="file to write, the figures beside it (default: --eval's name with summary for eval)")
    g.add_argument("--n", default=4, type=at_least(1), help="sampled answers a problem (default: 4) [paper: 8]")
    g.add_argument("--k", default=4, type=at_least(1), help="of pass@k (default: 4) [paper: 8]")
    g.add_argument("--max-new-tokens", default=320, type=at_least(1), help="(default: 320) [paper: 32768]")
    g.add_argument("--temperature", default=1.0, type=at_least(0.0), help="(default: 1.0)")
    g.add_argument("--batch-rows", default=384, type=at_least(1), help="answers sampled at once (default: 384); less if memory runs out")
    args = parse(p, argv)
    path = Path(args.eval or args.out / "eval.jsonl")
    summary_path = Path(args.summary or path.with_name(path.stem.replace("eval", "summary", 1) + ".json"))
    if summary_path.resolve() in (path.resolve(), meta_file(path).resolve()):
        die(f"--summary {summary_path} would be written over --eval or its meta file; name another file")
    if args.k > args.n:
        die(f"--k {args.k} needs at least as many answers a problem, --n is {args.n}")
    named = args.checkpoints or [f"base={args.model}", f"srt={args.out / 'srt'}", f"sd_zero={args.out / 'sd_zero'}"]
    if bad := [c for c in named if not all(c.partition("="))]:
        die(f"--checkpoints {bad[0]}: not NAME=MODEL")
    checkpoints = dict(c.split("=", 1) for c in named)
    if len(checkpoints) < len(named):
        die(f"--checkpoints {' '.join(named)}: a name appears twice")
    for name, stage in (("srt", "03_revise_sft.py"), ("sd_zero", "04_self_distill.py")):
        if args.checkpoints is None and not Path(checkpoints[name]).is_dir():
            die(f"{checkpoints[name]} does not exist; run first: python {stage}")
    tokenizers = {name: load_tokenizer(folder) for name, folder in checkpoints.items()}

    # ---- answers and revisions
    problems = load_problems(args.data, args.split, args.limit, args.allow_code, args.seed)
    began, device = time.time(), pick_device(args.device)
    phase_1 = args.out / "verified.jsonl"
    trained_on = {r["problem"] for r in read_jsonl(phase_1, ("problem",), "python 02_verify.py")} if phase_1.is_file() else set()
    if any(x["problem"] in trained_on for x in problems):
        die(f"{problem_file(args.data, args.split)} holds problems that {phase_1} trained on; evaluate on others")
    if not summary_path.parent.is_dir() and summary_path.parent != path.parent:
        die(f"--summary {summary_path}: its folder does not exist")
    named_by = lambda k, folder: "srt" if k == "srt" and meta_file(folder).exists() else f"checkpoint {k}"  # sd_zero may be of another srt
    inputs = {"data": problem_file(args.data, args.split), **{named_by(k, folder): folder for k, folder in checkpoints.items()}}
    done, complete = claim(path, args, inputs,
                           ("split", "limit", "seed", "p_r_right", "p_r_wrong", "n", "max_new_tokens", "temperature"),
                           ("checkpoint", "id", "sample", "greedy", "kind", "problem", "answer", "response", "response_ids", "finished",
                            "reward", "verdict", "extracted"), same=("p_r_right", "p_r_wrong") if args.checkpoints else SAME)
    done = list(done)
    for r in done:
        needed = () if r["greedy"] else ("revised_reward", "kl", "kl_reward") if r["sample"] == 0 else ("revised_reward",)
        if r["greedy"] != (r["sample"] < 0) or not all(k in r and SCHEMA[k](r[k]) for k in needed):
            die(f"{path}: answer {r['sample']} to {r['id']!r:.40} is damaged; remove the file to make it again")
    for name in checkpoints:
        check_ids(path, [r for r in done if r["checkpoint"] == name], tokenizers[name])
    rows = {name: evaluate(name, folder, tokenizers[name], problems, [r for r in done if r["checkpoint"] == name], path, device, args)
            for name, folder in checkpoints.items()}
    stop_if_ungraded([r["verdict"] for of in rows.values() for r in of], any(x["kind"] == "code" for x in problems), path)

    # ---- numbers and figures
    summary = [summarise(name, r, args.k, {1: args.p_r_right, 0: args.p_r_wrong}) for name, r in rows.items()]
    write_json(summary_path, summary)
    print_table(summary)
    prefix = "" if summary_path.name == "summary.json" else f"{summary_path.stem}_"
    stages, token_kl = (summary_path.with_name(prefix + name) for name in ("stages.png", "token_kl.html"))
    plot_stages(summary, stages)
    name = "srt" if "srt" in rows else list(rows)[-1]
    show_token_kl(rows[name], tokenizers[name], token_kl)
    if not complete:
        finish(path, began, device, answers=sum(map(len, rows.values())))
    print(f"\n{path}, {summary_path}, {stages}, {token_kl}")


if __name__ == "__main__":
    run(main)
