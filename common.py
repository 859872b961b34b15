"""What two or more stages must share exactly: command line, records, prompts and P_r, the verifier, models, training, sampling.

Letters for shapes: B rows, T positions, V vocabulary, N answer tokens of a batch laid end to end, H hidden size.
"""

import argparse
import atexit
import errno
import hashlib
import itertools
import json
import math
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from decimal import Decimal
from functools import lru_cache
from pathlib import Path


def say_interrupted():
    print(f"\ninterrupted; the same command goes on where it stopped: python {shlex.join(sys.argv)}", file=sys.stderr)


def leave(*_):
    say_interrupted()
    os._exit(130)


# Ctrl-C during the imports, which take seconds (the scripts import this file first): an exception may get lost there, in some library's
# __del__. Nothing has been written yet. Later run() sees to it.
interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if interruptible:
    signal.signal(signal.SIGINT, leave)

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
import transformers
try:
    import fcntl
except ImportError:     # Windows
    fcntl = None
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

if interruptible:
    signal.signal(signal.SIGINT, signal.default_int_handler)
transformers.utils.logging.disable_progress_bar()   # ours are enough
huggingface_hub.utils.logging.set_verbosity_error()  # a hub out of reach is said once, by die()
HERE, _locks, _passed = Path(__file__).resolve().parent, {}, set()
P_R = {1: "Let me rephrase the above solution.", 0: "Wait, this response is not correct, let me start over."}


def die(message):
    """A user's mistake: one line on stderr (what, where, how to mend), exit code 2."""
    tqdm.write(f"error: {' '.join(str(message).split())}", file=sys.stderr)     # not into a progress bar
    sys.exit(2)


def run(main):
    """A script's entry: an interruption, or a full disk, ends in one line that says how to go on."""
    def interrupt(*_):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, interrupt)
    try:
        return main()
    except KeyboardInterrupt:
        say_interrupted()
        code = 130
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        print(f"\nerror: {'the disk is full' if full else 'a file cannot be read or written'} ({e}); when that is mended, "
              "the same command goes on where it stopped", file=sys.stderr)
        code = 2
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)      # at once: graders may have a queue to work off


# ---------------------------------------------------------------- command line

def arguments(doc, limit=None):
    """A parser with the flags that all scripts take, so that one set fits all five commands; a stage ignores what it has no use for."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: die(f"{p.prog}: {message}; see {p.prog} --help")
    g = p.add_argument_group("shared by all stages")
    g.add_argument("--model", default=None, help="folder or hub id of a chat model (default: the folder base in --data, "
                                                 "if there is one, else data/base) [paper: Qwen/Qwen3-4B-Instruct-2507]")
    g.add_argument("--data", default=str(HERE / "data"), help="JSONL file, folder with SPLIT.jsonl, or hub id (default: data; data/code "
                                                              "is the other embedded domain) [paper: open-r1/OpenR1-Math-220k]")
    g.add_argument("--out", default="runs/demo", type=Path, help="folder of this run's artifacts (default: runs/demo)")
    g.add_argument("--seed", default=0, type=int, help="of all sampling and shuffling (default: 0)")
    g.add_argument("--limit", default=limit, type=at_least(1), help="use only the first so many rows "
                   f"(04: of those that phase 1 left; default: {limit or 'all'})")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    g.add_argument("--overwrite", action="store_true", help="replace this stage's artifacts where they were made with other arguments")
    g.add_argument("--allow-code", action="store_true", help='run programs that the model wrote, for problems of kind "code", in a sandbox')
    g.add_argument("--mix", action="store_true", help="accept inputs of another model, seed, P_r or phase 1, or changed since")
    g.add_argument("--p-r-right", default=P_R[1], metavar="PHRASE", help="P_r after a right answer (default: the paper's)")
    g.add_argument("--p-r-wrong", default=P_R[0], metavar="PHRASE", help="P_r after a wrong answer (default: the paper's)")
    return p


def parse(p, argv):
    """The arguments, --model filled in: an embedded domain brings its own base."""
    args = p.parse_args(argv)
    args.model = args.model or str(Path(args.data, "base") if Path(args.data, "base").is_dir() else HERE / "data/base")
    return args


def at_least(bound):
    """An argparse type: a finite number of the bound's own type (int or float), not below it."""
    def number(text):
        value = type(bound)(text)
        if not bound <= value < float("inf"):
            raise ValueError
        return value
    number.__name__ = f"number (at least {bound})"
    return number


def pick_device(name):
    try:
        device = torch.empty(1, device=name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu").device
    except (RuntimeError, AssertionError) as e:
        die(f"--device {name} cannot be used here: {str(e).splitlines()[0]}")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        torch.backends.cuda.enable_cudnn_sdp(False)     # cuDNN's attention plans anew for each new shape, and sampling has one a token
    return device if device.type in ("cpu", "cuda", "mps") else die(f"--device {name} is not supported: cpu, cuda or mps")


def autocast(device):
    """bf16 on a GPU that has it, fp16 on an older one; on a CPU plain float32. Returns (context factory, dtype)."""
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return lambda: torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32), dtype


# ---------------------------------------------------------------- records on disk

is_ids = lambda v: isinstance(v, list) and v and all(type(t) is int and t >= 0 for t in v)
is_number = lambda v: type(v) in (int, float)
is_bit = lambda v: type(v) is int and v in (0, 1)
is_test = lambda t: isinstance(t, dict) and (isinstance(t.get("stdin"), str) and isinstance(t.get("stdout"), str) if t.get("call") is None
                                             else isinstance(t["call"], str) and isinstance(t.get("args"), list) and "expected" in t)
is_tests = lambda v: isinstance(v, list) and v and all(map(is_test, v)) and len({t.get("call") is None for t in v}) == 1
is_numbers = lambda v: isinstance(v, list) and all(is_number(x) and abs(x) < 1e9 for x in v)
or_none = lambda right: lambda v: v is None or right(v)
is_tolerance = or_none(lambda v: is_number(v) and 0 <= v < 1)
SCHEMA = {"id": str, "kind": str, "problem": str, "answer": str, "tests": is_tests, "tolerance": is_tolerance,          # data
          "sample": int, "response": str, "response_ids": is_ids, "finished": bool,                                     # 01
          "reward": is_bit, "verdict": str, "extracted": or_none(lambda v: type(v) is str),                             # 02
          "revision": int, "p_r": str, "revised": str, "revised_ids": is_ids, "revised_finished": bool,                 # 03
          "revised_reward": is_bit, "revised_verdict": str, "kept": str,
          "step": int, "checkpoint": str, "greedy": bool, "kl": is_numbers, "kl_reward": is_numbers}                    # 04, 05


LONGEST_LINE = 64 << 20     # bytes: an answer of a million tokens would have a quarter of that


def read_jsonl(path, fields, made_by):
    """stream_jsonl() as a list."""
    return list(stream_jsonl(path, fields, made_by))


def stream_jsonl(path, fields, made_by):
    """Rows of a JSONL file as dicts, one by one, each with at least `fields`, as SCHEMA has them; `made_by` says how to get the file."""
    path, number = Path(path), 0
    if not path.is_file():
        die(f"{path} does not exist or is no file; run first: {made_by}")
    with open(path, "rb") as f:
        while line := f.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE:
                die(f"{path}:{number}: a line of more than {LONGEST_LINE >> 20} MB; mend or remove it")
            try:
                row = json.loads(line.decode())
                json.dumps(row, ensure_ascii=False).encode()    # a lone surrogate is no text: tokenizers refuse it
            except (ValueError, RecursionError) as e:
                die(f"{path}:{number}: not JSON in UTF-8 ({e}); mend or remove the line")
            if not isinstance(row, dict):
                die(f"{path}:{number}: not an object {{...}}; mend or remove the line")
            if missing := [k for k in fields if k not in row]:
                die(f"{path}:{number}: field {missing[0]!r} is missing; mend the line, or make the file again: {made_by}")
            for k in (*fields, "kind", "tests", "tolerance") if fields else ():
                right = SCHEMA[k]
                if k in row and not (type(row[k]) is right if isinstance(right, type) else right(row[k])):
                    die(f"{path}:{number}: field {k!r} cannot be {row[k]!r:.40}; mend the line, or make the file again: {made_by}")
            if fields and row.get("kind") == "code" and "problem" in fields and "tests" not in row:
                die(f"{path}:{number}: a row of kind 'code' without 'tests'; mend the line, or make the file again: {made_by}")
            yield row
    if not number:
        die(f"{path} is empty; make it again: {made_by}")


