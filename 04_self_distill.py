"""Stage 4 of SD-Zero, on-policy self-distillation: the Reviser teaches the Generator.

    y ~ π_θ(· | x),  r = verify(y, a)
    L(θ) = Σ_t D_KL( π_θ(· | x, y_<t) ‖ π_SRT(· | x, y, P_r, y_<t) )     whole vocabulary, float32

    student   chat(x) + y
                        ▔ scored: every token of y, its end token too
    teacher   chat(x) + y (no end token) + "\\n\\n" P_r "\\n\\n" + y
                                                               ▔ the same tokens of the second y

A step's loss is the sum over all its tokens, divided by their number. The teacher has read the
whole answer and whether it was right, the student has not: so one bit per answer becomes a
distribution at every token. The gradient goes through the student only, and not through sampling.
The teacher is frozen at θ_SRT; each further round starts with teacher := student. srt/, problems
that phase 1 did not use → sd_zero/, distill.jsonl (a row per step), sd_zero.best/ (see save).

    python 04_self_distill.py
    python 04_self_distill.py --from runs/demo --out runs/no_srt --start base     # no phase 1
"""

import random
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import all_ranks, as_teacher, check_memory, check_prompt, copy_weights, deal, evened
from common import arguments, already_made, die, find, finish, parse, read_jsonl, run_stage, warn
from common import autocast, end_ids, load_model, load_tokenizer, pick_device, positions, save_model
from common import backward_through_head, completion_hidden, log_step, micro_batches, update
from common import load_problems, load_state, prompt_ids, revision_ids, row_seed, sample, save_state
from common import gather_rows, sampling, sampling_flags, shard, stop_if_ungraded, verify_all


# ---------------------------------------------------------------- the loss


def token_kl(student_logits, teacher_logits, kind="reverse"):
    """KL at each position, summed over the vocabulary: [..., V], [..., V] → [...], in float32.

    reverse is KL(student‖teacher), the paper's; forward KL(teacher‖student); mixed half of each.
    """
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    log_s = student_logits.to(wide).log_softmax(-1)
    log_t = teacher_logits.to(wide).log_softmax(-1)
    reverse = (log_s.exp() * (log_s - log_t)).sum(-1)
    if kind == "reverse":
        return reverse
    forward = (log_t.exp() * (log_t - log_s)).sum(-1)
    return forward if kind == "forward" else 0.5 * forward + 0.5 * reverse


def kl_backward(hidden, head, hidden_t, head_t, kind, tokens, context=nullcontext, **how):
    """Backward of token_kl(head(hidden), head_t(hidden_t)).sum() / tokens through the student.

    hidden, hidden_t (the teacher's): [N, H], of which a chunk has logits at a time → the KL, [N].
    """
    token_kls = []

    def loss_of(student_logits, at):
        with torch.no_grad(), context():
            teacher_logits = head_t(hidden_t[at].to(student_logits.device))
        kl = token_kl(student_logits, teacher_logits, kind)
        token_kls.append(kl.detach())
        return kl.sum() / tokens

    backward_through_head(hidden, head, loss_of, context, **how)
    return torch.cat(token_kls)


# ---------------------------------------------------------------- the answers of a step


def batches_of(problems, steps, size, seed):
    """Batches of different problems: shuffled passes over all, each without a short last one."""
    rng, queue = random.Random(seed), []
    for _ in range(steps):
        if len(queue) < size:
            queue = rng.sample(problems, len(problems))
        yield queue[:size]
        queue = queue[size:]


