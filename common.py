"""What two or more stages must share exactly: runs, prompts, graders, training, sampling.

Letters for shapes: B rows, T positions, V vocabulary, H hidden size, N answer tokens of a batch
laid end to end. Files, models and problems are read and written by data/*.py.
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
from contextlib import nullcontext
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock, Timeout
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from data.files import append_jsonl, die, fingerprint, in_blocks, read_jsonl  # noqa: F401
from data.files import remove, warn, write_whole
from data.models import autocast, end_ids, load_model, load_tokenizer  # noqa: F401
from data.models import pick_device, positions, save_model  # noqa: F401
from data.problems import load_problems  # noqa: F401

HERE = Path(__file__).resolve().parent
P_R = {  # the control phrase by reward: --p-r-right, --p-r-wrong → args.p_r → revision_ids()
    1: "Let me rephrase the above solution.",
    0: "Wait, this response is not correct, let me start over.",
}


# ---------------------------------------------------------------- errors

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
REFUSED = errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST


def run_stage(main):
    """A script's entry: Ctrl-C and what a machine lacks are one line, all else is a traceback."""
    go_on = f"the same command goes on where it stopped: python {shlex.join(sys.argv)}"
    interrupted = []  # a library may turn the exception into one of its own

    def interrupt(*_):
        interrupted.append(True)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except BaseException as e:
        number = isinstance(e, Exception) and error_number(e)
        if interrupted or isinstance(e, KeyboardInterrupt):
            _graders.shutdown(wait=False, cancel_futures=True)
            print(f"\ninterrupted; {go_on}", file=sys.stderr)
            sys.exit(130)
        if isinstance(e, torch.OutOfMemoryError):
            die("the GPU is full; lower --batch-rows, --micro-tokens, or --gradient-checkpointing")
        if number in FULL:
            die(f"the disk is full ({e}); make room, and {go_on}")
        if number in REFUSED:
            die(f"cannot be written: {e}; choose another --out")
        raise


def error_number(e):
    """errno, also of an OSError that torch wraps or that safetensors writes into its text."""
    told = re.search(r"\(os error (\d+)\)", str(e))
    number = int(told[1]) if told else getattr(e, "errno", None)
    return number or e.__context__ and error_number(e.__context__)


# ---------------------------------------------------------------- command line

DEFAULTS = {  # stage and flag: (with an embedded model, with any other: the paper's numbers)
    "01 --data": (str(HERE / "data"), "open-r1/OpenR1-Math-220k"),
    "01 --limit": (1500, 10_000),
    "01 --max-new-tokens": (320, 16_384),
    "01 --batch-rows": (384, 8),
    "03 --revisions-wrong": (4, 3),
    "03 --revisions-right": (1, 3),
    "03 --max-new-tokens": (320, 16_384),
    "03 --batch-rows": (384, 8),
    "03 --lr": (8e-4, 5e-6),
    "03 --batch-size": (32, 8),
    "04 --limit": (None, 9_000),
    "04 --steps": (50, 70),
    "04 --lr": (2e-4, 5e-6),
    "04 --warm-up": (5, 20),
    "04 --batch-size": (64, 128),
    "04 --max-new-tokens": (320, 8_192),
    "04 --batch-rows": (384, 8),
    "05 --limit": (400, 500),
    "05 --n": (4, 8),
    "05 --max-new-tokens": (320, 32_768),
    "05 --batch-rows": (384, 2),
}
MAY_BE_0 = "seed", "temperature", "lr", "revisions_wrong", "revisions_right"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        die(f"{self.prog}: {message}; see {self.prog} --help")


def arguments(stage, doc):
    """The parser of a stage, "01" to "05", with the flags that all stages take."""
    p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.set_defaults(stage=stage)
    g = p.add_argument_group("the run (what its stages share is said once, to 01)")
    g.add_argument("--out", default="runs/demo", type=Path, help="the run's folder")
    g.add_argument("--model", help="chat model: folder or hub id (default: the base in --data)")
    g.add_argument("--data", help="problems: JSONL file, folder with SPLIT.jsonl, or hub id")
    g.add_argument("--seed", type=int, help="of all sampling and shuffling (default: 0)")
    g.add_argument("--p-r-right", metavar="P_r", help=f"after a right answer (default: {P_R[1]})")
    g.add_argument("--p-r-wrong", metavar="P_r", help=f"after a wrong answer (default: {P_R[0]})")
    g.add_argument("--from", dest="other", type=Path, help="a run to be a variant of")
    g.add_argument("--overwrite", action="store_true", help="make again what this stage has made")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--allow-code", action="store_true", help="run what the model writes")
    return p


def parse(p, argv):
    """The arguments, every default filled in; args.run is run.json, args.p_r {reward: P_r}."""
    pairs = {}  # name: (with an embedded model, with any other)
    for action in p._actions:
        if pair := DEFAULTS.get(f"{p.get_default('stage')} {action.option_strings[0]}"):
            pairs[action.dest] = pair
            action.help += f" (default: {pair[0] or '–'}; with --model: {pair[1]})"
        elif action.default not in (None, False, argparse.SUPPRESS):
            action.help += " (default: %(default)s)"
    args = p.parse_args(argv)
    args.run = open_run(args)
    for name, (small, paper) in pairs.items():
        if getattr(args, name) is None:
            setattr(args, name, small if args.run["embedded"] else paper)
    for name, value in vars(args).items():
        least = 0 if type(value) is float or name in MAY_BE_0 else 1
        if type(value) in (int, float) and not least <= value < math.inf:
            die(f"--{name.replace('_', '-')} cannot be {value}")
    args.p_r = {1: args.p_r_right, 0: args.p_r_wrong}
    return args