def problem_file(source, split):
    """What load_problems reads: the file itself, {split}.jsonl of a folder, or a hub id as it is."""
    return Path(source) / f"{split}.jsonl" if Path(source).is_dir() else Path(source)


BOX = "\n\nPut your final answer within \\boxed{}."
math_by = lambda name: lambda r: {"id": r[name], "problem": r["problem"] + BOX, "answer": r["answer"]}
KNOWN = {  # hub id: (configuration, a row as ours: id, problem, and answer or tests)
    "open-r1/OpenR1-Math-220k": ("default", math_by("uuid")), "HuggingFaceH4/MATH-500": (None, math_by("unique_id")),
    "HuggingFaceH4/aime_2024": (None, math_by("id")), "math-ai/aime25": (None, math_by("id")),
    "MathArena/hmmt_feb_2025": (None, math_by("problem_idx")),
    "openai/gsm8k": ("main", lambda r: {"problem": r["question"] + BOX, "answer": r["answer"].split("####")[-1]}),
    "open-r1/codeforces-cots": ("solutions_py", lambda r: codeforces(r, "python")),
    "open-r1/codeforces-cots:cpp": ("solutions", lambda r: codeforces(r, "cpp")),   # what follows the colon is ours
    "lighteval/code_generation_lite": (None, lambda r: contest(r["question_id"], [r["question_content"]], [
        t for t in json.loads(r["public_test_cases"]) if t["testtype"] == "stdin"])),   # the others are packed as a pickle, and not read
}


def codeforces(r, language):
    return contest(r["id"], [r["title"], r["description"], r["input_format"], r["output_format"], r["note"]], r["examples"] or [], language)


def contest(name, parts, tests, language="python"):
    """A programming problem; tests: [{"input", "output"}, ...]. The first is an example, shown and not graded: a table would pass it."""
    example = "".join(f"Example:\n{t['input']}\n→\n{t['output']}" for t in tests[:1])
    how = f"Answer with one ```{language} block: a program from stdin to stdout."
    return {"id": name, "problem": "\n\n".join(filter(None, [*parts, example, how])), "language": language,
            "tests": [{"stdin": t["input"], "stdout": t["output"]} for t in tests[1:]]}


def load_problems(source, split="train", limit=None, allow_code=False, seed=0):
    """Problems {id, kind, problem, answer}, of kind "code" with tests (and perhaps tolerance, language) and the answer "".

    source: a JSONL file of such rows, a folder holding {split}.jsonl, or a hub data set: one of KNOWN, or with these columns; a hub set is
    shuffled by the seed. A row that cannot be graded is a mistake in a file; of a hub set it is left out and counted.
    """
    path, ours = Path(source), dict
    if from_file := path.exists() or path.suffix == ".jsonl":
        path = problem_file(source, split)
        if not path.is_file():
            die(f"--data: {path} does not exist; name a JSONL file, a folder that holds {split}.jsonl, or a hub id")
        rows = read_jsonl(path, (), "the README's section Artifacts has the format")
    else:
        from datasets import load_dataset  # slow to import, and needed for hub ids only
        configuration, ours = KNOWN.get(str(source), (None, dict))
        try:
            hub = str(source).partition(":")[0] if str(source) in KNOWN else str(source)
            rows = load_dataset(hub, configuration, split=split).shuffle(seed=seed)
        except Exception as e:      # datasets has many of its own
            die(f"--data {source} is no local file or folder (which need no network), and loading split {split!r} from the hub failed: {e}")
        if ours is dict and not {"problem"} < set(rows.column_names) & {"problem", "answer", "tests"}:
            die(f"--data {source}: its columns are {', '.join(rows.column_names)}; it needs problem and answer (or tests), or a line in "
                "common.py's table KNOWN")
    where, problems, left_out = path if from_file else source, {}, Counter()
    for number, raw in enumerate(tqdm(rows, desc="problems", unit="row", disable=len(rows) < 10_000), 1):
        try:
            row = ours(raw)
        except KeyError as e:
            die(f"--data {source}: it has no column {e}; the table KNOWN in common.py says which are read")
        except (TypeError, AttributeError, ValueError):
            left_out["with nothing where the problem or its answer should be"] += 1
            continue
        if not from_file:   # ids must not depend on the order, which the seed shuffles
            row["id"] = str(row.get("id") or hashlib.sha256(str(row.get("problem")).encode()).hexdigest()[:12])
            row["answer"] = str(row.get("answer") or "").strip()
        row.setdefault("id", f"{split}-{number - 1:06d}")
        row.setdefault("kind", "code" if "tests" in row else "math")
        if row["kind"] == "code":
            row["answer"] = ""
        why = unusable(row, problems)
        if not why and row.get("language") == "cpp" and not compiler():
            why = "in C++, not gradable without g++"
        if not why and row["kind"] == "math" and not readable(row["answer"]):
            why = "whose 'answer' math-verify cannot read"
        if why and from_file and "without g++" not in why:
            die(f"{where}:{number}: a row {why}")
        if why:
            left_out[why] += 1
        else:
            problems[row["id"]] = {k: row[k] for k in ("id", "kind", "problem", "answer", "tests", "tolerance", "language") if k in row}
        if len(problems) == limit:
            break
    for why, n in left_out.items():
        print(f"{where}: left out {n} rows, each {why}")
    problems = list(problems.values()) or die(f"{where}: no row can be graded")
    check_code(any(x["kind"] == "code" for x in problems), allow_code)
    return problems


def unusable(row, problems):
    """Why a row cannot be graded; "" if it can. problems: those before it, by id."""
    text = lambda k: isinstance(row.get(k), str) and row[k].strip()
    if row["kind"] not in ("math", "code"):
        return f"of kind {row['kind']!r:.40}, which is neither 'math' nor 'code'"
    if missing := [k for k in ("id", "problem", *(["answer"] if row["kind"] == "math" else [])) if not text(k)]:
        return f"whose {missing[0]!r} is no text, or empty"
    if row["kind"] == "math" and row["answer"].strip().lower() in ("proof", "notfound", "not found", "n/a"):
        return "whose 'answer' is none"
    if row["kind"] == "code" and not is_tests(row.get("tests")):
        return "whose 'tests' is no list of {stdin, stdout} or of {call, args, expected}"
    if row["kind"] == "code" and row.get("language") not in (None, "python", "cpp"):
        return f"whose 'language' is {row['language']!r:.40}, and neither 'python' nor 'cpp'"
    if not SCHEMA["tolerance"](row.get("tolerance")):
        return "whose 'tolerance' is no number from 0 to 1"
    return "whose 'id' is there already" if row["id"] in problems else ""


def check_code(any_code, allow_code):
    """Programs are run only if --allow-code was given; says what they will run in."""
    if any_code:
        print(f"programs run in: {isolation()}") if allow_code else die('problems of kind "code" are graded by running what the model '
                                                                        "writes, in a sandbox; give --allow-code to all stages")


