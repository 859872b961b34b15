"""From data/claims/*.json alone: the tables between the markers of README.md and of
data/claims/README.md, and the figures. Used by tests/claims.py."""

import json
import re
from pathlib import Path

import numpy as np

from conftest import ROOT, filled_in
from methods import AGAIN, METHODS, STABLE, on_obedient

CORE = ["base", "rft", "grpo", "sdft", "srt", "sd_zero"]
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's, two-sided
COLUMNS = {
    "accuracy": "sampled, %",
    "greedy": "greedy, %",
    "pass_at_k": "pass@k, %",
    "correction_rate": "mended, %",
    "mean_tokens": "length",
}
REGIMES = "obedient_", "unasked_"
WINDOWS = (1, 4), (9, 12), (17, 20), (37, 40)  # steps of phase 2
SELF = {
    "revised_accuracy": "accuracy after own revision, %",
    "spoiling_rate": "right answers spoiled, %",
    "finished": "finished, %",
    "phrases": "control phrases an answer",
    "phrases_true": "of these true, %",
    "wrong_after_wrong": "“wrong” among phrases after wrong attempts, %",
    "wrong_after_right": "“wrong” among phrases after right attempts, %",
}
FIGURES = "data/bit.png", "data/budgets.png", "data/claims/outcomes.png"
HITS = "answers", "kl_on_it", "kl_by_line_end", "reward_by_line_end", "chance"
GREY = "#6b7680"
CURVES = {  # of the second figure: colour, name
    "sd_zero": ("#2b7bba", "SD-Zero"),
    "no_srt": ("#7fb8e0", "phase 2 on the base"),
    "sdft": ("#5a9a68", "SDFT"),
    "grpo": ("#e8a33d", "GRPO"),
    "rft": ("#6b7680", "RFT"),
}
TOLD = {  # what the teacher of phase 2 is told: its colour, its name in the figure
    "true": ("#2b7bba", "told the\ntruth"),
    "one": ("#e8a33d", "always told\n“rephrase”"),
    "opposite": ("#b5484d", "told the\nopposite"),
}


def read(folder):
    """(runs {method: {seed: run}}, searches {method: search}) as filed."""
    runs, searches = {}, {}
    for path in sorted(Path(folder).glob("*.json")):
        value = json.loads(path.read_text())
        if path.stem.startswith("search-"):
            searches[path.stem.removeprefix("search-")] = value
        else:
            runs.setdefault(value["method"], {})[value["seed"]] = value
    return runs, searches


def of(runs, method, key):
    """A metric of a method, a value a seed; of one answer to a problem no pass@k."""
    metrics = [run["metrics"] for run in runs[method].values()]
    return [None if key == "pass_at_k" and m["n"] == 1 else m[key] for m in metrics]


def mean_se(values, percent=False, digits=1):
    """ "mean ± standard error" over seeds; no error for one seed; – where nothing was measured."""
    values = [v * (100 if percent else 1) for v in values if v is not None]
    if not values:
        return "–"
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{error}"


def standard_error(values):
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def judge(differences):
    """(mean, its standard error, verdict) of a claimed difference, a value a seed; None of fewer
    than two. shown: the 95% interval (t) lies above 0; opposite: below; else not shown."""
    if len(differences) < 2:
        return None
    mean, error = float(np.mean(differences)), standard_error(differences)
    bound = T95.get(len(differences), T95[8]) * error
    verdict = "shown" if mean > bound else "opposite" if mean < -bound else "not shown"
    return mean, error, verdict


def differences(runs, metric, more, less):
    """Of two methods, paired by seed. C6 compares wrong and right answers of one method: the share
    of an answer's KL that is in the top 10% of its tokens."""
    if metric == "kl":
        metrics = [run["metrics"] for run in runs.get(more, {}).values()]
        both = [(m["kl_wrong"], m["kl_right"]) for m in metrics]
        return [wrong["top"][1] - right["top"][1] for wrong, right in both if wrong and right]
    seeds = sorted(runs.get(more, {}).keys() & runs.get(less, {}).keys())
    pairs = [[runs[name][s]["metrics"][metric] for name in (more, less)] for s in seeds]
    return [a - b for a, b in pairs if a is not None and b is not None]