# ---------------------------------------------------------------- a run: a folder with one run.json

MADE_BY = {  # in order; "base" is the model that a run starts from
    "base": "01_generate.py",
    "responses.jsonl": "01_generate.py",
    "verified.jsonl": "02_verify.py",
    "revisions.jsonl": "03_revise_sft.py",
    "srt": "03_revise_sft.py",
    "sd_zero": "04_self_distill.py",
    "sd_zero.best": "04_self_distill.py",
    "eval.jsonl": "05_eval.py",
}


def read_run(folder):
    """run.json: {settings, embedded, from, made: {artifact: its entry}}; None if there is none."""
    path = Path(folder, "run.json")
    if any(Path(folder).glob("*.meta.json")):
        die(f"{folder} is of the first edition, which had no run.json; choose another --out")
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as e:
        die(f"{path} is damaged ({e}); mend it, or choose another --out")


def open_run(args):
    """The run of --out, or a new one: of --from, or of 01's arguments. It settles arguments."""
    args.out.mkdir(parents=True, exist_ok=True)
    args.lock = FileLock(args.out / ".lock", is_singleton=True)
    try:
        args.lock.acquire(timeout=0)  # until this process ends
    except Timeout:
        die(f"{args.out} is in use by another process; wait for it, or choose another --out")
    run = read_run(args.out)
    if not run and args.other:
        run = variant_of(args)
    elif not run and args.stage == "01":
        run = new_run(args)
    elif not run:
        die(f"{args.out} is no run yet; run 01_generate.py first, or give --from for a variant")
    if args.other and str(args.other) != run["from"]:
        die(f"{args.out} is not a variant of {args.other}; choose another --out")
    for name, settled in run["settings"].items():
        if getattr(args, name) not in (None, settled):
            flag = "--" + name.replace("_", "-")
            die(f"{flag}: the run {args.out} has {settled!r}; for another, choose another --out")
        setattr(args, name, settled)
    return run


def new_run(args):
    """Settings as said to 01, or by default: an embedded domain brings its own base."""
    embedded = not args.model or Path(args.model).resolve() in (HERE / "data").rglob("base")
    data = args.data or DEFAULTS["01 --data"][not embedded]
    base = next(b for b in (Path(data, "base"), HERE / "data/base") if b.is_dir())
    settings = {"model": args.model or str(base), "data": data, "seed": args.seed or 0}
    settings |= {"p_r_right": args.p_r_right or P_R[1], "p_r_wrong": args.p_r_wrong or P_R[0]}
    base = {"arguments": {}, "id": fingerprint(settings["model"]), "counts": {}}
    return {"settings": settings, "embedded": embedded, "from": None, "made": {"base": base}}


def variant_of(args):
    """The settings of the run --from, and links to what the stages before this one made there."""
    run, made = read_run(args.other), {}
    if not run:
        die(f"--from {args.other} is no run: it has no run.json")
    for name, entry in run["made"].items():
        earlier = MADE_BY[name][:2] < args.stage or (name, args.stage) == ("revisions.jsonl", "03")
        if name == "base" or earlier and "counts" in entry:
            made[name] = entry
    for link in (args.out / name for name in made if name != "base"):
        if link.is_symlink():  # of an earlier try
            remove(link)
        link.symlink_to(os.path.relpath(args.other.resolve() / link.name, args.out.resolve()))
    return {**run, "from": str(args.other), "made": made}


def find(args, name):
    """The path of what an earlier stage made; dies unless it is there, complete and unchanged."""
    path = Path(args.model) if name == "base" else args.out / name
    entry, again = args.run["made"].get(name, {}), f"python {MADE_BY[name]} --out {args.out}"
    again += f" --from {args.other}" if args.other else ""
    if "counts" not in entry:
        die(f"{path} is not made yet, or only in part; run first: {again}")
    if fingerprint(path) != entry["id"]:
        mend = "begin another run" if name == "base" else f"make it again: {again} --overwrite"
        die(f"{path} is gone or was changed since {MADE_BY[name]} noted it; {mend}")
    return path


def already_made(args, name, decides, problems=None, grows=False):
    """True if an artifact of this stage is complete; else begins, or goes on with, its entry.

    decides: the arguments and artifacts that decide, with the problems, what it will be. What was
    made of others is refused; with --overwrite it, and what is complete, is made again.
    grows: of other artifacts than before it may be, as 05 adds checkpoints.
    """
    made, path = args.run["made"], args.out / name
    now = {k: made[k]["id"] if k in made else getattr(args, k) for k in decides.split()}
    if problems:
        now["problems"] = hashlib.sha256(json.dumps(problems).encode()).hexdigest()[:16]
    was = made.get(name, {}).get("arguments", {})
    keys = was.keys() & now.keys() if grows or not was else was.keys() | now.keys()
    keys = [k for k in keys if was.get(k) != now.get(k)]
    differs = [f"{k}: {was.get(k)!r} there, {now.get(k)!r} now" for k in keys]
    if path.exists() and name not in made:
        differs = ["it, or what it was made from, is of an earlier try"]
    if differs and not args.overwrite and not path.is_symlink():
        other = "--out" if args.stage == "01" else f"--out with --from {args.out}"
        die(f"{path} was made otherwise ({min(differs)}); choose another {other}, or --overwrite")
    complete = "counts" in made.get(name, {}) and path.exists() and now.keys() <= was.keys()
    redo = args.overwrite and name != "revisions.jsonl"  # they did not change: training did
    if complete and not differs and not redo:
        print(f"{path} is there already")
        remove(f"{path}.resume")
        return True
    if differs or complete or path.is_symlink():  # a variant's own will be another one
        was = {}
        for later in list(MADE_BY)[list(MADE_BY).index(name) :]:  # they were made from it
            made.pop(later, None)
        write_whole(args.out / "run.json", json.dumps(args.run, indent=1) + "\n")
        for suffix in ("", ".resume", ".best"):
            remove(f"{path}{suffix}")
    git = "git describe --always --dirty"  # in a shell: there may be no git
    commit = subprocess.run(git, shell=True, cwd=HERE, capture_output=True, text=True).stdout
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    made[name] = {"arguments": was | now, "versions": versions, "commit": commit.strip()}
    write_whole(args.out / "run.json", json.dumps(args.run, indent=1) + "\n")
    return False


