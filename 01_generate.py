"""Stage 1 of SD-Zero: the Generator answers.

    y_init ~ π_base(· | x)

problems → responses.jsonl: a row an answer, {the problem's fields, sample, response, response_ids,
finished}. The losses read `response_ids`; `response` is for people and the verifier. `finished` is
false where the answer was cut.

    python 01_generate.py
    python 01_generate.py --model Qwen/Qwen3-4B-Instruct-2507 --out runs/qwen
    python 01_generate.py --model Qwen/Qwen3-4B-Instruct-2507 --out runs/qwen \\
        --answers from_a_cluster.jsonl
"""

import json
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from common import arguments, already_made, find, finish, parse, run_stage, sampling_flags
from common import autocast, end_ids, load_model, load_tokenizer, pick_device, prompt_ids
from common import deal, die, fingerprint, gather_rows, in_blocks, load_problems, read_jsonl
from common import row_seed, sample, sampling, turn_end, write_whole


def sampled_elsewhere(file, problems, tokenizer):
    """Rows from what other software sampled: {id, response}, and `finished` if some were cut.

    The token ids are what the tokenizer makes of the text, which may differ from those sampled.
    """
    problems, count = {x["id"]: x for x in problems}, Counter()
    end = turn_end(tokenizer) or [tokenizer.eos_token_id]
    for number, row in enumerate(read_jsonl(file), 1):
        name, text = str(row.get("id")), row.get("response")
        finished = row.get("finished") is not False
        if name not in problems or not isinstance(text, str):
            die(f"{file}:{number}: 'response' is no text, or 'id' is of no problem: {name!r:.60}")
        y = tokenizer(text, add_special_tokens=False)["input_ids"] + end * finished
        answer = {"sample": count[name], "response": text, "response_ids": y}
        count[name] += 1
        yield {**problems[name], **answer, "finished": finished}


def main(argv=None):
    p = arguments("01", __doc__)
    p.add_argument("--split", default="train", help="split of --data")
    p.add_argument("--limit", type=int, help="answer the first so many problems")
    p.add_argument("--n", type=int, default=1, help="answers a problem")
    p.add_argument("--answers", metavar="FILE", help="JSONL of {id, response}, sampled elsewhere")
    sampling_flags(p)
    args = parse(p, argv)
    if args.answers and not Path(args.answers).is_file():
        die(f"--answers {args.answers} is no file")
    args.answers_id = args.answers and fingerprint(args.answers)

    # ---------------- problems
    began, path = time.time(), args.out / "responses.jsonl"
    find(args, "base")
    problems = load_problems(args.data, args.split, args.limit, args.allow_code, args.seed)
    tokenizer, device = load_tokenizer(args.model), pick_device(args.device)
    prompts = {x["id"]: prompt_ids(tokenizer, x["problem"]) for x in problems}
    args.run["prompt"] = tokenizer.decode(prompts[problems[0]["id"]])
    decides = "base split limit n answers_id max_new_tokens temperature top_p"
    if already_made(args, "responses.jsonl", decides, problems):
        return
    if args.answers:
        rows = list(sampled_elsewhere(args.answers, problems, tokenizer))
        if not rows:
            die(f"{args.answers} holds no answer")
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
        return finish(args, "responses.jsonl", began, "elsewhere", answers=len(rows))

    # ---------------- answers
    model = load_model(args.model, tokenizer, device, autocast(device)[1])
    tasks = [(x, k) for x in problems for k in range(args.n)]
    done = sum(1 for _ in read_jsonl(path, mend=True))
    progress = tqdm(total=len(tasks), desc="generate", unit="answer")
    for block, _, rows in in_blocks(path, done, tasks, 4 * args.batch_rows, progress):
        share, answers = deal(block), []  # of several GPUs, this one's
        prefixes = [prompts[x["id"]] for x, _ in share]
        seeds = [row_seed(args.seed, "generate", x["id"], k) for x, k in share]
        out = sample(model, prefixes, seeds, **sampling(args), progress=progress)
        for (x, k), y in zip(share, out):
            text = tokenizer.decode(y, skip_special_tokens=True)
            finished = y[-1] in end_ids(model)
            answer = {"sample": k, "response": text, "response_ids": y, "finished": finished}
            answers.append({**x, **answer})
        rows += gather_rows(answers)
    finish(args, "responses.jsonl", began, device, problems=len(problems), answers=len(tasks))


if __name__ == "__main__":
    run_stage(main)