def short(method, rates):
    """A method's commands as stage numbers with the flags that make it, without paths and seeds."""
    parts = []
    for command in method.commands:
        command = re.sub(r" --(out|from|seed) \S+", "", command)
        parts.append(command[:2] + command.partition(".py")[2].format(**rates))
    constants = "".join(f", {name} = {value:g}" for name, value in method.constants.items())
    return ", ".join(parts) + (f"; with {method.patch}.patch" if method.patch else "") + constants


def table_of(names, runs, seeds):
    """Markdown lines: a row a method."""
    head = ["", "", *COLUMNS.values(), "answers", "tokens", "minutes"]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "--:|" * (len(head) - 2)]
    for name in names:
        own = list(runs[name].values())
        label = METHODS[name].label + (f" (seeds: {len(own)})" if len(own) < seeds else "")
        cells = [mean_se(of(runs, name, k), t.endswith("%")) for k, t in COLUMNS.items()]
        answers, tokens, minutes = (np.mean([run[k] for run in own]) for k in head[-3:])
        cells += [f"{answers:,.0f}", f"{tokens / 1e3:,.0f}K", f"{minutes:.1f}"]
        lines.append(f"| `{name}` | {label} | {' | '.join(cells)} |")
    return lines


def told_table(runs):
    """Markdown lines: by base, the accuracy of phase 2 by what its teacher was told."""
    lines = ["| sampled, %, after phase 2 on | base | the truth | one P_r | the opposite | SRT |"]
    lines.append("|---|" + "--:|" * 5)
    for regime in (name.rstrip("_") for name in REGIMES):
        names = [f"{regime}_{name}" for name in ("base", *TOLD, "srt")]
        cells = [mean_se(of(runs, n, "accuracy"), True) if n in runs else "–" for n in names]
        lines.append(f"| `data/{regime}/base` | {' | '.join(cells)} |")
    return lines


def long_table(runs):
    """Markdown lines: long problems, where the paper's phase 2 collapses, and what holds there."""
    names = {"srt": "SRT", "sd_zero": "the paper's", "clip": "clipped", "gate": "gated"}
    names = {name: label for name, label in names.items() if f"long_{name}" in runs}
    lines = [f"| after phase 2 on `data/long` | {' | '.join(names.values())} |"]
    lines.append("|---|" + "--:|" * len(names))
    for key in ("accuracy", "greedy"):
        cells = [mean_se(of(runs, f"long_{name}", key), True) for name in names]
        lines.append(f"| {COLUMNS[key]} | {' | '.join(cells)} |")
    return lines


def verdict_of(runs, seeds, metric, more, less):
    """ "difference, unit | verdict" of a claim."""
    values = differences(runs, metric, more, less)
    if not (judged := judge(values)):
        return "– | not run"
    mean, error, verdict = judged
    units = {"phrases": (1, 2, "phrases"), "mean_tokens": (1, 1, "tokens")}
    scale, digits, unit = units.get(metric, (100, 1, "points"))
    unit += f" ({len(values)} seeds)" if len(values) < seeds else ""
    digits += float(f"{scale * error:.{digits}f}") == 0  # "± 0.0" says nothing
    return f"{scale * mean:+.{digits}f} ± {scale * error:.{digits}f} {unit} | **{verdict}**"


def claims_tables(runs, methods, claims, seeds):
    """Markdown lines: a row a claim; those about the first domain are judged on both bases."""
    first = ["| | claim | truthful base | verdict | obedient base | verdict |"]
    first.append("|---|---|--:|---|--:|---|")
    other = ["| | claim | difference | verdict |", "|---|---|--:|---|"]
    for claim, metric, more, less, text in claims:
        cells = verdict_of(runs, seeds, metric, more, less)
        if methods[more].domain:
            other.append(f"| {claim} | {text} | {cells} |")
            continue
        again = verdict_of(runs, seeds, metric, on_obedient(more), on_obedient(less))
        first.append(f"| {claim} | {text} | {cells} | {again} |")
    return [*first, "", *other]


def until(accuracy, level=0.95, batches=5):
    """The step at whose end the last so many batches are right in `level` on average, or None."""
    means = np.convolve(accuracy, np.ones(batches) / batches, "valid")
    return int(np.argmax(means >= level)) + batches if (means >= level).any() else None


