"""Stage 5 of SD-Zero: did it learn, and what?

base, srt/ and sd_zero/ answer the test problems, verify, and revise each of their own answers once (generate-then-revise).
→ eval.jsonl     a row an answer: the fields of 01 and 02, {checkpoint, greedy}, and those of 03 for its revision; sample -1 is greedy
→ summary.json   a row a checkpoint; columns below
→ stages.png     accuracy and length by stage;  token_kl.png  one wrong answer, its tokens coloured by KL(student‖reviser)

    accuracy         avg@n: mean over n sampled answers a problem; accuracy_se is its standard error over problems
    pass_at_k        chance that one of k answers is right (unbiased estimate from n);  greedy: accuracy of greedy decoding
    correction_rate  wrong answers that the revision makes right;  spoiling_rate: right ones that it makes wrong
    phrases          control phrases that an answer says unasked;  phrases_true: share of them that are true
    wrong_after_wrong, wrong_after_right   of the phrases said after a wrong (right) attempt, how many say "wrong"; equal means by chance

    python 05_eval.py
    python 05_eval.py --checkpoints base=data/base mine=runs/other/srt --n 8 --k 8 --eval runs/demo/eval_mine.jsonl
"""

import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import (append_jsonl, arguments, at_least, claim, completion_logits, die, end_ids, finish, load_model, load_problems,
                    load_tokenizer, pick_device, problem_file, prompt_ids, read_jsonl, revision_ids, row_seed, sample, verify, write_json)


# ---------------------------------------------------------------- answers and revisions

def evaluate(name, folder, problems, done, path, device, args):
    """Rows of one checkpoint: n sampled answers and a greedy one for each problem; the sampled ones are revised once."""
    tasks = [(x, k) for k in range(-1, args.n) for x in problems]                   # k = -1: greedy
    if [(r["id"], r["sample"]) for r in done] != [(x["id"], k) for x, k in tasks[:len(done)]]:
        die(f"{path} does not hold these problems in their order; remove it to make it again")
    if len(done) == len(tasks):
        return done
    tokenizer, p_r = load_tokenizer(folder), {1: args.p_r_right, 0: args.p_r_wrong}
    model = load_model(folder, tokenizer, device)

    def answer(batch, prefixes, stage, temperature):
        seeds = [row_seed(args.seed, stage, x["id"], k) for x, k in batch]          # the same noise for every checkpoint: paired
        out = sample(model, prefixes, seeds, args.max_new_tokens, temperature, args.batch_rows, progress)
        texts = [tokenizer.decode(y, skip_special_tokens=True) for y in out]
        return [(y, text, y[-1] in end_ids(model), *verify(x, text)) for (x, _), y, text in zip(batch, out, texts)]

    todo = tasks[len(done):]
    progress = tqdm(total=len(todo) + sum(k >= 0 for _, k in todo), desc=name, unit="answer")    # revisions too
    for b in range(0, len(todo), 4 * args.batch_rows):
        batch, rows = todo[b:b + 4 * args.batch_rows], []
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
        append_jsonl(path, rows)
        done = done + rows
        progress.set_postfix(right=f"{np.mean([r['reward'] for r in rows]):.0%}")
    progress.close()
    return done


# ---------------------------------------------------------------- from rows to numbers

