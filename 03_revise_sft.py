"""Stage 3 of SD-Zero, Self-Revision Training (SRT): the Reviser revises, and the base learns from what proved right.

    collect   y_revised ~ π_base(· | x, y_init, P_r),   keep (x, y_init, P_r, y_revised) only where y_revised is verified correct
    train     L_SRT = L_revision + L_generation
              L_revision   = mean over tokens of  -log π_θ(y_revised | x, y_init, P_r)
              L_generation = mean over tokens of  -log π_θ([y_init, P_r, y_revised] | x)

verified.jsonl → revisions.jsonl: a row a revision, with {revision, p_r, revised, revised_ids, revised_finished, revised_reward,
revised_verdict, kept}; `kept` is "yes" or the reason why not. Answers that were cut get no revision, and are counted.
Then → srt/, the model θ_SRT, and srt.jsonl, a row an optimiser step.
A wrong y_init stays in the context: it is information, not noise. It carries no end token. Unlike the official code:
one summed loss instead of two stages of SFT, and revisions of right answers are used too.
--objective rft is the baseline RFT (rejection-sampling fine-tuning): no revisions, L = mean over tokens of -log π_θ(y | x), y right.

    python 03_revise_sft.py
    python 03_revise_sft.py --objective generation --srt runs/demo/generation_only    # the same revisions, half of the loss
"""

import math
import random
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

from common import (append_jsonl, arguments, at_least, autocast, backward_through_head, check_code, check_ids, claim, completion_hidden,
                    die, end_ids, finish, load_model, load_state, load_tokenizer, micro_batches, parse, pick_device, prompt_ids,
                    read_jsonl, remove, revision_ids, row_seed, run, sample, save_model, save_state, stop_if_broken,
                    stop_if_ungraded, update, verify_all)

import torch
import torch.nn.functional as F
from tqdm import tqdm


# ---------------------------------------------------------------- collecting revisions

def revision_tasks(rows, n_wrong, n_right):
    """(verified row, number of the revision) in order; rows whose y_init was cut get none."""
    return [(row, k) for row in rows if row["finished"] for k in range(n_right if row["reward"] else n_wrong)]


def collect(path, rows, done, model, tokenizer, args):
    """Sample and verify revisions, appending to `path`; returns all of its rows."""
    p_r = {1: args.p_r_right, 0: args.p_r_wrong}
    tasks = revision_tasks(rows, args.revisions_wrong, args.revisions_right)
    if [(r["id"], r["sample"], r["revision"]) for r in done] != [(r["id"], r["sample"], k) for r, k in tasks[:len(done)]]:
        die(f"{path} does not hold the revisions of these answers in their order; remove it to make it again")
    graded = lambda finished, verdict: finished and verdict not in ("timeout", "error")     # a copy of such may fare better
    seen = {(r["id"], r["sample"], tuple(r["revised_ids"])) for r in done if graded(r["revised_finished"], r["revised_verdict"])}
    if len(done) == len(tasks):
        return done
    block, kept = 4 * args.batch_rows, Counter(r["kept"] for r in done)
    start = len(done) // block * block      # a torn block is sampled again, so that an answer's neighbours are those that it would have had
    progress = tqdm(total=len(tasks), initial=start, desc="revise", unit="revision")
    for b in range(start, len(tasks), block):
        batch, missing = tasks[b:b + block], slice(max(0, len(done) - b), None)
        prefixes = [revision_ids(tokenizer, r["problem"], r["response_ids"], r["reward"], p_r) for r, _ in batch]
        seeds = [row_seed(args.seed, "revise", r["id"], r["sample"], k) for r, k in batch]
        revisions = sample(model, prefixes, seeds, args.max_new_tokens, args.temperature, args.batch_rows, progress)
        batch, revisions, out = batch[missing], revisions[missing], []
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in revisions]
        for (row, k), ids, text, (reward, verdict, _) in zip(batch, revisions, texts, verify_all([row for row, _ in batch], texts)):
            finished, key = ids[-1] in end_ids(model), (row["id"], row["sample"], tuple(ids))
            why = "revision cut" if not finished else "duplicate" if key in seen else "yes" if reward else "revision " + verdict
            if graded(finished, verdict):
                seen.add(key)
            kept[why] += 1
            out.append({**row, "revision": k, "p_r": p_r[row["reward"]], "revised": text, "revised_ids": ids,
                        "revised_finished": finished, "revised_reward": reward, "revised_verdict": verdict, "kept": why})
        append_jsonl(path, out)
        done = done + out
        progress.set_postfix(kept=kept["yes"])
    progress.close()
    return done


