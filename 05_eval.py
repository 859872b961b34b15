"""Stage 5 of SD-Zero: did it learn, and what?

base, srt/ and sd_zero/, those that there are, answer the test problems, verify, and, with --revise,
revise each of their sampled answers once (generate-then-revise).

→ eval.jsonl     a row an answer: fields of 01, 02, and, for its revision, 03; {checkpoint, greedy};
                 sample -1 is greedy. Sample 0 has, a number a token, kl = KL(π(· | x, y_<t) ‖ π(· |
                 x, y, P_r, y_<t)) and kl_reward = log π(y_t | x, y_<t) - log π(y_t | x, y, P_r,
                 y_<t), above 0 where the reviser would not write y_t
→ summary.json   a row a checkpoint; NAME_se: standard error, problems being the units
→ stages.png     accuracy and length;  answers.html  sample 0 of 8 problems, coloured by kl_reward

    accuracy         avg@n: of n sampled answers a problem, those that are right
    pass_at_k        one of k = n is right;  maj_at_n: the most frequent one is (mathematics)
    greedy           accuracy of greedy decoding;  mean_tokens, finished: of the sampled answers
    revised_accuracy of each sampled answer's revision, told whether the answer was right
    correction_rate  wrong answers that this makes right;  spoiling_rate: right ones, wrong
    phrases          control phrases in an answer, said unasked

    python 05_eval.py
    python 05_eval.py --from runs/demo --out runs/eight --checkpoints sd_zero --n 8
    python 05_eval.py --ask "Start with … What number results?"     # worded as in data/test.jsonl
"""

import io
import json
import math
import time
from argparse import BooleanOptionalAction

import numpy as np
import torch
from tqdm import tqdm

from common import HERE, arguments, already_made, die, find, finish, fingerprint, parse, run_stage
from common import autocast, end_ids, load_model, load_tokenizer, pick_device, positions
from common import completion_hidden, micro_batches, prompt_ids, revision_ids, row_seed, sample
from common import in_blocks, load_problems, read_jsonl, same_answer, stop_if_ungraded, verify_all
from common import check_prompt, deal, gather_rows, sampling, sampling_flags, write_whole


# ---------------------------------------------------------------- answers and revisions


def evaluate(name, folder, problems, done, path, device, args):
    """A checkpoint's rows into the file `path`: n answers; as asked, a greedy one and revisions."""
    tokenizer = load_tokenizer(folder)
    tasks = [(x, k) for k in range(-args.greedy, args.n) for x in problems]  # k = -1: greedy
    if done == len(tasks):
        return
    model = load_model(folder, tokenizer, device, autocast(device)[1])
    progress = tqdm(total=len(tasks), desc=name, unit="answer")

    def answers(tasks, prefixes, what, greedy=False, bar=None):
        """Of each task, the fields of 01 and 02; all checkpoints get the same noise."""
        seeds = [row_seed(args.seed, what, x["id"], k) for x, k in tasks]
        how = sampling(args) | ({"temperature": 0.0} if greedy else {})
        out = sample(model, prefixes, seeds, **how, progress=bar)
        texts = [tokenizer.decode(y, skip_special_tokens=True) for y in out]
        graded = verify_all([x for x, _ in tasks], texts)
        for y, text, (reward, verdict, extracted) in zip(out, texts, graded):
            answer = {"response": text, "response_ids": y, "finished": y[-1] in end_ids(model)}
            yield answer | {"reward": reward, "verdict": verdict, "extracted": extracted}

    for block, _, all_rows in in_blocks(path, done, tasks, 4 * args.batch_rows, progress):
        rows = []  # of several GPUs, this one's
        for greedy in (True, False):
            part = [(x, k) for x, k in deal(block) if (k < 0) == greedy]
            prompts = [prompt_ids(tokenizer, x["problem"]) for x, _ in part]
            found = answers(part, prompts, "eval", greedy, progress)
            for (x, k), answer in zip(part, found):
                rows.append({"checkpoint": name, **x, "sample": k, "greedy": greedy, **answer})
        sampled = [row for row in rows if not row["greedy"]]
        asked = sampled if args.revise else []
        prefixes = [reviser_prefix(row, tokenizer, args.p_r) for row in asked]
        part = [(row, row["sample"]) for row in asked]
        found = answers(part, prefixes, "eval revision") if asked else []
        for row, revision in zip(asked, found):
            row |= {"p_r": args.p_r[row["reward"]], "revised": revision["response"]}
            row["revised_ids"] = revision["response_ids"]
            for field in ("finished", "reward", "verdict"):
                row[f"revised_{field}"] = revision[field]
        reviser_kl(model, tokenizer, [row for row in sampled if row["sample"] == 0], args.p_r)
        all_rows += gather_rows(rows)


