"""The figures of the READMEs, from what is filed: see report.py."""

import matplotlib

matplotlib.use("Agg")
import numpy as np  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

from report import BUDGETS, curves_of, of, shares  # noqa: E402

GREY = "#6b7680"
COLOURS = {"sd_zero": "#2b7bba", "no_srt": "#a06cb5", "sdft": "#5a9a68", "grpo": "#222222"}
TOLD = {  # what the teacher of phase 2 is told: its colour and name
    "true": ("#2b7bba", "told the\ntruth"),
    "one": ("#e8a33d", "always told\n“rephrase”"),
    "opposite": ("#b5484d", "told the\nopposite"),
}


def finish(figure, axes, path):
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontsize(13)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_bit(runs, path):
    """On the obedient base, told the truth or not: accuracy over phase 2's steps; edit by edit, the
    share of right readings before and after."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for told, (colour, label) in TOLD.items():
        curves = 100 * np.array(curves_of(runs, f"obedient_{told}"))  # [seeds, steps]
        steps, mean = np.arange(curves.shape[1]) + 1, curves.mean(0)
        left.plot(steps, curves.T, color=colour, linewidth=0.8, alpha=0.35)
        left.plot(steps, mean, color=colour, linewidth=2.8)
        at = steps[-1] + 1, mean[-5:].mean()
        left.annotate(label, at, color=colour, fontsize=12, va="center", annotation_clip=False)
    levels = [100 * np.mean(of(runs, f"obedient_{name}", "accuracy")) for name in ("base", "srt")]
    left.hlines(levels, 0, steps[-1], color=GREY, linewidth=1.2, linestyle=":", zorder=0)
    ticks = [0, f"base: {levels[0]:.0f}", f"phase 1: {levels[1]:.0f}", 100]
    left.set_yticks([0, *levels, 100], ticks, fontsize=11)
    left.set(title="right answers of a batch, %", xlabel="step of phase 2")
    left.set(ylim=(0, 102), xlim=(0, 54))
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
    right.set(title="each edit read rightly, %", xlim=(-3, 103))
    right.set_xlabel("grey: the base; arrows: to step 40")
    right.set_ylim(-0.6, len(edits) - 0.4)
    right.set_yticks(range(len(edits)), edits, fontsize=11)
    finish(figure, (left, right), path)


def plot_budgets(budgets, runs, path):
    """On obedient and long: accuracy against all answers sampled for training."""
    figure, both = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for axes, (regime, methods) in zip(both, budgets.items()):
        ends = []
        for name, curves in reversed(methods.items()):  # SD-Zero on top
            colour = COLOURS.get(name, GREY)
            answers, accuracy = np.array(curves).swapaxes(0, 1)  # each [seeds, budgets]
            axes.plot(answers.T, 100 * accuracy.T, color=colour, linewidth=0.8, alpha=0.4)
            x, y = answers.mean(0), 100 * accuracy.mean(0)
            axes.plot(x, y, color=colour, linewidth=2.8, marker="o", markersize=5)
            ends.append((y[-1], BUDGETS[name], colour))
        below = np.inf
        for y, label, colour in sorted(ends, reverse=True):  # names do not cover each other
            below = min(y, below - 5)
            how = {"color": colour, "fontsize": 11, "va": "center", "annotation_clip": False}
            axes.annotate(f"{label} {y:.0f}", (9000, below), **how)
        base = 100 * np.mean(of(runs, f"{regime}_base", "accuracy"))
        axes.axhline(base, color=GREY, linewidth=1.2, linestyle=":", zorder=0)
        axes.annotate(f"base {base:.0f}", (20000, base + 2), color=GREY, fontsize=11)
        axes.set_xscale("log")
        axes.set_xticks([1024, 2048, 4096, 8192], ["1K", "2K", "4K", "8K"], fontsize=11)
        axes.minorticks_off()
        seeds = max(map(len, methods.values()), default=0)
        axes.set_title(f"{regime}, seeds: {seeds}")
        axes.set(ylim=(-9, 102), xlim=(820, 36000))
        axes.set_xlabel("answers sampled for training, all of them", loc="left", fontsize=11)
    both[0].set_ylabel("right answers to test problems, %", fontsize=11)
    finish(figure, both, path)


def plot_outcomes(outcomes, path):
    """The two-outcome model: the drift that one batch foretells, and what training did."""
    regimes = {"truthful": "truthful", "obedient": "obedient", "unasked": "unasked"}
    regimes |= {"long": "long, from SRT", "code": "functions, from SRT"}
    figure, grid = plt.subplots(2, 3, figsize=(11.4, 7.6), layout="constrained")
    *panels, key = grid.flat
    for axes, (regime, title) in zip(panels, regimes.items()):
        for told, (colour, _) in TOLD.items():
            for kind, rows in outcomes.get((regime, told), {}).items():
                x, y = ([row[key] for row in rows.values()] for key in ("foretold", "after_20"))
                axes.scatter(x, y, 55, colour, "o" if "read" in kind else "^", edgecolors="white")
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.axline((0, 0), slope=1, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_title(title)
    for colour, label in TOLD.values():
        key.scatter([], [], 55, colour, label=label.replace("\n", " "))
    for marker, label in (("o", "how an edit is read"), ("^", "which comes next")):
        key.scatter([], [], 55, GREY, marker, label=label)
    key.plot([], [], ":", color=GREY, label="as foretold")
    key.legend(frameon=False, fontsize=13, loc="center")
    key.set_axis_off()
    figure.supxlabel("drift foretold by one batch, nats")
    figure.supylabel("drift that came in 20 steps, nats")
    finish(figure, grid.flat, path)