# ---------------------------------------------------------------- the two losses

def sequence(row, tokenizer, p_r):
    """Token ids of a kept tuple in three parts: x as a prompt; y_init (no end token) with P_r; y_revised."""
    prompt = prompt_ids(tokenizer, row["problem"])
    reviser = revision_ids(tokenizer, row["problem"], row["response_ids"], row["reward"], p_r)
    return prompt, reviser[len(prompt):], row["revised_ids"]


def srt_backward(model, batch, objective, n_revision, n_generation, context=nullcontext, scale=lambda part: part):
    """Backward of the part of the step's loss that these tuples make up; returns it.

    Both losses read the same sequence [x, y_init, P_r, y_revised] and differ in the tokens that they score, so one pass serves both. With
    the whole step's n_revision tokens of y_revised and n_generation of [y_init, P_r, y_revised], a token's -log π weighs 1 / n_generation,
    and in y_revised 1 / n_revision more (with one of the losses alone, its weight alone).
    """
    prompts, attempts, revised = zip(*batch)
    completions = [a + r for a, r in zip(attempts, revised)]
    revision, generation = {"srt": (1, 1), "revision": (1, 0), "generation": (0, 1), "rft": (0, 1)}[objective]
    of_attempt, of_revised = generation / n_generation, generation / n_generation + revision / n_revision   # weights of a token's -log π
    weights = [w for a, r in zip(attempts, revised) for w in [of_attempt] * len(a) + [of_revised] * len(r)]
    tokens, weights = torch.tensor(sum(completions, []), device=model.device), torch.tensor(weights, device=model.device)   # [N], [N]
    with context():
        hidden = completion_hidden(model, prompts, completions)                                                             # [N, H]
    loss_of = lambda logits, at: (F.cross_entropy(logits.float(), tokens[at], reduction="none") * weights[at]).sum()
    return backward_through_head(hidden, model.get_output_embeddings(), loss_of, context, scale)