def finish(args, name, began, device, **counts):
    """Complete the entry: an id of what was made, and counts, which say that it is complete."""
    entry = args.run["made"][name]
    entry |= {"id": fingerprint(args.out / name), "device": str(device), "counts": counts}
    entry |= {"seconds": round(time.time() - began, 1), "threads": torch.get_num_threads()}
    if (best := args.out / f"{name}.best").exists():
        args.run["made"][best.name] = {**entry, "id": fingerprint(best)}
    write_whole(args.out / "run.json", json.dumps(args.run, indent=1) + "\n")
    remove(args.out / f"{name}.resume")
    print(f"{args.out / name}:", ", ".join(f"{n} {what}" for what, n in counts.items()))


# ---------------------------------------------------------------- prompts: nowhere else


def prompt_ids(tokenizer, problem):
    """chat(x): the user's turn and the opening of the assistant's, as token ids."""
    turn = [{"role": "user", "content": problem}]
    how = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
    text = tokenizer.apply_chat_template(turn, **how)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def delimiter(reward, p_r=P_R):
    return f"\n\n{p_r[reward]}\n\n"


def revision_ids(tokenizer, problem, response_ids, reward, p_r=P_R):
    """chat(x) + y without its end token + delimiter: what the reviser reads in 03, 04 and 05."""
    # Some models end a turn with a token that their tokenizer's configuration does not name.
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
    y = list(response_ids)
    while y and y[-1] in special:
        y.pop()
    # Parts are tokenised apart and ids joined, so that no BPE merge crosses a seam.
    told = tokenizer(delimiter(reward, p_r), add_special_tokens=False)["input_ids"]
    return prompt_ids(tokenizer, problem) + y + told


# ---------------------------------------------------------------- grading: mathematics


def last_boxed(text):
    r"""The content of the last \boxed{...} that is closed, nested braces and all; or None."""
    # opened: a stack; for each open brace, where its box's content starts, -1 if it is no box's
    opened, last = [], None
    for m in re.finditer(r"\\[{}]|(\\boxed\s*)?\{|\}", text):
        if m.group() in (r"\{", r"\}"):
            continue  # printed braces need no partner: \left\{ ... \right.
        if m.group() != "}":
            opened.append(m.end() if m.group(1) else -1)
        elif opened and (start := opened.pop()) > (last[0] if last else -1):
            last = start, m.start()
    return text[slice(*last)].strip() if last else None


WORDS = r"\\(?:text|textrm|mbox|mathrm)\s*\{"
NO_VARIABLES = WORDS + r"[^{}]*\}|\\[a-zA-Z]+"
NAMES = "hour|minute|second|day|year|degree|dollar|cent|met(er|re)|mile|unit"
UNITS = rf"\b([cmk]m|[km]g|m[lL]|({NAMES})s?|inch(es)?|feet)\b"


def tidied(answer):
    r"""LaTeX that math-verify would misread: commas, units, \degree, 0.\overline{3}, dollars."""
    answer = re.sub(r"^\$|(?<!\\)\$$", "", answer.strip()).removesuffix(".")
    if word := re.fullmatch(r"\\(?:text\w*|mbox|mathrm)\s*\{([^{}]*)\}", answer):
        answer = word[1]
    answer = re.sub(r"(?<=\d)(\\[,! ;:]|\{,\}|~|\\ | )(?=\d{3}(?!\d))", "", answer)
    no_unit = "or|and|percent|pct|ln|log|lg|sin|cos|tan|cot|cis|mod|remainder"
    unit = WORDS + rf"(?!\s*({no_unit})\b)[a-zA-Z. ]{{2,}}\}}"
    # 2 hours 30 minutes is neither 230 nor 32
    answer = re.sub(rf"(?<=\d)\s*{unit}\s*(?=\d)", ", ", answer)
    answer = re.sub(rf"(?<=[\d)}}])\s*({unit}|{UNITS}$)(\s*\^\{{?\d\}}?)?", "", answer)
    answer = re.sub(
        r"(\d+)\.(\d*)\\overline\s*\{(\d+)\}",
        lambda m: (
            rf"\frac{{{int(m[1] + m[2] + m[3]) - int(m[1] + m[2])}}}"
            f"{{{'9' * len(m[3]) + '0' * len(m[2])}}}"
        ),
        answer,
    )
    return re.sub(r"(\^\s*)?\\degree\b|°", r"^{\\circ}", answer).strip()


def letters(text):
    """Without words and commands: what is left are variables."""
    return re.sub(NO_VARIABLES, "", text)


def told_apart(texts):
    """A free letter for the capital of one in both cases, R and r: math-verify would mix them."""
    used = set(letters("".join(texts)))
    free = (c for c in "qkwvujgpyzthblmnoasrcfx" if c not in used)
    new = {c: next(free, c) for c in sorted(used) if c.isupper() and c.lower() in used}
    return [
        re.sub(NO_VARIABLES + "|([A-Z])", lambda m: new.get(m[1], m[0]), text) for text in texts
    ]


