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
TOLD = "true", "one", "opposite"  # what the teacher of phase 2 is told
BUDGETS = {"sd_zero": "SD-Zero", "no_srt": "phase 2 on the base", "sdft": "SDFT"}
BUDGETS |= {"grpo": "GRPO", "rft": "RFT"}
FIGURES = "data/bit.png", "data/budgets.png", "data/claims/outcomes.png"


def read_json(path):
    """What is filed there, or nothing."""
    return json.loads(path.read_text()) if path.exists() else {}


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


def read_budgets(filed, regime="obedient"):
    """{method: its curves, each [answers], [accuracy]} of budgets.py, in BUDGETS' order."""
    found = {}
    for name in BUDGETS:
        for path in sorted((Path(filed) / "budgets").glob(f"{regime}_{name}-[0-9].json")):
            curve = json.loads(path.read_text())["curve"]
            both = [p["answers"] for p in curve], [p["accuracy"] for p in curve]
            found.setdefault(name, []).append(both)
    return found


def read_outcomes(filed):
    """{(regime, told): {kind of choice: {choice: its row}}} of outcomes.py."""
    found = {}
    for path in sorted((Path(filed) / "outcomes").glob("*_*.json")):
        kinds = found[tuple(path.stem.split("_"))] = {}
        for what, row in json.loads(path.read_text()).items():
            follows = re.match(r"edit \d|the end", what)
            kinds.setdefault("which comes next" if follows else "how it is read", {})[what] = row
    return found


# ---------------------------------------------------------------- numbers


def of(runs, method, key):
    """A metric of a method, a value a seed; of one answer to a problem no pass@k."""
    metrics = [run["metrics"] for run in runs.get(method, {}).values()]
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


def until(accuracy, level=0.95, batches=5):
    """The step at whose end the last so many batches are right in `level` on average, or None."""
    means = np.convolve(accuracy, np.ones(batches) / batches, "valid")
    return int(np.argmax(means >= level)) + batches if (means >= level).any() else None


def curves_of(runs, method):
    """Accuracy by steps of phase 2, a list a seed."""
    every = [run["training"].get("accuracy") for run in runs.get(method, {}).values()]
    return [curve for curve in every if curve]


def window(curves, first, last):
    """Means of these steps, a value a curve that has them."""
    return [np.mean(curve[first - 1 : last]) for curve in curves if len(curve) >= last]


def shares(runs, method):
    """{edit: a share of right readings a seed}"""
    readings = [run["readings"] for run in runs[method].values()]
    return {edit: [of[edit][0] / sum(of[edit]) for of in readings] for edit in readings[0]}


# ---------------------------------------------------------------- tables, as lines of Markdown


def table(head, rows, words=1):
    """head: "a | b"; rows: lists of cells, of which the first so many are words."""
    numbers = head.count(" | ") + 1 - words
    lines = [f"| {head} |", "|" + "---|" * words + "--:|" * numbers]
    return lines + [f"| {' | '.join(cells)} |" for cells in rows]


def short(method, rates):
    """A method's commands as stage numbers with the flags that make it, without paths and seeds."""
    parts = []
    for command in method.commands:
        command = re.sub(r" --(out|from|seed) \S+", "", command)
        parts.append(command[:2] + command.partition(".py")[2].format(**rates))
    constants = "".join(f", {name} = {value:g}" for name, value in method.constants.items())
    return ", ".join(parts) + (f"; with {method.patch}.patch" if method.patch else "") + constants


def methods_table(names, runs, seeds):
    """A row a method."""
    rows = []
    for name in names:
        own = list(runs[name].values())
        label = METHODS[name].label + (f" (seeds: {len(own)})" if len(own) < seeds else "")
        cells = [mean_se(of(runs, name, k), t.endswith("%")) for k, t in COLUMNS.items()]
        means = (np.mean([run[k] for run in own]) for k in ("answers", "tokens", "minutes"))
        answers, tokens, minutes = means
        cells += [f"{answers:,.0f}", f"{tokens / 1e3:,.0f}K", f"{minutes:.1f}"]
        rows.append([f"`{name}`", label, *cells])
    return table(" | ".join(["", "", *COLUMNS.values(), "answers | tokens | minutes"]), rows, 2)


def long_table(runs):
    """Long problems, where the paper's phase 2 collapses, and what holds there."""
    rows, names = [], ("long_srt", "long_sd_zero", "long_clip", "long_gate")
    for key in ("accuracy", "greedy"):
        cells = [mean_se(of(runs, name, key), True) for name in names]
        rows.append([COLUMNS[key], *cells])
    return table("after phase 2 on `data/long` | SRT | the paper's | clipped | gated", rows)