def check_ids(source, rows, tokenizer, field="response_ids"):
    if max((max(r[field]) for r in rows), default=0) >= len(tokenizer):
        die(f"{source} holds token ids that the model's tokenizer does not have: it was made with another model")


def fingerprint(path):
    """A hash of what a stage read: a file's bytes, or a model folder's weights, tokenizer, template; a hub id stands for itself."""
    kinds = ".safetensors", ".json", ".jinja", ".txt", ".model"
    files = sorted(f for f in Path(path).iterdir() if f.suffix in kinds) if Path(path).is_dir() else [Path(path)]
    there = all(file.is_file() for file in files)
    return hash_of(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files)) if there else str(path)


@lru_cache(100)
def hash_of(files):
    """Of files (path, size, time of change): a model of many GB is read once."""
    digest = hashlib.sha256()
    for file, _, _ in files:
        with open(file, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def stem_of(artifact):
    """NAME of NAME.jsonl, the model folder NAME and NAME.meta.json: a model and its log have one meta file."""
    return Path(artifact).with_name(Path(artifact).name.removesuffix(".jsonl"))


def meta_file(artifact):
    return Path(f"{stem_of(artifact)}.meta.json")


SAME = "model (hash)", "seed", "p_r_right", "p_r_wrong", "verified (hash)", "srt (hash)"    # in all that a run consists of


def claim(artifact, args, inputs, settings, fields=(), same=SAME):
    """Take `artifact` (a .jsonl file of `fields`, or a model folder) for this run; returns (rows that an earlier try left, complete?).

    Beside it goes NAME.meta.json: the arguments named in `settings`, a hash of each of `inputs`, versions, commit. An artifact made with
    other settings or inputs is refused; with --overwrite it becomes NAME.old until the new one is complete. Inputs that were themselves
    made with something else than this run or each other, in what `same` names, are refused without --mix; so are inputs that were changed
    since, and always those that are not complete. Until finish(), or the end of the process, no other process can take the artifact. A torn
    last line, as a kill leaves it, is cut off.
    """
    artifact, stem, meta_path = Path(artifact), stem_of(artifact), meta_file(artifact)
    made_of = json.loads(json.dumps({**{k: vars(args)[k] for k in settings}, **{f"{k} (hash)": fingerprint(v) for k, v in inputs.items()}}))
    origin = {k: made_of[k] for k in same if k in made_of and made_of[k] != str(inputs.get("verified"))}     # GRPO needs none
    for name, path in inputs.items():
        meta, now = read_meta(path) if name != "model" else {}, made_of[f"{name} (hash)"]
        if meta and "counts" not in meta:
            die(f"{path} is not complete; give the command that makes it again, it goes on where it stopped")
        if meta.get("hash", now) != now and not args.mix:
            die(f"{path} is not what its stage left there, as {meta_file(path).name} says; remove it and make it again, or give --mix")
        base = {"model (hash)": now} if Path(path).is_dir() and name in ("srt", "checkpoint base") else {}
        for k, value in meta.get("origin", base).items():
            if k in same and k != f"{name} (hash)" and origin.setdefault(k, value) != value and not args.mix:
                die(f"{path} comes from {k.removesuffix(' (hash)')} {value!r}, and this run or another of its inputs from {origin[k]!r}; "
                    "make them alike, or give --mix")

    def look():
        there, old = [p for p in (stem, Path(f"{stem}.jsonl")) if p.exists()], read_meta(artifact)
        before = old.get("made_of", {})
        differs = there and sorted(k for k in made_of.keys() | before.keys() if made_of.get(k) != before.get(k))
        why = f"{differs[0]}: {before.get(differs[0])!r} there, {made_of.get(differs[0])!r} now" if before and differs else \
            f"{meta_path.name} is missing or damaged"
        if differs and not args.overwrite:
            die(f"{there[0]} belongs to another run ({why}); choose another --out, or --overwrite")
        return there, old, differs, not differs and artifact.exists() and "counts" in old

    if artifact.exists() and artifact.is_dir() == bool(fields):
        die(f"{artifact} is a {'folder' if fields else 'file'}, and this stage writes a {'file' if fields else 'folder'} there")
    there, old, differs, complete = look()
    try:
        if not complete:
            artifact.parent.mkdir(parents=True, exist_ok=True)
            lock(artifact)
            there, old, differs, complete = look()      # another process may just have ended
        if differs:
            for path in (*there, meta_path):
                if path.exists() and ("counts" in old or not Path(f"{path}.old").exists()):
                    remove(f"{path}.old")
                    os.replace(path, f"{path}.old")
                remove(path)        # of an --overwrite that did not come to its end: what it replaced is kept
            remove(f"{stem}.resume")
        if complete:
            remove(f"{artifact}.old")       # killed while they were removed
            remove(f"{meta_path}.old")
        else:
            versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
            write_json(meta_path, {"made_of": made_of, "origin": origin, "arguments": vars(args), "versions": versions, "commit": commit(),
                                   "isolation": isolation() if args.allow_code else None})
        if not fields or not artifact.exists():
            return [], complete
        with open(artifact, "rb") as f:
            end = size = f.seek(0, os.SEEK_END)
            while end:      # back to the last line break, a block at a time
                start = f.seek(max(0, end - (1 << 16)))
                if (at := f.read(end - start).rfind(b"\n")) >= 0:
                    end = start + at + 1
                    break
                end = start
        if end < size:
            print(f"{artifact}: the last line was torn and is cut off", file=sys.stderr)
            os.truncate(artifact, end)
    except OSError as e:
        die(f"{artifact} cannot be written: {e.strerror}; make room or choose another --out, and give the same command again")
    return stream_jsonl(artifact, fields, "remove it first") if end else [], complete


def read_meta(artifact):
    """Its meta file; {} if there is none that can be read."""
    try:
        meta = json.loads(meta_file(artifact).read_text())
        return meta if all(isinstance(meta[k], dict) for k in ("made_of", "origin")) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def lock_file(artifact):
    return stem_of(artifact).with_name(f".{stem_of(artifact).name}.lock")


def lock(artifact):
    """Until finish() or the end of the process, so that two never write the same artifact."""
    path = lock_file(artifact)
    if fcntl and path not in _locks:
        held = open(path, "w")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            die(f"{artifact} is being written by another process; wait for it, or choose another --out")
        except OSError as e:
            warn(f"{artifact}: its file system has no locks ({e.strerror}); do not run the same stage twice at the same time")
        _locks[path] = held


def unlock(path):
    if held := _locks.pop(path, None):
        held.close()


def finish(artifact, began, device, **counts):
    """Complete the artifact's meta file: its hash, device, threads, seconds since `began`, and counts, which say that it is complete."""
    made = fingerprint(stem_of(artifact) if stem_of(artifact).is_dir() else artifact)
    write_json(meta_file(artifact), {**json.loads(meta_file(artifact).read_text()), "hash": made, "device": str(device),
                                     "threads": torch.get_num_threads(), "seconds": round(time.time() - began, 1), "counts": counts})
    remove(f"{artifact}.old")
    remove(f"{meta_file(artifact)}.old")
    unlock(lock_file(artifact))


def remove(path):
    """A file, or a folder with all that is in it; nothing if there is nothing."""
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)


def commit():
    """Of this project, if it is run from a clone; else None."""
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def write_whole(path, text):
    """Whole or not at all: written beside the target, then renamed over it."""
    beside = Path(f"{path}.part")
    beside.write_text(text)
    os.replace(beside, path)


def write_json(path, value):
    write_whole(path, json.dumps(value, indent=1, default=str) + "\n")


