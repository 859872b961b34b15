"""Data sets of the Hugging Face hub as problems: of the known ones, which columns hold what.

A hub set with the columns `problem` and `answer` (or `tests`) needs no line here.
"""

import hashlib
import json

from common import die
from datasets import load_dataset

BOX = "\n\nPut your final answer within \\boxed{}."


def mathematics(name):
    """A row's problem and answer, by the column that names it."""
    return lambda row: {
        "id": row[name],
        "problem": row["problem"] + BOX,
        "answer": row["answer"],
    }


def gsm8k(row):
    return {"problem": row["question"] + BOX, "answer": row["answer"].split("####")[-1]}


def contest(name, parts, tests, language):
    """A programming problem; tests: [{"input", "output"}, ...].

    The first is an example, shown and not graded: a table of examples would pass it.
    """
    example = "".join(f"Example:\n{t['input']}\n→\n{t['output']}" for t in tests[:1])
    how = f"Answer with one ```{language} block: a program from stdin to stdout."
    return {
        "id": name,
        "problem": "\n\n".join(filter(None, [*parts, example, how])),
        "language": language,
        "tests": [{"stdin": t["input"], "stdout": t["output"]} for t in tests[1:]],
    }


def codeforces(language):
    columns = "title", "description", "input_format", "output_format", "note"
    return lambda row: contest(
        row["id"], [row[c] for c in columns], row["examples"] or [], language
    )


def live_code_bench(row):
    """Its other tests are packed as a pickle, and not read."""
    tests = [t for t in json.loads(row["public_test_cases"]) if t["testtype"] == "stdin"]
    return contest(row["question_id"], [row["question_content"]], tests, "python")


KNOWN = {  # hub id: (configuration, row → {id, problem, and answer or tests})
    "open-r1/OpenR1-Math-220k": ("default", mathematics("uuid")),
    "HuggingFaceH4/MATH-500": (None, mathematics("unique_id")),
    "HuggingFaceH4/aime_2024": (None, mathematics("id")),
    "math-ai/aime25": (None, mathematics("id")),
    "MathArena/hmmt_feb_2025": (None, mathematics("problem_idx")),
    "openai/gsm8k": ("main", gsm8k),
    "open-r1/codeforces-cots": ("solutions_py", codeforces("python")),
    "open-r1/codeforces-cots:cpp": ("solutions", codeforces("cpp")),  # the colon is ours
    "lighteval/code_generation_lite": (None, live_code_bench),
}


def hub_rows(source, split, seed):
    """Rows of a hub data set as problems, shuffled by the seed; {} where the problem is missing."""
    configuration, as_ours = KNOWN.get(source, (None, dict))
    try:
        name = source.partition(":")[0] if source in KNOWN else source
        rows = load_dataset(name, configuration, split=split).shuffle(seed=seed)
    except Exception as e:  # datasets has many of its own
        die(f"--data {source} is no local file or folder, and no split {split!r} on the hub: {e}")
    columns = set(rows.column_names)
    if as_ours is dict and not ("problem" in columns and columns & {"answer", "tests"}):
        die(f"--data {source} has the columns {sorted(columns)}; data/hub.py needs a line for it")
    for raw in rows:
        try:
            row = as_ours(raw)
        except KeyError as e:
            die(f"--data {source} has no column {e}; data/hub.py says which are read")
        except (TypeError, AttributeError, ValueError):  # nothing where something should be
            row = {}
        # ids must not depend on the order, which the seed shuffles
        text = str(row.get("problem")).encode()
        row["id"] = str(row.get("id") or hashlib.sha256(text).hexdigest()[:12])
        row["answer"] = str(row.get("answer") or "").strip()
        yield row