def depths(text):
    """How many brackets are open after each character."""
    return list(itertools.accumulate((c in "({[") - (c in ")}]") for c in text))


def split(text, separator):
    """Where it stands outside of brackets: P(X=2) is one part."""
    cuts = [
        i for i, (c, depth) in enumerate(zip(text, depths(text))) if c == separator and not depth
    ]
    return [text[a + 1 : b] for a, b in zip([-1, *cuts], [*cuts, len(text)])]


def sides(answer, reference):
    r"""What must equal the reference: of "m + n = 41" the 41; of "6 = 5" both; [] if nothing can.

    An answer that names alternatives is none, unless the reference names some: \boxed{1 or 2} is
    not a way to be right twice.
    """
    either, of = (
        r"\bor\b|\\(lor|vee)\b",
        r"\\[dt]?frac|\\(sqrt|cdot|times|left|right|pi|circ|binom)\b",
    )
    if re.search(either, answer) and not re.search(either + "|,|pm", reference):
        return []

    def kind(text):
        bracket = re.match(r"(\\left)?(\\\{|[(\[]|)", text)[2].replace("[", "(")
        return bracket if text.count("(") < 2 else ""

    if "" != kind(answer) != kind(reference) != "" and not re.search(
        r"\\\{.*(\(|\||\\mid|:)", answer if r"\{" in answer else reference
    ):
        return []  # a set is no pair
    if re.search(either + r"|\band\b|[<>,]|\\([lg]eq?|neq?|in)\b", answer) or "=" in reference:
        return [answer]
    parts = split(answer, "=")
    if re.fullmatch(r"\s*[a-zA-Z]\s*", parts[-1]) and len(parts) > 1:
        parts.pop()  # 5 = x
    return [
        part for part in parts[:-1] if not re.search(r"[a-zA-Z\\]", re.sub(of, "", part))
    ] + parts[-1:]


def components(text):
    """["(", the parts, ")"] of a pair, tuple or interval; [] of anything else."""
    text = re.sub(r"\\(left|right)\s*(?=[][()])", "", text)
    if (
        text[:1] not in ("(", "[") or depths(text)[-1] or 0 in depths(text)[:-1]
    ):  # its first bracket must go around it all
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
    normal = NormalizationConfig(units=units, malformed_operators=True, nits=True)
    configs = [LatexExtractionConfig(normalization_config=normal)]
    how = {"fallback_mode": "no_fallback", "parsing_timeout": None}  # else any number in it counts
    return parse("\\\\boxed{" + text + "}", configs, **how)

print(flush=True)
for line in sys.stdin:
    reference, answers, units = json.loads(line)
    gold, how = boxed(reference, units), {"timeout_seconds": None, "allow_set_relation_comp": True}
    same = lambda a: verify(gold, boxed(a, units), **how)
    print("error" if not gold else "correct" if all(map(same, answers)) else "wrong", flush=True)
"""
NUMBER = re.compile(r"\s*[-+]?\d{1,300}(\.\d{1,300})?\s*")
_thread = threading.local()  # .grader: the thread's own process
_graders = ThreadPoolExecutor(
    len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
)


def start_grader():
    pipe = subprocess.PIPE
    grader = subprocess.Popen(
        [sys.executable, "-c", GRADER],
        stdin=pipe,
        stdout=pipe,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )  # Ctrl-C is for the stage
    atexit.register(grader.kill)
    grader.stdout.readline()  # it has imported sympy
    return grader


def same_answer(reference, answer, seconds=5.0):
    """correct, wrong, timeout or error: math-verify in a process that is killed after `seconds`."""
    if len(answer) > 1000:
        return "wrong"
    reference, answer = tidied(reference), tidied(answer)
    if reference == answer != "" or not (answers := sides(answer, reference)):
        return "correct" if reference == answer else "wrong"
    ours, theirs = components(reference), components(answer)
    if (
        ours and theirs
    ):  # part by part: math-verify takes ten times as long for a pair as for two numbers
        same = len(ours) == len(theirs) and ours[0] == theirs[0] and ours[-1] == theirs[-1]
        verdicts = (
            [same_answer(a, b, seconds) for a, b in zip(ours[1:-1], theirs[1:-1])]
            if same
            else ["wrong"]
        )
        return next((verdict for verdict in verdicts if verdict != "correct"), "correct")
    if re.fullmatch("[a-zA-Z ]{2,}", reference) and reference.lower() == answer.lower():  # Yes
        return "correct"
    if all(
        map(NUMBER.fullmatch, (reference, *answers))
    ):  # numbers need no algebra; math-verify rounds small ones
        return (
            "correct" if all(Decimal(reference) == Decimal(text) for text in answers) else "wrong"
        )
    reference, *answers = told_apart([reference, *answers])
    return ask_grader(reference, answers, seconds)


def readable(reference):
    """Can math-verify grade with it? (One that takes too long today may not tomorrow.)"""
    reference = tidied(reference)
    return bool(NUMBER.fullmatch(reference)) or ask_grader(reference, [reference], 5.0) in (
        "correct",
        "timeout",
    )


def ask_grader(reference, answers, seconds):
    """Whether all of the answers are equal to the reference, by the thread's own process."""
    if getattr(_thread, "grader", None) is None or _thread.grader.poll() is not None:
        _thread.grader = start_grader()
    grader = _thread.grader
    began, late = time.monotonic(), threading.Timer(seconds, grader.kill)
    late.start()
    try:
        grader.stdin.write(
            json.dumps([reference, answers, not re.search("[a-zA-Z]", letters(reference))]) + "\n"
        )  # 6m: metres?
        grader.stdin.flush()
        verdict = grader.stdout.readline().strip()
    except OSError:
        verdict = ""
    late.cancel()
    if not verdict:
        _thread.grader = None  # the next answer gets a new one
        grader.kill()
    return verdict or ("timeout" if time.monotonic() - began >= seconds else "error")


