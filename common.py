"""What two or more stages must share exactly: runs, prompts, graders, training, sampling.

Letters for shapes: B rows, T positions, V vocabulary, H hidden size, N answer tokens of a batch
laid end to end. Files, models and problems are read and written by data/*.py.
"""

import argparse
import copy
import errno
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from datetime import date, timedelta
from decimal import Decimal
from functools import partial, partialmethod, wraps
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from filelock import FileLock, Timeout
from markdown_it import MarkdownIt
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from data.files import RANK, WORLD, append_jsonl, die, fingerprint, in_blocks  # noqa: F401
from data.files import load_state, places_jsonl, read_jsonl, remove, row_at  # noqa: F401
from data.files import save_state, warn, write_whole  # noqa: F401
from data.models import as_teacher, autocast, end_ids, load_model, load_tokenizer  # noqa: F401
from data.models import pick_device, positions, save_model  # noqa: F401
from data.models import check_memory, special_ids, turn_end  # noqa: F401
from data.problems import load_problems, stop_if_ungraded  # noqa: F401
from data.sandbox import PYTHON, check_code, run_inside  # noqa: F401

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
    started = "python" if WORLD == 1 else f"torchrun --nproc-per-node {WORLD}"
    go_on = f"the same command goes on where it stopped: {started} {shlex.join(sys.argv)}"
    interrupted = []  # a library may turn the exception into one of its own

    def interrupt(*_):
        interrupted.append(True)
        raise KeyboardInterrupt

    for stream in (sys.stdout, sys.stderr):  # a terminal may lack ⟨ and →
        stream.reconfigure(errors="replace")
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        join_ranks()
        main()
        if WORLD > 1:  # else one may be gone while others still talk to it
            dist.barrier()
            dist.destroy_process_group()
    except BaseException as e:
        number = isinstance(e, Exception) and error_number(e)
        if interrupted or isinstance(e, KeyboardInterrupt):
            _graders.shutdown(wait=False, cancel_futures=True)
            if RANK == 0:
                print(f"\ninterrupted; {go_on}", file=sys.stderr)
            sys.exit(130)
        if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate" in str(e):
            die("memory is full; lower --batch-rows in sampling, --micro-tokens in training")
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


# ---------------------------------------------------------------- many GPUs: torchrun 0k_….py
# All ranks do the same. Each samples and verifies its share of the rows, and trains on it with its
# share of the weights, gradients and Adam's state; every answer has its own seed, and losses are
# sums over all ranks: so the results do not depend on how many there are. What calls all_ranks() or
# a sharded model must be reached by every rank.


def join_ranks():
    """Meet the other processes of torchrun; rank 0 alone talks."""
    if WORLD > 1:
        gpus = torch.cuda.device_count()
        if 0 < gpus <= int(os.environ["LOCAL_RANK"]):
            die(f"{os.environ['LOCAL_WORLD_SIZE']} processes need as many GPUs, here are {gpus}")
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    if RANK:
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def all_ranks(x):
    """[x of rank 0, x of rank 1, …], on all ranks; here and below x may be any Python object."""
    if WORLD == 1:
        return [x]
    every = [None] * WORLD
    dist.all_gather_object(every, x)
    return every


def deal(rows):
    """This rank's share of the rows."""
    return rows[RANK::WORLD]