def append_jsonl(path, rows):
    with open(path, "a", encoding="utf-8") as f:
        f.write("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- prompts: the one place where they are defined

def prompt_text(tokenizer, problem):
    return tokenizer.apply_chat_template([{"role": "user", "content": problem}], add_generation_prompt=True, tokenize=False,
                                         enable_thinking=False)


def prompt_ids(tokenizer, problem):
    """chat(x): the user's turn and the opening of the assistant's, as token ids."""
    return tokenizer(prompt_text(tokenizer, problem), add_special_tokens=False)["input_ids"]


@lru_cache(4)
def special_ids(tokenizer):
    """Ids that are no text. Some models end their turn with a token that has no name in the tokenizer's configuration."""
    return {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}


def delimiter(reward, p_r=P_R):
    return f"\n\n{p_r[reward]}\n\n"


def revision_ids(tokenizer, problem, response_ids, reward, p_r=P_R):
    """chat(x) + y without its end token + "\\n\\n" P_r "\\n\\n": what the reviser sees, in collection, in SFT and as the teacher."""
    y = list(response_ids)
    while y and y[-1] in special_ids(tokenizer):
        y.pop()
    # Parts are tokenised apart and ids joined, so that no BPE merge crosses a seam.
    return prompt_ids(tokenizer, problem) + y + tokenizer(delimiter(reward, p_r), add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------- verifying mathematics

def last_boxed(text):
    r"""The content of the last \boxed{...} that is closed, nested braces and all; None if there is none."""
    opened, last = [], None     # opened: a stack; for each open brace the place where its box's content starts, -1 if it is no box's
    for m in re.finditer(r"\\[{}]|(\\boxed\s*)?\{|\}", text):
        if m.group() in (r"\{", r"\}"):
            continue        # printed braces need no partner: \left\{ ... \right.
        if m.group() != "}":
            opened.append(m.end() if m.group(1) else -1)
        elif opened and (start := opened.pop()) > (last[0] if last else -1):
            last = start, m.start()
    return text[slice(*last)].strip() if last else None


WORDS = r"\\(?:text|textrm|mbox|mathrm)\s*\{"
NO_VARIABLES = WORDS + r"[^{}]*\}|\\[a-zA-Z]+"
UNITS = r"\b([cmk]m|[km]g|m[lL]|(hour|minute|second|day|year|degree|dollar|cent|met(er|re)|mile|unit)s?|inch(es)?|feet)\b"


def tidied(answer):
    r"""LaTeX that math-verify would misread: separators in numbers, units, \degree, 0.\overline{3}, a full stop or dollars around it."""
    answer = re.sub(r"^\$|(?<!\\)\$$", "", answer.strip()).removesuffix(".")
    if word := re.fullmatch(r"\\(?:text\w*|mbox|mathrm)\s*\{([^{}]*)\}", answer):
        answer = word[1]
    answer = re.sub(r"(?<=\d)(\\[,! ;:]|\{,\}|~|\\ | )(?=\d{3}(?!\d))", "", answer)
    unit = WORDS + r"(?!\s*(or|and|percent|pct|ln|log|lg|sin|cos|tan|cot|cis|mod|remainder)\b)[a-zA-Z. ]{2,}\}"
    answer = re.sub(rf"(?<=\d)\s*{unit}\s*(?=\d)", ", ", answer)       # 2 hours 30 minutes is neither 230 nor 32
    answer = re.sub(rf"(?<=[\d)}}])\s*({unit}|{UNITS}$)(\s*\^\{{?\d\}}?)?", "", answer)
    answer = re.sub(r"(\d+)\.(\d*)\\overline\s*\{(\d+)\}", lambda m: rf"\frac{{{int(m[1] + m[2] + m[3]) - int(m[1] + m[2])}}}"
                    f"{{{'9' * len(m[3]) + '0' * len(m[2])}}}", answer)
    return re.sub(r"(\^\s*)?\\degree\b|°", r"^{\\circ}", answer).strip()


def letters(text):
    """Without words and commands: what is left are variables."""
    return re.sub(NO_VARIABLES, "", text)


def told_apart(texts):
    """Where these have a letter in both cases, as R and r, a free letter for the capital: math-verify would take them for one."""
    used = set(letters("".join(texts)))
    free = (c for c in "qkwvujgpyzthblmnoasrcfx" if c not in used)
    new = {c: next(free, c) for c in sorted(used) if c.isupper() and c.lower() in used}
    return [re.sub(NO_VARIABLES + "|([A-Z])", lambda m: new.get(m[1], m[0]), text) for text in texts]


def depths(text):
    """How many brackets are open after each character."""
    return list(itertools.accumulate((c in "({[") - (c in ")}]") for c in text))


def split(text, separator):
    """Where it stands outside of brackets: P(X=2) is one part."""
    cuts = [i for i, (c, depth) in enumerate(zip(text, depths(text))) if c == separator and not depth]
    return [text[a + 1:b] for a, b in zip([-1, *cuts], [*cuts, len(text)])]


def sides(answer, reference):
    r"""What must equal the reference: of "m + n = 41" the 41; of "6 = 5" both, for a false equation is not right; [] if nothing can.

    An answer that names alternatives is none, unless the reference names some: \boxed{1 or 2} is not a way to be right twice.
    """
    either, of = r"\bor\b|\\(lor|vee)\b", r"\\[dt]?frac|\\(sqrt|cdot|times|left|right|pi|circ|binom)\b"
    if re.search(either, answer) and not re.search(either + "|,|pm", reference):
        return []
    kind = lambda text: re.match(r"(\\left)?(\\\{|[(\[]|)", text)[2].replace("[", "(") if text.count("(") < 2 else ""
    if "" != kind(answer) != kind(reference) != "" and not re.search(r"\\\{.*(\(|\||\\mid|:)", answer if r"\{" in answer else reference):
        return []           # a set is no pair
    if re.search(either + r"|\band\b|[<>,]|\\([lg]eq?|neq?|in)\b", answer) or "=" in reference:
        return [answer]
    parts = split(answer, "=")
    if re.fullmatch(r"\s*[a-zA-Z]\s*", parts[-1]) and len(parts) > 1:
        parts.pop()         # 5 = x
    return [part for part in parts[:-1] if not re.search(r"[a-zA-Z\\]", re.sub(of, "", part))] + parts[-1:]


def components(text):
    """["(", the parts, ")"] of a pair, tuple or interval; [] of anything else."""
    text = re.sub(r"\\(left|right)\s*(?=[][()])", "", text)
    if text[:1] not in ("(", "[") or depths(text)[-1] or 0 in depths(text)[:-1]:    # its first bracket must go around it all
        return []
    parts = split(text[1:-1], ",")
    return [text[0], *parts, text[-1]] if len(parts) > 1 else []


GRADER = """  # a process of its own, for sympy can hang on one answer and eat all memory on another
import ctypes, json, logging, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)      # dies with the stage, however that dies
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
except (ImportError, ValueError):
    pass
from functools import lru_cache
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
logging.disable(logging.CRITICAL)

@lru_cache(1000)
def boxed(text, units):
    config = LatexExtractionConfig(normalization_config=NormalizationConfig(units=units, malformed_operators=True, nits=True))
    return parse("\\\\boxed{" + text + "}", [config], fallback_mode="no_fallback", parsing_timeout=None)    # else any number in it would do

print(flush=True)
for line in sys.stdin:
    reference, answers, units = json.loads(line)
    gold, same = boxed(reference, units), lambda a: verify(gold, boxed(a, units), timeout_seconds=None, allow_set_relation_comp=True)
    print("error" if not gold else "correct" if all(map(same, answers)) else "wrong", flush=True)
"""
NUMBER = re.compile(r"\s*[-+]?\d{1,300}(\.\d{1,300})?\s*")
_thread = threading.local()     # .grader: the thread's own process
_graders = ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def start_grader():
    pipe = subprocess.PIPE
    grader = subprocess.Popen([sys.executable, "-c", GRADER], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True,
                              start_new_session=True)   # Ctrl-C is for the stage
    atexit.register(grader.kill)
    grader.stdout.readline()    # it has imported sympy
    return grader


def same_answer(reference, answer, seconds=5.0):
    """'correct', 'wrong', 'timeout' or 'error', as math-verify decides in a process that is killed after `seconds`."""
    if len(answer) > 1000:
        return "wrong"
    reference, answer = tidied(reference), tidied(answer)
    if reference == answer != "" or not (answers := sides(answer, reference)):
        return "correct" if reference == answer else "wrong"
    ours, theirs = components(reference), components(answer)
    if ours and theirs:     # part by part: math-verify takes ten times as long for a pair as for two numbers
        same = len(ours) == len(theirs) and ours[0] == theirs[0] and ours[-1] == theirs[-1]
        verdicts = [same_answer(a, b, seconds) for a, b in zip(ours[1:-1], theirs[1:-1])] if same else ["wrong"]
        return next((verdict for verdict in verdicts if verdict != "correct"), "correct")
    if re.fullmatch("[a-zA-Z ]{2,}", reference) and reference.lower() == answer.lower():    # Yes
        return "correct"
    if all(map(NUMBER.fullmatch, (reference, *answers))):   # numbers need no algebra; math-verify rounds small ones
        return "correct" if all(Decimal(reference) == Decimal(text) for text in answers) else "wrong"
    reference, *answers = told_apart([reference, *answers])
    return ask_grader(reference, answers, seconds)


def readable(reference):
    """Can math-verify grade with it? (One that takes too long today may not tomorrow; in grading it would be counted.)"""
    reference = tidied(reference)
    return bool(NUMBER.fullmatch(reference)) or ask_grader(reference, [reference], 5.0) in ("correct", "timeout")


def ask_grader(reference, answers, seconds):
    """Whether all of the answers are equal to the reference, by the thread's own process."""
    if getattr(_thread, "grader", None) is None or _thread.grader.poll() is not None:
        _thread.grader = start_grader()
    grader = _thread.grader
    began, late = time.monotonic(), threading.Timer(seconds, grader.kill)
    late.start()
    try:
        grader.stdin.write(json.dumps([reference, answers, not re.search("[a-zA-Z]", letters(reference))]) + "\n")   # 6m: metres?
        grader.stdin.flush()
        verdict = grader.stdout.readline().strip()
    except OSError:
        verdict = ""
    late.cancel()
    if not verdict:
        _thread.grader = None   # the next answer gets a new one
        grader.kill()
    return verdict or ("timeout" if time.monotonic() - began >= seconds else "error")


# ---------------------------------------------------------------- programs that a model wrote

HARNESS = """  # inside the sandbox: limits itself, gives root away, then becomes the program, or calls its functions
import builtins, json, os, resource, sys
with os.fdopen(int(sys.argv[1])) as f:
    job = json.load(f)
if sys.platform == "linux":
    if job["kind"] != "bubblewrap":                 # which does this itself
        import ctypes
        ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)     # no sudo
    with open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")                             # if memory runs out, this goes first
for name, value in job["limits"].items():
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    except ValueError:                              # macOS has no RLIMIT_AS
        pass
if job["uid"]:
    os.setgroups([]), os.setgid(job["uid"]), os.setuid(job["uid"])
if "command" in job:
    os.execv(job["command"][0], job["command"])
out = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # what the program prints is no result
sys.path += job["paths"]                            # started without the module site, which takes most of the time
builtins.exit = builtins.quit = sys.exit
program = sys.modules["program"] = type(sys)("program")
exec(compile(open("program.py").read(), "program.py", "exec"), program.__dict__)
for name, args in job["calls"]:
    print(json.dumps(getattr(program, name)(*args)), file=out, flush=True)
"""
_uids = itertools.cycle(range(200_000 + 1000 * (os.getpid() % 10_000), 201_000 + 1000 * (os.getpid() % 10_000)))   # as root: a user each


def fence(kind, box, seconds):
    """The command that shuts what follows it in: from the network, other processes and the disk, as far as the kind of isolation goes."""
    root = os.getuid() == 0
    # Were this process killed, bubblewrap would end the program at once, and this a little after its time.
    watch = ["timeout", "-s", "KILL", str(math.ceil(seconds) + 5)] if shutil.which("timeout") else []
    if kind == "bubblewrap":
        spaces = "--unshare-net --unshare-pid --unshare-ipc --unshare-uts --cap-add CAP_SETUID --cap-add CAP_SETGID"
        seen = dict.fromkeys(["/usr", "/bin", "/lib", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", sys.base_prefix, sys.prefix])
        above = [str(p) for place in (sys.base_prefix, sys.prefix, box) for p in reversed(Path(place).parents) if p != Path("/")]
        return ["bwrap", *(spaces.split() if root else ["--unshare-all"]), "--die-with-parent", "--new-session",
                *[word for place in above for word in ("--perms", "0755", "--dir", place)],
                *[word for place in seen for word in ("--ro-bind-try", place, place)],
                "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--bind", box, box, "--chdir", box, "--remount-ro", "/"]
    if kind == "namespaces":
        own = [] if root else ["--user", "--map-root-user"]
        spaces = ["--net", "--pid", "--ipc", "--mount", "--mount-proc", "--fork", "--kill-child"]
        # the first process, with which all others die, is the shell
        return [*watch, "unshare", *own, *spaces, "sh", "-c", '"$@"; exit $?', "sh"]
    return watch


def run_program(files, job, kind, stdin="", seconds=10.0, memory=1 << 30, keep=None):
    """Run in a fresh folder that holds `files` {name: text or bytes}. Returns (what was printed, "ok", "failed" or "timeout", file `keep`).

    job: {"command": [...]}, {box} standing for the folder, or {"calls": [[name, args], ...]} to functions of the file program.py.
    """
    place = tempfile.mkdtemp(prefix="sd-zero-")     # not the program's, so it cannot put a link in place of its folder
    box = os.path.join(place, "box")
    os.mkdir(box)
    os.chmod(place, 0o711)
    try:
        return run_in(box, files, job, kind, stdin, seconds, memory, keep)
    finally:
        try:
            for name in files:
                os.unlink(os.path.join(box, name))
            os.rmdir(box), os.rmdir(place)
        except OSError:     # it left more there
            if os.getuid():
                subprocess.run(["chmod", "-R", "u+rwx", "--", place], stderr=subprocess.DEVNULL)
            subprocess.run(["rm", "-rf", "--", place], stderr=subprocess.DEVNULL)


def run_in(box, files, job, kind, stdin, seconds, memory, keep):
    """run_program() in a folder that is there, and stays."""
    deadline = time.monotonic() + seconds
    uid = next(_uids) if os.getuid() == 0 else 0
    limits = {"CPU": math.ceil(seconds) + 1, "AS": memory, "FSIZE": 16 << 20, "NOFILE": 64, "CORE": 0,
              "NPROC": 4096 if kind == "limits" and not uid else 16}    # without a namespace all of the user's processes count
    paths = [p for p in sys.path if p.endswith("-packages")] if python_for(kind) == sys.executable else []
    job = {**job, "limits": limits, "uid": uid, "kind": kind, "paths": paths}
    if "command" in job:
        job["command"] = [word.format(box=box) for word in job["command"]]
    for name, content in files.items():
        Path(box, name).write_bytes(content if isinstance(content, bytes) else content.encode(errors="replace"))
        os.chmod(Path(box, name), 0o755)
    if uid:
        os.chown(box, uid, uid)
    # What the program is told lies outside of its folder: there it could put a link where we write.
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as told:
        source.write(stdin.encode(errors="replace")), source.seek(0)
        told.write(json.dumps(job).encode()), told.seek(0)
        command = [*fence(kind, box, seconds), python_for(kind), "-I", "-S", "-c", HARNESS, str(told.fileno())]
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": box, "TMPDIR": box, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=box, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
                                   start_new_session=True, pass_fds=[told.fileno()])
    out, ended = b"", False
    while len(out) <= 1_000_000 and (left := deadline - time.monotonic()) > 0:
        if select.select([process.stdout], [], [], 0.0 if ended else min(left, 0.02))[0]:
            if not (block := os.read(process.stdout.fileno(), 1 << 16)):
                break
            out += block
        elif ended:     # something that it left behind still holds its stdout
            break
        ended = ended or os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    while not ended and len(out) <= 1_000_000 and time.monotonic() < deadline:     # it closed its stdout, and goes on
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        time.sleep(0.001)
    try:
        os.killpg(process.pid, signal.SIGKILL)      # and what it left behind; not reaped yet, so the number is still its own
    except (ProcessLookupError, PermissionError):
        pass
    status = "ok" if process.wait() == 0 and ended else "timeout" if time.monotonic() >= deadline else "failed"
    process.stdout.close()
    kept = Path(box, keep).read_bytes() if keep and status == "ok" else None
    return out.decode(errors="replace"), status, kept


def python_for(kind):
    """The interpreter of programs: ours, unless that lies in root's home, where another user cannot read it."""
    hidden = os.getuid() == 0 and any(not p.stat().st_mode & 1 for p in Path(sys.executable).resolve().parents)
    return sys.executable if kind == "bubblewrap" or not hidden else "/usr/bin/python3"


@lru_cache(1)
def isolation():
    """The strongest kind that works here: "bubblewrap", "namespaces" or "limits"; dies where none does."""
    for kind in ("bubblewrap", "namespaces", "limits") if os.name == "posix" else ():
        try:
            if run_program({"program.py": "def one():\n    return 1\n"}, {"calls": [["one", []]]}, kind)[:2] == ("1\n", "ok"):
                return kind
        except (OSError, AttributeError):   # macOS has os.waitid from Python 3.13 on
            pass
    die("--allow-code: no program can be run here; it needs Linux, or macOS with Python 3.13, and as root /usr/bin/python3 or bubblewrap")


def same_value(a, b, tolerance=0.0):
    """Of two JSON values; whole numbers exactly, others within the tolerance, absolute or relative; true is not 1."""
    if isinstance(a, (list, dict)) and type(a) is type(b) and len(a) == len(b):
        pairs = [(a[k], b[k]) for k in a if k in b] if isinstance(a, dict) else list(zip(a, b))
        return len(pairs) == len(a) and all(same_value(x, y, tolerance) for x, y in pairs)
    if {type(a), type(b)} == {int, float} or type(a) is type(b) is float:
        try:
            return a == b or math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
        except OverflowError:
            return False
    return type(a) is type(b) and a == b


def same_output(printed, expected, tolerance=0.0):
    """Word by word; with a tolerance, words that are numbers as numbers."""
    def value(word):
        for kind in (int, float) if tolerance else ():
            try:
                return kind(word)
            except ValueError:
                pass
        return word
    a, b = printed.split(), expected.split()
    return len(a) == len(b) and all(x == y or same_value(value(x), value(y), tolerance) for x, y in zip(a, b))


def verify_code(record, response, seconds=10.0):
    """verify() for kind "code": the answer's last ```python or ```cpp block (or last block) must pass every test of record["tests"].

    The program runs as a child that cannot hurt: a fresh folder for each run, a process group that is killed as a whole after `seconds`;
    limits on CPU, memory, processes, open files and their size; at most 1 MB of output; an empty environment; as root another user. Under
    bubblewrap it sees no network, no process but its own, and of the disk only the system and Python, read-only. In plain namespaces it
    still sees the files that all may read or, not started by root, reads and writes what the user may, so data and results too. With
    limits alone it also has the network, can signal the user's processes, and children that leave the process group outlive it. Not
    covered by any: holes in the kernel, time and heat, the sum of many small files, or of memory over its 16 processes.
    What it should return is never passed to it, and compared outside: what it prints can be forged, the verdict cannot.
    """
    blocks = re.findall(r"^[ \t]*```([^\n`]*)\n(.*?)^[ \t]*```", response, re.DOTALL | re.MULTILINE)
    if not blocks:
        return 0, "no_answer", None
    of = {**dict.fromkeys(("python", "py", "python3"), "python"), **dict.fromkeys(("cpp", "c++", "cc", "cxx", "c++17"), "cpp")}
    tagged = [(of[tag.strip().lower()], text) for tag, text in blocks if tag.strip().lower() in of]
    language, program = (tagged or [(record.get("language") or "python", blocks[-1][1])])[-1]
    program, tests, tolerance = textwrap.dedent(program), record["tests"], record.get("tolerance") or 0.0
    known = hashlib.sha256(repr((program, language, tests, tolerance)).encode(errors="replace")).digest()
    if known not in _passed:    # a trained model gives the same right answer again and again
        reward, verdict = run_tests(program, language, tests, tolerance, seconds)
        if not reward:
            return 0, verdict, program
        _passed.add(known)
    return 1, "correct", program


def compiler():
    """g++ where the sandbox sees it, or None."""
    return shutil.which("g++", path="/usr/local/bin:/usr/bin")


def run_tests(program, language, tests, tolerance, seconds):
    """(reward, verdict) of a program; the verdict is error where no compiler is there for it."""
    kind = isolation()
    calls = [[t["call"], t["args"]] for t in tests if t.get("call") is not None]
    files, command = {"program.py": program}, [python_for(kind), "-I", "{box}/program.py"]
    if language == "cpp":
        if calls or not compiler():
            return 0, "wrong" if calls else "error"
        compile_it = {"command": [compiler(), "-O2", "-std=c++17", "-o", "{box}/program", "{box}/program.cpp"]}
        binary = run_program({"program.cpp": program}, compile_it, kind, "", 60.0, 4 << 30, keep="program")[2]
        if not binary:
            return 0, "wrong"
        files, command = {"program": binary}, ["{box}/program"]
    if calls:
        printed, status, _ = run_program(files, {"calls": calls}, kind, seconds=seconds)
        try:
            values = [json.loads(line) for line in printed.splitlines()]
        except (ValueError, RecursionError):
            values = []
        right = len(values) == len(calls) and all(same_value(v, t["expected"], tolerance) for v, t in zip(values, tests))
    for test in [] if calls else tests:
        printed, status, _ = run_program(files, {"command": command}, kind, test["stdin"], seconds)
        right = same_output(printed, test["stdout"], tolerance)
        if not right or status != "ok":
            break
    right = right and status == "ok"
    return int(right), "correct" if right else "timeout" if status == "timeout" else "wrong"


# ---------------------------------------------------------------- the verifier of both

def verify(record, response):
    r"""r(y, a). Returns (reward 0 or 1, verdict, extracted): verdict is correct, wrong, no_answer, timeout or error; fails closed."""
    if record.get("kind") == "code":
        return verify_code(record, response)
    extracted = last_boxed(response)
    if extracted is None:
        return 0, "no_answer", None
    verdict = same_answer(record["answer"], extracted)
    return int(verdict == "correct"), verdict, extracted


def stop_if_ungraded(verdicts, any_code, what, least=1):
    """Where more than half of the answers (at least so many) cannot be graded, rewards mean nothing.

    Programs may take too long, so timeouts count only where no answer is one.
    """
    count = Counter(verdicts)
    if (n := sum(count.values())) >= least and count["error"] + (0 if any_code else count["timeout"]) > n / 2:
        die(f"{what}: {count['error']} errors and {count['timeout']} timeouts in {n} answers, so the rewards mean nothing; look at the "
            "problems' answers and tests, and whether the graders can run here, then remove a file that holds such verdicts")


def verify_all(records, responses):
    """verify() of many, in order, as they get ready; a grader a core."""
    return _graders.map(verify, records, responses)


# ---------------------------------------------------------------- models

def load_tokenizer(name):
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        die(f"{name} is no model folder: it has no config.json")
    if not Path(name).exists() and (str(name).count("/") != 1 or str(name)[0] in "./~"):
        die(f"model {name} does not exist: name a folder or a hub id (OWNER/NAME)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as e:  # tokenizers raises bare Exceptions
        die(f"model {name}: no tokenizer could be loaded (a local folder needs no network): {first_line(e)}")
    if not tokenizer.chat_template:
        die(f"model {name} has no chat template: SD-Zero needs a chat model")
    try:
        text = prompt_text(tokenizer, "1 + 1 = ?")
    except Exception as e:  # whatever the template raises
        die(f"model {name}: its chat template fails on one turn of the user: {first_line(e)}")
    if "1 + 1 = ?" not in text or len(text) > 100_000:
        die(f"model {name}: its chat template makes {len(text)} characters of a problem of 9, without the problem or too long")
    return tokenizer


def first_line(e):
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200]}" if str(e).strip() else type(e).__name__


def load_model(name, tokenizer, device, dtype=torch.float32):
    """A causal LM in eval mode. float32 weights are for training: in bf16 an update of 5e-6 rounds to nothing."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, output_loading_info=True,
                                                           trust_remote_code=False)
    except Exception as e:  # safetensors has its own, and a wrong config fails in many ways
        die(f"model {name}: no weights could be loaded: {first_line(e)}")
    if lost := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        die(f"model {name}: {len(lost)} of its weights are missing or of the wrong shape, {lost[0]} for one")
    model = model.to(device).eval()
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=model.config).layers):
        die(f"model {name} has layers other than attention (a recurrent state, say), which sampling does not support")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        die(f"model {name}: its tokenizer has {len(tokenizer)} tokens, its weights only {model.get_input_embeddings().num_embeddings}")
    if not set(end_ids(model)) & set(tokenizer.all_special_ids):
        die(f"model {name}: no end token of its generation config {end_ids(model)} is a special token of its tokenizer")
    with torch.no_grad():  # completion_logits goes through the head itself; some models do more after it (soft-capping, scaling)
        ids = prompt_ids(tokenizer, "1 + 1 = ?")
        whole, ours = model(torch.tensor([ids], device=device)).logits[0, :-1], completion_logits(model, [ids[:1]], [ids[1:]])
        if not (whole - ours).norm() <= 0.05 * whole.norm():    # "not": so that NaN is refused, too
            die(f"model {name}: its logits are not finite, or not head(hidden states): soft-capped or scaled ones are not supported")
    return model


def end_ids(model):
    ids = model.generation_config.eos_token_id
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]


def positions(model):
    """How many tokens a sequence may have: beyond the positions that it was made for a model writes noise, or fails."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


@contextmanager
def writing(path):
    """Libraries fail in ways of their own when a disk is full."""
    try:
        yield
    except Exception as e:
        die(f"{path} cannot be written ({first_line(e)}): is the disk full? What was there is kept, and the same command goes on")


def save_model(model, tokenizer, folder):
    """Written beside the target and swapped in by rename: `folder` is never half a model."""
    beside, old = f"{folder}.part", f"{folder}.replaced"
    remove(beside)
    with writing(folder):
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    if Path(folder).exists():
        remove(old)
        os.replace(folder, old)
    os.replace(beside, folder)
    remove(old)


def completion_hidden(model, prefixes, completions):
    """Last hidden states at the positions that predict each token of each completion after its prefix, rows laid end to end: [N, H].

    Token j of a completion is predicted one position earlier, the first by the prefix's last token. Rows are padded on the right: under
    causal attention no real token sees a pad, so masks come from lengths alone and the pad id may be anything, the end token too.
    """
    lengths = [len(p) + len(c) for p, c in zip(prefixes, completions, strict=True)]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)         # [B, T]
    predicts = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)    # [B, T] true where the next token is one of the completion's
    for i, (p, c) in enumerate(zip(prefixes, completions)):
        ids[i, :lengths[i]] = torch.tensor(p + c)
        predicts[i, len(p) - 1:lengths[i] - 1] = True
    hidden = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state   # [B, T, H]
    return hidden[predicts.to(model.device)]