# ---------------------------------------------------------------- grading: programs

_passed = set()  # right programs: a trained model gives the same one again and again
HARNESS = """  # inside: limits itself, gives root away, becomes the program, or calls its functions
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
sys.path += job["paths"]                            # started without the module site, which is slow
builtins.exit = builtins.quit = sys.exit
program = sys.modules["program"] = type(sys)("program")
exec(compile(open("program.py").read(), "program.py", "exec"), program.__dict__)
for name, args in job["calls"]:
    print(json.dumps(getattr(program, name)(*args)), file=out, flush=True)
"""
_uids = itertools.cycle(
    range(200_000 + 1000 * (os.getpid() % 10_000), 201_000 + 1000 * (os.getpid() % 10_000))
)  # as root: a user each


def fence(kind, box, seconds):
    """The command that shuts what follows it in, as far as the kind of isolation goes."""
    root = os.getuid() == 0
    # Were this process killed, bubblewrap would end the program at once, this after its time.
    watch = (
        ["timeout", "-s", "KILL", str(math.ceil(seconds) + 5)] if shutil.which("timeout") else []
    )
    if kind == "bubblewrap":
        spaces = "--unshare-net --unshare-pid --unshare-ipc --unshare-uts"
        spaces += " --cap-add CAP_SETUID --cap-add CAP_SETGID"
        seen = dict.fromkeys(
            [
                "/usr",
                "/bin",
                "/lib",
                "/lib64",
                "/etc/alternatives",
                "/etc/ld.so.cache",
                sys.base_prefix,
                sys.prefix,
            ]
        )
        above = [
            str(p)
            for place in (sys.base_prefix, sys.prefix, box)
            for p in reversed(Path(place).parents)
            if p != Path("/")
        ]
        return [
            "bwrap",
            *(spaces.split() if root else ["--unshare-all"]),
            "--die-with-parent",
            "--new-session",
            *[word for place in above for word in ("--perms", "0755", "--dir", place)],
            *[word for place in seen for word in ("--ro-bind-try", place, place)],
            "--proc",
            "/proc",
            "--dev",
            "/dev",
            "--remount-ro",
            "/dev",
            "--bind",
            box,
            box,
            "--chdir",
            box,
            "--remount-ro",
            "/",
        ]
    if kind == "namespaces":
        own = [] if root else ["--user", "--map-root-user"]
        spaces = ["--net", "--pid", "--ipc", "--mount", "--mount-proc", "--fork", "--kill-child"]
        # the first process, with which all others die, is the shell
        return [*watch, "unshare", *own, *spaces, "sh", "-c", '"$@"; exit $?', "sh"]
    return watch


def run_program(files, job, kind, stdin="", seconds=10.0, memory=1 << 30, keep=None):
    """Run in a fresh folder that holds `files` {name: text or bytes}.

    job: {"command": [...]}, {box} standing for the folder, or {"calls": [[name, args], ...]} to
    functions of program.py. Returns (output, "ok", "failed" or "timeout", the file `keep`).
    """
    place = tempfile.mkdtemp(
        prefix="sd-zero-"
    )  # not the program's, so it cannot put a link in place of its folder
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
        except OSError:  # it left more there
            if os.getuid():
                subprocess.run(["chmod", "-R", "u+rwx", "--", place], stderr=subprocess.DEVNULL)
            subprocess.run(["rm", "-rf", "--", place], stderr=subprocess.DEVNULL)