def pass_at_k(n, c, k):
    """Chance that k of n answers, c of them right, drawn without replacement, hold a right one."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def judgements(row, p_r):
    """(said, true) for each control phrase that the answer says after an attempt with a \\boxed{}: 1 right, 0 wrong."""
    places = sorted((m.start(), bit) for bit in (0, 1) for m in re.finditer(re.escape(p_r[bit]), row["response"]))
    start, out = 0, []
    for i, said in places:
        true, verdict, _ = verify(row, row["response"][start:i])
        if verdict != "no_answer":
            out.append((said, true))
        start = i + len(p_r[said])
    return out


def summarise(name, rows, k, p_r):
    """The checkpoint's row of summary.json; a rate over nothing is null."""
    mean = lambda values: float(np.mean(values)) if len(values) else None
    greedy, rows = [r["reward"] for r in rows if r["greedy"]], [r for r in rows if not r["greedy"]]
    by_problem = {}
    for r in rows:
        by_problem.setdefault(r["id"], []).append(r["reward"])
    per_problem, n = [np.mean(v) for v in by_problem.values()], len(next(iter(by_problem.values())))
    said = [j for r in rows for j in judgements(r, p_r)]
    return {"checkpoint": name, "problems": len(by_problem), "n": n, "k": k, "accuracy": mean(per_problem),
            "accuracy_se": float(np.std(per_problem, ddof=1) / math.sqrt(len(per_problem))) if len(per_problem) > 1 else None,
            "pass_at_k": mean([pass_at_k(n, sum(v), k) for v in by_problem.values()]), "greedy": mean(greedy),
            "mean_tokens": mean([len(r["response_ids"]) for r in rows]), "finished": mean([r["finished"] for r in rows]),
            "revised_accuracy": mean([r["revised_reward"] for r in rows]),
            "correction_rate": mean([r["revised_reward"] for r in rows if not r["reward"]]),
            "spoiling_rate": mean([1 - r["revised_reward"] for r in rows if r["reward"]]),
            "phrases": len(said) / len(rows), "phrases_true": mean([s == t for s, t in said]),
            "wrong_after_wrong": mean([s == 0 for s, t in said if t == 0]), "wrong_after_right": mean([s == 0 for s, t in said if t == 1])}


def print_table(summary):
    columns = [c for c in summary[0] if c not in ("problems", "n", "k")]
    cell = lambda v: "–" if v is None else v if isinstance(v, str) else f"{v:.3f}" if v < 10 else f"{v:.1f}"
    print(f"\n{summary[0]['problems']} problems, n = {summary[0]['n']}, k = {summary[0]['k']}")
    for c in columns:
        print(f"{c:18}" + "".join(f"{cell(row[c]):>12}" for row in summary))


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


