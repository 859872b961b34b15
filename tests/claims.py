"""The paper's claims as one table: SD-Zero, its baselines and its ablations, each a few commands that anyone can run alone.

    data/claims/METHOD-SEED.json     one run: its commands, every metric of 05_eval.py, answers and tokens sampled, minutes, commit
    data/claims/search-METHOD.json   its learning rates on data/validation.jsonl, seed 0
    README.md, data/*.png            tables between the markers and figures, made from these files alone

A claim is an inequality between two rows, written in CLAIMS before the runs. It is *shown* if the 95% confidence interval (t) of the
difference, paired by seed, lies on the claimed side of 0, *opposite* if it lies on the other side, else *not shown*.

    python tests/claims.py --seeds 3                          # goes on where it stopped
    python tests/claims.py --seeds 1 --methods rft grpo       # only these
    python tests/claims.py --check                            # do README and figures hold what data/claims says?
"""

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
import report  # noqa: E402
from conftest import MINI, ROOT, common, load, rows_of  # noqa: E402

FILED, BASE, WRONG, RIGHT = ROOT / "data/claims", "data/base", common.P_R[0], common.P_R[1]
# {S}: folder of the seed, with its phase 1 made once; {SRT}: that phase's model; {O}: the method's own folder; {M}: its model;
# {srt} and the like: the learning rate found for that method
ANSWER = ["01_generate.py --out {S}", "02_verify.py --out {S}"]
REVISE = "03_revise_sft.py --lr {srt} --verified {S}/verified.jsonl --revisions {S}/revisions.jsonl"
PHASE_1 = [*ANSWER, REVISE + " --srt {SRT}"]
DISTILL = "04_self_distill.py --verified {S}/verified.jsonl --sd-zero {M} --distill {M}.jsonl"
PHASE_2 = DISTILL + " --lr {sd_zero} --srt {SRT}"
ON_SRT, ON_SD_ZERO = (
    ["{S}/responses.jsonl", "{S}/revisions.jsonl"],
    ["{S}/responses.jsonl", "{S}/revisions.jsonl", "{M}.jsonl"],
)
METHODS = {  # name: (label, commands, model, files that hold what was sampled for it)
    "base": ("base", [], BASE, []),
    "rft": (
        "RFT: SFT on right answers, 4 a problem",
        [
            "01_generate.py --n 4 --limit 2080 --out {O}",
            "02_verify.py --out {O}",
            "03_revise_sft.py --objective rft --lr {rft} --out {O} --srt {M}",
        ],
        "{M}",
        ["{O}/responses.jsonl"],
    ),
    "grpo": (
        "GRPO: 8 answers a problem",
        [
            "04_self_distill.py --objective grpo --n 8 --steps 130 --lr {grpo} --srt data/base "
            "--verified {O}/none --sd-zero {M} --distill {M}.jsonl"
        ],
        "{M}",
        ["{M}.jsonl"],
    ),
    "sdft": (
        "SDFT: the teacher reads a right answer to x instead of y",
        [
            "01_generate.py --n 4 --limit 1280 --out {O}",
            "02_verify.py --out {O}",
            "04_self_distill.py --objective sdft --lr {sdft} --srt data/base --out {O} --sd-zero {M} --distill {M}.jsonl",
        ],
        "{M}",
        ["{O}/responses.jsonl", "{M}.jsonl"],
    ),
    "srt": ("SRT: phase 1", PHASE_1, "{SRT}", ON_SRT),
    "sd_zero": ("SD-Zero: phases 1 and 2", [*PHASE_1, PHASE_2], "{M}", ON_SD_ZERO),
    "revision_only": (
        "SRT, L_revision alone",
        [*ANSWER, REVISE + " --objective revision --srt {M}"],
        "{M}",
        ON_SRT,
    ),
    "generation_only": (
        "SRT, L_generation alone",
        [*ANSWER, REVISE + " --objective generation --srt {M}"],
        "{M}",
        ON_SRT,
    ),
    "unfiltered": (
        "SRT on all finished revisions, wrong ones too",
        [*ANSWER, REVISE + " --unfiltered --srt {M}"],
        "{M}",
        ON_SRT,
    ),
    "wrong_only": (
        "SRT on revisions of wrong answers alone",
        [
            *ANSWER,
            "03_revise_sft.py --lr {srt} --verified {S}/verified.jsonl --revisions-right 0 --out {O} --srt {M}",
        ],
        "{M}",
        ["{S}/responses.jsonl", "{O}/revisions.jsonl"],
    ),
    "no_srt": (
        "phase 2 on the base",
        [*ANSWER, DISTILL + " --lr {sd_zero} --srt data/base"],
        "{M}",
        ["{M}.jsonl"],
    ),
    "no_srt_long": (
        "phase 2 on the base, as many answers as SD-Zero",
        [*ANSWER, DISTILL + " --lr {sd_zero} --srt data/base --steps 130"],
        "{M}",
        ["{M}.jsonl"],
    ),
    "forward": ("phase 2 by forward KL", [*PHASE_1, PHASE_2 + " --kl forward"], "{M}", ON_SD_ZERO),
    "mixed": ("phase 2 by mixed KL", [*PHASE_1, PHASE_2 + " --kl mixed"], "{M}", ON_SD_ZERO),
    "top_64": (
        "phase 2 by mixed KL on the teacher's top 64",
        [*PHASE_1, PHASE_2 + " --kl mixed --top-k 64"],
        "{M}",
        ON_SD_ZERO,
    ),
    "neutral": (
        "phase 2, “rephrase” for both rewards",
        [*PHASE_1, PHASE_2 + f" --p-r-wrong '{RIGHT}' --mix"],
        "{M}",
        ON_SD_ZERO,
    ),
    "inverted": (
        "phase 2, P_r of the other reward",
        [*PHASE_1, PHASE_2 + f" --p-r-wrong '{RIGHT}' --p-r-right '{WRONG}' --mix"],
        "{M}",
        ON_SD_ZERO,
    ),
    "rounds_2": ("phase 2, two rounds", [*PHASE_1, PHASE_2 + " --rounds 2"], "{M}", ON_SD_ZERO),
    "rounds_3": ("phase 2, three rounds", [*PHASE_1, PHASE_2 + " --rounds 3"], "{M}", ON_SD_ZERO),
    "long": (
        "phase 2, one round as long as three",
        [*PHASE_1, PHASE_2 + " --steps 150"],
        "{M}",
        ON_SD_ZERO,
    ),
}
CODE = " --data data/code --allow-code"  # the second domain, with the rates found for the first, and phase 2 at lower ones, too
for name, rate in (
    *((name, "") for name in ("base", "rft", "srt", "sd_zero", "no_srt")),
    ("sd_zero", "1e-4"),
    ("sd_zero", "5e-5"),
    ("no_srt", "1e-4"),
    ("no_srt_long", "1e-4"),
):
    label, commands, model, sampled = METHODS[name]
    commands = [
        c.replace(BASE, "data/code/base").replace("{sd_zero}", rate or "{sd_zero}") + CODE
        for c in commands
    ]
    label = f"short functions, {label}" + f", at {rate}" * bool(rate)
    METHODS[f"code_{name}" + f"_{rate}" * bool(rate)] = (
        label,
        commands,
        model.replace(BASE, "data/code/base"),
        sampled,
    )
