"""Stage 4 of SD-Zero, on-policy self-distillation: the Reviser teaches the Generator, token by token.

    y ~ π_θ(· | x),  r = verify(y, a)
    L(θ) = Σ_t D_KL( π_θ(· | x, y_<t) ‖ π_SRT(· | x, y, P_r, y_<t) )          over the full vocabulary, in float32

    student   chat(x) + y
                        ▔ loss: every token of y, its end token too
    teacher   chat(x) + y (no end token) + "\\n\\n" P_r "\\n\\n" + y
                                                               ▔ the same tokens of the second y
A step's loss is the sum over all its tokens, divided by their number.

The teacher has read the whole answer and whether it was right; the student has not. That is all the supervision there is: one bit an
answer becomes a distribution at every token. The gradient goes through the student only, and not through sampling. The teacher is frozen
at θ_SRT; each further round starts with teacher := student.
srt/ + problems that phase 1 did not use → sd_zero/, sd_zero.best/ (at the save whose last three batches were right most often, for when
accuracy falls later), and distill.jsonl, a row an optimiser step.
Baselines in the same loop: --objective sdft, whose teacher has read a right answer instead of y and its reward; --objective grpo, with no
teacher: L = -Σ_t A log π_θ(y_t | x, y_<t), A = (r - mean) / standard deviation of the --n answers to x (on-policy, so no clipping; no KL
to the start; token mean over the step).

    python 04_self_distill.py
    python 04_self_distill.py --srt data/base --out runs/no_srt --verified runs/demo/verified.jsonl   # phase 2 without phase 1
"""

import random
import time
from contextlib import nullcontext
from pathlib import Path

from common import (append_jsonl, arguments, at_least, autocast, backward_through_head, check_ids, claim, completion_hidden,
                    die, end_ids, finish, load_model, load_problems, load_state, load_tokenizer, micro_batches, parse, pick_device,
                    positions, problem_file, prompt_ids, read_jsonl, remove, revision_ids, row_seed, run, sample, save_model, save_state,
                    stop_if_broken, stop_if_ungraded, update, verify_all, warn)

import torch
import torch.nn.functional as F
from tqdm import tqdm


def token_kl(student_logits, teacher_logits, kind="reverse", top_k=None):
    """KL at each position, summed over the vocabulary: [..., V], [..., V] → [...], in float32 (or wider), at temperature 1.

    reverse is KL(student‖teacher), the paper's; forward is KL(teacher‖student); mixed is half of each.
    top_k, as in the official code: of both only the teacher's k likeliest tokens, renormalised; what the student has elsewhere is not seen.
    """
    if top_k:
        likeliest = teacher_logits.topk(min(top_k, teacher_logits.shape[-1])).indices
        student_logits, teacher_logits = student_logits.gather(-1, likeliest), teacher_logits.gather(-1, likeliest)
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    log_s = student_logits.to(wide).log_softmax(-1)
    log_t = teacher_logits.to(wide).log_softmax(-1)
    reverse = (log_s.exp() * (log_s - log_t)).sum(-1)
    if kind == "reverse":
        return reverse
    forward = (log_t.exp() * (log_t - log_s)).sum(-1)
    return forward if kind == "forward" else 0.5 * forward + 0.5 * reverse


def kl_backward(student_hidden, student_head, teacher_hidden, teacher_head, kind, tokens, context=nullcontext, scale=lambda part: part,
                chunk=None, top_k=None):
    """Backward of Σ KL / tokens through the student's head and hidden states; returns the KL at each position: [N, H], [N, H] → [N].

    Of both sides only a chunk of positions has logits at a time: they take chunk · V entries, not N · V.
    """
    token_kls = []

    def loss_of(student_logits, at):
        with torch.no_grad(), context():
            teacher_logits = teacher_head(teacher_hidden[at].to(student_logits.device))
        kl = token_kl(student_logits, teacher_logits, kind, top_k)
        token_kls.append(kl.detach())
        return kl.sum() / tokens

    backward_through_head(student_hidden, student_head, loss_of, context, scale, chunk)
    return torch.cat(token_kls)


