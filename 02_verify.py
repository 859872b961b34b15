"""Stage 2 of SD-Zero: one bit an answer.

    r = 1[answer(y_init) = a]

responses.jsonl → verified.jsonl: every row again, with {reward, verdict, extracted}. The answer is
what stands in the last \\boxed{}; math-verify decides whether it equals the reference. Programs are
run on their tests. `verdict` tells the ways to fail apart: wrong, no_answer, timeout, output_limit,
error. Needs no model and no GPU. The same verifier grades revisions, distillation and evaluation.

    python 02_verify.py
"""

import time
from collections import Counter
from itertools import islice

from tqdm import tqdm

from common import already_made, append_jsonl, arguments, find, finish, parse, read_jsonl, run_stage
from common import check_code, stop_if_ungraded, verify_all, warn


def main(argv=None):
    args = parse(arguments("02", __doc__), argv)
    began, path = time.time(), args.out / "verified.jsonl"
    source, counts, code = find(args, "responses.jsonl"), Counter(), []
    for row in read_jsonl(source):
        counts.update(answers=1, cut=not row["finished"])
        code = [row] if row["kind"] == "code" else code  # one is enough to know
    check_code(code, args.allow_code)
    if already_made(args, "verified.jsonl", "responses.jsonl"):
        return

    # ---------------- a thousand answers at a time are in memory
    verdicts = Counter(row["verdict"] for row in read_jsonl(path, mend=True))
    todo = islice(read_jsonl(source), verdicts.total(), None)
    progress = tqdm(initial=verdicts.total(), total=counts["answers"], desc="verify", unit="answer")
    while batch := list(islice(todo, 1000)):
        graded = verify_all(batch, [row["response"] for row in batch])
        for row, (reward, verdict, extracted) in zip(batch, graded):
            verified = {"reward": reward, "verdict": verdict, "extracted": extracted}
            append_jsonl(path, [{**row, **verified}])
            verdicts[verdict] += 1
            progress.update()
    progress.close()
    stop_if_ungraded(verdicts.elements(), code, path)
    finish(args, "verified.jsonl", began, "cpu", **verdicts)

    # ---------------- what it means
    n, right = counts["answers"], verdicts["correct"]
    if right in (0, n):
        warn(f"{path}: all answers are {'right' if right else 'wrong'}: rewards tell nothing apart")
    if counts["cut"] == n:
        warn(f"{path}: every answer was cut; 01_generate.py may need more --max-new-tokens")
    rates = {"accuracy": right, "finished": n - counts["cut"], "no answer": verdicts["no_answer"]}
    shares = ", ".join(f"{name} {count / n:.1%}" for name, count in rates.items())
    failed = f"timeouts {verdicts['timeout']}, errors {verdicts['error']}"
    print(f"{path}: {n} answers, {shares}, {failed}")


if __name__ == "__main__":
    run_stage(main)