def reviser_prefix(row, tokenizer, p_r):
    return revision_ids(tokenizer, row["problem"], row["response_ids"], row["reward"], p_r)


@torch.no_grad()
def reviser_kl(model, tokenizer, rows, p_r):
    """Add {kl, kl_reward} to each row; empty where y does not fit the model's positions twice."""
    head, context = model.get_output_embeddings(), autocast(model.device)[0]
    for row in rows:
        row |= {"kl": [], "kl_reward": [], "reviser": reviser_prefix(row, tokenizer, p_r)}

    def length(row):
        return len(row["reviser"]) + len(row["response_ids"])

    fits = [row for row in rows if length(row) <= positions(model)]
    for part in micro_batches(fits, length, 4096):
        y = [row["response_ids"] for row in part]
        generator = [prompt_ids(tokenizer, row["problem"]) for row in part]
        tokens = torch.tensor(sum(y, []), device=model.device)  # [N]
        kls, rewards, n = [], [], max(1, 2**25 // len(tokenizer))
        with context():
            student = completion_hidden(model, generator, y).split(n)  # [N, H] by chunks
            teacher = completion_hidden(model, [row["reviser"] for row in part], y).split(n)
            for s, t, token in zip(student, teacher, tokens.split(n)):
                log_s, log_t = (head(h).float().log_softmax(-1) for h in (s, t))  # [n, V]
                kls.append((log_s.exp() * (log_s - log_t)).sum(-1))
                rewards.append((log_s - log_t).gather(-1, token[:, None])[:, 0])
        for name, values in (("kl", kls), ("kl_reward", rewards)):
            for row, of_row in zip(part, torch.cat(values).split(list(map(len, y)))):
                row[name] = [round(v, 4) for v in of_row.tolist()]
    for row in rows:
        del row["reviser"]


# ---------------------------------------------------------------- from rows to numbers


def equal(a, b):
    """Would the verifier take these two rows' answers for one?"""
    if a["reward"] or b["reward"] or a["extracted"] == b["extracted"]:
        return a["reward"] == b["reward"]
    graded = a["verdict"] == b["verdict"] == "wrong"
    return graded and same_answer(a["extracted"], b["extracted"]) == "correct"


def majority(rows):
    """Of one problem's answers: is the most frequent one right? A tie counts in part."""
    votes = []  # lists of rows whose answers are equal
    for row in rows:
        if row["extracted"] is not None:
            same = next((vote for vote in votes if equal(vote[0], row)), None)
            votes.append([row]) if same is None else same.append(row)
    most = max(map(len, votes), default=0)
    first = [vote[0]["reward"] for vote in votes if len(vote) == most]
    return sum(first) / max(1, len(first))


def rate(problems, value):
    """(mean, standard error) over rows, grouped by problems, of value(row), where that is a number.

    The units of the error are the problems. (None, None) over nothing.
    """
    values = [[v for row in rows if (v := value(row)) is not None] for rows in problems]
    sums, counts = np.array([sum(v) for v in values], float), np.array([len(v) for v in values])
    if not counts.sum():
        return None, None
    mean, n = sums.sum() / counts.sum(), len(problems)
    squares = ((sums - mean * counts) ** 2).sum()
    return mean, math.sqrt(squares * n / (n - 1)) / counts.sum() if n > 1 else None


def summarise(name, rows, p_r):
    """The checkpoint's row of summary.json; a rate over nothing is null."""
    sampled, greedy = {}, {}
    for row in rows:
        (greedy if row["greedy"] else sampled).setdefault(row["id"], []).append(row)
    sampled, n = list(sampled.values()), len(next(iter(sampled.values())))
    math_only, once = all(row["kind"] == "math" for row in rows), []
    revised = sampled if "revised_reward" in sampled[0][0] else []
    for of in sampled:
        vote = majority(of) if math_only else None
        once.append([{"pass": any(row["reward"] for row in of), "majority": vote}])
    rates = {
        "accuracy": rate(sampled, lambda r: r["reward"]),
        "pass_at_k": rate(once, lambda r: r["pass"]),
        "maj_at_n": rate(once, lambda r: r["majority"]),
        "greedy": rate(list(greedy.values()), lambda r: r["reward"]),
        "mean_tokens": rate(sampled, lambda r: len(r["response_ids"])),
        "finished": rate(sampled, lambda r: r["finished"]),
        "revised_accuracy": rate(sampled, lambda r: r.get("revised_reward")),
        "correction_rate": rate(revised, lambda r: None if r["reward"] else r["revised_reward"]),
        "spoiling_rate": rate(revised, lambda r: 1 - r["revised_reward"] if r["reward"] else None),
        "phrases": rate(sampled, lambda r: sum(map(r["response"].count, p_r.values()))),
    }
    summary = {"checkpoint": name, "problems": len(sampled), "n": n}
    for key, (value, error) in rates.items():
        summary |= {key: value, f"{key}_se": error}
    return summary


# ---------------------------------------------------------------- table, figure, page


def print_table(summary):
    """A column a checkpoint, each rate with its standard error over problems."""
    print(f"\n{summary[0]['problems']} problems, n = {summary[0]['n']}, ± standard error")
    for key in summary[0]:
        line = f"{key:18}"
        for row in summary:
            value, error = row[key], row.get(f"{key}_se")
            digits = 1 if isinstance(value, float) and value >= 10 else 3
            cell = f"{value:.{digits}f}" if isinstance(value, float) else str(value or "–")
            cell += "" if error is None else f" ± {error:.{digits}f}"
            line += f"{cell:>18}"
        if not key.endswith("_se") and key not in ("problems", "n"):
            print(line)


def plot_stages(summary, path):
    """Accuracy and length of each checkpoint, with their standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names, colours = [row["checkpoint"] for row in summary], ["#9aa5b1", "#e8a33d", "#2b7bba"]
    figure, both = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    panels = ("accuracy", "right answers, %", 100), ("mean_tokens", "tokens per answer", 1)
    for axes, (key, title, scale) in zip(both, panels):
        values = [scale * row[key] for row in summary]
        errors = [scale * (row[f"{key}_se"] or 0) for row in summary]
        bars = axes.bar(names, values, yerr=errors, capsize=4, color=colours, width=0.6)
        axes.bar_label(bars, [f"{v:.0f}" for v in values], padding=3, fontsize=12)
        axes.set_title(title)
        axes.set_yticks([])
        axes.margins(y=0.15)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(image := io.BytesIO(), dpi=150)
    plt.close(figure)
    write_whole(path, image.getvalue())


def choose(rows):
    """Problems for the page: first four that the first checkpoint gets wrong and the last right;
    then, to make up eight, half each that the last gets wrong, and that both get right."""
    rewards = {}  # problem: [reward of each checkpoint's sample 0]
    for row in sum(rows.values(), []):
        if row["sample"] == 0 and row["kl"]:
            rewards.setdefault(row["id"], []).append(row["reward"])
    ends = [(x, of[0], of[-1]) for x, of in rewards.items() if len(of) == len(rows)]
    learned = [x for x, first, last in ends if first < last][:4]
    wrong = [x for x, _, last in ends if not last][: (8 - len(learned)) // 2]
    right = [x for x, first, last in ends if first and last][: (8 - len(learned)) // 2]
    return learned + wrong + right


@torch.no_grad()
def likeliest(model, tokenizer, prefix, y):
    """At each token of y after the prefix [(token, probability), ...]: five, less those of 0.0%."""
    head, found = model.get_output_embeddings(), []
    with autocast(model.device)[0]():
        for h in completion_hidden(model, [prefix], [y]).split(max(1, 2**25 // len(tokenizer))):
            best, ids = head(h).float().softmax(-1).topk(5)  # [n, 5]
            for of in map(zip, ids.tolist(), best.tolist()):
                found.append([(tokenizer.decode(i), round(p, 3)) for i, p in of if p >= 0.0005])
    return found


def reread(rows, folder, device, p_r):
    """What the page shows of a checkpoint's rows."""
    tokenizer, shown = load_tokenizer(folder), []
    model = load_model(folder, tokenizer, device, autocast(device)[1])
    fields = "checkpoint", "id", "problem", "answer", "reward", "finished"
    for row in deal(rows):
        y = row["response_ids"]
        prefixes = prompt_ids(tokenizer, row["problem"]), reviser_prefix(row, tokenizer, p_r)
        both = [likeliest(model, tokenizer, prefix, y) for prefix in prefixes]
        tokens = list(zip(map(tokenizer.decode, y), row["kl_reward"], *both))
        shown.append({name: row.get(name) for name in fields} | {"tokens": tokens})
    return gather_rows(shown)


def write_page(rows, summary, folders, device, args):
    """data/page.html with answers of these checkpoints, which are loaded again, one at a time."""
    chosen, answers = choose({name: rows[name] for name in folders}), []
    for name, folder in folders.items():
        of = {row["id"]: row for row in rows[name] if row["sample"] == 0}
        answers += reread([of[x] for x in chosen], folder, device, args.p_r)
    shown = json.dumps({"answers": answers, "summary": summary, "p_r": args.p_r})
    page = (HERE / "data/page.html").read_text(encoding="utf-8")
    write_whole(args.out / "answers.html", page.replace("/*DATA*/", shown.replace("<", r"\u003c")))


def ask(problem, name, folder, device, args):
    """Print a checkpoint's answer to a problem of the user's own, of which no reward is known."""
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, tokenizer, device, autocast(device)[1])
    seed = row_seed(args.seed, "ask", problem)
    (y,) = sample(model, [prompt_ids(tokenizer, problem)], [seed], **sampling(args))
    print(f"\n── {name}\n{tokenizer.decode(y, skip_special_tokens=True)}")


