"""Files: rows of JSON, writing whole or not at all, hashes; and how a user is told of a mistake.

Of several processes (torchrun) all read, and rank 0 alone writes and talks.
"""

import hashlib
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process saves alone
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def warn(message):
    if RANK == 0:
        tqdm.write(f"warning: {message}", file=sys.stderr)  # not into a progress bar


def die(message):
    """A user's mistake: one line on stderr (what, where, how to mend), exit code 2."""
    if RANK:
        time.sleep(10)  # if it is rank 0's mistake, too, that says it, and this process is ended
    tqdm.write(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def append_jsonl(path, rows):
    if RANK == 0:
        with open(path, "a", encoding="utf-8") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path, mend=False):
    """Rows of a JSONL file, one by one; mend: there may be none, or a torn last line to cut."""
    for _, row in places_jsonl(path, mend):
        yield row


def row_at(path, place):
    """The row that begins at a byte: so that files need not fit into memory."""
    return next(places_jsonl(path, start=place))[1]


def places_jsonl(path, mend=False, start=0):
    """(the byte where it begins, row) of a JSONL file's rows; for mend see read_jsonl."""
    end = start
    if mend and not path.exists():
        return
    with open(path, "rb") as f:
        f.seek(start)
        for number, line in enumerate(f, 1):
            if mend and not line.endswith(b"\n"):
                if RANK == 0:
                    os.truncate(path, end)
                return
            end += len(line)
            if not line.strip():
                continue
            try:
                yield end - len(line), {**json.loads(line.decode())}
            except (ValueError, TypeError, RecursionError) as e:
                die(f"{path}:{number}: no JSON object in UTF-8 ({e}); mend or remove the line")


def in_blocks(path, done, tasks, size, progress):
    """(block of tasks, number of those before it, a list for the caller to fill), in turn.

    These rows are appended to `path`, where an earlier try left `done` rows. A block that it left
    unfinished is made again as a whole, so that every answer has the same neighbours and rounding.
    """
    size *= WORLD
    start = done // size * size if done < len(tasks) else len(tasks)
    progress.initial = progress.n = start
    for b in range(start, len(tasks), size):
        rows = []
        yield tasks[b : b + size], b, rows
        append_jsonl(path, rows[max(0, done - b) :])
        progress.update(min(b + size, len(tasks)) - progress.n)  # what other ranks have made
        if WORLD > 1:
            dist.barrier()  # they may read what is written
    progress.close()


def write_whole(path, text):
    """Text or bytes, whole or not at all: written beside the target, then renamed over it."""
    if RANK == 0:
        data = text if isinstance(text, bytes) else text.encode()
        Path(f"{path}.part").write_bytes(data)
        os.replace(f"{path}.part", path)


def remove(path):
    """A file, a link, or a folder with all that is in it; nothing if there is nothing."""
    path = Path(path)
    if RANK == 0 and path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif RANK == 0:
        path.unlink(missing_ok=True)


def fingerprint(path):
    """A hash of a file, or of the files of a model folder; a hub id stands for itself."""
    path, digest = Path(path), hashlib.sha256()
    if not path.exists():
        return str(path)
    files = [f for f in sorted(path.iterdir()) if f.is_file()] if path.is_dir() else [path]
    for file in files:
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]


def state_of(model, optimizer, parts):
    """What training needs to go on; a sharded model's weights and Adam's state stay sharded."""
    weights, adam = get_state_dict(model, optimizer)
    state = {name: part.state_dict() for name, part in parts.items()}
    return state | {"model": weights, "optimizer": adam}


def save_state(folder, step, model, optimizer, **parts):
    """The state after `step` steps, in {folder}.resume/STEP; then those before it go."""
    resume = Path(f"{folder}.resume")
    state = state_of(model, optimizer, parts)
    dcp.save(state, checkpoint_id=resume / f"{step:06}", no_dist=WORLD == 1)
    for other in [path for path in resume.iterdir() if path.name != f"{step:06}"]:
        remove(other)


def load_state(folder, log, model, optimizer, **parts):
    """Undo save_state(), if it was called; returns the log's rows of the steps done, no others.

    The number of processes may be another one than when it was saved.
    """
    saved = sorted(Path(f"{folder}.resume").glob("*/.metadata"))  # which is written last
    step = int(saved[-1].parent.name) if saved else 0
    if saved:
        state = state_of(model, optimizer, parts)
        dcp.load(state, checkpoint_id=saved[-1].parent, no_dist=WORLD == 1)
        weights, adam = state["model"], state["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=adam)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    rows = list(read_jsonl(log, mend=True))[:step] if step else []
    if len(rows) < step:
        die(f"{log} has {len(rows)} of {step} steps: remove {folder}.resume to start again")
    write_whole(log, "".join(json.dumps(row) + "\n" for row in rows))
    return rows