def rollouts(student, tokenizer, batch, step, args):
    """y ~ π_θ(· | x) and r for these problems, with the two prefixes that y is scored after."""
    prompts = [prompt_ids(tokenizer, x["problem"]) for x in batch]
    seeds = [row_seed(args.seed, "distill", x["id"], step) for x in batch]
    answers = sample(student, prompts, seeds, **sampling(args))
    texts = [tokenizer.decode(y, skip_special_tokens=True) for y in answers]
    graded = list(verify_all(batch, texts))
    rewards = [reward for reward, _, _ in graded]
    verdicts = sum(all_ranks([verdict for _, verdict, _ in graded]), [])
    stop_if_ungraded(verdicts, batch, f"{args.out}, step {step}", least=8)
    rows = []
    for x, generator, y, text, r in zip(batch, prompts, answers, texts, rewards):
        reviser = revision_ids(tokenizer, x["problem"], y, r, args.p_r)
        row = {**x, "response": text, "response_ids": y, "finished": y[-1] in end_ids(student)}
        rows.append({**row, "reward": r, "generator": generator, "reviser": reviser, "kl": []})
    return rows


def length(row):
    """How many tokens the teacher reads: y counts twice."""
    return len(row["reviser"]) + len(row["response_ids"])


def hidden_after(prefix, rows, model):
    """Hidden states where the tokens of y are predicted, after each row's `prefix`: [N, H]."""
    return completion_hidden(model, [r[prefix] for r in rows], [r["response_ids"] for r in rows])


def mean(values):
    return sum(values) / len(values) if values else None


def metrics_of(rows, p_r):
    """The metrics of a step's answers, sampled before its update; kl in nats per token."""
    kls = {bit: sum((r["kl"] for r in rows if r["reward"] == bit), []) for bit in (0, 1)}
    tokens = sum(len(r["response_ids"]) for r in rows)
    return {
        "accuracy": mean([r["reward"] for r in rows]),
        "kl": mean(kls[0] + kls[1]),
        "kl_r0": mean(kls[0]),
        "kl_r1": mean(kls[1]),
        "tokens": tokens,
        "mean_tokens": tokens / len(rows),
        "finished": mean([r["finished"] for r in rows]),
        "said_wrong": mean([r["response"].count(p_r[0]) for r in rows]),
        "said_right": mean([r["response"].count(p_r[1]) for r in rows]),
        "problems": [r["id"] for r in rows],
    }