def main(argv=None):
    p = arguments(__doc__)
    g = p.add_argument_group("collection")
    g.add_argument("--verified", default=None, help="file to read (default: OUT/verified.jsonl)")
    g.add_argument("--revisions", default=None, help="file to write (default: OUT/revisions.jsonl)")
    g.add_argument("--revisions-wrong", default=4, type=at_least(0), help="of a wrong answer (default: 4) [paper: 3]")
    g.add_argument("--revisions-right", default=1, type=at_least(0), help="of a right answer (default: 1) [paper: 3; official code: 0]")
    g.add_argument("--max-new-tokens", default=320, type=at_least(1), help="(default: 320) [paper: 16384]")
    g.add_argument("--temperature", default=1.0, type=at_least(0.0), help="(default: 1.0) [paper: 0.7; official code: 1.0 with top-p 0.9]")
    g.add_argument("--batch-rows", default=384, type=at_least(1), help="answers sampled at once (default: 384); less if memory runs out")
    g = p.add_argument_group("training")
    g.add_argument("--srt", default=None, help="model folder to write (default: OUT/srt)")
    g.add_argument("--objective", default="srt", choices=["srt", "revision", "generation", "rft"],
                   help="srt is revision + generation; rft: no revisions, right answers only (default: srt)")
    g.add_argument("--unfiltered", action="store_true", help="train on wrong revisions too")
    g.add_argument("--epochs", default=3, type=at_least(1), help="(default: 3) [paper: 3]")
    g.add_argument("--lr", default=8e-4, type=at_least(0.0), help="peak; cosine with 5%% warm-up (default: 8e-4) [paper: 5e-6]")
    g.add_argument("--batch-size", default=32, type=at_least(1), help="tuples a step (default: 32)")
    g.add_argument("--micro-tokens", default=2048, type=at_least(1),
                   help="at most so many in a forward pass, padding too (default: 2048); less if memory runs out")
    g.add_argument("--gradient-checkpointing", action="store_true", help="less memory, one more forward pass")
    g.add_argument("--save-every", default=20, type=at_least(1), help="steps after which an interrupted training can go on (default: 20)")
    args = parse(p, argv)
    source, path = args.verified or args.out / "verified.jsonl", Path(args.revisions or args.out / "revisions.jsonl")
    srt = Path(args.srt or args.out / "srt")
    log = srt.with_name(srt.name + ".jsonl")

    # ---- answers to revise
    rows = read_jsonl(source, ("id", "sample", "problem", "answer", "response_ids", "finished", "reward"), "python 02_verify.py")
    rows = rows[:args.limit]
    check_code(any_code := any(r.get("kind") == "code" for r in rows), args.allow_code)
    tokenizer, began, device = load_tokenizer(args.model), time.time(), pick_device(args.device)
    check_ids(source, rows, tokenizer)
    if log == path:
        die(f"--srt {srt} would write its log over {path}; name another folder")

    # ---- collect revisions from the base
    if args.objective == "rft":
        path, model = source, load_model(args.model, tokenizer, device)
        kept = list({(r["id"], tuple(r["response_ids"])): r for r in rows if r["reward"] and r["finished"]}.values())
        examples = [(prompt_ids(tokenizer, r["problem"]), [], r["response_ids"]) for r in kept]
    else:
        done, complete = claim(path, args, {"verified": source, "model": args.model},
                               ("limit", "seed", "p_r_right", "p_r_wrong", "revisions_wrong", "revisions_right", "max_new_tokens",
                                "temperature"),
                               ("id", "sample", "revision", "problem", "answer", "response_ids", "finished", "reward", "p_r", "revised",
                                "revised_ids", "revised_finished", "revised_verdict", "kept"))
        done = list(done)
        for field in ("response_ids", "revised_ids"):
            check_ids(path, done, tokenizer, field)
        model = load_model(args.model, tokenizer, device)
        cut = sum(not r["finished"] for r in rows)
        rows = collect(path, rows, done, model, tokenizer, args)
        stop_if_ungraded([r["revised_verdict"] for r in rows], any_code, path)
        counts = Counter(r["kept"] for r in rows)
        kept = [r for r in rows if r["kept"] == "yes" or args.unfiltered and r["kept"] in ("revision wrong", "revision no_answer")]
        if not complete:
            finish(path, began, device, answers_cut=cut, **counts)
        print(f"{path}: {len(kept)} of {len(rows)} kept, {sum(r['reward'] == 0 for r in kept)} of them after a wrong answer; "
              f"{dict(counts)}; {cut} answers were cut and not revised")
        examples = [sequence(r, tokenizer, {1: args.p_r_right, 0: args.p_r_wrong}) for r in kept]
    if not kept:
        die(f"{path}: nothing was verified correct, so there is nothing to train on: more problems, or a stronger base")

    # ---- train on L_SRT
    settings = ("limit", "seed", "p_r_right", "p_r_wrong", "objective", "unfiltered", "epochs", "lr", "batch_size")
    for artifact, fields in ((log, ("step",)), (srt, ())):
        _, complete = claim(artifact, args, {"revisions": path, "model": args.model}, settings, fields)
    if complete:
        remove(f"{srt}.resume")
        return print(f"{srt} is there already")
    began, (context, dtype) = time.time(), autocast(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    rng, batches = random.Random(args.seed), []
    for _ in range(args.epochs):
        order = rng.sample(examples, len(examples))
        batches += [order[b:b + args.batch_size] for b in range(0, len(order), args.batch_size)]
    model.train()
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    warm_up, history = max(1, len(batches) // 20), load_state(srt, log, model, optimizer, scaler)
    progress = tqdm(range(len(history), len(batches)), initial=len(history), total=len(batches), desc="SRT", unit="step")
    for step in progress:
        batch = batches[step]
        after = max(0, step - warm_up) / max(1, len(batches) - warm_up)                 # 0 until warmed up, then to 1 at the end
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * after))
        n_revision, n_generation = sum(len(r) for _, _, r in batch), sum(len(a) + len(r) for _, a, r in batch)
        loss = sum(srt_backward(model, part, args.objective, n_revision, n_generation, context, scaler.scale)
                   for part in micro_batches(batch, lambda parts: sum(map(len, parts)), args.micro_tokens))
        norm = update(model, optimizer, scaler)
        history.append({"step": step, "loss": loss, "lr": lr, "gradient_norm": norm, "tokens": n_generation})
        append_jsonl(log, history[-1:])
        stop_if_broken(history, srt, len(batches))
        progress.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}")
        if (step + 1) % args.save_every == 0 and step + 1 < len(batches) and norm is not None:
            save_state(srt, step + 1, model, optimizer, scaler)
    save_model(model, tokenizer, srt)
    for artifact in (log, srt):
        finish(artifact, began, device, tuples=len(kept), steps=len(batches), skipped=sum(row["gradient_norm"] is None for row in history))
    remove(f"{srt}.resume")
    print(f"{srt}: trained on {len(kept)} tuples, {len(batches)} steps, last loss {loss:.3f}")


if __name__ == "__main__":
    run(main)
