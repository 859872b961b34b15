"""Stage 3 of SD-Zero, Self-Revision Training (SRT): the Reviser revises, the base learns from it.

    collect   y_revised ~ π_base(· | x, y_init, P_r)
    filter    keep (x, y_init, P_r, y_revised) only where y_revised is verified correct, and new
    train     L_SRT = L_revision + L_generation, two means over tokens
              L_revision   = -log π_θ(y_revised | x, y_init, P_r)
              L_generation = -log π_θ([y_init, P_r, y_revised] | x)

verified.jsonl → revisions.jsonl: a row a revision, with {revision, p_r, revised, revised_ids,
revised_finished, revised_reward, revised_verdict, kept}; `kept` is "yes", or why not. → srt/, the
model θ_SRT, and srt.jsonl, a row a step. A wrong y_init stays in the context: it is information.
Answers that were cut get no revision. Unlike the official code: one loss, not two stages of SFT,
and revisions of right answers are used too.

    python 03_revise_sft.py
    python 03_revise_sft.py --from runs/demo --out runs/longer --epochs 6
"""

import math
import random
import time
from collections import Counter
from contextlib import nullcontext
from itertools import islice

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import arguments, already_made, die, find, finish, parse, read_jsonl, run_stage
from common import all_ranks, deal, evened, gather_rows, sampling, sampling_flags, shard
from common import autocast, end_ids, load_model, load_tokenizer, pick_device, save_model
from common import backward_through_head, completion_hidden, log_step, micro_batches, update
from common import check_code, check_memory, check_prompt, stop_if_ungraded, verify_all
from common import in_blocks, load_state, prompt_ids, revision_ids, row_seed, sample, save_state
from common import places_jsonl, row_at


# ---------------------------------------------------------------- collect and filter


def collect(path, verified, model, tokenizer, args):
    """y_revised ~ π_base(· | x, y_init, P_r), verified and filtered, into the file `path`."""
    tasks = []  # (place of an answer in the file, number of the revision); none of what was cut
    for place, row in places_jsonl(verified):
        n = args.revisions_right if row["reward"] else args.revisions_wrong
        tasks += [(place, k) for k in range(n if row["finished"] else 0)]
    if not tasks:
        die("no answer to revise: all were cut (01 --max-new-tokens), or --revisions-* is 0")
    progress = tqdm(total=len(tasks), desc="revise", unit="revision")
    done, seen = sum(1 for _ in read_jsonl(path, mend=True)), set()
    for block, before, rows in in_blocks(path, done, tasks, 4 * args.batch_rows, progress):
        for row in islice(read_jsonl(path), 0 if seen else before):  # of an earlier try
            keep(row, seen)
        share = [(row_at(verified, place), k) for place, k in deal(block)]  # this GPU's
        prefixes, seeds, revised = [], [], []
        for row, k in share:
            told = row["response_ids"], row["reward"], args.p_r
            prefixes.append(revision_ids(tokenizer, row["problem"], *told))
            seeds.append(row_seed(args.seed, "revise", row["id"], row["sample"], k))
        revisions = sample(model, prefixes, seeds, **sampling(args), progress=progress)
        texts = [tokenizer.decode(y, skip_special_tokens=True) for y in revisions]
        graded = verify_all([row for row, _ in share], texts)
        for (row, k), y, text, (reward, verdict, _) in zip(share, revisions, texts, graded):
            new = {"revision": k, "p_r": args.p_r[row["reward"]], "revised": text}
            new |= {"revised_ids": y, "revised_finished": y[-1] in end_ids(model)}
            new |= {"revised_reward": reward, "revised_verdict": verdict}
            revised.append({**row, **new})
        rows += [{**row, "kept": keep(row, seen)} for row in gather_rows(revised)]


def keep(row, seen):
    """ "yes" if y_revised is finished, new and right; else why not. seen: revisions until now."""
    if not row["revised_finished"]:
        return "revision cut"
    revision = row["id"], row["sample"], tuple(row["revised_ids"])
    if revision in seen:
        return "duplicate"
    if row["revised_verdict"] not in ("timeout", "error"):  # a copy of such may fare better
        seen.add(revision)
    return "yes" if row["revised_reward"] else "revision " + row["revised_verdict"]


# ---------------------------------------------------------------- train


def sequence(row, tokenizer, p_r):
    """Token ids of a tuple in three parts: chat(x); y_init (no end token) P_r; y_revised."""
    x = prompt_ids(tokenizer, row["problem"])
    reviser = revision_ids(tokenizer, row["problem"], row["response_ids"], row["reward"], p_r)
    return x, reviser[len(x) :], row["revised_ids"]


def length(parts):
    """Tokens of a tuple, its three parts together."""
    return sum(map(len, parts))