def gather_rows(rows):
    """All ranks' rows, in the order in which they were dealt."""
    every = all_ranks(rows)
    return [every[i % WORLD][i // WORLD] for i in range(sum(map(len, every)))]


def evened(parts):
    """As many micro-batches on each rank, some of them empty: a sharded model needs all ranks."""
    return parts + [[]] * (max(all_ranks(len(parts))) - len(parts))


def by_first(f):
    """f(args, …) runs on rank 0 alone; its result, and args.run as it leaves it, are everyone's."""

    @wraps(f)
    def on_all_ranks(args, *others, **named):
        result = f(args, *others, **named) if RANK == 0 else None
        result, args.run = all_ranks((result, vars(args).get("run")))[0]
        return result

    return on_all_ranks


def shard(model, samples=False):
    """Spread a model over the ranks (FSDP2): each holds a share of weights and gradients, and
    layers are put together while they compute. samples: keep a copy on each rank that samples."""
    if WORLD == 1:
        return
    dtype = autocast(model.device)[1]
    if samples:  # the memo of deepcopy() says that these are the parameters' copies
        half = {id(p): torch.nn.Parameter(p.to(dtype), False) for p in model.parameters()}
        model.copies = [copy.deepcopy(model, half)]  # in a list: a module would be sharded, too
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    for module in [*layers, model]:
        fully_shard(module)
        module.set_gradient_divide_factor(1.0)  # losses are sums over all ranks, not means
        module.set_force_sum_reduction_for_comms(True)
    model.read = types.MethodType(read, model)
    register_fsdp_forward_method(model, "read")


def read(model, **how):
    """What lies below the head; of a sharded model through its root, which puts it together."""
    return model.base_model(**how)


@torch.no_grad()
def copy_weights(model, target):
    """Of a model, sharded or not, into a whole one of any precision; see also as_teacher()."""
    if target is model:  # LoRA: one model has the student's adapter, and the teacher's
        named = dict(model.named_parameters())
        for name in (n for n in named if ".teacher." in n):
            named[name].copy_(named[name.replace(".teacher.", ".default.")])
        return
    for p, q in zip(model.parameters(), target.parameters(), strict=True):
        q.copy_(p.full_tensor() if isinstance(p, DTensor) else p)


# ---------------------------------------------------------------- command line

DEFAULTS = {  # stage and flag: (with an embedded model, with any other: the paper's numbers)
    "01 --data": (str(HERE / "data"), "open-r1/OpenR1-Math-220k"),
    "01 --limit": (400, 10_000),
    "01 --max-new-tokens": (320, 16_384),
    "01 --batch-rows": (384, 64),
    "03 --revisions-wrong": (4, 3),
    "03 --revisions-right": (1, 3),
    "03 --max-new-tokens": (320, 16_384),
    "03 --batch-rows": (384, 64),
    "03 --lr": (8e-4, 5e-6),
    "03 --batch-size": (32, 8),
    "04 --limit": (None, 9_000),
    "04 --steps": (24, 70),
    "04 --lr": (2e-4, 5e-6),
    "04 --warm-up": (5, 20),
    "04 --batch-size": (64, 128),
    "04 --max-new-tokens": (320, 8_192),
    "04 --batch-rows": (384, 64),
    "05 --limit": (100, 500),
    "05 --n": (2, None),
    "05 --greedy": (True, False),
    "05 --revise": (True, False),
    "05 --max-new-tokens": (320, 32_768),
    "05 --batch-rows": (384, 64),
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
    g.add_argument("--model", help="chat model: folder or hub id (default: --data's base, or ours)")
    g.add_argument("--data", help="problems: JSONL file, folder with SPLIT.jsonl, or hub id")
    g.add_argument("--seed", type=int, help="of all sampling and shuffling (default: 0)")
    g.add_argument("--p-r-right", metavar="P_r", help=f"after a right answer (default: {P_R[1]})")
    g.add_argument("--p-r-wrong", metavar="P_r", help=f"after a wrong answer (default: {P_R[0]})")
    g.add_argument("--from", dest="other", type=Path, help="a run to be a variant of")
    g.add_argument("--overwrite", action="store_true", help="make again what this stage has made")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    code = {"nargs": "?", "const": "bubblewrap", "choices": ["bubblewrap", "limits"]}
    g.add_argument("--allow-code", **code, help="run what the model writes, in a sandbox")
    return p


def sampling_flags(p):
    p.add_argument("--max-new-tokens", type=int, help="longer answers are cut")
    p.add_argument("--temperature", type=float, default=1.0, help="0: greedy; the paper has 0.7")
    p.add_argument("--top-p", type=float, default=1.0, help="leave out the unlikeliest tokens")
    p.add_argument("--batch-rows", type=int, help="answers sampled at once")


def sampling(args):
    """What these flags said, for sample()."""
    names = "max_new_tokens", "temperature", "top_p", "batch_rows"
    return {name: getattr(args, name) for name in names}


def parse(p, argv):
    """The arguments, every default filled in; args.run is run.json, args.p_r {reward: P_r}."""
    pairs = {}  # name: (with an embedded model, with any other)
    for action in p._actions:
        if pair := DEFAULTS.get(f"{p.get_default('stage')} {action.option_strings[0]}"):
            pairs[action.dest] = pair
            shown = ("–" if value is None else value for value in pair)
            action.help += " (default: {}; with --model: {})".format(*shown)
        elif action.default not in (None, False, argparse.SUPPRESS):
            action.help += " (default: %(default)s)"
    args = p.parse_args(argv)
    args.run = open_run(args)
    settle(args)
    for name, (small, paper) in pairs.items():
        if name == "lr" and args.lora:
            paper = 1e-4  # an adapter learns nothing at a whole model's rate
        if getattr(args, name) is None:
            setattr(args, name, small if args.run["embedded"] else paper)
    for name, value in vars(args).items():
        least = 0 if type(value) is float or name in MAY_BE_0 else 1
        most = 1 if name == "top_p" else sys.float_info.max
        if type(value) in (int, float) and not least <= value <= most:
            die(f"--{name.replace('_', '-')} cannot be {value}")
    args.p_r = {1: args.p_r_right, 0: args.p_r_wrong}
    return args


# ---------------------------------------------------------------- a run: a folder with one run.json

ADDED = {"top_p": 1.0, "lora": None}  # flags that earlier runs did not have
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


_today = time.strftime("%Y-%m-%d")  # or the run's, once there is one
NOW = r"""strftime_now\((['"])(.*?)\1\)"""  # in templates that write it


def read_run(folder):
    """run.json: {settings, embedded, from, made: {artifact: its entry}}; None if there is none."""
    path = Path(folder, "run.json")
    if any(Path(folder).glob("*.meta.json")):
        die(f"{folder} is of the first edition, which had no run.json; choose another --out")
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as e:
        die(f"{path} is damaged ({e}); mend it, or choose another --out")


@by_first
def open_run(args):
    """The run of --out, or a new one: of --from, or of 01's arguments."""
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
    return run


def settle(args):
    """What the run has settled becomes the arguments'; dies where they say otherwise."""
    global _today
    run = args.run
    _today = run.setdefault("date", _today)
    if args.other and str(args.other) != run["from"]:
        die(f"{args.out} is not a variant of {args.other}; choose another --out")
    for name, settled in run["settings"].items():
        if getattr(args, name) not in (None, settled):
            flag = "--" + name.replace("_", "-")
            die(f"{flag}: the run {args.out} has {settled!r}; for another, choose another --out")
        setattr(args, name, settled)


def new_run(args):
    """Settings as said to 01, or by default: an embedded domain brings its own base."""
    embedded = not args.model or Path(args.model).resolve() in (HERE / "data").rglob("base")
    data = args.data or DEFAULTS["01 --data"][not embedded]
    base = next(b for b in (Path(data, "base"), HERE / "data/obedient/base") if b.is_dir())
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


@by_first
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
    was = {k: v for k, v in ADDED.items() if was and k in now} | was
    keys = {k for k in was.keys() | now.keys() if was and not (grows and k in MADE_BY)}
    keys = [k for k in keys | (was.keys() & now.keys()) if was.get(k) != now.get(k)]
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


@by_first
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
    today = date.fromisoformat(_today).strftime  # for templates that write the date
    template = re.sub(NOW, lambda m: repr(today(m[2])), tokenizer.get_chat_template())
    text = tokenizer.apply_chat_template(turn, chat_template=template, **how)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_prompt(args, tokenizer):
    """The prompt of the run's first problem must still be what 01 noted."""
    problem = next(read_jsonl(find(args, "responses.jsonl")))["problem"]
    now, was = tokenizer.decode(prompt_ids(tokenizer, problem)), args.run["prompt"]
    if now != was:
        at = len(os.path.commonprefix([now, was]))
        die(f"prompts differ from those of 01: {was[at : at + 60]!r}, now {now[at : at + 60]!r}")


def delimiter(reward, p_r=P_R):
    return f"\n\n{p_r[reward]}\n\n"


def revision_ids(tokenizer, problem, response_ids, reward, p_r=P_R):
    """chat(x) + y without its end token + delimiter: what the reviser reads in 03, 04 and 05."""
    y, special = list(response_ids), special_ids(tokenizer)
    while y and y[-1] in special:
        y.pop()
    # Parts are tokenised apart and ids joined, so no BPE merge crosses a seam; behind a letter,
    # for SentencePiece puts a blank before what it reads alone.
    texts = "a", "a" + delimiter(reward, p_r)
    letter, told = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return prompt_ids(tokenizer, problem) + y + told[len(letter) :]


# ---------------------------------------------------------------- grading: mathematics

TEXT, GAP = r"\\(?:text\w*|mathrm|mbox)\s*\{", r"(?:\\[,;:! ]|\s)*+"
COUNTS = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
RULES = [  # (what math-verify would misread, what is put in its place)
    (r"\\\$|\$|\"|\\left(?=[(\[])|\\right(?=[)\]])", ""),  # \$840, "$840.00"
    (r"~", r"\\ "),  # 6.5~\text{m/s}
    (r"(?<=\d)(?:\\[,;:! ]|\{,\}| )(?=\d{3}(?!\d))", ""),  # 52\,416, 52{,}416, 52 416
    (r"(?<=[\d.])[eE]([-+]?\d+)", r"\\times 10^{\1}"),  # 2.7e8
    (r"(?<![\d.])(\d+) (\d+)/(\d+)", r"(\1+\\frac{\2}{\3})"),  # 4 1/2
    (rf"(?<![_^\d.\\a-zA-Z])(\d+){GAP}\(", r"\1\\cdot("),  # 410-5(8), which it reads as 410-5+8
    (r"(?<=\d)i\b", " i"),  # 1+5-3i+2i
    (r"[a-zA-Z]\s*=\s*(?=\\pm)", ""),  # x = \pm 4, x = \pm 2
    (r"\\degree|°|\^ ?(?:\\circ|\{ ?\\circ ?\})", r"^\\circ"),  # 73\degree, 73°
    (r"(\\(?:sin|cos|tan|cot)\W*)([\d.]+)\^\\circ", r"\1(\\frac{\2\\pi}{180})"),  # \sin 60^\circ
    (rf"^{TEXT}([^{{}}]*)\}}$", r"\1"),  # \text{odd}
    (r"^\\approx|[.,\\]$", ""),  # \approx 29, 47.
    *((rf"(?<=\d){GAP}({TEXT})?\s*{word}s?\b", rf"\\times {n}\1") for word, n in COUNTS.items()),
]
NO_UNIT = r"(?<![\\a-zA-Z])(?:or|and|to|not|plus|minus|times|squared|cubed|half|halves|thirds?)\b"
UNIT = r"[a-zA-Z]{3,}+|(?:[ckm]m|[ap]\.?m|[km]g|m[lL]|ft|in)(?![a-zA-Z])"
WORD = rf"(?:{TEXT}[^{{}}\d]*\}}|{UNIT}|[mghsLVNJW](?![a-zA-Z]))(?:\^\{{?-?\d\}}?)?"
UNITS = rf"(?<=[\d)}}%]){GAP}(?:{WORD}{GAP}(?:/{GAP})?)+$"  # 5 cm^2, 7 km per hour
NO_VARIABLES = rf"{TEXT}[^{{}}]*\}}|\\mathbb\{{.\}}|\\[a-zA-Z]+"
NUMBER = r"(?a)[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
MARKS = rf"\d_\{{?(\d+)|\d{GAP}(?:{TEXT})?\s*([ap])\.?m"  # 52_8, 52_7; 11 a.m., 11 p.m.
_thread = threading.local()  # .grader: the thread's own process


def last_boxed(text):
    r"""The content of the last \boxed{...} that is closed, nested braces and all; or None."""
    opened, last = [], (0, 0)  # where a box's content starts, for each open brace; 0: no box's
    for m in re.finditer(r"(\\boxed\s*)?(?<!\\)\{|(?<!\\)\}", text):  # \{ needs no partner
        if m[0] != "}":
            opened.append(m.end() if m[1] else 0)
        elif opened:
            last = max(last, (opened.pop(), m.start()))
    return text[slice(*last)].strip() if last[0] else None


def tidied(answer):
    for pattern, instead in RULES:
        answer = re.sub(pattern, instead, answer.strip())
    return answer.strip()


def same_answer(reference, answer):
    r"""correct, wrong, timeout or error (no reference that can be read), as math-verify says.

    Policy: 52_8 is not 52_7. A decimal equals a fraction exactly, or, where the reference is a
    decimal, to six places. A percent sign may be missing on one side. Units count only where the
    reference has variables; "million" is a number. What is not worked out counts as its value.
    """
    a, b = tidied(reference), tidied(answer[:1000])
    x, y = (re.findall(MARKS, text.lower()) for text in (a, b))
    if len(answer) > 1000 or x and y and x != y:
        return "wrong"
    bare = re.sub(rf"{NO_VARIABLES}|(?<= )(?:{UNIT})", "", a)  # "6 weeks" has no variable, "6m" has
    if units := not re.search("[a-zA-Z]", bare) and not re.search(NO_UNIT, f"{a} {b}"):
        a, b = re.sub(UNITS, "", a), re.sub(UNITS, "", b)
    x, y = (text.strip(r"()\%") for text in (a, b))  # 8,3 may be (8,3); A the choice (A); 8.4 in %
    numbers = re.fullmatch(NUMBER, x) and re.fullmatch(NUMBER, y)
    if x == y != "" or numbers and Decimal(x) == Decimal(y):
        return "correct"
    if re.fullmatch("[A-Z]{2,}|[a-zA-Z ]{4,}", a) or "text" in reference and a.isalpha():  # a word
        return "correct" if a.lower() == b.lower() else "wrong"
    if numbers and "%" not in a + b:
        return "wrong"
    return ask_grader(a, b, units)


def ask_grader(*question):
    """The verdict of data/equal.py, a process of the thread's own: it may hang, and be killed."""
    process = getattr(_thread, "grader", None)
    if process is None or process.poll() is not None:
        how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [sys.executable, HERE / "data/equal.py"]
        process = _thread.grader = subprocess.Popen(command, **how, text=True)
    with suppress(OSError):
        print(json.dumps(question), file=process.stdin, flush=True)
        if verdict := process.stdout.readline().strip():
            return verdict
    return "timeout" if process.wait() == -signal.SIGPROF else "error"


# ---------------------------------------------------------------- grading: programs

TAGS = {"python": r"(py|python|pypy)[\d.]*", "cpp": r"(c\+\+|cpp|cc|cxx)\d*"}  # of a fence


def program_in(response, language):
    """The last closed fence with the language's tag, else the last without one; or None."""
    text = re.sub(r"\r\n?", "\n", response.rpartition("</think>")[2]) + "\n"
    text = re.sub(r"""(?m)^([^`\n]*[^`\s"'#/])(```+)[ \t]*$""", r"\1\n\2", text)  # print(1)```
    found = {}  # {tagged?: program}
    for block in MarkdownIt("zero").enable("fence").parse(text):
        if block.type == "fence" and block.content.strip():
            first, end = block.map
            closed = end - first == block.content.count("\n") + 2  # not so where it was cut
            tag = re.match(r"[{.]*([\w+.]*)", block.info)[1].lower()
            if closed and (not tag or re.fullmatch(TAGS[language], tag)):
                found[bool(tag)] = block.content
    return found.get(True, found.get(False))


def same_output(printed, expected, tolerance=None, fold=str):
    """Word by word; where a number with a point or exponent is expected, 1e-6 off is right, too."""
    a, b = fold(expected).split(), fold(printed).split()
    for x, y in zip(a, b):
        near = tolerance or (1e-6 if re.search("[.eE]", x) else 0)
        numbers = near and re.fullmatch(NUMBER, x) and re.fullmatch(NUMBER, y)
        close = numbers and math.isclose(float(x), float(y), rel_tol=near, abs_tol=near)
        if x != y and not close:
            return False
    return len(a) == len(b)


def same_values(printed, expected):
    """Of JSON, as Python's == has it: 1 == 1.0 == True; but NaN equals NaN, a set for this."""
    with suppress(ValueError, RecursionError):
        a, b = (json.loads(text, parse_constant=set) for text in (printed, expected))
        return a == b
    return False


def verify_code(record, response):
    """verify() for kind "code": the program must pass every test of record["tests"].

    A test has {stdin, stdout}, or {call, args, expected}, perhaps kwargs, for functions; a row may
    have a `time_limit` (seconds of CPU a test; 10) and a `tolerance` (for printed numbers). What a
    test expects never enters the sandbox: what is printed there can be forged, the verdict cannot.
    """
    language, tests = record.get("language") or "python", record["tests"]
    words = " ".join(test.get("stdout") or "" for test in tests).lower().split()
    fold = str.lower if {*words} <= {"yes", "no"} else str
    same = partial(same_output, tolerance=record.get("tolerance"), fold=fold)
    seconds, command = record.get("time_limit") or 10.0, PYTHON
    program = program_in(response, language)
    if program is None:
        return 0, "no_answer", None
    code = program.encode(errors="replace")
    if language == "cpp":
        build, command = "g++ -O2 -std=gnu++20 -o /proc/self/fd/1 -x c++".split(), []
        code, status = run_inside(code, build, "", 60.0, 4 << 30, 64 << 20)
        if status != "ok":
            return 0, status, program
    elif tests[0].get("call"):
        command = [*PYTHON, "-c", Path(HERE, "data/calls.py").read_text(), str(seconds)]
        calls = json.dumps([[t["call"], t["args"], t.get("kwargs") or {}] for t in tests])
        seconds, same = seconds * len(tests), same_values
        tests = [{"stdin": calls, "stdout": json.dumps([test["expected"] for test in tests])}]
    for test in tests:
        most = max(1 << 20, 2 * len(test["stdout"]))
        printed, status = run_inside(code, command, test["stdin"], seconds, most=most)
        if status != "ok" or not same(printed.decode(errors="replace"), test["stdout"]):
            return 0, "wrong" if status == "ok" else status, program
    return 1, "correct", program


# ---------------------------------------------------------------- grading: both

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
_graders = ThreadPoolExecutor(max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def verify(record, response):
    r"""r(y, a). Returns (reward 0 or 1, verdict, extracted); fails closed.

    verdict: correct, wrong, no_answer, timeout, output_limit or error; extracted: what was graded.
    """
    if record.get("kind") == "code":
        return verify_code(record, response)
    extracted = last_boxed(response)
    verdict = "no_answer" if extracted is None else same_answer(record["answer"], extracted)
    return int(verdict == "correct"), verdict, extracted


def verify_all(records, responses):
    """verify() of many, in order, as they get ready; a grader a core."""
    return _graders.map(verify, records, responses)


# ---------------------------------------------------------------- training


def completion_hidden(model, prefixes, completions):
    """Last hidden states where each token of each completion is predicted: [N, H], rows end to end.

    Token j of a completion is predicted one position earlier, the first by its prefix's last token.
    Rows are padded on the right, where causal attention hides pads: no mask depends on a pad id.
    """
    lengths = [len(p) + len(c) for p, c in zip(prefixes, completions, strict=True)]
    shape = max(1, len(lengths)), max(lengths, default=1)  # also of no rows, with N = 0
    ids = torch.zeros(shape, dtype=torch.long)  # [B, T]
    predicts = torch.zeros_like(ids, dtype=torch.bool)  # [B, T] is the next token a completion's?
    for i, (p, c) in enumerate(zip(prefixes, completions)):
        ids[i, : lengths[i]] = torch.tensor(p + c)
        predicts[i, len(p) - 1 : lengths[i] - 1] = True
    below_head = getattr(model, "read", model.base_model)
    out = below_head(input_ids=ids.to(model.device), use_cache=False)
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
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
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


def draw(logits, temperature, top_p, uniform):
    """One token a row, [B, V] → [B]: where the distribution function passes uniform [B, 1]; where
    logits are not finite V, which is none. top_p: of the likeliest tokens that make up so much."""
    if temperature == 0:  # the likeliest
        best, token = logits.max(-1)
        return token.where(best.isfinite(), logits.shape[-1])
    p = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        likeliest = p.sort(-1, descending=True).values
        out = likeliest.cumsum(-1) - likeliest >= max(top_p, 1e-9)  # those before make it up
        p = p.masked_fill(p < likeliest.masked_fill(out, 1).amin(-1, keepdim=True), 0)  # keeps NaN
    cdf = p.cumsum(-1)
    return (~(cdf >= uniform * cdf[:, -1:])).sum(-1)


@torch.no_grad()  # in inference_mode autocast keeps no copy of the weights, and casts at each token
def sample(
    model,
    prefixes,
    seeds,
    max_new_tokens,
    temperature=1.0,
    top_p=1.0,
    batch_rows=384,
    progress=None,
):
    """One answer a prefix, as token ids, ended by an end token, or cut by max_new_tokens or where
    the model's positions end. progress: a tqdm bar, counting answers.

    Each row draws from its own stream of uniforms: neighbours change its answer only by rounding.
    Rows that ended leave the batch, a quarter of it at a time, for leaving copies the rest. The
    last quarter waits while the next batch runs, and goes on with others of its kind: so a batch
    does not wait for its longest answers. 2 · batch_rows rows are in memory.
    """
    if isinstance(model, FSDPModule):
        copy_weights(model, model.copies[0])
        model = model.copies[0]
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
        logits = model(input_ids=ids, **how).logits[:, -1, : model.vocabulary]  # no padding
        tokens = draw(logits, temperature, top_p, uniform).tolist()
        if max(tokens) == logits.shape[-1]:
            die("logits are not finite: these weights do not fit this precision or this device")
        return tokens

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
