"""Stage 1 of SD-Zero: the Generator answers.

    y_init ~ π_base(· | x)

problems → responses.jsonl: a row an answer, with the problem's fields and {sample, response, response_ids, finished}. The losses read
`response_ids`; `response` is for people and the verifier. `finished` is false where the answer was cut at --max-new-tokens.
Answers are written in order, four batches at a time; after an interruption the same command goes on where it stopped, to the same file.

    python 01_generate.py
    python 01_generate.py --model Qwen/Qwen3-4B-Instruct-2507 --data open-r1/OpenR1-Math-220k --limit 10000 \\
        --max-new-tokens 8192 --batch-rows 16
"""

import time

from tqdm import tqdm

from common import (append_jsonl, arguments, at_least, claim, die, end_ids, finish, load_model, load_problems, load_tokenizer, parse,
                    pick_device, problem_file, prompt_ids, row_seed, run, sample)


def main(argv=None):
    p = arguments(__doc__, limit=1500)
    g = p.add_argument_group("generation")
    g.add_argument("--split", default="train", help="split of --data (default: train)")
    g.add_argument("--responses", default=None, help="file to write (default: OUT/responses.jsonl)")
    g.add_argument("--n", default=1, type=at_least(1), help="answers a problem (default: 1) [paper: 1]")
    g.add_argument("--max-new-tokens", default=320, type=at_least(1), help="(default: 320) [paper: 16384]")
    g.add_argument("--temperature", default=1.0, type=at_least(0.0),
                   help="0 is greedy (default: 1.0) [paper: 0.7; official code: 1.0 with top-p 0.9]")
    g.add_argument("--batch-rows", default=384, type=at_least(1), help="answers sampled at once (default: 384); less if memory runs out")
    args = parse(p, argv)
    path = args.responses or args.out / "responses.jsonl"

    # ---- problems and what is already there
    problems = load_problems(args.data, args.split, args.limit, args.allow_code, args.seed)
    tokenizer, device = load_tokenizer(args.model), pick_device(args.device)
    done, complete = claim(path, args, {"model": args.model, "data": problem_file(args.data, args.split)},
                           ("split", "limit", "seed", "n", "max_new_tokens", "temperature"), ("id", "sample", "response_ids", "finished"))
    tasks, done = [(x, k) for x in problems for k in range(args.n)], list(done)
    if [(r["id"], r["sample"]) for r in done] != [(x["id"], k) for x, k in tasks[:len(done)]]:
        die(f"{path} does not hold these problems in their order; remove it to make it again")
    if complete and len(done) == len(tasks):
        return print(f"{path} is there already: {len(done)} answers")

    # ---- sample
    began, model = time.time(), load_model(args.model, tokenizer, device)
    block, finished, tokens = 4 * args.batch_rows, 0, 0
    # A torn block is sampled again, so that an answer's neighbours are those that it would have had.
    start = len(done) // block * block if len(done) < len(tasks) else len(tasks)
    progress = tqdm(total=len(tasks), initial=start, desc="generate", unit="answer")
    for b in range(start, len(tasks), block):
        batch = tasks[b:b + block]
        answers = sample(model, [prompt_ids(tokenizer, x["problem"]) for x, _ in batch],
                         [row_seed(args.seed, "generate", x["id"], k) for x, k in batch],
                         args.max_new_tokens, args.temperature, args.batch_rows, progress)
        rows = [{**x, "sample": k, "response": tokenizer.decode(y, skip_special_tokens=True), "response_ids": y,
                 "finished": y[-1] in end_ids(model)} for (x, k), y in zip(batch, answers)]
        append_jsonl(path, rows[max(0, len(done) - b):])
        finished, tokens = finished + sum(r["finished"] for r in rows), tokens + sum(map(len, answers))
        progress.set_postfix(finished=f"{finished / (progress.n - start):.0%}", tokens=f"{tokens / (progress.n - start):.0f}")
    progress.close()
    finish(path, began, device, answers=len(tasks))
    print(f"{path}: {len(tasks)} answers to {len(problems)} problems")


if __name__ == "__main__":
    run(main)