def completion_logits(model, prefixes, completions):
    """The logits at these positions, all at once: [N, V]. For a few answers; the losses go through the head chunk by chunk."""
    return model.get_output_embeddings()(completion_hidden(model, prefixes, completions))


# ---------------------------------------------------------------- training

def micro_batches(rows, length, budget):
    """Rows in lists of at most `budget` tokens, padding included: shortest first, like lengths together. A longer row is alone."""
    batches = []
    for row in sorted(rows, key=length):
        if not batches or (len(batches[-1]) + 1) * length(row) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def backward_through_head(hidden, head, loss_of, context=nullcontext, scale=lambda part: part, chunk=None):
    """Backward of a loss on head(hidden), a chunk of positions at a time: [chunk, V] logits exist at once, not [N, V]. Returns the loss.

    loss_of(logits [n, V], at) is the part of the loss that the positions `at`, a slice of the N, make up; the loss is the sum of the parts.
    Each part's backward stops at its chunk's hidden states, and frees its logits; then the gradient of all hidden states [N, H] goes
    through the model in one pass. Nothing is computed twice, and the result is that of all chunks together.
    context: of the head's forward (autocast); scale: applied to a part before its backward (GradScaler.scale), not to the loss returned.
    """
    chunk = chunk or max(1, 2**25 // head.weight.shape[0])  # 2^25 logits: 128 MB in float32
    loss, gradients = 0.0, []
    for b, h in enumerate(hidden.split(chunk)):
        h = h.detach().requires_grad_()
        with context():
            logits = head(h)
        part = loss_of(logits, slice(b * chunk, b * chunk + len(h)))
        scale(part).backward()
        loss, gradients = loss + part.item(), gradients + [h.grad]
    hidden.backward(torch.cat(gradients))
    return loss


def update(model, optimizer, scaler):
    """An optimiser step with gradients clipped to norm 1. Returns their norm before; None if it is not finite: such a step is skipped."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    if math.isfinite(norm) or scaler.is_enabled():      # the scaler skips by itself, and learns from it
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm if math.isfinite(norm) else None


def save_state(folder, step, model, optimizer, scaler, teacher=None):
    """All that the training of `folder` needs to go on after `step` steps, in {folder}.resume: written beside, then renamed."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    state = {"made_of": json.dumps(read_meta(folder)["made_of"]), "step": step, "model": model.state_dict(),
             "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "random": [torch.get_rng_state(), *cuda],
             "teacher": teacher and teacher.state_dict()}
    with writing(f"{folder}.resume"):
        torch.save(state, f"{folder}.resume.part")
    os.replace(f"{folder}.resume.part", f"{folder}.resume")