def grpo_backward(hidden, head, y, advantages, tokens, context=nullcontext, scale=lambda part: part):
    """Backward of -Σ A log π(y) / tokens: hidden states [N, H], tokens y [N], each with its answer's advantage [N]. Returns this loss."""
    loss_of = lambda logits, at: (F.cross_entropy(logits.float(), y[at], reduction="none") * advantages[at]).sum() / tokens
    return backward_through_head(hidden, head, loss_of, context, scale)


def advantages_of(rewards, n):
    """(r - mean) / (standard deviation + 1e-4) among each n answers to the same problem; 0 where all are right or all are wrong."""
    groups = torch.tensor(rewards, dtype=torch.float32).view(-1, n)                                             # [problems, n]
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten().tolist()


def batches_of(problems, steps, size, seed):
    """`steps` batches of different problems: shuffled passes over all of them, each without a last batch that would not be full."""
    rng, queue = random.Random(seed), []
    for _ in range(steps):
        if len(queue) < size:
            queue = rng.sample(problems, len(problems))
        yield queue[:size]
        queue = queue[size:]


def best_of(history, every):
    """After how many steps, a multiple of `every`, the last three batches (or `every`, if fewer) were right most often."""
    right = {s: sum(m["accuracy"] for m in history[max(s - 3, s - every):s]) for s in range(every, len(history) + 1, every)}
    return max(right, key=lambda s: (right[s], s))


def trouble(history, window, every, problems):
    """A warning if training, in steps of so many problems, goes wrong, else None. Asked after each step, answers every `window` steps."""
    mean, last = lambda rows, key: sum(m[key] for m in rows) / len(rows), history[-window:]
    small = lambda m: m["gradient_norm"] is not None and m["gradient_norm"] < 1e-6 or m["kl"] is not None and m["kl"] < 1e-4
    if len(history) == 3 and all(map(small, history)):
        return "nothing to learn from the start: teacher and student agree, or all answers to a problem have the same reward"
    if len(history) % window:
        return None
    if mean(last, "finished") == 0:
        return f"every answer of the last {window} steps was cut; --max-new-tokens may be too small"
    if mean(last, "accuracy") in (0, 1):
        return f"of the last {window} steps all answers are {'right' if last[0]['accuracy'] else 'wrong'}: the reward tells nothing apart"
    now, best = mean(last, "accuracy"), max(mean(history[b:b + window], "accuracy") for b in range(0, len(history), window))
    error = (2 * best * (1 - best) / (window * problems)) ** 0.5     # of the difference of two such means
    if best - now > max(0.15 * best, 3 * error):
        after = best_of(history, every) if len(history) >= every else len(history)
        return f"of the last {window} steps' answers {now:.1%} are right, in the best {window} steps {best:.1%} were" \
            + (f"; it was best after step {after}" if after < len(history) else "")
    return None