def verdict_of(runs, seeds, metric, more, less):
    """[difference, verdict] of a claim."""
    values = differences(runs, metric, more, less)
    if not (judged := judge(values)):
        return ["–", "not run"]
    mean, error, verdict = judged
    units = {"phrases": (1, 2, "phrases"), "mean_tokens": (1, 1, "tokens")}
    scale, digits, unit = units.get(metric, (100, 1, "points"))
    unit += f" ({len(values)} seeds)" if len(values) < seeds else ""
    digits += float(f"{scale * error:.{digits}f}") == 0  # "± 0.0" says nothing
    return [f"{scale * mean:+.{digits}f} ± {scale * error:.{digits}f} {unit}", f"**{verdict}**"]


def claims_tables(runs, claims, seeds):
    """A row a claim; those about the first domain are judged on both bases."""
    first, other = [], []
    for claim, metric, more, less, text in claims:
        cells = [claim, text, *verdict_of(runs, seeds, metric, more, less)]
        if METHODS[more].domain:
            other.append(cells)
        else:
            again = metric, on_obedient(more), on_obedient(less)
            first.append(cells + verdict_of(runs, seeds, *again))
    lines = table(" | claim | truthful base | verdict | obedient base | verdict", first, 2)
    return [*lines, "", *table(" | claim | difference | verdict", other, 2)]


def bit_tables(regime, runs, seeds):
    """What the reward buys on a base: in all, over the steps, edit by edit."""
    names = [f"{regime}_{name}" for name in ("base", "srt", *TOLD)]
    names = [name for name in names if name in runs]
    if not names:
        return []
    lines = [f"**What the bit buys: {regime}**, one answer to each problem but of base and SRT", ""]
    lines += [*methods_table(names, runs, seeds), "", "Right in batches of phase 2, %:", ""]
    ends, rows = range(5, 41, 7), []  # five batches each
    for name in (name for name in names if curves_of(runs, name)):
        steps = [window(curves_of(runs, name), end - 4, end) for end in ends]
        rows.append([f"`{name}`", *(mean_se(of, True) for of in steps)])
    lines += table(" | ".join(["", *(f"steps {end - 4} to {end}" for end in ends)]), rows)
    of_all = [shares(runs, name) for name in names]
    rows = [[edit, *(mean_se(of[edit], True) for of in of_all)] for edit in of_all[0]]
    head = " | ".join(["right readings, % of", *(f"`{name}`" for name in names)])
    return [*lines, "", *table(head, rows)]


def budget_tables(filed):
    """Accuracy by all answers sampled, method by method."""
    lines = ["**What an answer buys**: sampled, %, by all answers sampled for training"]
    for regime in ("obedient", "long"):
        rows, curves = [], read_budgets(filed, regime)
        for name, label in BUDGETS.items():
            tried = read_json(Path(filed) / f"budgets/search-{regime}_{name}.json")
            tried = "; ".join(f"{choice} → {100 * a:.1f}" for choice, a in tried.items())
            accuracy = [accuracy for _, accuracy in curves.get(name, [])]
            cells = [mean_se(of, True) for of in zip(*accuracy)] or ["–"] * 4
            rows.append([label, tried, f"{len(accuracy)}", *cells])
        head = f"{regime} | rate, SD-Zero's problems of phase 1 → validation, % | seeds"
        lines += ["", *table(f"{head} | about 1,024 | 2,048 | 4,096 | 8,192", rows, 2)]
    return lines


def stable_table(filed, runs):
    """What keeps phase 2 stable where the paper's collapses."""
    rows = [["none: SRT", *[""] * len(WINDOWS), *ends(runs, "srt")]]
    for name, method in STABLE.items():
        curves = curves_of(runs, f"long_{name}")
        stopped = read_json(Path(filed) / f"stopped/long_{name}-0.json")
        if not curves and stopped:
            curves = [stopped["training"]["accuracy"]]
        cells = [mean_se(window(curves, *steps), True) for steps in WINDOWS]
        label = method.label + (": not run" if not curves else "")
        rows.append([label, *cells, *ends(runs, name)])
    head = ["phase 2 from SRT", *(f"steps {a} to {b}" for a, b in WINDOWS)]
    head += ["sampled | greedy | worst | off task | length | obedient | functions"]
    lines = ["**What keeps phase 2 stable**, in % but for the length, tokens; *long*, unless said"]
    return [*lines, "", *table(" | ".join(head), rows)]


def ends(runs, name):
    """Where runs ended, on long problems and in the other domains, as cells."""
    cells = [mean_se(of(runs, f"long_{name}", key), True) for key in ("accuracy", "greedy")]
    accuracy = of(runs, f"long_{name}", "accuracy")
    cells.append(f"{100 * min(accuracy):.1f}" if accuracy else "–")
    own = runs.get(f"long_{name}", {}).values()
    cells.append(mean_se([run["off_task"] for run in own], True))
    cells.append(mean_se(of(runs, f"long_{name}", "mean_tokens"), digits=0))
    others = [of(runs, f"{domain}_{name}", "accuracy") for domain in ("obedient", "code")]
    return cells + [mean_se(values, True) for values in others]