def load_state(folder, log, model, optimizer, scaler, teacher=None):
    """Go on from save_state(), if it belongs to this run: `log` keeps the rows of the steps done, which are returned."""
    path, step = Path(f"{folder}.resume"), 0
    rows = read_jsonl(log, (), "remove it") if Path(log).exists() and Path(log).stat().st_size else []
    if path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["made_of"] == json.dumps(read_meta(folder)["made_of"]) and \
                    [r.get("step") for r in rows[:state["step"]]] == list(range(state["step"])):
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                if state["scaler"]:
                    scaler.load_state_dict(state["scaler"])
                if teacher and state["teacher"]:
                    teacher.load_state_dict(state["teacher"])
                torch.set_rng_state(state["random"][0])
                for i, cuda in enumerate(state["random"][1:torch.cuda.device_count() + 1]):
                    torch.cuda.set_rng_state(cuda, i)
                step = state["step"]
            else:
                warn(f"{path} belongs to another run or log; the training starts again")
        except Exception as e:      # torch.load fails in many ways on a damaged file
            die(f"{path} is damaged ({first_line(e)}); remove it, and the training starts again")
    rows = rows[:step]
    write_whole(log, "".join(json.dumps(row) + "\n" for row in rows))
    if step:
        print(f"{folder}: goes on after {step} steps")
    return rows