def srt_backward(model, batch, n_revision, n_generation, context=nullcontext, scaler=None):
    """Backward of the part of the step's L_SRT that these tuples make up; returns it.

    Both losses read the same sequence [x, y_init, P_r, y_revised] and score other tokens of it, in
    the whole step n_revision (y_revised) and n_generation ([y_init, P_r, y_revised]). So one pass
    serves both: a token's -log π weighs 1 / n_generation, and in y_revised 1 / n_revision more.
    """
    prompts, completions, weights = [], [], []
    for x, attempt, revised in batch:
        prompts.append(x)
        completions.append(attempt + revised)
        weights += [1 / n_generation] * len(attempt)
        weights += [1 / n_generation + 1 / n_revision] * len(revised)
    tokens = torch.tensor(sum(completions, []), dtype=torch.long, device=model.device)  # [N]
    weights = torch.tensor(weights, device=model.device)  # [N]
    with context():
        hidden = completion_hidden(model, prompts, completions)  # [N, H]

    def loss_of(logits, at):
        nll = F.cross_entropy(logits.float(), tokens[at], reduction="none")
        return (nll * weights[at]).sum()

    return backward_through_head(hidden, model.get_output_embeddings(), loss_of, context, scaler)


def learning_rate(step, steps, peak):
    """Linear warm-up over 5% of the steps, then cosine to 0."""
    warm_up = max(1, steps // 20)
    after = max(0, step - warm_up) / max(1, steps - warm_up)
    return peak * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * after))


def train(model, tokenizer, path, kept, args, device):
    """Minimise L_SRT over the tuples at these places of `path`: srt/; srt.jsonl, a row a step."""
    folder, log, (context, dtype) = args.out / "srt", args.out / "srt.jsonl", autocast(device)
    betas, decay = (0.9, 0.95), 1e-4
    shard(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, args.lr, betas, weight_decay=decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    history = load_state(folder, log, **state)
    rng, batches = random.Random(args.seed), []
    for _ in range(args.epochs):
        order = rng.sample(kept, len(kept))
        batches += [order[b : b + args.batch_size] for b in range(0, len(order), args.batch_size)]
    model.train()
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    steps = len(batches)
    progress = tqdm(range(len(history), steps), "SRT", steps, initial=len(history), unit="step")
    for step in progress:
        batch, loss = [row_at(path, place) for place in deal(batches[step])], 0.0
        batch = [sequence(row, tokenizer, args.p_r) for row in batch]
        n_revision = sum(all_ranks(sum(len(revised) for _, _, revised in batch)))  # on all GPUs
        n_generation = n_revision + sum(all_ranks(sum(len(attempt) for _, attempt, _ in batch)))
        for part in evened(micro_batches(batch, length, args.micro_tokens)):
            loss += srt_backward(model, part, n_revision, n_generation, context, scaler)
        loss = sum(all_ranks(loss))
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args.lr)
        norm = update(model, optimizer, scaler)
        row = {"step": step, "loss": loss, "lr": lr, "gradient_norm": norm, "tokens": n_generation}
        log_step(log, history, row, progress)
        if (step + 1) % args.save_every == 0 and step + 1 < steps and norm is not None:
            save_state(folder, step + 1, **state)
    save_model(model, tokenizer, folder)


def main(argv=None):
    p = arguments("03", __doc__)
    p.add_argument("--revisions-wrong", type=int, help="revisions of a wrong answer")
    p.add_argument("--revisions-right", type=int, help="of a right one; the official code has 0")
    sampling_flags(p)
    p.add_argument("--epochs", type=int, default=3, help="passes over the kept tuples")
    p.add_argument("--lr", type=float, help="peak; 5%% warm-up, then cosine")
    p.add_argument("--batch-size", type=int, help="tuples a step")
    p.add_argument("--micro-tokens", type=int, default=2048, help="tokens a forward pass, at most")
    p.add_argument("--lora", type=int, metavar="R", help="adapter of rank R, at 1e-4")
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    p.add_argument("--save-every", type=int, default=20, help="steps between states to go on from")
    args = parse(p, argv)

    # ---------------- answers to revise
    began, verified = time.time(), find(args, "verified.jsonl")
    find(args, "base")
    check_code(read_jsonl(verified), args.allow_code)
    tokenizer, device = load_tokenizer(args.model), pick_device(args.device)
    check_prompt(args, tokenizer)
    check_memory(args.model, device, lora=args.lora)

    # ---------------- collect and filter
    model, path = None, args.out / "revisions.jsonl"
    decides = "verified.jsonl base revisions_wrong revisions_right max_new_tokens temperature top_p"
    if not already_made(args, "revisions.jsonl", decides):
        model = load_model(args.model, tokenizer, device, lora=args.lora)
        collect(path, verified, model, tokenizer, args)
        verdicts = (row["revised_verdict"] for row in read_jsonl(path))
        stop_if_ungraded(verdicts, read_jsonl(path), path)
        counts = Counter(row["kept"] for row in read_jsonl(path))
        finish(args, "revisions.jsonl", began, device, **counts)
    path, counts = find(args, "revisions.jsonl"), Counter()
    kept = []  # places in the file
    for place, row in places_jsonl(path):
        counts[row["kept"]] += 1
        kept += [place] * (row["kept"] == "yes")
    print(f"{path}: kept {len(kept)} of {counts.total()}: {dict(counts)}")
    if not kept:
        die(f"{path}: nothing was verified correct: more problems, or a stronger base")

    # ---------------- train
    if already_made(args, "srt", "revisions.jsonl base epochs lr batch_size lora"):
        return
    began = time.time()
    model = model or load_model(args.model, tokenizer, device, lora=args.lora)
    train(model, tokenizer, path, kept, args, device)
    finish(args, "srt", began, device, tuples=len(kept))


if __name__ == "__main__":
    run_stage(main)