def show(rows, tokenizer):
    """Of the wrong and of the right answers the one of median length, each token followed by its KL where that is at least 0.1 nats."""
    for bit in (0, 1):
        of_this_kind = sorted((r for r in rows if r["reward"] == bit), key=lambda r: len(r["response_ids"]))
        for row in of_this_kind[len(of_this_kind) // 2:][:1]:
            kl = row["kl"] or [0.0] * len(row["response_ids"])      # GRPO has none
            text = "".join(tokenizer.decode([t]) + (f"⟨{k:.1f}⟩" if k >= 0.1 else "") for t, k in zip(row["response_ids"], kl))
            reference = f"a = {row['answer']}, " if row["answer"] else ""
            tqdm.write(f"\n── {row['problem']}  [{reference}r = {row['reward']}, KL {sum(row['kl']):.2f}]\n{text}\n")


def main(argv=None):
    p = arguments(__doc__)
    g = p.add_argument_group("files")
    g.add_argument("--split", default="train", help="split of --data (default: train)")
    g.add_argument("--verified", default=None, help="phase 1's answers; their problems are left out (default: OUT/verified.jsonl)")
    g.add_argument("--srt", default=None, help="student at the start, and teacher (default: OUT/srt)")
    g.add_argument("--sd-zero", default=None, help="model folder to write (default: OUT/sd_zero)")
    g.add_argument("--distill", default=None, help="file of metrics to write (default: OUT/distill.jsonl)")
    g = p.add_argument_group("distillation")
    g.add_argument("--objective", default="sd-zero", choices=["sd-zero", "sdft", "grpo"], help="see above (default: sd-zero)")
    g.add_argument("--n", default=1, type=at_least(1), help="answers a problem; grpo needs at least 2 (default: 1)")
    g.add_argument("--steps", default=50, type=at_least(1), help="optimiser steps a round (default: 50)")
    g.add_argument("--rounds", default=1, type=at_least(1), help="rounds; after each, teacher := student (default: 1)")
    g.add_argument("--batch-size", default=64, type=at_least(1), help="answers a step (default: 64) [paper: 128]")
    g.add_argument("--micro-tokens", default=2048, type=at_least(1),
                   help="at most so many in a forward pass, padding too (default: 2048); less if memory runs out")
    g.add_argument("--gradient-checkpointing", action="store_true", help="less memory, one more forward pass of the student")
    g.add_argument("--offload-teacher", action="store_true", help="the teacher waits in the CPU's memory while the student works")
    g.add_argument("--kl", default="reverse", choices=["reverse", "forward", "mixed"],
                   help="reverse is KL(student‖teacher), forward the other, mixed half of each (default: reverse) [official code: mixed]")
    g.add_argument("--top-k", default=None, type=at_least(1), help="KL over the teacher's so many likeliest tokens [official code: 64]")
    g.add_argument("--lr", default=2e-4, type=at_least(0.0), help="constant after warm-up (default: 2e-4) [paper: 5e-6]")
    g.add_argument("--warm-up", default=5, type=at_least(1), help="steps of linear warm-up (default: 5) [paper: 20]")
    g.add_argument("--max-new-tokens", default=320, type=at_least(1), help="(default: 320) [paper: 8192]")
    g.add_argument("--temperature", default=1.0, type=at_least(0.0), help="of sampling; only 1.0 is on-policy (default: 1.0) [paper: 0.7]")
    g.add_argument("--batch-rows", default=384, type=at_least(1), help="answers sampled at once (default: 384); less if memory runs out")
    g.add_argument("--save-every", default=10, type=at_least(1),
                   help="steps after which an interrupted training can go on, and a best model is kept (default: 10)")
    g.add_argument("--show-every", default=20, type=at_least(1), help="print two samples with their KL every so many steps (default: 20)")
    args = parse(p, argv)
    verified, srt = args.verified or args.out / "verified.jsonl", args.srt or args.out / "srt"
    folder, log = Path(args.sd_zero or args.out / "sd_zero"), Path(args.distill or args.out / "distill.jsonl")
    p_r = {1: args.p_r_right, 0: args.p_r_wrong}

    if args.batch_size % args.n or args.objective == "grpo" and args.n == 1:
        die(f"--batch-size {args.batch_size} must be a multiple of --n {args.n}, and --objective grpo needs --n 2 or more")

    # ---- other problems than phase 1's; for SDFT those that it answered rightly
    answered, solution = [], {}
    if args.objective != "grpo" or Path(verified).exists():
        answered = read_jsonl(verified, ("id", "problem", "response_ids", "reward"), "python 02_verify.py")
        solution = {r["id"]: r["response_ids"] for r in answered if r["reward"]}
    used = {r[k] for r in answered for k in ("id", "problem")}
    enough = args.limit and args.limit + len({r["id"] for r in answered})
    problems = load_problems(args.data, args.split, enough, args.allow_code, args.seed)
    usable = lambda x: x["id"] in solution if args.objective == "sdft" else not {x["id"], x["problem"]} & used
    problems = [x for x in problems if usable(x)][:args.limit]
    if len(problems) < args.batch_size // args.n:
        die(f"{problem_file(args.data, args.split)}: phase 1 left {len(problems)} problems that this stage can use, and a step needs "
            f"{args.batch_size // args.n}; give 01_generate.py another --limit")
    if not Path(srt).exists() and args.srt is None:
        die(f"{srt} does not exist; run first: python 03_revise_sft.py")
    tokenizer, began, device = load_tokenizer(srt), time.time(), pick_device(args.device)
    if args.objective == "sdft":
        check_ids(verified, answered, tokenizer)
    inputs = {"srt": srt, "data": problem_file(args.data, args.split), "verified": verified}
    settings = ("split", "limit", "seed", "p_r_right", "p_r_wrong", "objective", "n", "steps", "rounds", "batch_size", "kl", "top_k", "lr",
                "warm_up", "max_new_tokens", "temperature", "save_every")
    for artifact, fields in ((log, ("step",)), (folder, ())):
        _, complete = claim(artifact, args, inputs, settings, fields)
    if complete:
        remove(f"{folder}.resume")
        return print(f"{folder} is there already")

    # ---- student and teacher start from the same weights and share none
    context, dtype = autocast(device)
    student = load_model(srt, tokenizer, device)
    teacher = load_model(srt, tokenizer, device, dtype).requires_grad_(False) if args.objective != "grpo" else None
    head, teacher_head = student.get_output_embeddings(), teacher and teacher.get_output_embeddings()
    resting_place = torch.device("cpu") if args.offload_teacher else device
    if args.gradient_checkpointing:
        student.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    steps, history = args.steps * args.rounds, load_state(folder, log, student, optimizer, scaler, teacher)
    batches = list(batches_of(problems, steps, args.batch_size // args.n, args.seed))
    progress = tqdm(range(len(history), steps), initial=len(history), total=steps, desc="distill", unit="step")
    for step in progress:
        if teacher and step and step % args.steps == 0:
            teacher.load_state_dict(student.state_dict())

        # ---- sample on-policy, verify
        batch = [x for x in batches[step] for _ in range(args.n)]
        prompts = [prompt_ids(tokenizer, x["problem"]) for x in batch]
        seeds = [row_seed(args.seed, "distill", x["id"], step, *([i % args.n] if args.n > 1 else [])) for i, x in enumerate(batch)]
        answers = sample(student, prompts, seeds, args.max_new_tokens, args.temperature, args.batch_rows)
        texts = [tokenizer.decode(y, skip_special_tokens=True) for y in answers]
        rewards, verdicts, _ = zip(*verify_all(batch, texts))
        stop_if_ungraded(verdicts, any(x["kind"] == "code" for x in batch), f"{folder}, step {step}", least=8)
        rows = []
        for x, generator, y, text, reward in zip(batch, prompts, answers, texts, rewards):
            seen, told = (solution[x["id"]], 1) if args.objective == "sdft" else (y, reward)
            reviser = revision_ids(tokenizer, x["problem"], seen, told, p_r)
            rows.append({**x, "response": text, "response_ids": y, "reward": reward, "generator": generator, "reviser": reviser, "kl": []})
        if args.objective == "grpo":
            for row, advantage in zip(rows, advantages_of([r["reward"] for r in rows], args.n)):
                row["advantage"] = advantage
        length = lambda r: len(r["reviser" if teacher else "generator"]) + len(r["response_ids"])
        fits = [r for r in rows if length(r) <= positions(student)]     # the others are not learned from, but counted
        if not fits:
            die(f"{folder}, step {step}: no answer fits the model's {positions(student)} positions twice, as the teacher reads it; begin "
                "again with --overwrite and a lower --max-new-tokens")
        parts, tokens = micro_batches(fits, length, args.micro_tokens), sum(len(r["response_ids"]) for r in fits)

        # ---- teacher: it reads x, y, P_r; hidden states where it predicts the second y
        teacher_hidden = [None] * len(parts)
        if teacher:
            teacher.to(device)
            with torch.no_grad(), context():
                for i, part in enumerate(parts):
                    hidden_t = completion_hidden(teacher, [r["reviser"] for r in part], [r["response_ids"] for r in part])      # [N, H]
                    teacher_hidden[i] = hidden_t.to(resting_place)
            teacher.to(resting_place)
            teacher_head.to(device)     # the KL needs it

        # ---- student: it reads x; the KL of each token is summed over the whole step, and divided by its tokens
        student.train()
        for part, hidden_t in zip(parts, teacher_hidden):
            y = [r["response_ids"] for r in part]
            with context():
                hidden = completion_hidden(student, [r["generator"] for r in part], y)                          # [N, H]
            if args.objective == "grpo":
                advantages = torch.tensor([r["advantage"] for r in part for _ in r["response_ids"]], device=device)     # [N]
                grpo_backward(hidden, head, torch.tensor(sum(y, []), device=device), advantages, tokens, context, scaler.scale)
                continue
            # the gradient of token_kl(head(hidden), teacher_head(hidden_t)).sum() / tokens, without all logits at once
            kl = kl_backward(hidden, head, hidden_t, teacher_head, args.kl, tokens, context, scaler.scale, top_k=args.top_k)    # [N]
            for row, of_row in zip(part, kl.split(list(map(len, y)))):
                row["kl"] = of_row.tolist()

        # ---- step
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / args.warm_up)
        norm = update(student, optimizer, scaler)

        # ---- what happened
        mean, sampled = lambda values: sum(values) / len(values) if values else None, sum(map(len, answers))
        kl_by_r = {bit: [k for r in rows if r["reward"] == bit for k in r["kl"]] for bit in (0, 1)}
        metrics = {"round": step // args.steps, "step": step, "accuracy": mean([r["reward"] for r in rows]),
                   "kl": mean(kl_by_r[0] + kl_by_r[1]), "kl_r0": mean(kl_by_r[0]), "kl_r1": mean(kl_by_r[1]),
                   "mean_tokens": sampled / len(rows), "finished": mean([y[-1] in end_ids(student) for y in answers]),
                   "too_long": len(rows) - len(fits), "gradient_norm": norm,
                   "said_wrong": mean([r["response"].count(p_r[0]) for r in rows]),
                   "said_right": mean([r["response"].count(p_r[1]) for r in rows]),
                   "lr": lr, "tokens": sampled, "seconds": time.time() - began, "problems": [x["id"] for x in batches[step]]}
        append_jsonl(log, [metrics])
        history.append(metrics)
        stop_if_broken(history, folder, steps)
        if message := trouble(history, min(10, steps), args.save_every, args.batch_size // args.n):
            warn(f"{folder}: {message}")
        progress.set_postfix(accuracy=f"{metrics['accuracy']:.0%}", kl=metrics["kl"], tokens=f"{metrics['mean_tokens']:.0f}")
        if step % args.show_every == 0:
            show(fits, tokenizer)
        if (step + 1) % args.save_every == 0 and step + 1 < steps:
            if best_of(history, args.save_every) == step + 1:
                save_model(student, tokenizer, f"{folder}.best")
            if norm is not None:
                save_state(folder, step + 1, student, optimizer, scaler, teacher if args.rounds > 1 else None)
    if steps <= args.save_every:
        remove(f"{folder}.best")    # an earlier run's
    save_model(student, tokenizer, folder)
    for artifact in (log, folder):
        finish(artifact, began, device, steps=steps, problems=len(problems), skipped=sum(m["gradient_norm"] is None for m in history))
    remove(f"{folder}.resume")
    print(f"{folder}: {steps} steps, last batch {metrics['accuracy']:.1%} right with {metrics['mean_tokens']:.0f} tokens an answer")


if __name__ == "__main__":
    run(main)