def run_in(box, files, job, kind, stdin, seconds, memory, keep):
    """run_program() in a folder that is there, and stays."""
    deadline = time.monotonic() + seconds
    uid = next(_uids) if os.getuid() == 0 else 0
    limits = {"CPU": math.ceil(seconds) + 1, "AS": memory, "FSIZE": 16 << 20, "NOFILE": 64}
    # without a namespace all of the user's processes count
    limits |= {"CORE": 0, "NPROC": 4096 if kind == "limits" and not uid else 16}
    ours = python_for(kind) == sys.executable
    paths = [p for p in sys.path if p.endswith("-packages")] if ours else []
    job = {**job, "limits": limits, "uid": uid, "kind": kind, "paths": paths}
    if "command" in job:
        job["command"] = [word.format(box=box) for word in job["command"]]
    for name, content in files.items():
        content = content if isinstance(content, bytes) else content.encode(errors="replace")
        Path(box, name).write_bytes(content)
        os.chmod(Path(box, name), 0o755)
    if uid:
        os.chown(box, uid, uid)
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": box, "TMPDIR": box}
    environment |= {"LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
    # What the program is told lies outside of its folder: there it could put a link where we write.
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as told:
        source.write(stdin.encode(errors="replace")), source.seek(0)
        told.write(json.dumps(job).encode()), told.seek(0)
        interpreter = [python_for(kind), "-I", "-S", "-c", HARNESS, str(told.fileno())]
        process = subprocess.Popen(
            [*fence(kind, box, seconds), *interpreter],
            cwd=box,
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
            pass_fds=[told.fileno()],
        )
    out, ended = read_until_end(process, deadline)
    try:  # and what it left behind; not reaped yet, so the number is still its own
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    late = time.monotonic() >= deadline
    status = "ok" if process.wait() == 0 and ended else "timeout" if late else "failed"
    process.stdout.close()
    kept = Path(box, keep).read_bytes() if keep and status == "ok" else None
    return out.decode(errors="replace"), status, kept


def read_until_end(process, deadline, most=1_000_000):
    """(what a process prints, at most so much, has it ended?); not later than the deadline."""
    out, ended, how = b"", False, os.WEXITED | os.WNOHANG | os.WNOWAIT
    while len(out) <= most and (left := deadline - time.monotonic()) > 0:
        if select.select([process.stdout], [], [], 0.0 if ended else min(left, 0.02))[0]:
            if not (block := os.read(process.stdout.fileno(), 1 << 16)):
                break
            out += block
        elif ended:  # something that it left behind still holds its stdout
            break
        ended = ended or os.waitid(os.P_PID, process.pid, how) is not None
    while not ended and len(out) <= most and time.monotonic() < deadline:  # it closed its stdout
        ended = os.waitid(os.P_PID, process.pid, how) is not None
        time.sleep(0.001)
    return out, ended


def python_for(kind):
    """The interpreter of programs: ours, unless it lies in root's home, hidden from others."""
    hidden = os.getuid() == 0 and any(
        not p.stat().st_mode & 1 for p in Path(sys.executable).resolve().parents
    )
    return sys.executable if kind == "bubblewrap" or not hidden else "/usr/bin/python3"


@lru_cache(1)
def isolation():
    """The strongest kind that works here, bubblewrap, namespaces or limits; dies without any."""
    for kind in ("bubblewrap", "namespaces", "limits") if os.name == "posix" else ():
        try:
            if run_program(
                {"program.py": "def one():\n    return 1\n"}, {"calls": [["one", []]]}, kind
            )[:2] == ("1\n", "ok"):
                return kind
        except (OSError, AttributeError):  # macOS has os.waitid from Python 3.13 on
            pass
    die(
        "--allow-code: no program can be run here; it needs Linux, or macOS with Python 3.13, and "
        "as root /usr/bin/python3 or bubblewrap"
    )


def same_value(a, b, tolerance=0.0):
    """Of two JSON values: whole numbers exactly, others within the tolerance; true is not 1."""
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
    return len(a) == len(b) and all(
        x == y or same_value(value(x), value(y), tolerance) for x, y in zip(a, b)
    )


def verify_code(record, response, seconds=10.0):
    """verify() for kind "code": the last ```python or ```cpp block (or the last block) must pass
    every test of record["tests"].

    The program runs as a child that cannot hurt: a fresh folder for each run, a process group that
    is killed as a whole after `seconds`; limits on CPU, memory, processes, open files and their
    size; at most 1 MB of output; an empty environment; as root another user. Under bubblewrap it
    sees no network, no process but its own, and of the disk only the system and Python, read-only.
    In plain namespaces it still sees the files that all may read or, not started by root, reads
    and writes what the user may. With limits alone it also has the network, can signal the user's
    processes, and children that leave the process group outlive it. Not covered by any: holes in
    the kernel, time and heat, the sum of many small files, or of memory over its 16 processes.
    What it should return is never passed to it, and compared outside: what it prints can be
    forged, the verdict cannot.
    """
    blocks = re.findall(r"^[ \t]*```([^\n`]*)\n(.*?)^[ \t]*```", response, re.DOTALL | re.MULTILINE)
    if not blocks:
        return 0, "no_answer", None
    of = {
        **dict.fromkeys(("python", "py", "python3"), "python"),
        **dict.fromkeys(("cpp", "c++", "cc", "cxx", "c++17"), "cpp"),
    }
    tagged = [(of[tag.strip().lower()], text) for tag, text in blocks if tag.strip().lower() in of]
    language, program = (tagged or [(record.get("language") or "python", blocks[-1][1])])[-1]
    program, tests, tolerance = (
        textwrap.dedent(program),
        record["tests"],
        record.get("tolerance") or 0.0,
    )
    known = hashlib.sha256(
        repr((program, language, tests, tolerance)).encode(errors="replace")
    ).digest()
    if known not in _passed:  # a trained model gives the same right answer again and again
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
        compile_it = {
            "command": [compiler(), "-O2", "-std=c++17", "-o", "{box}/program", "{box}/program.cpp"]
        }
        binary = run_program(
            {"program.cpp": program}, compile_it, kind, "", 60.0, 4 << 30, keep="program"
        )[2]
        if not binary:
            return 0, "wrong"
        files, command = {"program": binary}, ["{box}/program"]
    if calls:
        printed, status, _ = run_program(files, {"calls": calls}, kind, seconds=seconds)
        try:
            values = [json.loads(line) for line in printed.splitlines()]
        except (ValueError, RecursionError):
            values = []
        right = len(values) == len(calls) and all(
            same_value(v, t["expected"], tolerance) for v, t in zip(values, tests)
        )
    for test in [] if calls else tests:
        printed, status, _ = run_program(files, {"command": command}, kind, test["stdin"], seconds)
        right = same_output(printed, test["stdout"], tolerance)
        if not right or status != "ok":
            break
    right = right and status == "ok"
    return int(right), "correct" if right else "timeout" if status == "timeout" else "wrong"


def check_code(records, allow_code):
    """Programs are run only if --allow-code was given; says what they will run in."""
    if any(record["kind"] == "code" for record in records):
        if not allow_code:
            die(
                'problems of kind "code" are graded by running what the model writes, in a '
                "sandbox; give --allow-code to all stages"
            )
        print(f"programs run in: {isolation()}")


# ---------------------------------------------------------------- grading: both


def verify(record, response):
    r"""r(y, a). Returns (reward 0 or 1, verdict, extracted); fails closed.

    verdict: correct, wrong, no_answer, timeout or error; extracted: what was graded.
    """
    if record.get("kind") == "code":
        return verify_code(record, response)
    extracted = last_boxed(response)
    if extracted is None:
        return 0, "no_answer", None
    verdict = same_answer(record["answer"], extracted)
    return int(verdict == "correct"), verdict, extracted


def verify_all(records, responses):
    """verify() of many, in order, as they get ready; a grader a core."""
    return _graders.map(verify, records, responses)


def stop_if_ungraded(verdicts, records, what, least=1):
    """Where more than half of the answers (at least so many) cannot be graded, rewards say nothing.

    Programs may take too long, so timeouts count only where no answer is one.
    """
    count = Counter(verdicts)
    n = sum(count.values())
    any_code = any(record["kind"] == "code" for record in records)
    ungraded = count["error"] + (0 if any_code else count["timeout"])
    if n >= least and ungraded > n / 2:
        why = f"{count['error']} errors and {count['timeout']} timeouts in {n} answers"
        mend = "mend the problems' answers or verify(), and remove a file that holds such verdicts"
        die(f"{what}: {why}: rewards mean nothing; {mend}")


# ---------------------------------------------------------------- training


def completion_hidden(model, prefixes, completions):
    """Last hidden states where each token of each completion is predicted: [N, H], rows end to end.

    Token j of a completion is predicted one position earlier, the first by its prefix's last token.
    Rows are padded on the right, where causal attention hides pads: no mask depends on a pad id.
    """
    lengths = [len(p) + len(c) for p, c in zip(prefixes, completions, strict=True)]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)  # [B, T]
    predicts = torch.zeros_like(ids, dtype=torch.bool)  # [B, T] is the next token a completion's?
    for i, (p, c) in enumerate(zip(prefixes, completions)):
        ids[i, : lengths[i]] = torch.tensor(p + c)
        predicts[i, len(p) - 1 : lengths[i] - 1] = True
    out = model.base_model(input_ids=ids.to(model.device), use_cache=False)
    return out.last_hidden_state[predicts.to(model.device)]  # [B, T, H] → [N, H]