def shares(runs, method):
    """{edit: a share of right readings a seed}"""
    readings = [run["readings"] for run in runs[method].values()]
    return {edit: [of[edit][0] / sum(of[edit]) for of in readings] for edit in readings[0]}


def bit_lines(regime, names, runs, seeds):
    """Markdown lines: what the reward buys on a base, in all, over the steps, edit by edit."""
    lines = [f"**What the bit buys: {regime[:-1]}**, one answer to each problem", ""]
    lines += [*table_of(names, runs, seeds), "", "Right in batches of phase 2, %, and readings, %:"]
    told = [name for name in names if name.removeprefix(regime) in TOLD]
    steps = max(len(runs[name][0]["training"]["accuracy"]) for name in told) if told else 0
    ends = [end for end in range(5, 41, 7) if end <= steps]  # five batches each
    head = " | ".join(f"steps {end - 4} to {end}" for end in ends)
    lines += ["", f"| | {head} |", "|---|" + "--:|" * len(ends)]
    for name in told:
        curves = [run["training"]["accuracy"] for run in runs[name].values()]
        cells = [mean_se([np.mean(c[end - 5 : end]) for c in curves], True) for end in ends]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", f"| right readings of | {' | '.join(f'`{name}`' for name in names)} |"]
    lines += ["|---|" + "--:|" * len(names)]
    of_all = [shares(runs, name) for name in names]
    for edit in of_all[0]:
        lines.append(f"| {edit} | {' | '.join(mean_se(of[edit], True) for of in of_all)} |")
    return lines


def read_budgets(filed, regime="obedient"):
    """{method: its curves, each [answers], [accuracy]} of budgets.py, in CURVES' order."""
    found = {}
    for name in CURVES:
        for path in sorted((Path(filed) / "budgets").glob(f"{regime}_{name}-[0-9].json")):
            points = json.loads(path.read_text())["curve"]
            both = [[point[key] for point in points] for key in ("answers", "accuracy")]
            found.setdefault(name, []).append(both)
    return found


def budget_lines(filed):
    """Markdown lines: accuracy by all answers sampled, method by method."""
    lines = ["**What an answer buys**: sampled, %, by all answers sampled for training; *obedient*"]
    lines += ["", "| | seeds | about 1,024 | 2,048 | 4,096 | 8,192 | searched, % on validation |"]
    lines.append("|---|" + "--:|" * 5 + "---|")
    for name, curves in read_budgets(filed).items():
        cells = [mean_se(of, True) for of in zip(*(accuracy for _, accuracy in curves))]
        tried = json.loads((Path(filed) / f"budgets/search-obedient_{name}.json").read_text())
        tried = "; ".join(f"{choice} → {100 * a:.1f}" for choice, a in tried.items())
        lines.append(f"| {CURVES[name][1]} | {len(curves)} | {' | '.join(cells)} | {tried} |")
    lines += [
        "",
        "Tried: learning rate, problems of SD-Zero's phase 1 → right, %. On *long*, the same:",
    ]
    for path in sorted((Path(filed) / "budgets").glob("search-long_*.json")):
        tried = json.loads(path.read_text()).items()
        lines[-1] += f" {path.stem.partition('_')[2]} " + "; ".join(
            f"{c} → {a:.1%}" for c, a in tried
        )
    return lines