def main(argv=None):
    p = arguments("05", __doc__)
    p.add_argument("--test-data", help="like 01's --data; none: the run's own, or MATH-500")
    p.add_argument("--split", default="test", help="split of the test data")
    p.add_argument("--limit", type=int, help="answer the first so many problems")
    names = ["base", "srt", "sd_zero", "sd_zero.best"]
    p.add_argument("--checkpoints", nargs="+", choices=names, help="none: the first three")
    p.add_argument("--n", type=int, help="sampled answers per problem; –: 8 for up to 50, or 1")
    p.add_argument("--greedy", action=BooleanOptionalAction, help="also a greedy answer")
    p.add_argument("--revise", action=BooleanOptionalAction, help="also revise what was sampled")
    p.add_argument("--ask", metavar="PROBLEM", help="answer this once, write nothing, and end")
    sampling_flags(p)
    args = parse(p, argv)

    # ---------------- checkpoints and problems
    began, path, made = time.time(), args.out / "eval.jsonl", args.run["made"]
    there = [name for name in ("base", "srt", "sd_zero") if "counts" in made.get(name, {})]
    folders = {name: find(args, name) for name in args.checkpoints or there}
    device = pick_device(args.device)
    if args.ask is not None:
        for name, folder in folders.items():
            ask(args.ask, name, folder, device, args)
        return
    if args.data == "open-r1/OpenR1-Math-220k":  # which has no test split
        args.test_data = args.test_data or "HuggingFaceH4/MATH-500"
    data = args.test_data or args.data
    learned = [made[x]["arguments"]["split"] for x in ("responses.jsonl", "sd_zero") if x in made]
    problems = load_problems(data, args.split, args.limit, args.allow_code, args.seed)
    used = {row["problem"] for row in read_jsonl(find(args, "responses.jsonl"))}
    if any(x["problem"] in used for x in problems) or data == args.data and args.split in learned:
        die(f"--split {args.split} of {data} holds problems of training; evaluate on others")
    for folder in folders.values():
        check_prompt(args, load_tokenizer(folder))
    args.n = args.n or (8 if len(problems) <= 50 else 1)
    decides = "test_data split limit n greedy revise max_new_tokens temperature top_p"
    already_made(args, "eval.jsonl", " ".join([decides, *folders]), problems, grows=True)

    # ---------------- answers, numbers, figures
    for name, folder in folders.items():
        done = sum(row["checkpoint"] == name for row in read_jsonl(path, mend=True))
        evaluate(name, folder, problems, done, path, device, args)
    rows = {}
    for row in read_jsonl(path):
        rows.setdefault(row["checkpoint"], []).append(row)
    whole = len(problems) * (args.n + args.greedy)
    rows = {name: of for name, of in rows.items() if len(of) == whole}
    verdicts = [row["verdict"] for row in sum(rows.values(), [])]
    stop_if_ungraded(verdicts, problems, path)
    if fingerprint(path) != args.run["made"]["eval.jsonl"].get("id"):
        finish(args, "eval.jsonl", began, device, answers=len(verdicts))
    summary = [summarise(name, of, args.p_r) for name, of in rows.items()]
    write_whole(args.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    print_table(summary)
    plot_stages(summary, args.out / "stages.png")
    write_page(rows, summary, folders, device, args)
    print(f"\n{path}, summary.json, stages.png and answers.html beside it")


if __name__ == "__main__":
    run_stage(main)
