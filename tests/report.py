"""From the files under data/claims alone: the README's tables between the markers, and three figures. Used by tests/claims.py."""

import json
import re
from pathlib import Path

import numpy as np

from conftest import ROOT, filled_in

CORE = ["base", "rft", "grpo", "sdft", "srt", "sd_zero"]
T95 = {
    2: 12.71,
    3: 4.30,
    4: 3.18,
    5: 2.78,
    6: 2.57,
    7: 2.45,
    8: 2.36,
    9: 2.31,
    10: 2.26,
}  # Student's t, two-sided, by number of seeds
COLUMNS = {
    "accuracy": "sampled, %",
    "greedy": "greedy, %",
    "pass_at_k": "pass@k, %",
    "correction_rate": "mended, %",
    "mean_tokens": "length",
}
SELF = {
    "revised_accuracy": "accuracy after own revision, %",
    "spoiling_rate": "right answers spoiled, %",
    "finished": "finished, %",
    "phrases": "control phrases an answer",
    "phrases_true": "of these true, %",
    "wrong_after_wrong": "“wrong” among phrases after wrong attempts, %",
    "wrong_after_right": "“wrong” among phrases after right attempts, %",
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


def mean_se(values, percent=False, digits=1):
    """ "mean ± standard error" over seeds; without an error for one seed; – where nothing was measured."""
    values = [v * (100 if percent else 1) for v in values if v is not None]
    error = (
        f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    )
    return f"{np.mean(values):.{digits}f}{error}" if values else "–"


def judge(differences):
    """(mean, its standard error, verdict) of a claimed difference, a value a seed; None with less than two.

    shown: the 95% confidence interval (t) lies above 0; opposite: below 0; else not shown.
    """
    if len(differences) < 2:
        return None
    mean, error = (
        float(np.mean(differences)),
        float(np.std(differences, ddof=1) / len(differences) ** 0.5),
    )
    bound = T95.get(len(differences), T95[10]) * error
    return mean, error, "shown" if mean > bound else "opposite" if mean < -bound else "not shown"


def differences(runs, metric, more, less):
    """Of two methods, paired by seed. C6 compares wrong and right answers of one: the share of KL in the top 10% of an answer's tokens."""
    of = lambda name, s: runs[name][s]["metrics"][metric]
    if metric == "kl":
        metrics = [run["metrics"] for run in runs.get(more, {}).values()]
        return [
            m["kl_wrong"]["top"][1] - m["kl_right"]["top"][1]
            for m in metrics
            if m["kl_wrong"] and m["kl_right"]
        ]
    pairs = [
        (of(more, s), of(less, s))
        for s in sorted(runs.get(more, {}).keys() & runs.get(less, {}).keys())
    ]
    return [a - b for a, b in pairs if a is not None and b is not None]


def short(commands):
    """Commands as stage numbers with the flags that make the method, without evaluation, paths and seeds."""
    paths = r" --(out|verified|revisions|sd-zero|distill|seed) \S+| --srt (?!data/)\S+"
    commands = [c.removeprefix("python ") for c in commands if "05_eval.py" not in c]
    return ", ".join(c[:2] + re.sub(paths, "", c.partition(".py")[2]) for c in commands)


def table_of(names, runs, seeds):
    """Markdown lines: a row a method."""
    lines = [
        "| | | " + " | ".join(COLUMNS.values()) + " | answers | tokens | minutes |",
        "|---|---|" + "--:|" * (len(COLUMNS) + 3),
    ]
    for name in names:
        own = list(runs[name].values())
        label = own[0]["label"] + (
            f" ({len(own)} seed{'s' * (len(own) > 1)})" if len(own) < seeds else ""
        )
        cells = [
            mean_se([r["metrics"][k] for r in own], title.endswith("%"))
            for k, title in COLUMNS.items()
        ]
        answers, tokens, minutes = (
            np.mean([r[k] for r in own]) for k in ("answers", "tokens", "minutes")
        )
        lines.append(
            f"| `{name}` | {label} | {' | '.join(cells)} | {answers:,.0f} | {tokens / 1e3:,.0f}K | {minutes:.1f} |"
        )
    return lines


def until(accuracy, level=0.95, batches=5):
    """The number of the step at whose end the last so many batches are right in `level` on average; None if they never are."""
    means = np.convolve(accuracy, np.ones(batches) / batches, "valid")
    return int(np.argmax(means >= level)) + batches if (means >= level).any() else None


def tables(runs, searches, methods, claims):
    """Markdown."""
    seeds, some = max(map(len, runs.values())), next(iter(next(iter(runs.values())).values()))
    m, cores = some["metrics"], f"{some['threads']} core{'s' * (some['threads'] > 1)}"
    lines = [
        f"{seeds} seeds, {m['problems']} test problems, n = {m['n']}, k = {m['k']}; mean ± standard error over seeds. "
        "*Mended*: of its own wrong answers, those that the model makes right when told so. *Answers*, *tokens*: sampled for training "
        "(where phase 2 starts from the base, phase 1's answers, which only say what problems to leave out, are not counted). "
        f"*Minutes*: of {cores}, sampling and training, without evaluation."
    ]
    code = [name for name in methods if name in runs and name.startswith("code_")]
    core = [name for name in CORE if name in runs]
    rest = [name for name in methods if name in runs and name not in core + code]
    for title, names in (
        ("**The methods**", core),
        ("**The second domain**, short functions", code),
        ("**Ablations**: SD-Zero with one thing changed", rest),
    ):
        lines += ["", title, "", *table_of(names, runs, seeds)] if names else []
        astray = {
            name: [r.get("off_task") for r in runs[name].values()]
            for name in names
            if names == code
        }
        lines += (
            [
                "",
                "Off task, that is, programs with another number of lines than the problem has steps, or with a line that is neither "
                "the right nor the usual wrong code for its step, %: "
                + ", ".join(
                    f"`{name}` {mean_se(of, True)}" for name, of in astray.items() if None not in of
                )
                + ".",
            ]
            if astray
            else []
        )

    lines += [
        "",
        "*Shown*: the 95% interval (t, over seeds) of the difference lies above 0; *opposite*: below 0; *not shown*: undecided, "
        "which is not equal. C1 to C10 number the claims that we took from the paper; – are our own.",
        "",
        "| | claim | difference | verdict |",
        "|---|---|--:|---|",
    ]
    for claim, text, metric, more, less in claims:
        of_seeds = differences(runs, metric, more, less)
        if verdict := judge(of_seeds):
            scale, digits, unit = {
                "phrases": (1, 2, "phrases"),
                "mean_tokens": (1, 1, "tokens"),
            }.get(metric, (100, 1, "points"))
            unit += f" ({len(of_seeds)} seeds)" if len(of_seeds) < seeds else ""
            digits += (
                f"{scale * verdict[1]:.{digits}f}" == f"{0:.{digits}f}"
            )  # "± 0.0" says nothing
            difference = (
                f"{scale * verdict[0]:+.{digits}f} ± {scale * verdict[1]:.{digits}f} {unit}"
            )
            lines.append(f"| {claim} | {text} | {difference} | **{verdict[2]}** |")

    reached = {}
    for name in methods:
        steps = [
            until(r["training"]["accuracy"]) for r in runs.get(name, {}).values() if r["training"]
        ]
        if steps and None not in steps:
            reached[name] = f"`{name}` {mean_se(steps)}"
    lines += (
        [
            "",
            "Steps of 64 on-policy answers, those of phase 1 not counted, until 95% of five batches' answers are right (methods that "
            f"get there with all seeds): {', '.join(reached.values())}.",
        ]
        if reached
        else []
    )

    lines += [
        "",
        "How the models judge and revise themselves:",
        "",
        "| | " + " | ".join(core) + " |",
        "|---|" + "--:|" * len(core),
    ]
    for key, title in SELF.items():
        of, digits = (
            lambda name: [r["metrics"][key] for r in runs[name].values()],
            2 if key == "phrases" else 1,
        )
        cells = [mean_se(of(name), title.endswith("%"), digits) for name in core]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    where = [runs["srt"][s] for s in sorted(runs["srt"])] if "srt" in runs else []
    kls = lambda key, f: [f(r["metrics"][key]) for r in where if r["metrics"][key]]
    lines += [
        "",
        "Where SRT's reviser disagrees with SRT's answers (one answer a problem), as phase 2 finds it at its start:",
        "",
        "| | nats an answer | in the top 5% of its tokens, % | 10% | 20% | 50% |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for key, title in (("kl_wrong", "wrong answers"), ("kl_right", "right answers")):
        cells = [mean_se(kls(key, lambda v: v["top"][i]), True) for i in range(4)]
        lines.append(
            f"| {title} | {mean_se(kls(key, lambda v: v['nats']))} | " + " | ".join(cells) + " |"
        )
    hit = lambda key: mean_se([r["mistakes"][key] for r in where], True)
    count = sum(r["mistakes"]["answers"] for r in where)
    lines += [
        "",
        f"In the last attempt of wrong answers ({count} in all) the token with the most KL is the first wrong digit in "
        f"{hit('kl_on_it')}%, and lies between it and the end of its line in {hit('kl_by_line_end')}%; the token with the largest KL "
        f"reward does so in {hit('reward_by_line_end')}%; a token chosen at random would in {hit('chance')}%.",
        "",
    ]
    tried = lambda v: ", ".join(f"{float(lr):g} → {100 * a:.1f}" for lr, a in v["accuracy"].items())
    grid = "; ".join(f"`{name}` {tried(v)}" for name, v in searches.items())
    lines += [
        f"Learning rates, by accuracy in % on `data/validation.jsonl` (seed 0): {grid}.",
        "",
        "<details><summary>The commands of each row, without paths and seeds</summary>",
        "",
    ]
    fill = {
        **dict.fromkeys(("S", "SRT", "O", "M"), "x"),
        **{k: f"{v['rate']:g}" for k, v in searches.items()},
    }
    lines += [
        f"- `{name}`: {short([c.format(**fill) for c in methods[name][1]])}"
        for name in core + code + rest
        if methods[name][1]
    ]
    return "\n".join([*lines, "", "</details>"])


# ---------------------------------------------------------------- figures


def over_seeds(runs, get):
    """Mean over seeds of a list of numbers: [length]."""
    return np.nanmean([[np.nan if v is None else v for v in get(run)] for run in runs.values()], 0)


def plot_methods(runs, methods, path):
    """Each method's accuracy, sampled, greedy and revised, and the length of its answers."""
    from matplotlib import pyplot as plt

    names = [name for name in methods if name in runs][::-1]
    y, of = (
        np.arange(len(names)),
        lambda name, key: [r["metrics"][key] for r in runs[name].values()],
    )
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(10, 0.3 * len(names) + 1),
        sharey=True,
        layout="constrained",
        width_ratios=(3, 1),
    )
    for axes, key, label in ((left, "accuracy", "sampled"), (right, "mean_tokens", None)):
        values = [of(name, key) for name in names]
        axes.barh(
            y,
            list(map(np.mean, values)),
            xerr=[np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0 for v in values],
            capsize=2,
            color=["0.5" if name in CORE else "0.8" for name in names],
            edgecolor="black",
            label=label,
        )
    for key, marker, label in (
        ("greedy", "kx", "greedy"),
        ("revised_accuracy", "k^", "after its own revision"),
    ):
        left.plot([np.mean(of(name, key)) for name in names], y, marker, markersize=5, label=label)
    left.set(
        title="accuracy on test problems",
        xlim=(0, 1.03),
        ylim=(-0.6, len(names) - 0.4),
        yticks=y,
        yticklabels=[next(iter(runs[name].values()))["label"] for name in names],
    )
    left.legend(fontsize=8, loc="lower left")
    right.set(title="tokens an answer")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_training(runs, path):
    """Accuracy, length and phrases over the answers sampled in phase 2 and in GRPO; pass@k of the results."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    smooth = lambda v: np.convolve(np.pad(v, 2, "edge"), np.ones(5) / 5, "valid")
    styles = {
        "long": ("k-", "phase 2"),
        "rounds_3": ("k:", "phase 2, new teacher every 50 steps"),
        "grpo": ("k--", "GRPO"),
    }
    for name, (style, label) in styles.items():
        if name in runs:
            of = lambda key: smooth(over_seeds(runs[name], lambda r: r["training"][key]))
            curves = {k: of(k) for k in ("accuracy", "mean_tokens", "said_wrong", "said_right")}
            x = np.arange(len(curves["accuracy"])) * 64
            axes[0].plot(x, curves["accuracy"], style, label=label)
            axes[1].plot(x, curves["mean_tokens"], style, label=label)
            if name != "rounds_3":
                axes[2].plot(
                    x,
                    curves["said_wrong"],
                    style,
                    marker="x",
                    markevery=20,
                    markersize=5,
                    label=f"“not correct”, {label}",
                )
                axes[2].plot(
                    x,
                    curves["said_right"],
                    style,
                    marker="o",
                    markevery=20,
                    markersize=4,
                    label=f"“rephrase”, {label}",
                )
    for a, title in zip(
        axes,
        ("accuracy", "tokens an answer", "control phrases an answer", "pass@k on test problems"),
    ):
        a.set(title=title, xlabel="answers sampled on-policy" if a is not axes[3] else "k")
    for name, style in zip(CORE, ("k^:", "ks--", "kD-.", "kv:", "kx--", "ko-")):
        if name in runs:
            pass_at = over_seeds(runs[name], lambda r: r["metrics"]["pass_at"])
            axes[3].plot(range(1, len(pass_at) + 1), pass_at, style, markersize=5, label=name)
    for a in axes:
        if a.lines:
            a.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_token_kl(runs, path):
    """One wrong answer, its tokens shaded by KL(student‖reviser); how much of an answer's KL its top tokens hold; KL by position."""
    from matplotlib import pyplot as plt

    runs = {"srt": {}, **runs}
    row = next(
        (r["example"] for _, r in sorted(runs["srt"].items()) if r["example"]),
        dict(problem="none", answer="", tokens=[], kl=[]),
    )
    top, places, column, line = (
        max(row["kl"], default=0.0),
        [],
        0,
        0,
    )  # places: (column, line, text, KL)
    for text, k in zip(row["tokens"], row["kl"]):
        if column + len(text.rstrip("\n")) > 60:
            line, column = line + 1, 0
        places.append((column, line, text.replace("\n", ""), k))
        line, column = line + text.count("\n"), 0 if "\n" in text else column + len(text)
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(14, 3.6), layout="constrained", width_ratios=(2, 1, 1)
    )
    left.set(
        xlim=(0, 60),
        ylim=(max(line + 1.2, 9), -0.2),
        title=f"{row['problem']}\na = {row['answer']}; darkest: {top:.2f} nats",
    )
    left.title.set_size(9)
    left.axis("off")
    for x, at, text, k in places:
        shade = k / (top or 1)
        left.add_patch(
            plt.Rectangle((x, at + 0.05), len(text) or 0.4, 0.9, color=plt.cm.Greys(0.75 * shade))
        )
        left.text(
            x + len(text) / 2,
            at + 0.5,
            text.replace("$", r"\$"),
            family="DejaVu Sans Mono",
            size=10,
            va="center",
            ha="center",
            color="white" if shade > 0.7 else "black",
        )
    for key, style, label in (
        ("kl_wrong", "kx--", "wrong answers"),
        ("kl_right", "ko-", "right answers"),
    ):
        own = {s: r for s, r in runs["srt"].items() if r["metrics"][key]}
        if own:
            middle.plot(
                (5, 10, 20, 50),
                over_seeds(own, lambda r: r["metrics"][key]["top"]),
                style,
                label=label,
            )
            right.plot(
                np.arange(10) + 0.5,
                over_seeds(own, lambda r: r["metrics"][key]["position"]),
                style,
                label=label,
            )
    middle.set(
        title="share of an answer's KL",
        xlabel="in so many % of its tokens",
        ylim=(0, 1.03),
        xlim=(0, 52),
    )
    right.set(title="KL by position, nats a token", xlabel="tenth of the answer", yscale="log")
    middle.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- README and figures, written or checked