def micro_batches(rows, length, budget):
    """Rows in lists of at most `budget` tokens, padding included; a longer row is alone."""
    batches = []
    for row in sorted(rows, key=length):  # like lengths together
        if not batches or (len(batches[-1]) + 1) * length(row) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def backward_through_head(hidden, head, loss_of, context=nullcontext, scaler=None, chunk=None):
    """Backward of a loss on head(hidden): [chunk, V] logits exist at a time, not [N, V].

    loss_of(logits [n, V], at): the part of the loss that the positions `at`, a slice of the N, make
    up; returns their sum. Each part's backward stops at its chunk's hidden states; their gradients
    [N, H] then go through the model in one pass. Exact, and nothing is computed twice.
    """
    chunk = chunk or max(1, 2**25 // head.weight.shape[0])  # 2^25 logits: 128 MB in float32
    loss, gradients = 0.0, []
    for b, h in enumerate(hidden.split(chunk)):
        h = h.detach().requires_grad_()  # [n, H]
        with context():
            logits = head(h)  # [n, V]
        part = loss_of(logits, slice(b * chunk, b * chunk + len(h)))
        (scaler.scale(part) if scaler else part).backward()
        loss += part.item()
        gradients.append(h.grad)
    hidden.backward(torch.cat(gradients))
    return loss


def update(model, optimizer, scaler):
    """A step with gradients clipped to norm 1. Returns their norm; None, if not finite: skipped."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    if math.isfinite(norm) or scaler.is_enabled():  # the scaler skips by itself, and learns from it
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm if math.isfinite(norm) else None


def log_step(path, history, row, progress):
    """File a step's metrics; dies after eight steps in a row without a finite gradient."""
    append_jsonl(path, [row])
    history.append(row)
    shown = "loss", "accuracy", "kl", "mean_tokens", "lr"
    progress.set_postfix({name: row[name] for name in shown if name in row})
    lost = [m["gradient_norm"] is None for m in history]
    if len(lost) >= min(8, progress.total) and all(lost[-8:]):
        die(f"{path}: {sum(lost)} of {len(lost)} steps had no finite gradient; try a lower --lr")
    if lost[-1]:
        warn(f"{path}: step {row['step']} has no finite gradient and is skipped")


def save_state(folder, step, **parts):
    """What training needs to go on after `step` steps, in {folder}.resume: modules and the like."""
    state = {name: part.state_dict() for name, part in parts.items()}
    with open(f"{folder}.resume.part", "wb") as f:
        torch.save({"step": step, **state}, f)
    os.replace(f"{folder}.resume.part", f"{folder}.resume")


def load_state(folder, log, **parts):
    """Undo save_state(), if it was called; returns the log's rows of the steps done, no others."""
    path, step = Path(f"{folder}.resume"), 0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        step = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    rows = list(read_jsonl(log, mend=True))[:step] if step else []
    if len(rows) < step:
        die(f"{log} has {len(rows)} of {step} steps: remove {path}, and the training starts again")
    write_whole(log, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


# ---------------------------------------------------------------- sampling


def row_seed(*parts):
    """A seed for one answer from what names it: the same in any batch and any order."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


class RoomyLayer(DynamicLayer):
    """A layer's cache [B, heads, T, D] with free columns behind T: transformers' own copies all of
    it at each token. gather() replaces keys and values, and so drops their `room`."""

    def update(self, keys, values, *args, **kwargs):
        keys = keys.to(values.dtype)  # autocast leaves keys in float32, after their norm
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values, self.room = keys[:, :, :0], values[:, :, :0], None
        T, n = self.keys.shape[2], keys.shape[2]
        if self.room is None or T + n > self.room[0].shape[2]:
            self.room = [F.pad(x, (0, 0, 0, n + 64)) for x in (self.keys, self.values)]
        self.room[0][:, :, T : T + n] = keys
        self.room[1][:, :, T : T + n] = values
        self.keys, self.values = (x[:, :, : T + n] for x in self.room)
        return self.keys, self.values


def prefill(model, prefixes):
    """The cache after all but each prefix's last token, padded on the left; equal ones run once."""
    place = {p: j for j, p in enumerate(dict.fromkeys(map(tuple, prefixes)))}
    T = max(2, *map(len, place)) - 1
    ids = torch.tensor([[0] * (T + 1 - len(p)) + list(p[:-1]) for p in place])  # [B, T]
    mask = torch.tensor([[0] * (T + 1 - len(p)) + [1] * (len(p) - 1) for p in place])
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    how = {"input_ids": ids, "attention_mask": mask, "position_ids": at}
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    how = {name: x.to(model.device) for name, x in how.items()}
    model.base_model(**how, past_key_values=cache)
    return gather([(cache, [place[tuple(p)] for p in prefixes])], T)


def gather(pieces, T):
    """Rows of caches, [(cache, rows), ...], as one cache of their last, or padded to, T columns."""
    for layers in zip(*(cache.layers for cache, _ in pieces)):
        for name in ("keys", "values"):
            parts = []
            for layer, (_, rows) in zip(layers, pieces):
                x = getattr(layer, name)[:, :, -T:][rows]  # [rows, heads, at most T, D]
                parts.append(F.pad(x, (0, 0, T - x.shape[2], 0)))
                setattr(layer, name, None)  # freed before the next layer is gathered
            setattr(layers[0], name, torch.cat(parts))
        layers[0].room = None
    return pieces[0][0]


def draw(logits, temperature, uniform):
    """One token a row, [B, V] → [B]: where the distribution function passes uniform [B, 1]."""
    if temperature == 0:  # the likeliest
        return logits.argmax(-1)
    cdf = (logits.float() / temperature).softmax(-1).cumsum(-1)
    return (cdf < uniform * cdf[:, -1:]).sum(-1)


@torch.no_grad()  # in inference_mode autocast keeps no copy of the weights, and casts at each token
def sample(model, prefixes, seeds, max_new_tokens, temperature=1.0, batch_rows=384, progress=None):
    """One answer a prefix, as token ids, ended by an end token, or cut by max_new_tokens or where
    the model's positions end. progress: a tqdm bar, counting answers.

    Each row draws from its own stream of uniforms: neighbours change its answer only by rounding.
    Rows that ended leave the batch, a quarter of it at a time, for leaving copies the rest. The
    last quarter waits while the next batch runs, and goes on with others of its kind: so a batch
    does not wait for its longest answers. 2 · batch_rows rows are in memory.
    """
    was_training, ends, room = model.training, set(end_ids(model)), positions(model)
    model.eval()
    limits = [max(1, min(max_new_tokens, room - len(p))) for p in prefixes]
    prefixes = [p if len(p) <= room else p[-room:] for p in prefixes]  # one token, counted as cut
    noise = [np.random.default_rng(s).random(n, np.float32) for s, n in zip(seeds, limits)]
    answers, ended = [[] for _ in prefixes], [False] * len(prefixes)
    # like lengths, and equal prefixes, together
    queue = sorted(range(len(prefixes)), key=lambda i: (len(prefixes[i]), prefixes[i]))
    waiting = []  # [(rows, cache), ...]

    def next_tokens(rows, cache):
        """Of rows that are fed their last token: [B]."""
        T = cache.get_seq_length() + 1
        ids = torch.tensor([[(answers[i] or prefixes[i])[-1]] for i in rows])  # [B, 1]
        length = torch.tensor([[len(prefixes[i]) + len(answers[i])] for i in rows])
        uniform = [[noise[i][min(len(answers[i]), limits[i] - 1)]] for i in rows]
        uniform = torch.from_numpy(np.array(uniform).clip(1e-8))  # a 0 would take token 0
        ids, length, uniform = (x.to(model.device) for x in (ids, length, uniform))
        mask = (torch.arange(T, device=model.device) >= T - length).long()  # [B, T]
        how = {"attention_mask": mask, "position_ids": length - 1, "past_key_values": cache}
        return draw(model(input_ids=ids, **how).logits[:, -1], temperature, uniform).tolist()

    def join(batches):
        rows = [i for batch, _ in batches for i in batch]
        T = max(cache.get_seq_length() for _, cache in batches)
        return rows, gather([(cache, list(range(len(batch)))) for batch, cache in batches], T)

    with autocast(model.device)[0]():  # around everything: the weights are cast once
        while queue or waiting:
            if queue and sum(len(rows) for rows, _ in waiting) < batch_rows:
                pieces = micro_batches(queue[:batch_rows], lambda i: len(prefixes[i]), 8192)
                rows, cache = join([(p, prefill(model, [prefixes[i] for i in p])) for p in pieces])
                queue = queue[batch_rows:]
            else:
                (rows, cache), waiting = join(waiting), []
            few = batch_rows // 4 if queue or waiting else 0  # the last rows have none to wait for
            while len(rows) > few:
                for i, token in zip(rows, next_tokens(rows, cache)):
                    if not ended[i]:  # rows that ended stay until enough of them can leave
                        answers[i].append(token)
                        ended[i] = token in ends or len(answers[i]) == limits[i]
                alive = [j for j, i in enumerate(rows) if not ended[i]]
                if len(alive) <= max(few, 3 * len(rows) // 4):
                    if progress is not None:
                        progress.update(len(rows) - len(alive))
                    rows = [rows[j] for j in alive]
                    if rows:
                        T = max(len(prefixes[i]) + len(answers[i]) for i in rows) - 1
                        cache = gather([(cache, alive)], T)
            if rows:
                waiting.append((rows, cache))
    model.train(was_training)
    return answers