def show(rows, tokenizer):
    """A wrong and a right answer of median length, tokens followed by their KL where ≥ 0.1 nats."""
    for bit in (0, 1):
        kind = sorted((r for r in rows if r["reward"] == bit), key=length)
        if kind:
            row = kind[len(kind) // 2]
            text = f"\n── {row['problem']}  [r = {bit}, KL {sum(row['kl']):.2f}]\n"
            for token, kl in zip(row["response_ids"], row["kl"]):
                text += tokenizer.decode([token]) + (f"⟨{kl:.1f}⟩" if kl >= 0.1 else "")
            tqdm.write(text)


def save(folder, history, tokenizer, args, state, last):
    """The state to go on from, and .best: of the saves, that after the best three batches."""
    right, every = torch.tensor([m["accuracy"] for m in history]), args.save_every
    ends = range(every, len(history) + 1, every)
    recent = [right[max(end - 3, end - every) : end].mean().item() for end in ends]
    if recent[-1] < 0.85 * max(recent):
        warn(f"{folder}: right were {max(recent):.1%}, now {recent[-1]:.1%}; see {folder}.best")
    if not last and recent[-1] == max(recent):
        save_model(state["model"], tokenizer, f"{folder}.best")
    if not last and history[-1]["gradient_norm"] is not None:
        save_state(folder, len(history), **state)


# ---------------------------------------------------------------- a check before training

SURE, DOUBT = 0.9, 0.01  # a probability; nats less than the generator
LISTENS, UNLEARNS = 0.1, 0.04  # a share of the answers; of the tokens


def log_probs(head, hidden, y):
    """log π(y), a chunk of logits at a time: [N, H], [N] → [N]."""
    chunks = zip(hidden.split(256), y.split(256))
    return torch.cat([-F.cross_entropy(head(h).float(), t, reduction="none") for h, t in chunks])


def check(teacher, head, tokenizer, parts, taught, args):
    """Say of the first batch: does the reviser listen to P_r, and does it doubt what the generator
    knows, tokens of right answers that it is sure of? parts, taught: as in main."""
    rows, known, doubted = sum(parts, []), 0, 0
    seeds = [row_seed(args.seed, "check", x["id"]) for x in rows]
    counts = [len(rows), sum(x["reward"] for x in rows)]
    for lie in (0, 1):
        told = [(x["problem"], x["response_ids"], x["reward"] ^ lie, args.p_r) for x in rows]
        prefixes = [revision_ids(tokenizer, *x) for x in told]
        revised = sample(teacher, prefixes, seeds, **sampling(args))
        texts = [tokenizer.decode(y, skip_special_tokens=True) for y in revised]
        counts.append(sum(reward for reward, _, _ in verify_all(rows, texts)))
    for part, hidden_t in zip(parts, taught):
        of_token = [(y, x["reward"]) for x in part for y in x["response_ids"]]
        y, r = torch.tensor(of_token, device=teacher.device).reshape(-1, 2).long().T  # [N], [N]
        log_p = log_probs(head, hidden_after("generator", part, teacher), y)
        sure = (r == 1) & (log_p.exp() > SURE)
        known += sure.sum().item()
        log_t = log_probs(head, hidden_t.to(y.device), y)
        doubted += (sure & (log_t < log_p - DOUBT)).sum().item()
    n, right, truth, opposite, known, doubted = map(sum, zip(*all_ranks([*counts, known, doubted])))
    tqdm.write(f"right: {right / n:.0%}; revised: {truth / n:.0%}, told a lie: {opposite / n:.0%}")
    tqdm.write(f"of {known:,} sure and right tokens it doubts {doubted / max(1, known):.1%}")
    if truth - opposite < LISTENS * n:
        warn("the reviser hardly listens to P_r, so the reward adds little; more of phase 1?")
    if doubted > UNLEARNS * known:
        warn("the reviser doubts what the generator knows: phase 2 may unlearn it; watch accuracy")


# ---------------------------------------------------------------- the algorithm


def load_student(start, tokenizer, device, args):
    student = load_model(start, tokenizer, device, lora=args.lora)
    if args.gradient_checkpointing:
        student.activation_checkpointing_enable()
    shard(student, samples=True)
    return student


def flags():
    p = arguments("04", __doc__)
    p.add_argument("--start", default="srt", choices=["srt", "base"], help="student and teacher")
    p.add_argument("--split", default="train", help="split of --data")
    p.add_argument("--limit", type=int, help="use the first so many problems that phase 1 left")
    p.add_argument("--steps", type=int, help="optimiser steps a round")
    p.add_argument("--rounds", type=int, default=1, help="after each, teacher := student")
    p.add_argument("--batch-size", type=int, help="answers a step, each to another problem")
    p.add_argument("--lr", type=float, help="constant, after warm-up")
    p.add_argument("--warm-up", type=int, help="steps until --lr is reached")
    kl = {"default": "reverse", "choices": ["reverse", "forward", "mixed"]}
    p.add_argument("--kl", **kl, help="KL(student‖teacher), KL(teacher‖student), half of each")
    sampling_flags(p)
    p.add_argument("--micro-tokens", type=int, default=2048, help="tokens a forward pass, at most")
    p.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    either = p.add_mutually_exclusive_group()  # an adapter's teacher is no other model
    either.add_argument("--offload-teacher", action="store_true", help="to the CPU, in between")
    either.add_argument("--lora", type=int, metavar="R", help="adapter of rank R, at 1e-4")
    p.add_argument("--save-every", type=int, default=10, help="steps between saves")
    return p


def main(argv=None):
    args = parse(flags(), argv)
    began, folder, log = time.time(), args.out / "sd_zero", args.out / "distill.jsonl"
    start, used = find(args, args.start), set()
    tokenizer, device = load_tokenizer(start), pick_device(args.device)
    check_prompt(args, tokenizer)
    check_memory(start, device, not args.offload_teacher, args.lora)

    # ---------------- problems that phase 1 did not use
    for row in read_jsonl(find(args, "responses.jsonl")):
        used |= {row["id"], row["problem"]}
    enough = args.limit and args.limit + len(used)
    problems = load_problems(args.data, args.split, enough, args.allow_code, args.seed)
    problems = [x for x in problems if not used & {x["id"], x["problem"]}][: args.limit]
    if len(problems) < args.batch_size:
        die(f"phase 1 left {len(problems)} problems, and a step needs {args.batch_size}")
    decides = "responses.jsonl split steps rounds batch_size lr warm_up kl max_new_tokens"
    decides += f" temperature top_p save_every lora {args.start}"
    if already_made(args, "sd_zero", decides, problems):
        return

    # ---------------- student and teacher start from the same weights
    context, dtype = autocast(device)
    student = load_student(start, tokenizer, device, args)
    teacher = student if args.lora else load_model(start, tokenizer, device, dtype)  # frozen
    head, head_t = student.get_output_embeddings(), teacher.get_output_embeddings()
    rest = torch.device("cpu") if args.offload_teacher else device  # where the teacher waits
    weights, betas = [p for p in student.parameters() if p.requires_grad], (0.9, 0.999)
    optimizer = torch.optim.AdamW(weights, args.lr, betas, weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = {"model": student, "optimizer": optimizer, "scaler": scaler}
    state |= {} if args.lora else {"teacher": teacher}
    history, steps = load_state(folder, log, **state), args.steps * args.rounds
    batches = list(batches_of(problems, steps, args.batch_size, args.seed))
    progress = tqdm(range(len(history), steps), "distill", steps, initial=len(history))
    for step in progress:
        if step % args.steps == 0:
            copy_weights(student, teacher)  # a new round

        # ---------------- sample y on-policy, verify r
        rows = rollouts(student, tokenizer, deal(batches[step]), step, args)  # this GPU's
        fits = [row for row in rows if length(row) <= positions(student)]
        parts = evened(micro_batches(fits, length, args.micro_tokens))
        tokens = sum(all_ranks(sum(len(row["response_ids"]) for row in fits)))  # on all GPUs
        if not tokens:
            die(f"no answer fits {positions(student)} positions twice; lower --max-new-tokens")

        # ---------------- the teacher reads x, y, P_r, y
        teacher.to(device)
        with torch.no_grad(), context(), as_teacher(teacher):
            taught = [hidden_after("reviser", part, teacher).to(rest) for part in parts]  # [N, H]
            if step == 0:
                check(teacher, head_t, tokenizer, parts, taught, args)
        teacher.to(rest)
        head_t.to(device)  # the KL needs it

        # ---------------- the student reads x, y: KL at each token of y
        student.train()
        for part, hidden_t in zip(parts, taught):
            with context():
                hidden = hidden_after("generator", part, student)  # [N, H]
            how = args.kl, tokens, context
            kl = kl_backward(hidden, head, hidden_t, head_t, *how, scaler=scaler)  # [N]
            for row, of_row in zip(part, kl.split([len(row["response_ids"]) for row in part])):
                row["kl"] = of_row.tolist()

        # ---------------- step, and what happened
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / args.warm_up)
        norm = update(student, optimizer, scaler)
        rows = gather_rows(rows)
        too_long = sum(length(row) > positions(student) for row in rows)
        metrics = {"round": step // args.steps, "step": step, **metrics_of(rows, args.p_r)}
        metrics |= {"too_long": too_long, "gradient_norm": norm, "lr": lr}
        log_step(log, history, metrics | {"seconds": time.time() - began}, progress)
        if step % 20 == 0:
            show(fits, tokenizer)
        if (step + 1) % args.save_every == 0:
            save(folder, history, tokenizer, args, state, last=step + 1 == steps)
    save_model(student, tokenizer, folder)
    finish(args, "sd_zero", began, device, steps=steps, problems=len(problems))


if __name__ == "__main__":
    run_stage(main)