CLAIMS = [  # (the paper's claim, what it says, metric of 05, the row that has more of it, the row that has less)
    ("C1", "SD-Zero is better than SRT", "accuracy", "sd_zero", "srt"),
    ("C1", "SRT is better than RFT (which had more answers)", "accuracy", "srt", "rft"),
    ("C1", "SRT is better than GRPO (which had more answers)", "accuracy", "srt", "grpo"),
    ("C1", "SD-Zero is better than RFT", "accuracy", "sd_zero", "rft"),
    ("C1", "SD-Zero is better than GRPO", "accuracy", "sd_zero", "grpo"),
    ("C1", "SD-Zero is better than SDFT", "accuracy", "sd_zero", "sdft"),
    ("C1", "RFT is better than the base", "accuracy", "rft", "base"),
    ("C1", "GRPO is better than the base", "accuracy", "grpo", "base"),
    ("C2", "SRT mends more of its wrong answers than the base", "correction_rate", "srt", "base"),
    ("C2", "SD-Zero mends more of its wrong answers than SRT", "correction_rate", "sd_zero", "srt"),
    ("C3", "SRT's answers are longer than the base's", "mean_tokens", "srt", "base"),
    ("C3", "SD-Zero's answers are shorter than SRT's", "mean_tokens", "srt", "sd_zero"),
    (
        "C4",
        "both SRT losses are better than L_generation alone",
        "accuracy",
        "srt",
        "generation_only",
    ),
    ("C4", "both SRT losses are better than L_revision alone", "accuracy", "srt", "revision_only"),
    (
        "C4",
        "both SRT losses mend more than L_generation alone",
        "correction_rate",
        "srt",
        "generation_only",
    ),
    (
        "C4",
        "both SRT losses mend more than L_revision alone",
        "correction_rate",
        "srt",
        "revision_only",
    ),
    ("C5", "phase 2 needs phase 1", "accuracy", "sd_zero", "no_srt"),
    (
        "C5",
        "phase 2 needs phase 1, at the same number of answers",
        "accuracy",
        "sd_zero",
        "no_srt_long",
    ),
    ("C6", "KL sits in fewer tokens of wrong answers than of right ones", "kl", "srt", "srt"),
    ("C7", "a second round, the teacher synchronised, adds", "accuracy", "rounds_2", "sd_zero"),
    ("C7", "a third round adds", "accuracy", "rounds_3", "rounds_2"),
    ("C7", "three rounds are better than one as long", "accuracy", "rounds_3", "long"),
    ("C8", "pass@k rises too: SRT over the base", "pass_at_k", "srt", "base"),
    ("C8", "pass@k rises too: SD-Zero over SRT", "pass_at_k", "sd_zero", "srt"),
    ("C9", "unfiltered revisions hurt", "accuracy", "srt", "unfiltered"),
    ("C10", "SRT says more control phrases than the base", "phrases", "srt", "base"),
    ("C10", "SD-Zero says fewer control phrases than SRT", "phrases", "srt", "sd_zero"),
    ("C1", "short functions: SD-Zero is better than SRT", "accuracy", "code_sd_zero", "code_srt"),
    ("C1", "short functions: SRT is better than RFT", "accuracy", "code_srt", "code_rft"),
    ("C1", "short functions: SD-Zero is better than RFT", "accuracy", "code_sd_zero", "code_rft"),
    (
        "C2",
        "short functions: SRT mends more of its wrong answers than the base",
        "correction_rate",
        "code_srt",
        "code_base",
    ),
    (
        "C3",
        "short functions: SD-Zero's answers are shorter than SRT's",
        "mean_tokens",
        "code_srt",
        "code_sd_zero",
    ),
    ("C5", "short functions: phase 2 needs phase 1", "accuracy", "code_sd_zero", "code_no_srt"),
    (
        "C1",
        "short functions, phase 2 at 1e-4: SD-Zero is better than SRT",
        "accuracy",
        "code_sd_zero_1e-4",
        "code_srt",
    ),
    (
        "C1",
        "short functions, phase 2 at 1e-4: SD-Zero is better than RFT",
        "accuracy",
        "code_sd_zero_1e-4",
        "code_rft",
    ),
    (
        "C3",
        "short functions, phase 2 at 1e-4: SD-Zero's answers are shorter than SRT's",
        "mean_tokens",
        "code_srt",
        "code_sd_zero_1e-4",
    ),
    (
        "C5",
        "short functions, phase 2 at 1e-4: it needs phase 1",
        "accuracy",
        "code_sd_zero_1e-4",
        "code_no_srt_1e-4",
    ),
    (
        "C5",
        "short functions, phase 2 at 1e-4: it needs phase 1, at the same number of answers",
        "accuracy",
        "code_sd_zero_1e-4",
        "code_no_srt_long_1e-4",
    ),
    (
        "–",
        "the teacher needs the reward: true P_r against one P_r for both",
        "accuracy",
        "sd_zero",
        "neutral",
    ),
    (
        "–",
        "the teacher needs the reward: true P_r against the other reward's",
        "accuracy",
        "sd_zero",
        "inverted",
    ),
]
CURVES = (
    "accuracy",
    "mean_tokens",
    "kl",
    "kl_r0",
    "kl_r1",
    "said_wrong",
    "said_right",
)  # of 04's log, kept with a run
START = {
    "rft": 2e-4,
    "grpo": 1e-4,
    "sdft": 1e-4,
    "srt": 2e-4,
    "sd_zero": 1e-4,
}  # where the search of learning rates starts