def stop_if_broken(history, folder, steps):
    """After eight steps in a row without a finite gradient, or if all `steps` had none; says how many were skipped."""
    broken = [row["gradient_norm"] is None for row in history]
    if len(broken) >= min(8, steps) and all(broken[-8:]):
        die(f"{folder}: the gradients of {sum(broken)} of {len(broken)} steps are not finite, those of the last too. The last --save-every "
            "with a finite one is kept; another run with a lower --lr may do better")
    if broken[-1]:
        warn(f"{folder}: step {history[-1]['step']} has no finite gradient and is skipped; {sum(broken)} so far")


def warn(message):
    tqdm.write(f"warning: {message}", file=sys.stderr)


# ---------------------------------------------------------------- sampling

def row_seed(*parts):
    """A seed for one answer from what names it (run seed, stage, problem id, sample number): the same in any batch and any order."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


class RoomyLayer(DynamicLayer):
    """One layer's cache, keys and values [B, heads, T, D], with free columns behind T: transformers' own copies all of it at each token.

    `room` holds the same keys and values with the free columns; pick() and join() replace the tensors, and so drop it.
    """

    def update(self, keys, values, *args, **kwargs):
        keys = keys.to(values.dtype)    # under autocast keys come out of their norm in float32, and would be cast at each token
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values, self.room = keys[:, :, :0], values[:, :, :0], None
        T, n = self.keys.shape[2], keys.shape[2]
        if self.room is None or T + n > self.room[0].shape[2]:
            self.room = [F.pad(x, (0, 0, 0, n + 64)) for x in (self.keys, self.values)]
        self.room[0][:, :, T:T + n], self.room[1][:, :, T:T + n] = keys, values
        self.keys, self.values = (x[:, :, :T + n] for x in self.room)
        return self.keys, self.values


def prefill(model, prefixes):
    """The cache after all but the last token of each prefix, padded on the left. Prefixes that are equal are computed once."""
    place = {p: j for j, p in enumerate(dict.fromkeys(map(tuple, prefixes)))}
    T = max(2, *map(len, place)) - 1
    ids = torch.tensor([[0] * (T + 1 - len(p)) + list(p[:-1]) for p in place], device=model.device)                        # [B, T]
    mask = torch.tensor([[0] * (T + 1 - len(p)) + [1] * (len(p) - 1) for p in place], device=model.device)
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    model.base_model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
    pick(cache, [place[tuple(p)] for p in prefixes], T)
    return cache


def pick(cache, rows, columns):
    """The cache becomes these rows of it, which may repeat, and its last columns."""
    rows = torch.tensor(rows, device=cache.layers[0].keys.device)
    for layer in cache.layers:
        layer.keys, layer.values, layer.room = layer.keys[:, :, -columns:][rows], layer.values[:, :, -columns:][rows], None


def join(batches):
    """Batches [(rows, cache), ...] as one. All rows end at the last column, so the narrower caches get empty columns on the left."""
    rows, caches = [i for batch, _ in batches for i in batch], [cache for _, cache in batches]
    T = max(cache.get_seq_length() for cache in caches)
    stack = lambda parts: torch.cat([F.pad(x, (0, 0, T - x.shape[2], 0)) for x in parts])
    for layers in zip(*(cache.layers for cache in caches)):
        keys, values = stack([x.keys for x in layers]), stack([x.values for x in layers])
        for x in layers:    # free a layer's parts before the next layer is stacked
            x.keys = x.values = x.room = None
        layers[0].keys, layers[0].values = keys, values
    return rows, caches[0]


def draw(logits, temperature, uniform):
    """One token a row, [B, V] → [B], by inverting the distribution function at uniform [B, 1] in (0, 1); temperature 0: the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits.float() / temperature).softmax(-1).cumsum(-1)
    return (cdf < uniform * cdf[:, -1:]).sum(-1)