def stable_lines(filed, runs):
    """Markdown lines: what keeps phase 2 stable where the paper's collapses."""
    head = ["phase 2 from SRT", *(f"steps {a} to {b}" for a, b in WINDOWS)]
    head += ["sampled", "greedy", "worst", "off task", "length", "obedient", "functions"]
    lines = ["**What keeps phase 2 stable**, in % but for the length, tokens; *long*, unless said"]
    lines += ["", f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    levels = [
        list(runs.get(f"{domain}_srt", {}).values()) for domain in ("long", "obedient", "code")
    ]
    sampled = [mean_se([run["metrics"]["accuracy"] for run in level], True) for level in levels]
    lines.append(f"| none: SRT |{' |' * 4} {end_cells(levels[0])} | {' | '.join(sampled[1:])} |")
    for name, method in STABLE.items():
        own = list(runs.get(f"long_{name}", {}).values())
        path = Path(filed) / f"stopped/long_{name}-0.json"
        curves = [run["training"]["accuracy"] for run in own]
        if not curves and path.exists():
            curves = [json.loads(path.read_text())["training"]["accuracy"]]
        cells = [mean_se(window(curves, *steps), True) for steps in WINDOWS] + [end_cells(own)]
        for domain in ("obedient", "code"):
            others = runs.get(f"{domain}_{name}", {}).values()
            cells.append(mean_se([run["metrics"]["accuracy"] for run in others], True))
        label = method.label + (": not run" if not curves else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def window(curves, first, last):
    """Means of these steps, a value a curve that has them."""
    return [np.mean(curve[first - 1 : last]) for curve in curves if len(curve) >= last]


def end_cells(own):
    """Where runs ended, as cells of a table."""
    metrics = [run["metrics"] for run in own]
    cells = [mean_se([m[key] for m in metrics], True) for key in ("accuracy", "greedy")]
    cells.append(f"{100 * min(m['accuracy'] for m in metrics):.1f}" if own else "–")
    cells.append(mean_se([run["off_task"] for run in own], True))
    cells.append(mean_se([m["mean_tokens"] for m in metrics], digits=0))
    return " | ".join(cells)


def outcome_kinds(filed, regime, told):
    """{kind of choice: {choice: its row}} of the two-outcome model (outcomes.py)."""
    rows = json.loads((Path(filed) / f"outcomes/{regime}_{told}.json").read_text())
    kinds = {"how it is read": {}, "what comes next": {}}
    for what, row in rows.items():
        following = re.match(r"edit \d|the end", what)
        kinds["what comes next" if following else "how it is read"][what] = row
    return {kind: of for kind, of in kinds.items() if of}


def outcome_lines(filed):
    """Markdown lines: the two-outcome model, choice by choice."""
    head = "n | p | T(R\\|R) | T(R\\|W) | drift foretold | came in 5 steps | in 20"
    keys = "n", "p", "T_R", "T_W", "foretold", "after_5", "after_20"
    details = ["", f"| base, told | choice | {head} |", "|---|---|" + "--:|" * len(keys)]
    lines = ["Log-odds of the right choice: drift foretold by answers before training, and drift"]
    lines[-1] += " that came (`outcomes.py`, seed 0; of *long* from its SRT):"
    lines += [
        "",
        "| base, told | choices | right signs, 5 steps | 20 | correlation, 5 steps | 20 |",
    ]
    lines += ["|---|---|--:|--:|--:|--:|"]
    for path in sorted((Path(filed) / "outcomes").glob("*_*.json")):
        regime, told = path.stem.split("_")
        for kind, of in outcome_kinds(filed, regime, told).items():
            foretold, *came = (np.array([row[key] for row in of.values()]) for key in keys[-3:])
            cells = [f"{(foretold * after > 0).sum()} of {len(of)}" for after in came]
            cells += [f"{np.corrcoef(foretold, after)[0, 1]:.2f}" for after in came]
            lines.append(f"| {regime}, {told} | {kind} | {' | '.join(cells)} |")
            for what, row in of.items() if regime != "unasked" else ():
                signs = ["", ".2f", *["+.1f"] * 5]
                cells = [f"{row[k]:{f}}" if k in row else "–" for k, f in zip(keys, signs)]
                details.append(f"| {regime}, {told} | {what} | {' | '.join(cells)} |")
    return [*lines, *details] if len(lines) > 4 else []


def doubt_lines(filed):
    """Markdown lines: where the long base's reviser doubts what its generator knows."""
    path = Path(filed) / "outcomes/doubts.json"
    if not path.exists():
        return []
    lines = [
        "Of the tokens of right answers that the generator is sure of (p > 0.9), those that its"
    ]
    lines[-1] += " reviser doubts (by 0.01 nats), %; *long*, by edits a problem:"
    filed = json.loads(path.read_text())
    ways = [key for key in filed["base"]["3"] if key != "right answers"]
    lines += ["", f"| | edits | {' | '.join(ways)} | right answers |", "|---|--:|" + "--:|" * 4]
    for name, by_length in filed.items():
        for n, row in by_length.items():
            cells = [f"{100 * row[way]:.1f}" for way in ways]
            lines.append(f"| {name} | {n} | {' | '.join(cells)} | {row['right answers']} |")
    return lines


def kl_lines(runs):
    """Markdown lines: where SRT's reviser disagrees with SRT's answers."""
    srt = [runs["srt"][seed] for seed in sorted(runs.get("srt", {}))]
    lines = ["Where SRT's reviser disagrees with SRT's answers, as phase 2 finds it at its start:"]
    head = "nats an answer | in the top 5% of its tokens, % | 10% | 20% | 50% |"
    lines += ["", f"| | {head}", "|---|--:|--:|--:|--:|--:|"]
    for key, title in (("kl_wrong", "wrong answers"), ("kl_right", "right answers")):
        spreads = [run["metrics"][key] for run in srt if run["metrics"][key]]
        cells = [mean_se([spread["nats"] for spread in spreads])]
        cells += [mean_se([spread["top"][i] for spread in spreads], True) for i in range(4)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += [
        "",
        "In the last attempt of wrong answers, does a token point to the first wrong digit?",
    ]
    head = (
        "wrong answers | the most KL: on it, % | from it to its line's end | the largest KL reward"
    )
    lines += ["", f"| SRT of | {head}: there | a random token |", "|---|" + "--:|" * 5]
    for regime in ("", "obedient_", "unasked_", "long_"):
        if f"{regime}srt" not in runs:
            continue
        n, *hits = ([run["mistakes"][key] for run in runs[f"{regime}srt"].values()] for key in HITS)
        cells = [f"{sum(n)}", *(mean_se(values, True) for values in hits)]
        lines.append(f"| {regime.rstrip('_') or 'truthful'} | {' | '.join(cells)} |")
    return lines


def best_lines(filed):
    """Markdown lines: of runs that fell, the end and .best, from summaries METHOD-SEED.json."""
    lines = ["Students that fell, at their end and as `.best` has them; ± over problems:", ""]
    lines += ["| | seed | end | `.best` |", "|---|--:|--:|--:|"]
    for path in sorted((Path(filed) / "best").glob("*.json")):
        both = [(100 * s["accuracy"], 100 * s["accuracy_se"]) for s in json.loads(path.read_text())]
        name, _, seed = path.stem.rpartition("-")
        cells = " | ".join(f"{value:.1f} ± {error:.1f}" for value, error in both)
        lines.append(f"| `{name}` | {seed} | {cells} |")
    return lines if len(lines) > 4 else []


def tables(filed, methods, claims):
    """(the tables of README.md, all of data/claims/README.md), in Markdown."""
    runs, searches = read(filed)
    seeds, some = max(map(len, runs.values())), next(iter(next(iter(runs.values())).values()))
    core = [name for name in CORE if name in runs]
    code = [name for name in methods if name in runs and name.startswith("code_")]
    regimes = [
        name for name in methods if name in runs and methods[name].domain not in ("", "code")
    ]
    rest = [name for name in methods if name in runs and not methods[name].domain]
    rest = [name for name in rest if name not in core]
    note = f"{seeds} seeds, {some['metrics']['problems']} test problems, {some['metrics']['n']} "
    note += (
        "answers to each, mean ± standard error over seeds.\n*Mended*: the share of its own wrong "
    )
    note += "answers that the model corrects when told so.\n*Answers*: sampled for training."
    first = [*told_table(runs), "", *long_table(runs)]
    lines = [note, "", *table_of(core, runs, seeds)]
    titles = ("**The second domain**, short functions", code)
    again = [f"obedient_{name}" for name in (*CORE, "true", *AGAIN)]
    again = [name for name in dict.fromkeys(again) if name in runs]
    titles = titles, ("**Ablations**: SD-Zero with one thing changed", rest)
    titles += (("**The obedient base**, about 5,490 answers a method; 40 steps a round", again),)
    for title, names in titles:
        lines += ["", title, "", *table_of(names, runs, seeds)] if names else []
    for regime in REGIMES:
        told = "base", "srt", *TOLD
        names = [f"{regime}{name}" for name in told if f"{regime}{name}" in runs]
        lines += ["", *bit_lines(regime, names, runs, seeds)] if names else []
    lines += ["", *budget_lines(filed), "", *stable_lines(filed, runs)]
    astray = {name: [run["off_task"] for run in runs[name].values()] for name in code}
    astray = [f"`{name}` {mean_se(v, True)}" for name, v in astray.items() if None not in v]
    lines += ["", f"Programs off their task, %: {', '.join(astray)}.", ""] if astray else [""]
    lines += claims_tables(runs, methods, claims, seeds)
    reached = []
    for name in methods:
        own = [
            run["training"]["accuracy"] for run in runs.get(name, {}).values() if run["training"]
        ]
        steps = [until(accuracy) for accuracy in own]
        if steps and None not in steps:
            reached.append(f"`{name}` {mean_se(steps)}")
    lines += [
        "",
        "Steps of phase 2 until 95% of five batches' answers are right (methods that get ",
    ]
    lines[-1] += f"there with all seeds): {', '.join(reached)}."
    lines += ["", "How the models judge and revise themselves:", "", f"| | {' | '.join(core)} |"]
    lines += ["|---|" + "--:|" * len(core)]
    for key, title in SELF.items():
        how = title.endswith("%"), 2 if key == "phrases" else 1
        cells = [mean_se(of(runs, name, key), *how) for name in core]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", *kl_lines(runs), "", "Learning rates, by accuracy in % on validation problems:"]
    for name, found in searches.items():
        tried = [f"{float(lr):g} → {100 * a:.1f}" for lr, a in found["accuracy"].items()]
        lines[-1] += f" `{name}` {', '.join(tried)};"
    lines += ["", "The commands of each row, without paths and seeds:", ""]
    rates = {name: f"{found['rate']:g}" for name, found in searches.items()}
    lines += [f"- `{name}`: {short(methods[name], rates)}" for name in core + code + rest + regimes]
    return "\n".join(first), "\n".join(
        [*lines, "", *best_lines(filed), "", *outcome_lines(filed), "", *doubt_lines(filed)]
    )


# ---------------------------------------------------------------- the figures


def plot_bit(runs, path):
    """On the obedient base, told the truth or not: accuracy over phase 2's steps; edit by edit, the
    share of right readings before and after."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for told, (colour, label) in TOLD.items():
        curves = [run["training"]["accuracy"] for run in runs[f"obedient_{told}"].values()]
        curves = 100 * np.array(curves)  # [seeds, steps]
        steps, mean = np.arange(curves.shape[1]) + 1, curves.mean(0)
        left.plot(steps, curves.T, color=colour, linewidth=0.8, alpha=0.35)
        left.plot(steps, mean, color=colour, linewidth=2.8)
        at = steps[-1] + 1, mean[-5:].mean()
        left.annotate(label, at, color=colour, fontsize=12, va="center", annotation_clip=False)
    levels = [100 * np.mean(of(runs, f"obedient_{name}", "accuracy")) for name in ("base", "srt")]
    left.hlines(levels, 0, steps[-1], color=GREY, linewidth=1.2, linestyle=":", zorder=0)
    ticks = [0, f"base {levels[0]:.0f}", f"SRT {levels[1]:.0f}", 100]
    left.set_yticks([0, *levels, 100], ticks, fontsize=11)
    left.set(title="right answers, %", xlabel="step of phase 2", ylim=(0, 102), xlim=(0, 52))
    left.set_xticks(range(0, len(steps) + 1, 10))

    before = {edit: 100 * np.mean(v) for edit, v in shares(runs, "obedient_base").items()}
    edits = sorted(before, key=before.get)
    for told, shift in (("true", 0.17), ("one", -0.17)):
        after = shares(runs, f"obedient_{told}")
        for y, edit in enumerate(edits):
            ends = (100 * np.mean(after[edit]), y + shift), (before[edit], y + shift)
            arrow = {"arrowstyle": "-|>", "color": TOLD[told][0], "linewidth": 2.4}
            right.annotate("", *ends, arrowprops=arrow | {"shrinkA": 0, "shrinkB": 0})
    for y, edit in enumerate(edits):
        right.plot([before[edit]] * 2, [y - 0.3, y + 0.3], color=GREY, linewidth=2)
    right.set(title="edits read rightly, %", xlabel="from the base to step 40", xlim=(-3, 103))
    right.set_ylim(-0.6, len(edits) - 0.4)
    right.set_yticks(range(len(edits)), edits, fontsize=11)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(13)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_budgets(filed, runs, path):
    """On the obedient base: accuracy against all answers sampled for training."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    ends = []
    for name, curves in read_budgets(filed).items():
        colour, label = CURVES[name]
        answers, accuracy = np.array(curves).swapaxes(0, 1)  # each [seeds, budgets]
        accuracy = 100 * accuracy
        axes.plot(answers.T, accuracy.T, color=colour, linewidth=0.8, alpha=0.4)
        x, y = answers.mean(0), accuracy.mean(0)
        axes.plot(x, y, color=colour, linewidth=2.8, marker="o", markersize=5)
        ends.append((y[-1], label, colour))
    below = np.inf
    for y, label, colour in sorted(ends, reverse=True):  # names do not cover each other
        below = min(y, below - 5)
        how = {"color": colour, "fontsize": 12, "va": "center", "annotation_clip": False}
        axes.annotate(f"{label} {y:.0f}", (9000, below), **how)
    base = 100 * np.mean(of(runs, "obedient_base", "accuracy"))
    axes.axhline(base, color=GREY, linewidth=1.2, linestyle=":", zorder=0)
    axes.set_xscale("log")
    ticks = [1024, 2048, 4096, 8192]
    axes.set_xticks(ticks, ["1K", "2K", "4K", "8K"], fontsize=11)
    axes.minorticks_off()
    axes.set_yticks([base, 60, 80, 100], [f"base {base:.0f}", "60", "80", "100"], fontsize=11)
    axes.set(title="right answers to test problems, %", ylim=(38, 102), xlim=(900, 20000))
    axes.set_xlabel("answers sampled for training, all of them", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(13)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_outcomes(filed, path):
    """The two-outcome model: the drift that one batch foretells, and what training did."""
    from matplotlib import pyplot as plt

    regimes = {path.stem.split("_")[0] for path in (Path(filed) / "outcomes").glob("*_*.json")}
    regimes = [regime for regime in ("obedient", "unasked", "long") if regime in regimes]
    how = {"figsize": (3.8 * len(regimes), 4.2), "layout": "constrained", "sharey": True}
    figure, panels = plt.subplots(1, len(regimes), **how)
    for axes, regime in zip(panels, regimes):
        for told, (colour, label) in TOLD.items():
            if not (Path(filed) / f"outcomes/{regime}_{told}.json").exists():
                continue
            for kind, of in outcome_kinds(filed, regime, told).items():
                x, y = ([row[key] for row in of.values()] for key in ("foretold", "after_20"))
                marker, said = ("o", label.replace("\n", " ")) if "read" in kind else ("^", None)
                axes.scatter(x, y, 55, colour, marker, label=said, edgecolors="white")
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set(title=regime, xlabel="drift foretold by one batch, nats")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("drift that came in 20 steps, nats")
    for kind, marker in (("how an edit is read", "o"), ("which comes next", "^")):
        panels[-1].scatter([], [], 55, GREY, marker, label=kind)
    keys = panels[0].get_legend_handles_labels(), panels[-1].get_legend_handles_labels()
    panels[0].legend(*keys[0], frameon=False, fontsize=11)
    panels[-1].legend(*(of[-2:] for of in keys[1]), frameon=False, fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------- written or checked


def write(filed, methods, claims, root):
    """The tables into the READMEs below `root`, between their markers, and the figures."""
    import matplotlib

    matplotlib.use("Agg")
    texts = tables(filed, methods, claims)
    for name, text in zip(("README.md", "data/claims/README.md"), texts):
        path, there = root / name, ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(filled_in((path if path.exists() else there).read_text(), "results", text))
    runs, _ = read(filed)
    if all(f"obedient_{name}" in runs for name in ("base", "srt", *TOLD)):
        plot_bit(runs, root / FIGURES[0])
    if read_budgets(filed) and "obedient_base" in runs:
        plot_budgets(filed, runs, root / FIGURES[1])
    if (Path(filed) / "outcomes").exists():
        plot_outcomes(filed, root / FIGURES[2])


def check(filed, methods, claims, scratch):
    """What differs between what is there and what `filed` gives; writes below `scratch` only."""
    from matplotlib.image import imread

    write(filed, methods, claims, scratch)
    differs = []
    for name in ("README.md", "data/claims/README.md"):
        if (scratch / name).read_text() != (ROOT / name).read_text():
            differs.append(name)
    for name in FIGURES:
        ours, theirs = (imread(root / name) for root in (scratch, ROOT))
        if ours.shape != theirs.shape or np.abs(ours - theirs).max() > 0.02:
            differs.append(name)
    return differs
