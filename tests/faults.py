"""Faults, tried on purpose: stages killed, disks full, files damaged, a million rows.

A fault is lost if the same command, given again, ends with other bytes than undisturbed; if there
is a traceback or a hang; if a mistake is not one line and exit code 2, or changes what was made.

    python tests/faults.py            # 20 minutes on 2 cores: data/faults.json and its table
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from threading import Timer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import MINI, ROOT, common, filled_in  # noqa: E402

FILED, TABLE = ROOT / "data/faults.json", ROOT / "data/claims/README.md"
MORE = {1: "--batch-rows 2", 3: "--batch-rows 3 --save-every 2", 5: "--batch-rows 2"}
MORE[4] = "--steps 4 --rounds 2 --save-every 2"  # many blocks and saves: more places to stop at
MAKES = {1: ["responses.jsonl"], 2: ["verified.jsonl"], 3: ["revisions.jsonl", "srt", "srt.jsonl"]}
MAKES |= {4: ["sd_zero", "sd_zero.best"], 5: ["eval.jsonl", "summary.json", "answers.html"]}


def attempt(stage, folder, kill=None, after=0.0, largest_file=resource.RLIM_INFINITY):
    """(exit code, what it said, peak MB) of a stage; sent `kill` so long after it has its lock."""
    script, env = next(ROOT.glob(f"0{stage}_*.py")), {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *MINI[stage], *MORE.get(stage, "").split(), "--out", folder]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    if kill:
        (folder / ".lock").unlink(missing_ok=True)
    process = subprocess.Popen(command, **how)
    hangs = Timer(1800, os.kill, (process.pid, SIGKILL))
    hangs.start()
    # to write beyond it fails, as on a full disk
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if kill:
        while not (folder / ".lock").exists():
            time.sleep(0.01)
        time.sleep(after)
        os.kill(process.pid, kill)
    text = process.stdout.read()  # until it ends
    hangs.cancel()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, text, usage.ru_maxrss / 1024


def contents(folder, stage):
    """What must be as undisturbed, as hashes; and what is left over."""
    made, found = common.read_run(folder)["made"], []
    for name in MAKES[stage]:
        entry = made.get(name.removesuffix(".best"), {})
        found += [common.fingerprint(folder / name), entry.get("arguments"), entry.get("counts")]
    return found, [path for path in folder.iterdir() if path.suffix in (".part", ".resume")]


def before(stage, source, folder):
    """A copy of the run as it is when the stage starts."""
    later = sum((MAKES[number] for number in range(stage, 6)), [])
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*later))
    run = common.read_run(folder)
    run["made"] = {name: entry for name, entry in run["made"].items() if name not in later}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def again(stage, source, folder):
    """What was lost, after the same command to its end; the folder is removed."""
    code, text, _ = attempt(stage, folder)
    same = code == 0 and contents(folder, stage) == contents(source, stage)
    shutil.rmtree(folder)
    return [] if same else [f"{stage}, again: {code}, or other bytes: {text[-500:]}"]


def refused(code, text, *names):
    """Exit code 2 and one line of error, with one of these names?"""
    one = len(re.findall("^error: ", text, re.M)) == 1 and "Traceback" not in text
    return code == 2 and one and any(name in text for name in names)


def killed(scratch, source, trials):
    """killed at random moments by SIGKILL, SIGTERM and SIGINT, up to eight times in a row"""
    rng, tried, lost, made = random.Random(0), Counter(), [], common.read_run(source)["made"]
    for stage in cycle(MAKES):
        if tried.total() >= trials:
            return tried.total(), lost, ", ".join(f"0{s} {n}" for s, n in sorted(tried.items()))
        folder = before(stage, source, scratch / "killed")
        seconds = sum(made[name]["seconds"] for name in MAKES[stage] if name in made)
        for _ in range(min(8, trials // 5)):
            how = rng.choice((SIGKILL, SIGTERM, SIGINT))
            code, text, _ = attempt(stage, folder, how, rng.random() * (0.1 + seconds / 2))
            if code == 0:
                break
            tried[stage] += 1
            told = "goes on where it stopped" in text and "Traceback" not in text
            if code != -how and not (code == 130 and told):  # -how: while Python exits
                lost.append(f"{stage}: {code} after {how.name}: {text[-500:]}")
        lost += again(stage, source, folder)


def full_disk(scratch, source, trials):
    """the disk full after a random number of bytes"""
    rng, tried, lost = random.Random(1), 0, []
    for stage, _ in zip(cycle(MAKES), range(trials)):
        folder = before(stage, source, scratch / "full")
        most = int(2000 * 10 ** rng.uniform(0, 4 if stage in (3, 4) else 1.2))
        code, text, _ = attempt(stage, folder, largest_file=most)
        tried += code != 0
        if code and not refused(code, text, "the disk is full"):
            lost.append(f"{stage}, {most} bytes: {code}: {text[-500:]}")
        lost += again(stage, source, folder)
    return tried, lost, ""


def two_at_once(scratch, source, trials):
    """the same command twice at the same time: one is refused, or comes late and finds it done"""
    lost = []
    for stage, _ in zip(cycle(MAKES), range(trials)):
        folder = before(stage, source, scratch / "twice")
        with ThreadPoolExecutor() as pool:
            ends = sorted(pool.map(attempt, [stage, stage], [folder, folder]))
        if ends[0][0] or ends[1][0] and not refused(*ends[1][:2], "another process"):
            lost.append(f"{stage}: {ends}")
        lost += again(stage, source, folder)
    return trials, lost, ""


def damaged(scratch, source, trials):
    """what was made is empty, torn, gone, changed, or of another model under the same name"""
    base = common.fingerprint(common.read_run(source)["settings"]["model"])
    damages = {"empty": lambda path: path.write_bytes(b""), "gone": Path.unlink}
    damages["torn"] = lambda path: os.truncate(path, path.stat().st_size // 2)
    damages["changed"] = lambda path: path.write_bytes(path.read_bytes() + b" ")
    damages["of another model"] = lambda path: path.write_text(path.read_text().replace(base, "?"))
    files = [(2, "responses.jsonl"), (3, "verified.jsonl"), (4, "srt/model.safetensors")]
    files += [(4, "srt/config.json"), (5, "responses.jsonl"), (5, "sd_zero/model.safetensors")]
    cases = [(*file, how) for file in files for how in ("empty", "gone", "torn", "changed")]
    cases += [(3, "run.json", how) for how in ("empty", "gone", "torn", "of another model")]
    cases, lost = random.Random(2).sample(cases, min(trials, len(cases))), []
    for stage, name, how in cases:
        folder = before(stage, source, scratch / "damaged")
        damages[how](folder / name)
        there = {path: common.fingerprint(path) for path in folder.iterdir()}
        code, text, _ = attempt(stage, folder)
        changed = [path.name for path in there if common.fingerprint(path) != there[path]]
        if changed or not refused(code, text, name.split("/")[0], "01_generate.py"):
            lost.append(f"{stage}, {name} {how}: {code}, {changed}: {text[-500:]}")
        shutil.rmtree(folder)
    return len(cases), lost, ""


def many_rows(scratch, source, trials):
    """rows through 02, whose memory must not grow with them"""
    row, peaks = {"kind": "math", "problem": "?", "answer": "2", "sample": 0, "finished": True}, []
    for n in (trials // 100, trials):
        folder = before(2, source, scratch / f"rows-{n}")
        path, run = folder / "responses.jsonl", common.read_run(folder)
        with open(path, "w") as f:
            for i in range(n):
                answer = f"\\frac{{{i}}}{{7}}" if i % 500 == 0 else i % 3  # few need a grader
                row |= {"id": str(i), "response": f"\\boxed{{{answer}}}"}
                f.write(json.dumps(row) + "\n")
        run["made"]["responses.jsonl"]["id"] = common.fingerprint(path)
        (folder / "run.json").write_text(json.dumps(run))
        code, text, peak = attempt(2, folder)
        if code or sum(1 for _ in open(folder / "verified.jsonl")) != n:
            return n, [f"{code}: {text[-500:]}"], ""
        peaks.append(peak)
    note = f"peak {peaks[1]:.0f} MB; of {trials // 100:,} rows {peaks[0]:.0f} MB"
    return trials, [note] if peaks[1] > peaks[0] + 64 else [], note


FAULTS = {"killed": (50, 5), "full_disk": (15, 5), "two_at_once": (5, 1)}  # how many, if quick
FAULTS |= {"damaged": (99, 6), "many_rows": (200_000, 5000)}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--quick", action="store_true", help="a few of each, written nowhere")
    p.add_argument("--only", nargs="+", default=list(FAULTS), choices=FAULTS, help="(default: all)")
    args = p.parse_args(argv)
    filed = json.loads(FILED.read_text()) if FILED.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        scratch, source = Path(scratch), Path(scratch, "undisturbed")
        for stage in MAKES:
            code, text, _ = attempt(stage, source)
            if code:
                sys.exit(f"stage {stage} failed undisturbed:\n{text}")
        for name in args.only:
            fault = globals()[name]
            tried, lost, note = fault(scratch, source, FAULTS[name][args.quick])
            print(f"{name}: {tried} tried, {len(lost)} lost; {note}", *lost, sep="\n", flush=True)
            filed[name] = {"fault": fault.__doc__, "tried": tried, "lost": len(lost), "note": note}
            filed[name]["commit"] = common.read_run(source)["made"]["verified.jsonl"]["commit"]
    if not args.quick:
        filed = {name: filed[name] for name in FAULTS if name in filed}
        common.write_whole(FILED, json.dumps(filed, indent=1) + "\n")
        table = "| fault | tried | lost | |\n|---|--:|--:|---|"
        for row in filed.values():
            table += f"\n| {row['fault']} | {row['tried']:,} | {row['lost']} | {row['note']} |"
        TABLE.write_text(filled_in(TABLE.read_text(), "faults", table))
    sys.exit(any(filed[name]["lost"] for name in args.only))


if __name__ == "__main__":
    main()