@torch.no_grad()    # in inference_mode autocast keeps no copy of the weights: they would be cast at every token
def sample(model, prefixes, seeds, max_new_tokens, temperature=1.0, batch_rows=384, progress=None):
    """One answer a prefix: a list of token ids. temperature 0 is greedy.

    It ends with an end token unless it is cut, at max_new_tokens or where the model's positions end; it has at least one token.
    Each row draws from its own stream of uniforms: its neighbours change its answer only through the logits' rounding. Rows that ended
    leave the batch, a quarter of it at a time, for leaving copies the rest. When a quarter is left, these rows wait while the next batch
    runs; once enough wait, they go on as a batch of long answers. So batches wait for their longest answers only when no others are left.
    At most 2 · batch_rows rows are in memory. progress: a tqdm bar, counting answers.
    """
    was_training, ends = model.training, set(end_ids(model))
    model.eval()
    room = positions(model)
    limits = [max(1, min(max_new_tokens, room - len(p))) for p in prefixes]
    prefixes = [p if len(p) <= room else p[-room:] for p in prefixes]       # its one token counts as cut
    noise = [np.random.default_rng(seed).random(n, np.float32) for seed, n in zip(seeds, limits, strict=True)]
    answers, ended = [[] for _ in prefixes], [False] * len(prefixes)
    queue = sorted(range(len(prefixes)), key=lambda i: (len(prefixes[i]), prefixes[i]))     # like lengths, and equal prefixes, together
    waiting = []                                                                            # [(rows, cache), ...]
    context, _ = autocast(model.device)
    with context():  # around everything: the weights are cast once
        while queue or waiting:
            if queue and sum(len(rows) for rows, _ in waiting) < batch_rows:
                pieces = micro_batches(queue[:batch_rows], lambda i: len(prefixes[i]), 8192)    # tokens a forward pass
                rows, cache = join([(piece, prefill(model, [prefixes[i] for i in piece])) for piece in pieces])
                queue = queue[batch_rows:]
            else:
                (rows, cache), waiting = join(waiting), []
            few = batch_rows // 4 if queue or waiting else 0    # the last rows have none to wait for
            while len(rows) > few:
                T = cache.get_seq_length() + 1
                length = torch.tensor([[len(prefixes[i]) + len(answers[i])] for i in rows], device=model.device)        # [B, 1]
                mask = (torch.arange(T, device=model.device) >= T - length).long()                                      # [B, T]
                ids = torch.tensor([[(answers[i] or prefixes[i])[-1]] for i in rows], device=model.device)              # [B, 1]
                logits = model(input_ids=ids, attention_mask=mask, position_ids=length - 1, past_key_values=cache).logits[:, -1]    # [B, V]
                uniform = np.array([[noise[i][min(len(answers[i]), limits[i] - 1)]] for i in rows]).clip(1e-8)     # a 0 takes token 0
                token = draw(logits, temperature, torch.from_numpy(uniform).to(model.device))                           # [B]
                for i, t in zip(rows, token.tolist()):
                    if not ended[i]:                        # rows that ended stay until enough of them can leave
                        answers[i].append(t)
                        ended[i] = t in ends or len(answers[i]) == limits[i]
                alive = [j for j, i in enumerate(rows) if not ended[i]]
                if len(alive) <= max(few, 3 * len(rows) // 4):
                    if progress is not None:
                        progress.update(len(rows) - len(alive))
                    rows = [rows[j] for j in alive]
                    if rows:
                        pick(cache, alive, max(len(prefixes[i]) + len(answers[i]) for i in rows) - 1)
            if rows:
                waiting.append((rows, cache))
    model.train(was_training)
    return answers