def outcome_tables(filed):
    """The two-outcome model, all choices of a kind, then one by one."""
    keys, signs = ("n", "p", "T_R", "T_W", "foretold", "after_5", "after_20"), ["", ".2f"]
    rows, details, signs = [], [], signs + ["+.1f"] * 5
    for (regime, told), kinds in read_outcomes(filed).items():
        for kind, of_kind in kinds.items():
            foretold, *came = (np.array([r[k] for r in of_kind.values()]) for k in keys[-3:])
            cells = [f"{(foretold * after > 0).sum()} of {len(of_kind)}" for after in came]
            cells += [f"{np.corrcoef(foretold, after)[0, 1]:.2f}" for after in came]
            rows.append([f"{regime}, {told}", kind, *cells])
            for what, row in of_kind.items() if regime != "unasked" else ():
                cells = [f"{row[k]:{f}}" if k in row else "–" for k, f in zip(keys, signs)]
                details.append([f"{regime}, {told}", what, *cells])
    said = "Log-odds of the right choice: drift foretold by answers before training, and drift that"
    said += " came (`outcomes.py`, seed 0; of *long* from its SRT):"
    head = "base, told | choices | right signs, 5 steps | 20 | correlation, 5 steps | 20"
    lines = [said, "", *table(head, rows, 2)]
    head = "base, told | choice | n | p | T(R\\|R) | T(R\\|W) | foretold | came in 5 steps | 20"
    return [*lines, "", *table(head, details, 2)] if rows else []


def doubt_table(filed):
    """Where the long base's reviser doubts what its generator knows."""
    rows = []
    for name, by_length in read_json(Path(filed) / "outcomes/doubts.json").items():
        for n, row in by_length.items():
            right, *doubted = row.values()
            rows.append([name, n, f"{right}", *(f"{100 * share:.1f}" for share in doubted)])
    said = "*Long*: of sure tokens (p > 0.9) of right answers the reviser doubts (0.01 nats), %:"
    head = " | edits | right answers | told the truth | the opposite | another problem's answer"
    return [said, "", *table(head, rows)] if rows else []


def kl_tables(filed, runs):
    """Where SRT's reviser disagrees with SRT's answers."""
    srt, rows = list(runs.get("srt", {}).values()), []
    for key, title in (("kl_wrong", "wrong answers"), ("kl_right", "right answers")):
        spreads = [run["metrics"][key] for run in srt if run["metrics"][key]]
        top = [[spread["top"][i] for spread in spreads] for i in range(4)]
        cells = [mean_se([spread["nats"] for spread in spreads])]
        rows.append([title, *cells, *(mean_se(values, True) for values in top)])
    lines = ["Where SRT's reviser disagrees with SRT's answers, as phase 2 finds it at its start:"]
    head = " | nats an answer | in the top 5% of its tokens, % | 10% | 20% | 50%"
    lines, rows = [*lines, "", *table(head, rows), ""], []
    pointing = read_json(Path(filed) / "outcomes/pointing.json")
    keys = "kl_on_it", "kl_by_line_end", "reward_by_line_end", "chance"
    for regime in ("truthful", "obedient", "unasked", "long"):
        own = runs.get("srt" if regime == "truthful" else f"{regime}_srt", {}).values()
        mistakes = [run["mistakes"] for run in own]
        hits = [mean_se([m[key] for m in mistakes], True) for key in keys]
        told = f"{100 * pointing[regime]['kl_on_it']:.1f}" if regime in pointing else "–"
        rows.append([regime, f"{sum(m['answers'] for m in mistakes)}", *hits, told])
    lines += ["In the last attempt of wrong answers, does a token point to the first wrong digit?"]
    head = (
        "SRT of | wrong answers | the most KL: on it, % | from it to its line's end | the largest"
    )
    head += " KL reward: there | a random token | the most KL of truth and opposite: on it"
    return [*lines, "", *table(head, rows)]


def best_table(filed):
    """Of runs that fell, the end and .best, from summaries METHOD-SEED.json."""
    rows = []
    for path in sorted((Path(filed) / "best").glob("*.json")):
        both = [(100 * s["accuracy"], 100 * s["accuracy_se"]) for s in json.loads(path.read_text())]
        name, _, seed = path.stem.rpartition("-")
        rows.append([f"`{name}`", seed, *(f"{value:.1f} ± {error:.1f}" for value, error in both)])
    lines = ["Students that fell, at their end and as `.best` has them; ± over problems:", ""]
    return [*lines, *table(" | seed | end | `.best`", rows)] if rows else []


