"""Stage 2 of SD-Zero: one bit an answer.

    r = 1[answer(y_init) = a]

responses.jsonl → verified.jsonl: every row again with {reward, verdict, extracted}. The answer is the content of the last \\boxed{}, and
math-verify decides whether it equals the reference. `verdict` tells the ways to fail apart: wrong, no_answer, timeout, error. Needs no
model and no GPU. The same verifier grades revisions, distillation and evaluation.

    python 02_verify.py
    python 02_verify.py --responses my_answers.jsonl --verified my_rewards.jsonl
"""

import time
from collections import Counter
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from common import append_jsonl, arguments, check_code, claim, die, finish, parse, run, stop_if_ungraded, stream_jsonl, verify_all, warn


def main(argv=None):
    p = arguments(__doc__)
    g = p.add_argument_group("verification")
    g.add_argument("--responses", default=None, help="file to read (default: OUT/responses.jsonl)")
    g.add_argument("--verified", default=None, help="file to write (default: OUT/verified.jsonl)")
    args = parse(p, argv)
    source, path = args.responses or args.out / "responses.jsonl", Path(args.verified or args.out / "verified.jsonl")

    # ---- one pass to see that all rows can be graded, one to grade them: no more than a thousand are in memory
    rows = lambda: islice(stream_jsonl(source, ("id", "problem", "answer", "response", "response_ids", "finished"),
                                       "python 01_generate.py"), args.limit)
    counts = Counter()
    for row in rows():
        counts.update(rows=1, cut=not row["finished"], code=row.get("kind") == "code")
    check_code(counts["code"], args.allow_code)
    done, complete = claim(path, args, {"responses": source}, ("limit",), ("id", "reward", "verdict"))
    began, verdicts, todo = time.time(), Counter(), rows()
    for row in done:
        if row["id"] != next(todo, {}).get("id"):
            die(f"{path} does not hold these answers in their order; remove it to make it again")
        verdicts[row["verdict"]] += 1
    progress = tqdm(initial=sum(verdicts.values()), total=counts["rows"], desc="verify", unit="answer")
    while batch := list(islice(todo, 1000)):
        for row, result in zip(batch, verify_all(batch, [row["response"] for row in batch])):
            append_jsonl(path, [{**row, **dict(zip(("reward", "verdict", "extracted"), result))}])
            verdicts[result[1]] += 1
            progress.update()
    progress.close()
    stop_if_ungraded(verdicts, counts["code"], path)
    if not complete:
        finish(path, began, "cpu", **verdicts)

    n = sum(verdicts.values())
    if verdicts["correct"] in (0, n):
        warn(f"{path}: {'all' if verdicts['correct'] else 'none'} of the answers are right, so the rewards tell nothing apart")
    if counts["cut"] == n:
        warn(f"{source}: every answer was cut; 01_generate.py may need more --max-new-tokens")
    print(f"{path}: {n} answers, accuracy {verdicts['correct'] / n:.1%}, finished {1 - counts['cut'] / n:.1%}, "
          f"no answer {verdicts['no_answer'] / n:.1%}, timeouts {verdicts['timeout']}, errors {verdicts['error']}")


if __name__ == "__main__":
    run(main)
