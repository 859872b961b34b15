"""Files: rows of JSON, writing whole or not at all, hashes; and how a user is told of a mistake."""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm


def warn(message):
    tqdm.write(f"warning: {message}", file=sys.stderr)  # not into a progress bar


def die(message):
    """A user's mistake: one line on stderr (what, where, how to mend), exit code 2."""
    tqdm.write(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def append_jsonl(path, rows):
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
    start = done // size * size if done < len(tasks) else len(tasks)
    progress.initial = progress.n = start
    for b in range(start, len(tasks), size):
        rows = []
        yield tasks[b : b + size], b, rows
        append_jsonl(path, rows[max(0, done - b) :])
    progress.close()


def write_whole(path, text):
    """Whole or not at all: written beside the target, then renamed over it."""
    Path(f"{path}.part").write_text(text, encoding="utf-8")
    os.replace(f"{path}.part", path)


def remove(path):
    """A file, a link, or a folder with all that is in it; nothing if there is nothing."""
    path = Path(path)
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


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
