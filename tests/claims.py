"""Does it work? All five stages for several seeds, and from their summaries the README's results table.

→ data/results.json   a row a seed and checkpoint, as 05 wrote it, with the seconds of every stage
→ data/*.png          seed 0's figures
→ README.md           the table between the markers; `--check` fails if it is not what data/results.json gives

    python tests/claims.py --seeds 3    # about 10 minutes a seed on 2 cores; goes on where it stopped
    python tests/claims.py --check
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"01_generate.py": ["responses"], "02_verify.py": ["verified"], "03_revise_sft.py": ["revisions", "srt"],
          "04_self_distill.py": ["sd_zero"], "05_eval.py": ["eval"]}
METRICS = {"accuracy": "accuracy, sampled (avg@n), %", "greedy": "accuracy, greedy, %", "pass_at_k": "pass@k, %",
           "mean_tokens": "tokens an answer",
           "finished": "finished, %", "revised_accuracy": "accuracy after own revision, %", "correction_rate": "correction rate, %",
           "spoiling_rate": "spoiling rate, %", "phrases": "control phrases an answer", "phrases_true": "of these true, %",
           "wrong_after_wrong": "“wrong” said after a wrong attempt, %", "wrong_after_right": "“wrong” said after a right attempt, %"}
MARKERS = "<!-- results -->", "<!-- /results -->"


def run(seed, out):
    """The five scripts with no flag but --seed and --out; returns 05's rows, each with its seed and the run's seconds."""
    seconds = {}
    for script, artifacts in STAGES.items():
        subprocess.run([sys.executable, str(ROOT / script), "--seed", str(seed), "--out", str(out)], check=True)
        seconds[script] = sum(json.loads((out / f"{name}.meta.json").read_text())["seconds"] for name in artifacts)
    return [{"seed": seed, **row, "seconds": seconds} for row in json.loads((out / "summary.json").read_text())]


def table(rows):
    """Markdown: mean ± standard error over seeds for each metric and checkpoint; then minutes by stage."""
    names, seeds = list(dict.fromkeys(r["checkpoint"] for r in rows)), sorted({r["seed"] for r in rows})
    lines = [f"{len(seeds)} seeds, {rows[0]['problems']} test problems, n = {rows[0]['n']}, k = {rows[0]['k']}; "
             f"mean ± standard error over seeds.", "",
             "| | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for key, label in METRICS.items():
        cells = []
        for name in names:
            values = [r[key] for r in rows if r["checkpoint"] == name and r[key] is not None]
            scale, digits = (100, 1) if label.endswith("%") else (1, 2 if key == "phrases" else 1)
            error = f" ± {scale * np.std(values, ddof=1) / np.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{scale * np.mean(values):.{digits}f}{error}" if values else "–")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    one = [r for r in rows if r["checkpoint"] == names[0]]
    minutes = {s: np.median([r["seconds"][s] for r in one]) / 60 for s in STAGES}
    each = ", ".join(f"{s[:2]} {m:.1f}" for s, m in minutes.items())
    lines += ["", f"Minutes on 2 cores, median over seeds: {each}; together {sum(minutes.values()):.1f}."]
    return "\n".join(lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=3, help="so many runs; 0 only writes the table of data/results.json again (default: 3)")
    p.add_argument("--out", type=Path, default=ROOT / "runs/claims", help="one folder a seed below it")
    p.add_argument("--check", action="store_true", help="only compare README.md with data/results.json")
    args = p.parse_args(argv)
    if args.seeds and not args.check:
        rows = [row for seed in range(args.seeds) for row in run(seed, args.out / f"seed{seed}")]
        for figure in ("stages.png", "token_kl.png"):
            shutil.copy(args.out / "seed0" / figure, ROOT / "data")
        (ROOT / "data/results.json").write_text(json.dumps(rows, indent=1) + "\n")
    readme, rows = (ROOT / "README.md").read_text(), json.loads((ROOT / "data/results.json").read_text())
    head, rest = readme.split(MARKERS[0])
    new = head + MARKERS[0] + "\n" + table(rows) + "\n" + MARKERS[1] + rest.split(MARKERS[1])[1]
    if args.check:
        sys.exit(0 if new == readme else "README.md does not hold the table that data/results.json gives; run: python tests/claims.py")
    (ROOT / "README.md").write_text(new)
    print(table(rows))


if __name__ == "__main__":
    main()
