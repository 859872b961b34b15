"""Problems, from a JSONL file or from the Hugging Face hub: what common.load_problems() reads.

A hub set with the columns `problem` and `answer` (or `tests`) needs no line in KNOWN.
"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import common
from data.files import die, read_jsonl
from data.sandbox import COMPILER, check_code

BOX = "\n\nPut your final answer within \\boxed{}."
FIELDS = "id", "kind", "problem", "answer", "tests", "tolerance", "time_limit", "language"
NO_COMPILER = "in C++, not gradable without g++"


def load_problems(source, split="train", limit=None, allow_code=False, seed=0):
    """Problems {id, kind, problem, answer}; of kind "code": tests (see verify_code), answer "".

    source: a JSONL file of such rows, a folder that holds {split}.jsonl, or a hub data set, which
    the seed shuffles. A row that cannot be graded is a mistake in a file; of a hub set it is left
    out, and counted.
    """
    path = Path(source, f"{split}.jsonl") if Path(source).is_dir() else Path(source)
    from_file, problems, left_out = path.is_file(), {}, Counter()
    if not from_file and (path.suffix == ".jsonl" or path.exists()):
        die(f"--data: {path} does not exist; name a JSONL file, a folder, or a hub id")
    rows = read_jsonl(path) if from_file else hub_rows(source, split, seed)
    for number, row in enumerate(rows, 1):
        row.setdefault("id", f"{split}-{number - 1:06d}")
        row.setdefault("kind", "code" if "tests" in row else "math")
        if row["kind"] == "code":
            row["answer"] = ""
        why = unusable(row, problems)
        if not why:
            problems[row["id"]] = {field: row[field] for field in FIELDS if field in row}
        elif from_file and why != NO_COMPILER:
            die(f"{path}:{number}: a row {why}")
        else:
            left_out[why] += 1
        if len(problems) == limit:
            break
    for why, n in left_out.items():
        print(f"{source}: left out {n} rows {why}")
    if not problems:
        die(f"--data: {path} has no row that can be graded")
    check_code(problems.values(), allow_code)
    return list(problems.values())


def unusable(row, before):
    """Why a row cannot be graded; "" if it can. before: the rows before it, by id."""
    if row.get("unfit"):
        return row["unfit"]
    if row["kind"] not in ("math", "code"):
        return f"of kind {row['kind']!r:.40}, which is neither 'math' nor 'code'"
    for field in ("id", "problem", "answer")[: 3 if row["kind"] == "math" else 2]:
        if not is_text(row.get(field)):
            return f"whose {field!r} is no text, or empty"
    if row["id"] in before:
        return "whose 'id' is there already"
    if row["kind"] == "math":
        answer = common.tidied(row["answer"])
        # one that takes too long today may not tomorrow
        verdict = answer.isdigit() or common.ask_grader(answer, answer, True)
        read = verdict in (True, "correct", "timeout")
        return "" if read else "whose 'answer' math-verify cannot read"
    if not are_tests(row.get("tests")):
        return "whose 'tests' is no list of {stdin, stdout} or of {call, args, expected}"
    language, tolerance = row.get("language"), row.get("tolerance") or 0
    if language not in (None, "python", "cpp"):
        return f"whose 'language' is {language!r:.40}, and neither 'python' nor 'cpp'"
    if language == "cpp" and "call" in row["tests"][0]:
        return "whose tests call functions, which is for Python"
    if type(tolerance) not in (int, float) or not 0 <= tolerance < 1:
        return "whose 'tolerance' is no number from 0 to 1"
    if tolerance and "call" in row["tests"][0]:
        return "whose 'tolerance' is for values, which are compared as Python's == does"
    seconds = row.get("time_limit") or 10
    if type(seconds) not in (int, float) or not 0.1 <= seconds <= 60:
        return "whose 'time_limit' is no number of seconds from 0.1 to 60"
    return NO_COMPILER if language == "cpp" and not COMPILER else ""


def is_text(value):
    """With something in it, and no lone surrogate, which tokenizers refuse."""
    try:
        return isinstance(value, str) and bool(value.strip().encode())
    except UnicodeEncodeError:
        return False


def are_tests(tests):
    """A list of {stdin, stdout}, or of {call, args, expected} (and kwargs), and not of both."""
    if not isinstance(tests, list) or not all(isinstance(test, dict) for test in tests):
        return False
    calls = [test for test in tests if test.get("call") is not None]
    for test in tests:
        call = test.get("call")
        if calls and not (call and type(call) is str and type(test.get("args")) is list):
            return False
        if type(test.get("kwargs") or {}) is not dict:
            return False
        if not calls and not (type(test.get("stdin")) is type(test.get("stdout")) is str):
            return False
    return bool(tests) and all("expected" in test for test in calls)


# ---------------------------------------------------------------- what cannot be graded here


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


# ---------------------------------------------------------------- the hub


def mathematics(name):
    """Of a row, the problem and the answer; `name`: the column with its id."""
    return lambda row: {"id": row[name], "problem": row["problem"] + BOX, "answer": row["answer"]}


def gsm8k(row):
    return {"problem": row["question"] + BOX, "answer": row["answer"].split("####")[-1]}


UNFIT = "that are interactive, or have several right outputs and no checker"
SEVERAL = r"(?i)\binteractive|interaction|in any order|\b(print|output|find|choose|give) any\b"
SEVERAL += (
    r"|any of them|if there (are|is|exist) (several|multiple|many|more)|multiple (answers|sol)"
)


def contest(name, parts, tests, language):
    """A programming problem; tests: [{"input", "output"}, ...].

    The first is an example, shown and not graded: else a table of the examples would pass. What a
    program must talk with, or answer in one of several ways, no such test can grade.
    """
    example = "".join(f"Example:\n{t['input']}\n→\n{t['output']}" for t in tests[:1])
    how = f"Answer with one ```{language} block: a program from stdin to stdout."
    text = "\n\n".join(filter(None, [*parts, example, how]))
    graded = [{"stdin": t["input"], "stdout": t["output"]} for t in tests[1:]]
    row = {"id": name, "problem": text, "language": language, "tests": graded}
    return row | {"unfit": UNFIT} if re.search(SEVERAL, " ".join(filter(None, parts))) else row


def codeforces(language):
    columns = "title", "description", "input_format", "output_format", "note"

    def problem_of(row):
        problem = contest(row["id"], [row[c] for c in columns], row["examples"] or [], language)
        return problem | {"unfit": UNFIT} if row.get("interaction_format") else problem

    return problem_of


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
    """Rows of a hub data set, shuffled by the seed; with no problem where something is missing."""
    import datasets  # slow to import, and needed for hub ids only

    configuration, problem_of = KNOWN.get(source, (None, dict))
    try:
        name = source.partition(":")[0] if source in KNOWN else source
        if (only := datasets.get_dataset_split_names(name, configuration)) == ["train"] != [split]:
            print(f"{source} has no split {split!r}: its only one, {only[0]!r}, is taken")
            split = only[0]
        rows = datasets.load_dataset(name, configuration, split=split).shuffle(seed=seed)
    except Exception as e:  # datasets has many of its own
        die(f"--data {source} is no local file, and no split {split!r} of it on the hub: {e}")
    columns = set(rows.column_names)
    if problem_of is dict and not ("problem" in columns and columns & {"answer", "tests"}):
        die(f"--data {source} has the columns {sorted(columns)}: see KNOWN in {__file__}")
    for raw in rows:
        try:
            row = problem_of(raw)
        except KeyError as e:
            die(f"--data {source} has no column {e}: see KNOWN in {__file__}")
        except (TypeError, AttributeError, ValueError):  # None where something should be
            row = {}
        # ids must not depend on the order, which the seed shuffles
        text = str(row.get("problem")).encode()
        row["id"] = str(row.get("id") or hashlib.sha256(text).hexdigest()[:12])
        row["answer"] = str(row.get("answer") or "").strip()
        yield row