def best_table(filed):
    """Markdown: of runs that fell, the model at the end and .best, from summaries of 05 named METHOD-SEED.json; nothing without any."""
    cell = lambda summary: f"{100 * summary['accuracy']:.1f} ± {100 * summary['accuracy_se']:.1f}"
    rows = [
        (path.stem.rpartition("-"), json.loads(path.read_text()))
        for path in sorted((Path(filed) / "best").glob("*.json"))
    ]
    lines = [
        "",
        "",
        "Students that fell, at their end and as `.best` has them; sampled, % of the test problems, ± over problems:",
        "",
        "| | seed | end | `.best` |",
        "|---|--:|--:|--:|",
    ]
    lines += [
        f"| `{name}` | {seed} | {cell(last)} | {cell(best)} |"
        for (name, _, seed), (last, best) in rows
    ]
    return "\n".join(lines) if rows else ""


def write(filed, methods, claims, readme, figures):
    """The tables into `readme` between the markers, the figures into the folder `figures`. Returns the tables."""
    import matplotlib

    matplotlib.use("Agg")
    runs, searches = read(filed)
    text = tables(runs, searches, methods, claims) + best_table(filed)
    readme.write_text(filled_in(readme.read_text(), "results", text))
    plot_methods(runs, methods, figures / "methods.png")
    plot_training(runs, figures / "training.png")
    plot_token_kl(runs, figures / "token_kl.png")
    return text


def check(filed, methods, claims, scratch):
    """What differs between the README and figures that are there and those that `filed` gives; [] if nothing. Writes below `scratch`."""
    from matplotlib.image import imread

    (scratch / "README.md").write_text((ROOT / "README.md").read_text())
    write(filed, methods, claims, scratch / "README.md", scratch)
    differs = (
        []
        if (scratch / "README.md").read_text() == (ROOT / "README.md").read_text()
        else ["README.md"]
    )
    for figure in ("methods.png", "training.png", "token_kl.png"):
        there = ROOT / "data" / figure
        ours, theirs = imread(scratch / figure), imread(there) if there.exists() else np.empty(0)
        if ours.shape != theirs.shape or np.abs(ours - theirs).max() > 0.02:
            differs.append(f"data/{figure}")
    return differs
