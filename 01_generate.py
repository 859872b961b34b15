"""Stage 1 of SD-Zero: the Generator answers.

    y_init ~ π_base(· | x)

problems → responses.jsonl: a row an answer, {the problem's fields, sample, response, response_ids,
finished}. The losses read `response_ids`; `response` is for people and the verifier. `finished` is
false where the answer was cut.

    python 01_generate.py
    python 01_generate.py --model Qwen/Qwen3-4B-Instruct-2507 --out runs/qwen
"""

import time

from tqdm import tqdm

from common import arguments, already_made, find, finish, parse, run_stage
from common import end_ids, load_model, load_problems, load_tokenizer, pick_device, prompt_ids
from common import in_blocks, read_jsonl, row_seed, sample


def main(argv=None):
    p = arguments("01", __doc__)
    p.add_argument("--split", default="train", help="split of --data")
    p.add_argument("--limit", type=int, help="answer the first so many problems")
    p.add_argument("--n", type=int, default=1, help="answers a problem")
    p.add_argument("--max-new-tokens", type=int, help="longer answers are cut")
    p.add_argument("--temperature", type=float, default=1.0, help="0: greedy; the paper has 0.7")
    p.add_argument("--batch-rows", type=int, help="answers sampled at once")
    args = parse(p, argv)

    # ---------------- problems
    began, path = time.time(), args.out / "responses.jsonl"
    find(args, "base")
    problems = load_problems(args.data, args.split, args.limit, args.allow_code, args.seed)
    tokenizer, device = load_tokenizer(args.model), pick_device(args.device)
    prompts = {x["id"]: prompt_ids(tokenizer, x["problem"]) for x in problems}
    args.run["prompt"] = tokenizer.decode(prompts[problems[0]["id"]])
    decides = "base split limit n max_new_tokens temperature"
    if already_made(args, "responses.jsonl", decides, problems):
        return

    # ---------------- answers
    model = load_model(args.model, tokenizer, device)
    tasks = [(x, k) for x in problems for k in range(args.n)]
    done = sum(1 for _ in read_jsonl(path, mend=True))
    progress = tqdm(total=len(tasks), desc="generate", unit="answer")
    for block, _, rows in in_blocks(path, done, tasks, 4 * args.batch_rows, progress):
        prefixes = [prompts[x["id"]] for x, _ in block]
        seeds = [row_seed(args.seed, "generate", x["id"], k) for x, k in block]
        how = args.max_new_tokens, args.temperature, args.batch_rows, progress
        for (x, k), y in zip(block, sample(model, prefixes, seeds, *how)):
            text = tokenizer.decode(y, skip_special_tokens=True)
            finished = y[-1] in end_ids(model)
            answer = {"sample": k, "response": text, "response_ids": y, "finished": finished}
            rows.append({**x, **answer})
    finish(args, "responses.jsonl", began, device, problems=len(problems), answers=len(tasks))


if __name__ == "__main__":
    run_stage(main)