@torch.no_grad()
def plot_token_kl(row, folder, path, device, args):
    """One answer's tokens, coloured by KL(π(· | x, y_<t) ‖ π(· | x, y, P_r, y_<t)): where does the reviser disagree?"""
    from matplotlib import pyplot as plt
    tokenizer = load_tokenizer(folder)
    model, y = load_model(folder, tokenizer, device), row["response_ids"]
    prefix = revision_ids(tokenizer, row["problem"], y, row["reward"], {1: args.p_r_right, 0: args.p_r_wrong})
    log_s = completion_logits(model, [prompt_ids(tokenizer, row["problem"])], [y]).float().log_softmax(-1)   # [N, V]
    log_t = completion_logits(model, [prefix], [y]).float().log_softmax(-1)
    kl = (log_s.exp() * (log_s - log_t)).sum(-1).tolist()                                                    # [N]; KL(student‖teacher)
    top, column, line, places = max(kl), 0, 0, []                                   # places: (column, line, text, kl)
    for t, k in zip(y, kl):
        text = tokenizer.decode([t])
        if column + len(text.rstrip("\n")) > 72:
            line, column = line + 1, 0
        places.append((column, line, text.replace("\n", ""), k))
        line, column = line + text.count("\n"), 0 if "\n" in text else column + len(text)
    width, height = 0.602 * 12 / 72, 0.28                                           # inches, of a character of this font at 12 points
    figure = plt.figure(figsize=(72 * width + 0.2, (line + 1) * height + 0.7))
    axes = figure.add_axes([0.1 / (72 * width + 0.2), 0, 0.99, 1 - 0.6 / ((line + 1) * height + 0.7)], xlim=(0, 72), ylim=(line + 1.2, 0))
    axes.axis("off")
    for x, at, text, k in places:
        axes.add_patch(plt.Rectangle((x, at + 0.05), len(text) or 0.4, 0.9, color=plt.cm.Greys(0.75 * k / top) if top else "white"))
        axes.text(x, at + 0.5, text.replace("$", r"\$"), family="DejaVu Sans Mono", size=12, va="center",
                  color="white" if k > 0.7 * top else "black")
    title = f"{row['problem'][:150]}  (answer: {row['answer'][:20]})\na wrong answer of {row['checkpoint']}; darkest = {top:.2f} nats"
    figure.suptitle(title.replace("$", r"\$"), size=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    p = arguments(__doc__, limit=400)
    g = p.add_argument_group("evaluation")
    g.add_argument("--split", default="test", help="split of --data (default: test)")
    g.add_argument("--checkpoints", nargs="+", metavar="NAME=MODEL", help="default: base=MODEL srt=OUT/srt sd_zero=OUT/sd_zero")
    g.add_argument("--eval", default=None, help="file to write (default: OUT/eval.jsonl)")
    g.add_argument("--summary", default=None, help="file to write, the figures beside it (default: summary.json beside --eval)")
    g.add_argument("--n", default=4, type=at_least(1), help="sampled answers a problem (default: 4) [paper: 8]")
    g.add_argument("--k", default=4, type=at_least(1), help="of pass@k (default: 4) [paper: 8]")
    g.add_argument("--max-new-tokens", default=320, type=at_least(1), help="(default: 320) [paper: 32768]")
    g.add_argument("--temperature", default=1.0, type=at_least(0.0), help="(default: 1.0)")
    g.add_argument("--batch-rows", default=384, type=at_least(1), help="answers sampled at once (default: 384): memory, not results")
    args = p.parse_args(argv)
    path = Path(args.eval or args.out / "eval.jsonl")
    summary_path = Path(args.summary or path.with_name(path.stem.replace("eval", "summary", 1) + ".json"))
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
    for folder in checkpoints.values():
        load_tokenizer(folder)

    # ---- answers and revisions
    problems, began, device = load_problems(args.data, args.split, args.limit), time.time(), pick_device(args.device)
    phase_1 = args.out / "verified.jsonl"
    trained_on = {r["problem"] for r in read_jsonl(phase_1, ("problem",), "python 02_verify.py")} if phase_1.is_file() else set()
    if any(x["problem"] in trained_on for x in problems):
        die(f"{problem_file(args.data, args.split)} holds problems that {phase_1} trained on; evaluate on others")
    if not summary_path.parent.is_dir() and summary_path.parent != path.parent:
        die(f"--summary {summary_path}: its folder does not exist")
    inputs = {"data": problem_file(args.data, args.split), **{f"checkpoint {k}": v for k, v in checkpoints.items()}}
    done, complete = claim(path, args, inputs,
                           ("split", "limit", "seed", "p_r_right", "p_r_wrong", "n", "max_new_tokens", "temperature"),
                           ("checkpoint", "id", "sample", "greedy", "reward", "response_ids"))
    rows = {name: evaluate(name, folder, problems, [r for r in done if r["checkpoint"] == name], path, device, args)
            for name, folder in checkpoints.items()}

    # ---- numbers and figures
    summary = [summarise(name, r, args.k, {1: args.p_r_right, 0: args.p_r_wrong}) for name, r in rows.items()]
    write_json(summary_path, summary)
    print_table(summary)
    prefix = "" if summary_path.name == "summary.json" else f"{summary_path.stem}_"
    figures = [summary_path.with_name(prefix + figure) for figure in ("stages.png", "token_kl.png")]
    plot_stages(summary, figures[0])
    name = "srt" if "srt" in rows else list(rows)[-1]
    wrong = [r for r in rows[name] if not r["greedy"] and not r["reward"] and r["finished"]]
    if wrong:
        typical = min(wrong, key=lambda r: abs(len(r["response_ids"]) - 80))
        plot_token_kl(typical, checkpoints[name], figures[1], device, args)
    if not complete:
        finish(path, began, device, answers=sum(map(len, rows.values())))
    print(f"\n{path}, {summary_path}, {figures[0]}" + (f", {figures[1]}" if wrong else ""))


if __name__ == "__main__":
    main()
