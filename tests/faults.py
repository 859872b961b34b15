"""Faults, tried on purpose: stages killed, disks full, files damaged, runs mixed, a million rows. Prints the README's table.

A fault is *lost* if anything else happens than should: artifacts that differ from an undisturbed run's after the same command was given
again, a traceback, a hang, an exit code other than 2 for a bad file, an earlier artifact changed.

    python tests/faults.py                  # about half an hour on 2 cores; the table goes into data/faults.json and the README
    python tests/faults.py --only mutated   # one kind
    python tests/faults.py --quick          # a few of each, written nowhere
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torch  # noqa: E402
from conftest import MINI, ROOT, common, filled_in, load, rows_of  # noqa: E402

STAGES = {int(path.name[:2]): load(path.name) for path in sorted(ROOT.glob("0*.py"))}
FLAGS = {
    1: [*MINI[1], "--batch-rows", "2"],
    2: [],
    3: [*MINI[3], "--save-every", "2", "--batch-rows", "3"],
    4: [*MINI[4], "--steps", "4", "--save-every", "2", "--rounds", "2"],
    5: [*MINI[5], "--batch-rows", "2"],
}
MADE = {
    1: ["responses"],
    2: ["verified"],
    3: ["revisions", "srt"],
    4: ["distill", "sd_zero"],
    5: ["eval"],
}
FILED = ROOT / "data/faults.json"


# ---------------------------------------------------------------- a stage in a process of its own

End = namedtuple(
    "End", "code text seconds megabytes"
)  # code: minus the signal, if it was killed; megabytes: peak memory


def attempt(stage, argv, kill=None, after=0.0, largest_file=None, seconds=300):
    """The stage in a fork, killed by a signal after so many seconds, or when the file `after` is there; by SIGKILL, if it hangs."""
    began, (out, into), early = time.time(), os.pipe(), {signal.SIGINT, signal.SIGTERM}

    def main():
        (
            torch.set_num_threads(1),
            setattr(common, "_graders", ThreadPoolExecutor(2)),
        )  # a fork has none of its parent's threads
        signal.pthread_sigmask(signal.SIG_UNBLOCK, early)
        STAGES[stage].main(argv)

    signal.pthread_sigmask(signal.SIG_BLOCK, early)  # until the stage has its handlers
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.dup2(into, 1), os.dup2(into, 2)
            sys.stdout, sys.stderr, sys.argv = open(1, "w", 1), open(2, "w", 1), [f"stage {stage}"]
            if largest_file is not None:  # writing beyond it fails, as on a full disk
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            common.run(main)
            code = 0
        except SystemExit as e:
            code = e.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, early)
    os.close(into)
    os.set_blocking(out, False)
    text, status = b"", 0
    while not status or status[0] == 0:
        if kill and (after.exists() if isinstance(after, Path) else time.time() - began > after):
            os.kill(pid, kill)
            kill = None
        if time.time() - began > seconds:
            os.kill(pid, signal.SIGKILL)
        try:
            text += os.read(out, 1 << 16)
        except BlockingIOError:
            pass
        time.sleep(0.005)
        status = os.wait4(pid, os.WNOHANG)
    os.set_blocking(out, True)
    while block := os.read(out, 1 << 16):
        text += block
    os.close(out)
    return End(
        os.waitstatus_to_exitcode(status[1]),
        text.decode(errors="replace"),
        time.time() - began,
        status[2].ru_maxrss / 1024,
    )


def contents(folder, stage):
    """What must be the same after an interruption: rows and meta files without their times, model folders and pages as bytes."""
    found = {}
    for name in MADE[stage]:
        path = folder / f"{name}.jsonl"
        if path.exists():
            rows = rows_of(path) if stage == 4 else None
            found[path.name] = (
                [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
                if rows
                else path.read_bytes()
            )
        models = [path for path in folder.glob(f"{name}*") if path.is_dir()]  # NAME.best, too
        found |= {str(file): file.read_bytes() for model in models for file in model.iterdir()}
        meta = common.read_meta(path)
        found[f"{name}.meta"] = {
            key: meta.get(key)
            for key in ("made_of", "origin", "counts", *(["hash"] if stage != 4 else []))
        }
    if stage == 5:
        found |= {name: (folder / name).read_text() for name in ("summary.json", "token_kl.html")}
    found = {key.removeprefix(str(folder)): value for key, value in found.items()}
    found["left over"] = [
        path.name
        for path in folder.rglob("*")
        if path.name.endswith((".part", ".replaced", ".resume", ".old"))
    ]
    return found


def reference(scratch):
    """All stages, undisturbed: (folder, seconds that each took)."""
    folder, seconds = scratch / "reference", {}
    for stage in STAGES:
        code, text, seconds[stage], _ = attempt(stage, [*FLAGS[stage], "--out", str(folder)])
        if code:
            sys.exit(f"stage {stage} failed undisturbed:\n{text}")
    return folder, seconds


def before(stage, source, folder):
    """`folder` as it is when the stage starts."""
    shutil.copytree(source, folder)
    for made in [name for later in range(stage, 6) for name in MADE[later]] + [
        "summary",
        "stages",
        "token_kl",
    ]:
        for path in folder.glob(f"{made}*"):
            common.remove(path)
    return folder


# ---------------------------------------------------------------- the faults: each returns (tried, [what was lost, ...])


def killed(scratch, source, seconds, wanted, most=8):
    """Every stage killed up to so many times at random points, by SIGKILL, SIGTERM and SIGINT, then left to end."""
    rng, tried, lost = random.Random(0), {stage: 0 for stage in STAGES}, []
    while sum(tried.values()) < wanted:
        stage = min(tried, key=tried.get)  # of which there are fewest yet
        folder = before(stage, source, scratch / "killed")
        argv = [*FLAGS[stage], "--out", str(folder)]
        for _ in range(most):
            how = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            code, text, *_ = attempt(stage, argv, how, rng.random() * seconds[stage] / 2)
            if code == 0:
                break
            tried[stage] += 1
            if (code, how) != (-signal.SIGKILL, signal.SIGKILL) and (
                code != 130 or "goes on where it stopped" not in text
            ):
                lost.append(f"stage {stage}: exit code {code} after {how.name}: {text[-300:]}")
        code, text, *_ = attempt(stage, argv)
        if code or contents(folder, stage) != contents(source, stage):
            lost.append(
                f"stage {stage}: exit code {code}, other artifacts than undisturbed: {text[-300:]}"
            )
        shutil.rmtree(folder)
    return sum(tried.values()), lost, ", ".join(f"0{stage} {n}" for stage, n in tried.items())


def full_disk(scratch, source, trials):
    """No file can grow beyond a random size; then it can again."""
    rng, lost, tried = random.Random(1), [], 0
    for trial in range(trials):
        stage = 1 + trial % 5
        folder = before(stage, source, scratch / f"full-{trial}")
        argv = [*FLAGS[stage], "--out", str(folder)]
        largest = max(
            p.stat().st_size
            for name in MADE[stage]
            for p in source.rglob("*")
            if p.is_file() and name in str(p)
        )
        largest *= (
            4 if stage in (3, 4) else 1
        )  # what training saves to go on is larger than a model, and it has to get there
        code, text, *_ = attempt(stage, argv, largest_file=rng.randrange(2000, largest))
        tried += code != 0
        if code not in (0, 2) or "Traceback" in text or code == 2 and "error: " not in text:
            lost.append(f"stage {stage}: exit code {code}: {text[-500:]}")
        code, text, *_ = attempt(stage, argv)
        if code or contents(folder, stage) != contents(source, stage):
            lost.append(
                f"stage {stage}: exit code {code}, other artifacts than undisturbed: {text[-300:]}"
            )
        shutil.rmtree(folder)
    return tried, lost, ""


def two_at_once(scratch, source, trials):
    """The same command twice at the same time: one does it, the other is refused, or finds it done."""
    lost = []
    for trial in range(trials):
        stage = 1 + trial % 5
        folder = before(stage, source, scratch / f"twice-{trial}")
        argv = [*FLAGS[stage], "--out", str(folder)]
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(attempt(stage, argv).code & 255)
            finally:
                os._exit(98)
        code, text, *_ = attempt(stage, argv)
        first = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        good = (
            {0: True, 2: "another process" in text}.get(code, False)
            and first in (0, 2)
            and 0 in (code, first)
        )
        if not good or contents(folder, stage) != contents(source, stage):
            lost.append(f"stage {stage}: exit codes {first} and {code}: {text[-300:]}")
        shutil.rmtree(folder)
    return trials, lost, ""


def mutated(line, rng):
    """A damaged JSON line, as bytes."""
    row, data = json.loads(line), line
    key = rng.choice(list(row))
    odd = rng.choice(
        [
            None,
            True,
            -1,
            1e308,
            10**400,
            "",
            "\x00",
            "é\u2028",
            [],
            {},
            [[]],
            {"a": None},
            ["x"],
            "x" * 10_000,
            [-1],
            [10**30],
            0.5,
        ]
    )
    nested = "[" * 100_000 + "]" * 100_000
    kind = rng.randrange(14)
    if kind == 0:
        data = line[: rng.randrange(len(line))]
    elif kind == 1:
        at = rng.randrange(len(line))
        data = line[:at] + bytes([rng.randrange(256)]) + line[at + 1 :]
    elif kind == 2:
        data = line.replace(b'"' + key.encode() + b'"', b'"' + key.encode() + b"_" + b'"', 1)
    elif kind == 3:
        data = json.dumps({**row, key: "PLACE"}).encode().replace(b'"PLACE"', nested.encode())
    elif kind == 4:
        data = line.decode().encode(rng.choice(("utf-16", "utf-32")))
    elif kind == 5:
        data = (
            json.dumps({**row, key: "PLACE"})
            .encode()
            .replace(b"PLACE", rng.choice((b"\\ud800", b"\xff\xfe", b"\x00")))
        )
    elif kind == 6:
        data = (
            json.dumps({**row, key: "PLACE"})
            .encode()
            .replace(b'"PLACE"', rng.choice((b"NaN", b"-Infinity", b"1e999", b"9" * 5000)))
        )
    elif kind == 7:
        data = rng.choice(
            (b"", b"null", b"[]", b'"x"', b"1", b"{}", b"{" * 50_000, b"\xef\xbb\xbf" + line)
        )
    elif kind == 8:
        data = json.dumps({k: v for k, v in row.items() if k != key}).encode()
    else:
        data = json.dumps({**row, key: odd}).encode()
    return data


def mutated_files(scratch, source, rows):
    """One damaged line in each file that a stage reads. Exit code 2 and one line, or the stage goes on; nothing that was there changes.

    With --mix, for without it a stage refuses any input that was changed, without a look at it.
    """
    rng, lost, named = random.Random(2), [], 0
    short = ["--max-new-tokens", "3", "--batch-rows", "8"]  # it is the reading that counts
    reads = [
        (1, "data", [*short, "--limit", "2"]),
        (2, "responses", []),
        (3, "verified", [*short, "--revisions-wrong", "1"]),
        (3, "revisions", FLAGS[3]),
        (4, "verified", [*short, "--steps", "1", "--batch-size", "2"]),
        (5, "eval", FLAGS[5]),
        (5, "data", [*short, "--limit", "2", "--n", "1", "--k", "1"]),
    ]
    lines = {"data": (ROOT / "data/test.jsonl").read_bytes().splitlines()[:3]}
    lines |= {
        name: (source / f"{name}.jsonl").read_bytes().splitlines()
        for _, name, _ in reads
        if name != "data"
    }
    for trial in range(rows):
        stage, name, flags = reads[trial % len(reads)]
        folder = scratch / f"mutated-{trial}"
        (before if name == "data" or stage != 5 else lambda _, a, b: shutil.copytree(a, b))(
            stage, source, folder
        )
        damaged, argv = list(lines[name]), [*flags, "--mix", "--out", str(folder)]
        at = rng.randrange(len(damaged))
        damaged[at] = mutated(damaged[at], rng)
        path = folder / (f"{name}.jsonl" if name != "data" else "problems.jsonl")
        for old in (source / f"{name}.jsonl", source / f"{name}.meta.json"):
            if name != "data":
                shutil.copy(old, folder)
        if (stage, name) == (3, "revisions"):  # as left by an interruption
            meta = json.loads((folder / "revisions.meta.json").read_text())
            (folder / "revisions.meta.json").write_text(
                json.dumps({k: v for k, v in meta.items() if k != "counts"})
            )
        path.write_bytes(b"\n".join(damaged) + b"\n")
        argv += ["--data", str(path)] if name == "data" else []
        there = {p: p.read_bytes() for p in folder.rglob("*.jsonl")}
        code, text, *_ = attempt(stage, argv)
        complaints = re.findall(r"error: .*", text)
        named += code == 2 and path.name in "".join(complaints)
        if code not in (0, 2) or "Traceback" in text or code == 2 and len(complaints) != 1:
            lost.append(
                f"stage {stage}, {name}: exit code {code}, {damaged[at][:200]}: {text[-500:]}"
            )
        changed = [
            p.name
            for p, data in there.items()
            if not p.exists() or not p.read_bytes().startswith(data[: data.rfind(b"\n") + 1])
        ]
        if code == 2 and changed:
            lost.append(f"stage {stage}, {name}: {changed} changed, {damaged[at][:200]}")
        shutil.rmtree(folder)
    return (
        rows,
        lost,
        f"{named} refused by the file's name, the others valid all the same or not needed",
    )


def damaged_files(scratch, source, most=None):
    """Files that are empty, folders, of one endless line, or torn: model folders, states and meta files too."""
    lost, tried = [], 0
    endless = b'{"id": "' + b"x" * 100_000_000
    faults = {
        "empty": lambda p: p.write_bytes(b""),
        "a folder": lambda p: (common.remove(p), p.mkdir()),
        "gone": common.remove,
        "a line of 100 MB": lambda p: p.write_bytes(endless),
        "torn": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    }
    files = [
        (2, "responses.jsonl"),
        (3, "verified.jsonl"),
        (4, "verified.jsonl"),
        (4, "srt/model.safetensors"),
        (4, "srt/tokenizer.json"),
        (4, "srt/config.json"),
        (4, "srt/chat_template.jinja"),
        (5, "sd_zero/model.safetensors"),
        (5, "verified.jsonl"),
        (2, "responses.meta.json"),
        (3, "verified.meta.json"),
        (4, "srt.meta.json"),
        (3, "srt.resume"),
        (4, "sd_zero.resume"),
    ]
    for (stage, name), what in [(file, what) for what in faults for file in files][:most]:
        folder = before(stage, source, scratch / f"damaged-{tried}")
        argv = [*FLAGS[stage], "--mix", "--out", str(folder)]
        if name.endswith(".resume"):
            attempt(stage, argv, signal.SIGKILL, folder / name)
        faults[what](folder / name)
        code, text, *_ = attempt(stage, argv)
        if (
            code not in (0, 2)
            or "Traceback" in text
            or code == 2
            and len(re.findall(r"error: .*", text)) != 1
        ):
            lost.append(f"stage {stage}, {name} {what}: exit code {code}: {text[-500:]}")
        if (
            name.endswith(".resume")
            and code == 0
            and contents(folder, stage) != contents(source, stage)
        ):
            lost.append(
                f"stage {stage}, {name} {what}: other artifacts than undisturbed: {text[-500:]}"
            )
        tried += 1
        shutil.rmtree(folder)
    return tried, lost, ""


def mixed_runs(scratch, source):
    """Inputs of another model, template, P_r or seed; an --out of other arguments."""
    lost, tried = [], 0
    other = scratch / "other"
    shutil.copytree(ROOT / "data/base", other)
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + " ")
    cases = [
        (3, ["--model", str(other)]),
        (3, ["--seed", "1"]),
        (4, ["--seed", "1"]),
        (4, ["--p-r-wrong", "No."]),
        (5, ["--p-r-right", "Yes."]),
        (5, ["--model", str(other)]),
        (5, ["--seed", "1"]),
        (1, ["--n", "2"]),
        (3, ["--lr", "1e-3"]),
        (4, ["--lr", "1e-3"]),
        (5, ["--n", "1", "--k", "1"]),
    ]
    for stage, flags in cases:
        folder = scratch / "mixed"
        (before if len(cases) - tried > 4 else lambda _, a, b: shutil.copytree(a, b))(
            stage, source, folder
        )
        code, text, *_ = attempt(stage, [*FLAGS[stage], *flags, "--out", str(folder)])
        if code != 2 or "Traceback" in text or not re.search("--mix|--overwrite", text):
            lost.append(f"stage {stage} {flags}: exit code {code}: {text[-300:]}")
        tried += 1
        shutil.rmtree(folder)
    return tried, lost, ""


def many_rows(scratch, rows):
    """Rows through 02; its memory must not grow with them."""
    row = {
        "kind": "math",
        "problem": "1 + 1 = ?",
        "answer": "2",
        "sample": 0,
        "response_ids": [5, 2],
        "finished": True,
    }
    peaks = []
    for n in (rows // 100, rows):
        folder = scratch / f"rows-{n}"
        folder.mkdir()
        with open(folder / "responses.jsonl", "w") as f:
            for i in range(n):
                answer = (
                    f"\\frac{{{i}}}{{7}}" if i % 500 == 0 else i % 3
                )  # a number needs no grader
                f.write(
                    json.dumps({"id": str(i), **row, "response": f"\\boxed{{{answer}}}"}) + "\n"
                )
        end = attempt(2, ["--out", str(folder)], seconds=3600)
        if end.code or sum(1 for _ in open(folder / "verified.jsonl")) != n:
            return n, [f"exit code {end.code}: {end.text[-300:]}"], ""
        peaks.append(end.megabytes)
    note = f"peak {peaks[1]:.0f} MB; of {rows // 100:,} rows {peaks[0]:.0f} MB"
    return rows, [note] if peaks[1] > peaks[0] + 64 else [], note


def hostile_programs():
    """tests/test_code.py."""
    end = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", ROOT / "tests/test_code.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    passed, failed = (
        sum(map(int, re.findall(rf"(\d+) {word}", end.stdout)))
        for word in ("passed", "failed|error")
    )
    return (
        passed + failed,
        end.stdout.splitlines()[-failed - 1 :] if failed or end.returncode else [],
        f"in {common.isolation()}",
    )


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="a few of each, written nowhere")
    p.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="FAULT",
        help="killed, full_disk, ... (default: all)",
    )
    args = p.parse_args(argv)
    few, results = lambda whole, quick: quick if args.quick else whole, {}
    torch.set_num_threads(1)  # two of these can run at the same time, each with its --only
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        source, seconds = reference(scratch)
        faults = {
            "killed": (
                "killed at a random point (SIGKILL, SIGTERM, SIGINT), up to eight times; then the same command again",
                lambda: killed(scratch, source, seconds, few(100, 5), few(8, 1)),
            ),
            "full_disk": (
                "disk full after a random number of bytes; then the same command again",
                lambda: full_disk(scratch, source, few(25, 2)),
            ),
            "two_at_once": (
                "the same command twice at the same time",
                lambda: two_at_once(scratch, source, few(10, 1)),
            ),
            "mutated": (
                "a damaged row (cut, wrong types, NUL, surrogates, huge numbers, 100,000 brackets, UTF-16, ...)",
                lambda: mutated_files(scratch, source, few(1050, 14)),
            ),
            "damaged": (
                "a file or model that is empty, torn, gone, a folder, or a line of 100 MB",
                lambda: damaged_files(scratch, source, few(None, 5)),
            ),
            "mixed": (
                "inputs of another model, template, seed or P_r; an --out of other arguments",
                lambda: mixed_runs(scratch, source),
            ),
            "many_rows": (
                "rows through 02, whose memory must not grow",
                lambda: many_rows(scratch, few(1_000_000, 5_000)),
            ),
            **(
                {}
                if args.quick
                else {"programs": ("hostile programs (`tests/test_code.py`)", hostile_programs)}
            ),
        }
        for name in args.only or faults:
            what, fault = faults[name]
            tried, lost, note = fault()
            results[name] = {
                "fault": what,
                "tried": tried,
                "lost": len(lost),
                "note": note,
                "commit": common.commit(),
            }
            print(
                "\n".join([f"{name}: {tried} tried, {len(lost)} lost; {note}", *lost]), flush=True
            )
            if not args.quick:
                results = {
                    **(json.loads(FILED.read_text()) if FILED.exists() else {}),
                    name: results[name],
                }
                common.write_json(FILED, {k: results[k] for k in faults if k in results})
    if not args.quick:
        lines = ["| fault | tried | lost | |", "|---|--:|--:|---|"]
        results = json.loads(FILED.read_text())
        lines += [
            f"| {r['fault']} | {r['tried']:,} | {r['lost']} | {r['note']} |"
            for r in results.values()
        ]
        print("\n".join(lines))
        (ROOT / "README.md").write_text(
            filled_in((ROOT / "README.md").read_text(), "faults", "\n".join(lines))
        )
    sys.exit(any(r["lost"] for r in results.values()))


if __name__ == "__main__":
    main()