def self_table(runs, names):
    rows = []
    for key, title in SELF.items():
        how = title.endswith("%"), 2 if key == "phrases" else 1
        rows.append([title, *(mean_se(of(runs, name, key), *how) for name in names)])
    lines = ["How the models judge and revise themselves:", ""]
    return [*lines, *table(" | ".join(["", *names]), rows)]


def reached_line(runs):
    steps = {name: [until(curve) for curve in curves_of(runs, name)] for name in METHODS}
    said = "Steps of phase 2 until 95% of five batches' answers are right (methods that get there"
    steps = {name: mean_se(at) for name, at in steps.items() if at and None not in at}
    return f"{said} with all seeds): {', '.join(f'`{name}` {at}' for name, at in steps.items())}."


def off_task_line(runs, names):
    astray = {name: [run["off_task"] for run in runs[name].values()] for name in names}
    said = [f"`{name}` {mean_se(of, True)}" for name, of in astray.items() if None not in of]
    return f"Programs off their task, %: {', '.join(said)}."


def searched_line(searches):
    said = "Learning rates, by accuracy in % on validation problems:"
    for name, found in searches.items():
        tried = [f"{float(lr):g} → {100 * a:.1f}" for lr, a in found["accuracy"].items()]
        said += f" `{name}` {', '.join(tried)};"
    return said


def tables(filed, claims):
    """(the tables of README.md, all of data/claims/README.md), in Markdown."""
    runs, searches = read(filed)
    seeds = max(map(len, runs.values()))
    there = {name: METHODS[name].domain for name in METHODS if name in runs}
    core = [name for name in CORE if name in there]
    rest = [name for name in there if there[name] == "" and name not in core]
    code = [name for name in there if there[name] == "code"]
    again = dict.fromkeys([f"obedient_{name}" for name in (*CORE, "true", *AGAIN)])
    rates = {name: f"{found['rate']:g}" for name, found in searches.items()}
    parts = [
        [
            f"{seeds} seeds, 400 test problems, 4 answers to each; mean ± standard error of seeds.",
            "*Mended*: the share of its own wrong answers that the model corrects when told so.",
            "*Answers*: sampled for training.",
        ],
        methods_table(core, runs, seeds),
        ["**The second domain**, short functions"],
        methods_table(code, runs, seeds),
        ["**Ablations**: SD-Zero with one thing changed"],
        methods_table(rest, runs, seeds),
        ["**The obedient base**, about 5,490 answers a method; 40 steps a round"],
        methods_table([name for name in again if name in runs], runs, seeds),
        bit_tables("obedient", runs, seeds),
        bit_tables("unasked", runs, seeds),
        budget_tables(filed),
        stable_table(filed, runs),
        [off_task_line(runs, code)],
        claims_tables(runs, claims, seeds),
        [reached_line(runs)],
        self_table(runs, core),
        kl_tables(filed, runs),
        [searched_line(searches)],
        ["The commands of each row, without paths and seeds:"],
        [f"- `{name}`: {short(METHODS[name], rates)}" for name in there],
        best_table(filed),
        outcome_tables(filed),
        doubt_table(filed),
    ]
    return "\n".join(long_table(runs)), "\n\n".join("\n".join(part) for part in parts if part)


# ---------------------------------------------------------------- written or checked


def write(filed, claims, root):
    """The tables into the READMEs below `root`, between their markers, and the figures."""
    import figures

    for name, text in zip(("README.md", "data/claims/README.md"), tables(filed, claims)):
        path, there = root / name, ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(filled_in((path if path.exists() else there).read_text(), "results", text))
    runs, _ = read(filed)
    if all(f"obedient_{name}" in runs for name in ("base", "srt", *TOLD)):
        figures.plot_bit(runs, root / FIGURES[0])
        budgets = {regime: read_budgets(filed, regime) for regime in ("obedient", "long")}
        figures.plot_budgets(budgets, runs, root / FIGURES[1])
        figures.plot_outcomes(read_outcomes(filed), root / FIGURES[2])


def check(filed, claims, scratch):
    """What differs between what is there and what `filed` gives; writes below `scratch` only."""
    from matplotlib.image import imread

    write(filed, claims, scratch)
    differs = []
    for name in ("README.md", "data/claims/README.md"):
        if (scratch / name).read_text() != (ROOT / name).read_text():
            differs.append(name)
    for name in FIGURES:
        ours, theirs = (imread(root / name) for root in (scratch, ROOT))
        if ours.shape != theirs.shape or np.abs(ours - theirs).max() > 0.02:
            differs.append(name)
    return differs