# ---------------------------------------------------------------- one run


def places(name, seed, out, rates):
    """What the braces of METHODS stand for."""
    rates = {k: f"{v:g}" for k, v in rates.items()}
    S = out / f"{'code_' if name.startswith('code_') else ''}seed{seed}"
    O = S / name
    return {
        "S": S,
        "SRT": S / f"srt/lr_{rates.get('srt')}",
        "O": O,
        "M": O / (f"lr_{rates[name]}" if name in rates else "model"),
        **rates,
    }


def run(name, seed, out, rates, split="test", miniature=False):
    """One method with one seed: its commands, then 05 on its model. Returns what is filed under data/claims."""
    label, commands, model, sampled = METHODS[name]
    at = places(name, seed, out, rates)
    evaluate = (
        f"05_eval.py --split {split} --checkpoints {name}={model} --eval {{M}}_{split}_eval.jsonl"
    )
    commands = [
        *commands,
        evaluate + CODE * name.startswith("code_") + " --mix" * any("--mix" in c for c in commands),
    ]
    commands = [
        f"{c.format(**at)} --seed {seed}" + ("" if "--out" in c else f" --out {at['O']}")
        for c in commands
    ]
    if miniature:
        commands = [" ".join([c, *MINI[int(c[:2])]]) for c in commands]
    at["O"].mkdir(parents=True, exist_ok=True)
    with open(at["O"] / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        for command in commands:
            print(f"\n$ python {command}", flush=True)
            script, *flags = shlex.split(command)
            try:
                load(script).main(flags)
            except SystemExit:
                raise RuntimeError(f"{command}: failed, see the end of {log.name}") from None
            finally:
                for held in list(common._locks):  # the worker lives on
                    common.unlock(held)
    counts = [count(Path(f.format(**at))) for f in sampled]
    made = {Path(f.format(**at)) for f in [*sampled, model]} | (
        {at["SRT"]} if any("{SRT}" in c for c in METHODS[name][1]) else set()
    )
    timed = made - {
        Path(model),
        Path(f"{at['M']}.jsonl"),
    }  # the log's seconds are those of its model
    seconds = [common.read_meta(f)["seconds"] for f in timed]
    made_by = {"commit": common.commit(), "threads": torch.get_num_threads()}
    if "{" in model:
        made_by |= {k: v for k, v in common.read_meta(model.format(**at)).items() if k in made_by}
    curves = {}
    if (log := Path(f"{at['M']}.jsonl")) in made:
        steps = rows_of(log)
        curves = {k: [round(r[k], 4) if r[k] is not None else None for r in steps] for k in CURVES}
    (metrics,) = json.loads(Path(f"{at['M']}_{split}_summary.json").read_text())
    rows, tokenizer = (
        rows_of(f"{at['M']}_{split}_eval.jsonl"),
        common.load_tokenizer(model.format(**at)),
    )
    wrong = [r for r in rows if r.get("kl") and r["finished"] and not r["reward"]]
    example = min(
        wrong, key=lambda r: abs(len(r["response_ids"]) - 80), default=None
    )  # of a length that can be printed
    if example:
        example = {
            **{k: example[k] for k in ("problem", "answer", "kl", "kl_reward")},
            "tokens": [tokenizer.decode([t]) for t in example["response_ids"]],
        }
    return {
        "method": name,
        "label": label,
        "seed": seed,
        "commands": [f"python {c}" for c in commands],
        "metrics": metrics,
        "answers": sum(n for n, _ in counts),
        "tokens": sum(t for _, t in counts),
        "minutes": round(sum(seconds) / 60, 2),
        **made_by,
        "mistakes": mistakes(rows, tokenizer),
        "off_task": off_task(rows),
        "training": curves,
        "example": example,
    }


def count(path):
    """(answers, tokens) sampled, as a file of 01, 03 or 04 has them."""
    rows = rows_of(path)
    if "gradient_norm" in rows[0]:
        return sum(round(r["tokens"] / r["mean_tokens"]) for r in rows), sum(
            r["tokens"] for r in rows
        )
    field = "revised_ids" if "revised_ids" in rows[0] else "response_ids"
    return len(rows), sum(len(r[field]) for r in rows)


def first_mistake(row, edits):
    """(start of the last attempt, of its first wrong digit, end of that digit's line), in characters; None if the mistake cannot be known.

    Known are attempts whose lines apply the problem's edits in turn, each to the number that the line before it states.
    """
    number, names = re.match(r"Start with (\d+): (.*?)\.", row["problem"]).groups()
    begin = at = max(
        [
            0,
            *(
                m.end()
                for phrase in common.P_R.values()
                for m in re.finditer(re.escape(phrase) + r"\s*", row["response"])
            ),
        ]
    )
    for name, line in zip(
        [*names.split(", then "), "boxed"], row["response"][begin:].splitlines(keepends=True)
    ):
        stated = list(re.finditer(r"\d+", line))
        if (
            name not in line
            or not stated
            or len(number) < 2
            or any(copied[0] != number for copied in stated[:-1])
        ):
            return None  # "Take 37512 and reverse, which gives 21573.": the first number is copied
        right = edits[name][0](number) if name in edits else number
        if stated[-1][0] != right:
            same = next(
                (i for i, (a, b) in enumerate(zip(stated[-1][0], right)) if a != b),
                min(len(stated[-1][0]), len(right)),
            )
            return begin, at + stated[-1].start() + same, at + len(line) - 1
        number, at = stated[-1][0], at + len(line)
    return None


def mistakes(rows, tokenizer):
    """Of wrong answers' last attempts: is the token with the most KL (the largest KL reward) the first mistake, or before the next line?

    For the first domain, in which the first mistake can be known.
    """
    edits, found = load("data/make_data.py").EDITS, []
    for row in rows:
        known = (
            row.get("kind") != "code" and row.get("kl") and row["finished"] and not row["reward"]
        )
        place = first_mistake(row, edits) if known else None
        if place:
            ends = np.cumsum([len(tokenizer.decode([t])) for t in row["response_ids"]])
            attempt = [j for j, end in enumerate(ends) if end > place[0]]
            inside = [j for j in attempt if place[1] < ends[j] <= place[2] + 1] or [
                len(ends) - 1
            ]  # the end came too early
            top = {key: max(attempt, key=lambda j: row[key][j]) for key in ("kl", "kl_reward")}
            found.append(
                (
                    top["kl"] == inside[0],
                    top["kl"] in inside,
                    top["kl_reward"] in inside,
                    len(inside) / len(attempt),
                )
            )
    means = np.mean(found, 0).tolist() if found else [None] * 4
    return dict(
        zip(
            ("answers", "kl_on_it", "kl_by_line_end", "reward_by_line_end", "chance"),
            [len(found), *means],
        )
    )


def off_task(rows):
    """Of the sampled programs of the second domain, the share whose lines are not, one by one, readings of the problem's steps.

    A reading is right or mistaken, with any number: a program can be wrong and on its task.
    """
    ops, found, pattern = (
        load("data/make_code.py").OPS,
        [],
        lambda text: re.escape(text).replace(r"\{n\}", r"\d+"),
    )
    readings = lambda step: "|".join(
        pattern(text)
        for op, (*both, _) in ops.items()
        if re.fullmatch(pattern(op), step)
        for text in both
    )
    for row in rows:
        if row.get("kind") == "code" and not row["greedy"]:
            asked = re.search("it should (.*)\\.$", row["problem"])[1].split(", then ")
            lines = re.findall(
                "^ *xs = (.*)$", row["response"].split("```python")[-1], re.MULTILINE
            )
            found.append(
                len(lines) != len(asked)
                or not all(re.fullmatch(readings(step), line) for step, line in zip(asked, lines))
            )
    return float(np.mean(found)) if found else None


def search(name, out, found, miniature):
    """Half of START's rate, it, twice it, and on while the best is at an end; on the validation split, with seed 0."""
    accuracy, todo = (
        {},
        [START[name]] if miniature else [0.5 * START[name], START[name], 2 * START[name]],
    )
    while todo:
        rate = todo.pop(0)
        accuracy[rate] = run(name, 0, out, {**found, name: rate}, "validation", miniature)[
            "metrics"
        ]["accuracy"]
        best = max(accuracy, key=accuracy.get)
        if not todo and not miniature and len(accuracy) < 6:
            todo = [rate for rate in (0.5 * best, 2 * best) if rate not in accuracy][:1]
    return {"rate": best, "accuracy": accuracy}


# ---------------------------------------------------------------- all runs


def needs(name):
    """The searches whose rates a method's commands name."""
    return [
        k
        for k in START
        if any(f"{{{k}}}" in c or k == "srt" and "{SRT}" in c for c in METHODS[name][1])
    ]


def complete(artifact):
    return "counts" in common.read_meta(artifact)


def start_worker(threads):
    torch.set_num_threads(threads)
    os.chdir(ROOT)
    # Were the driver killed, a worker would go on with its run, and the next driver's would write into the same files.
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def do(task, out, rates, miniature):
    """In a worker. A task is (method, seed), or (method, None): its search."""
    name, seed = task
    return (
        search(name, out, rates, miniature)
        if seed is None
        else run(name, seed, out, rates, miniature=miniature)
    )


def run_all(methods, seeds, filed, out, jobs, miniature):
    """Every search and run that is not filed yet, `jobs` at a time, each as soon as what it builds on is there."""
    filed.mkdir(parents=True, exist_ok=True)
    file_of = lambda name, seed: (
        filed / (f"search-{name}.json" if seed is None else f"{name}-{seed}.json")
    )
    searched = {k for name in methods for direct in needs(name) for k in (direct, *needs(direct))}
    tasks = [
        (k, None) for k in ("grpo", "srt", "sd_zero", "rft", "sdft") if k in searched
    ]  # the longest first
    tasks += [(name, seed) for name in methods for seed in range(seeds)]
    tasks, running, failed = [t for t in tasks if not file_of(*t).exists()], {}, []
    progress = tqdm(total=len(tasks), desc="claims", unit="run")
    with ProcessPoolExecutor(
        jobs, get_context("spawn"), start_worker, (max(1, os.cpu_count() // jobs),)
    ) as pool:
        while tasks or running:
            rates = {
                k: json.loads(file_of(k, None).read_text())["rate"]
                for k in START
                if file_of(k, None).exists()
            }
            for task in list(tasks):
                name, seed = task
                waits = [k for k in needs(name) if k not in rates and task != (k, None)]
                # Phase 1 of a seed is made once, by the first that needs it; the others wait for it.
                folder = lambda t: (
                    any("{S}" in c for c in METHODS[t[0]][1])
                    and places(t[0], t[1] or 0, out, rates)["S"]
                )
                shares = lambda t: folder(t) and folder(t) == folder(task)
                if (
                    not waits
                    and shares(task)
                    and not complete(places(name, seed or 0, out, rates)["SRT"])
                ):
                    waits = [t for t in running.values() if shares(t)]
                if not waits and len(running) < jobs:
                    running[pool.submit(do, task, out, rates, miniature)] = task
                    tasks.remove(task)
            if not running:
                failed += [f"{task}: what it needs failed" for task in tasks]
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                if future.exception():
                    failed.append(f"{task}: {future.exception()}")
                else:
                    common.write_json(file_of(*task), future.result())
                progress.update()
                tqdm.write(
                    failed[-1]
                    if future.exception()
                    else f"{task}: {future.result().get('metrics', future.result())['accuracy']}",
                    file=sys.stderr,
                )
    progress.close()
    if failed:
        sys.exit(
            "\n".join(
                [
                    "these runs failed, the others are filed; run the same command again to repeat them:",
                    *failed,
                ]
            )
        )


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--seeds",
        type=common.at_least(0),
        default=3,
        help="so many, from 0; 0: only write the README's tables (default: 3)",
    )
    p.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}",
    )
    p.add_argument(
        "--jobs",
        type=common.at_least(1),
        default=os.cpu_count(),
        help="runs at a time, with cores / jobs threads each (default: one a core)",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/claims"),
        help="one folder a seed below it (default: runs/claims)",
    )
    p.add_argument(
        "--check",
        action="store_true",
        help="run nothing; compare README.md and figures with what data/claims gives",
    )
    p.add_argument(
        "--miniature",
        action="store_true",
        help="tiny, to see that it runs: files its results below --out",
    )
    args = p.parse_args(argv)
    filed = args.out / "filed" if args.miniature else FILED
    if args.check:
        with tempfile.TemporaryDirectory() as scratch:
            differs = report.check(FILED, METHODS, CLAIMS, Path(scratch))
        sys.exit(
            f"{' and '.join(differs)}: not what data/claims gives; run: python tests/claims.py --seeds 0"
            if differs
            else 0
        )
    if args.seeds:
        run_all(args.methods, args.seeds, filed, args.out, args.jobs, args.miniature)
    readme, figures = (
        (args.out / "README.md", args.out)
        if args.miniature
        else (ROOT / "README.md", ROOT / "data")
    )
    if args.miniature:
        readme.write_text("<!-- results -->\n<!-- /results -->")
    print(report.write(filed, METHODS, CLAIMS, readme, figures))


if __name__ == "__main__":
    main()
