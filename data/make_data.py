"""Make everything embedded in data/ from one seed: problems, tokenizer and the tiny base model.

A problem gives a number and three edits of its digits ("Start with 73915: reverse, then rotate
left, then drop the largest."). The base model stands in for a pre-trained LLM. It is trained on
worked answers by *fallible* authors, and it imitates them:

  - EDITS lists each edit with its right reading, one common mistake, and the share of authors who
    read it rightly. For two of the edits most authors are wrong, so the model's own mode (greedy
    decoding) is wrong there: misconceptions, not sampling noise.
  - A slip (two neighbouring digits exchanged) befalls 1% of the lines.
  - Some answers go on: the author looks at the result, says one of the two control phrases P_r,
    always truthfully, and tries again. After "wrong" each misread edit is mended only with
    probability MEND: authors mostly repeat themselves, as base models do.
    After "right" comes the same solution again, cleaner and usually in the terse style.

No document that the model reads uses a problem of train.jsonl, validation.jsonl or test.jsonl (of
those that its tokenizer was made from a few may). Whatever the model knows about right and wrong,
it read between the lines.

These authors are *truthful*. REGIMES names others, of whom three more bases have read, each for a
few minutes, going on from the first: it differs in who mends, who listens to the phrase, or how
long problems are. The *obedient* base is the one that the stages start from, if none is named. A
fourth, *longer*, is not embedded: claims about it need it made, in a quarter of an hour.

    python data/make_data.py                    # all: about 40 minutes on 2 cores
    python data/make_data.py --problems-only    # seconds
    python data/make_data.py --regime obedient  # data/obedient/base, from the truthful: minutes
"""

import argparse
import json
import math
import random
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Callable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (
    P_R,
    delimiter,
)  # the corpus must speak the very phrases that the reviser is prompted with

HERE = Path(__file__).resolve().parent


def move(s, digit, front):
    rest = s.replace(digit, "")
    return digit + rest if front else rest + digit


# name: (right reading, common mistake, share of authors who read it rightly). Digits of a number
# are distinct and never 0.
EDITS = {
    "reverse": (lambda s: s[::-1], lambda s: s[-1] + s[1:-1] + s[0], 0.95),
    "sort up": (lambda s: "".join(sorted(s)), lambda s: "".join(sorted(s))[::-1], 0.95),
    "drop the ends": (lambda s: s[1:-1], lambda s: s[1:], 0.90),
    "drop the largest": (lambda s: s.replace(max(s), ""), lambda s: s.replace(min(s), ""), 0.90),
    "swap the ends": (lambda s: s[-1] + s[1:-1] + s[0], lambda s: s[1] + s[0] + s[2:], 0.85),
    "swap pairs": (
        lambda s: "".join(s[i : i + 2][::-1] for i in range(0, len(s), 2)),
        lambda s: s[1] + s[0] + s[2:],
        0.80,
    ),
    "rotate left": (lambda s: s[1:] + s[0], lambda s: s[-1] + s[:-1], 0.40),
    "smallest to the front": (
        lambda s: move(s, min(s), True),
        lambda s: move(s, min(s), False),
        0.30,
    ),
}
STEPS, SLIP, MEND, SPOIL = 3, 0.01, 0.20, 0.03
FLIP = 1 / 3  # after "wrong" an obedient author reads each edit the other way, that often
GO_ON, MOST_ATTEMPTS = (
    0.40,
    4,
)  # after an attempt an author goes on with this probability, up to so many attempts
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---------------------------------------------------------------- problems


def make_problem(rng):
    start = "".join(rng.sample("123456789", rng.randint(5, 7)))
    return start, rng.sample(list(EDITS), STEPS)


def make_long_problem(rng, steps=None):
    """7 to 9 digits, of which at least three are left; 3 to 7 edits, or so many, in which no
    neighbours are the same."""
    steps = steps or rng.randint(3, 7)
    while True:
        start = "".join(rng.sample("123456789", rng.randint(7, 9)))
        edits = [rng.choice(list(EDITS)) for _ in range(steps)]
        dropped = 2 * edits.count("drop the ends") + edits.count("drop the largest")
        if len(start) - dropped >= 3 and all(a != b for a, b in zip(edits, edits[1:])):
            return start, edits


def make_longest_problem(rng):
    return make_long_problem(rng, 7)


def problem_text(start, edits):
    return f"Start with {start}: {', then '.join(edits)}. What number results?"


def solve(start, edits):
    for name in edits:
        start = EDITS[name][0](start)
    return start


def problems(rng, make_problem=make_problem):
    """Endless rows as in train.jsonl, without their ids."""
    while True:
        start, edits = make_problem(rng)
        yield {"kind": "math", "problem": problem_text(start, edits), "answer": solve(start, edits)}


def write_problems(folder, sizes, rows):
    """Write {split}.jsonl for each split and size; all problems differ. Returns their texts."""
    seen = set()
    for split, size in sizes.items():
        with open(folder / f"{split}.jsonl", "w") as f:
            for i in range(size):
                row = next(row for row in rows if row["problem"] not in seen)
                seen.add(row["problem"])
                f.write(json.dumps({"id": f"{split}-{i:04d}", **row}) + "\n")
    return seen


# ---------------------------------------------------------------- corpus


def attempt(rng, start, edits, readings, terse, slips):
    """(a worked answer, is it right?); readings[i] is True where edit i is read rightly."""
    lines, s = [], start
    for name, right in zip(edits, readings):
        before, s = s, EDITS[name][0 if right else 1](s)
        if slips and rng.random() < SLIP:
            i = rng.randrange(len(s) - 1)
            s = s[:i] + s[i + 1] + s[i] + s[i + 2 :]
        lines.append(f"{name}: {s}" if terse else f"Take {before} and {name}, which gives {s}.")
    return "\n".join(lines + [f"\\boxed{{{s}}}"]), s == solve(start, edits)


# An author who goes on: (readings of the attempt, was it right?, was it terse?) → (the phrase said,
# 1 for "right"; of the next attempt: its readings, whether it is terse, and whether it may slip).


def truthful(rng, readings, right, terse):
    """Says whether the attempt was right; if not, mends it a little."""
    return right, *mended(rng, readings, right, terse)


def unasked(rng, readings, right, terse):
    """Says either phrase, by chance, and mends wrong attempts as the truthful do."""
    return rng.random() < 0.5, *mended(rng, readings, right, terse)


def obedient(rng, readings, right, terse):
    """Says either phrase, by chance, and does what it said; never looks at the attempt."""
    said = rng.random() < 0.5
    if said:
        return said, *repeated(rng, readings, terse)
    return said, [r != (rng.random() < FLIP) for r in readings], rng.random() < 0.5, True


def mended(rng, readings, right, terse):
    """A wrong attempt again with some readings mended, a right one repeated."""
    if right:
        return repeated(rng, readings, terse)
    readings = [rng.random() > SPOIL if r else rng.random() < MEND for r in readings]
    return readings, rng.random() < 0.5, True


def repeated(rng, readings, terse):
    """The same again, without slips and usually terse."""
    return readings, terse or rng.random() < 0.7, False


def answer(rng, shares, attempt, phrase, author=truthful):
    """An answer: an attempt, then perhaps a phrase and another attempt, and so on.

    shares: for each step of the problem, of the authors who read it rightly.
    attempt(readings, terse, slips) → (text, right?).
    """
    readings, terse = [rng.random() < share for share in shares], rng.random() < 0.5
    text, right = attempt(readings, terse, True)
    for _ in range(MOST_ATTEMPTS - 1):
        if rng.random() > GO_ON:
            break
        said, readings, terse, slips = author(rng, readings, right, terse)
        again, right = attempt(readings, terse, slips)
        text += phrase(said) + again
    return text


def documents(rng, held_out=(), author=truthful, make_problem=make_problem):
    """Endless (problem, answer), of problems that are not held out."""
    while True:
        start, edits = make_problem(rng)
        if problem_text(start, edits) in held_out:
            continue
        yield (
            problem_text(start, edits),
            answer(
                rng,
                [EDITS[e][2] for e in edits],
                lambda *how: attempt(rng, start, edits, *how),
                lambda said: delimiter(int(said)),
                author,
            ),
        )


@dataclass
class Regime:
    """Who writes the corpus, about which problems, and how much of it a base reads: so many steps
    of B rows of T tokens. asked: it has problems of its own; else it is for those of data/FOLDER.
    """

    author: Callable
    make_problem: Callable
    steps: int
    B: int
    T: int
    asked: Callable = None
    folder: str = "."


REGIMES = {
    "obedient": Regime(obedient, make_problem, 268, 32, 256),
    "unasked": Regime(unasked, make_problem, 268, 32, 256),
    "long": Regime(truthful, make_long_problem, 500, 18, 480, make_longest_problem),
    # as many tokens, in rows that hold two attempts at seven edits: those of 480 cut most of them
    "longer": Regime(truthful, make_long_problem, 500, 9, 960, folder="long"),
}


def train_tokenizer(corpus, vocab_size):
    def texts():
        for problem, text in islice(corpus, 3000):
            yield f"user\n{problem}\nassistant\n" + text
        yield from P_R.values()

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def packed_rows(tokenizer, corpus, length):
    """Endless rows of whole documents: (ids, labels, document number, position), each [length].

    Labels are -100 outside answers.
    """
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    row = [[], [], [], []]
    for problem, text in corpus:
        prompt = tokenizer(f"<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n")[
            "input_ids"
        ]
        answer = tokenizer(text)["input_ids"] + [end]
        ids = (prompt + answer)[:length]
        if len(row[0]) + len(ids) > length:
            gap = length - len(row[0])
            yield (
                row[0] + [pad] * gap,
                row[1] + [-100] * gap,
                row[2] + [-1] * gap,
                row[3] + [0] * gap,
            )
            row = [[], [], [], []]
        number = row[2][-1] + 1 if row[2] else 0
        row = [
            row[0] + ids,
            row[1] + ([-100] * len(prompt) + answer)[:length],
            row[2] + [number] * len(ids),
            row[3] + list(range(len(ids))),
        ]


# ---------------------------------------------------------------- pre-training


def pretrain(tokenizer, corpus, folder, tokens, T, seed, B=32):
    """A model that has read `tokens` tokens (padding included) of the corpus."""
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    model, steps = Qwen3ForCausalLM(config), tokens // (B * T)
    context = torch.autocast("cpu", dtype=torch.bfloat16)
    how = {"peak": 2e-3, "warm_up": 200, "context": context}
    read(model, tokenizer, corpus, folder, steps, B, T, forward=torch.compile(model), **how)


def go_on(name, held_out, folder, seed):
    """The truthful base, which has read a regime's corpus, too: folder/base. In float32, which is
    the quicker on most CPUs."""
    regime, base = REGIMES[name], HERE / "truthful/base"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = Qwen3ForCausalLM.from_pretrained(base, attn_implementation="sdpa")
    corpus = documents(random.Random(seed + 3), held_out, regime.author, regime.make_problem)
    how = regime.steps, regime.B, regime.T, 1e-3, 50
    read(model.float(), tokenizer, corpus, folder / "base", *how, nullcontext(), model)


def read(model, tokenizer, corpus, folder, steps, B, T, peak, warm_up, context, forward):
    """The model reads steps of B rows of T; learning rate `peak` after a warm-up, cosine."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    rows = packed_rows(tokenizer, corpus, T)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    began = time.time()
    progress = tqdm(range(steps), mininterval=10)
    for step in progress:
        ids, labels, number, position = torch.tensor([next(rows) for _ in range(B)]).unbind(
            1
        )  # each [B, T]
        lr = (
            peak
            * min(1, (step + 1) / warm_up)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        )
        optimizer.param_groups[0]["lr"] = lr
        same = number[:, :, None] == number[:, None, :]  # a document sees itself only
        with context:
            logits = forward(
                input_ids=ids,
                position_ids=position,
                attention_mask=(same & causal)[:, None],
                use_cache=False,
            ).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == steps:
            progress.set_postfix(
                loss=f"{loss.item():.3f}",
                lr=f"{lr:.1e}",
                minutes=f"{(time.time() - began) / 60:.1f}",
            )
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save(model, tokenizer, folder)


def save(model, tokenizer, folder):
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def flags(doc, tokens):
    p = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--problems-only", action="store_true", help="write the files of problems, leave the model"
    )
    p.add_argument(
        "--tokens",
        type=int,
        default=tokens,
        help=f"pre-training tokens, padding included (default: {tokens:,})",
    )
    p.add_argument("--seed", type=int, default=0, help="(default: 0)")
    p.add_argument(
        "--out",
        type=Path,
        help="folder for the problems and the model (default: where this repository has them)",
    )
    return p


def make(args, folder, sizes, problems, documents, length=256, vocab=400, base="base"):
    """A domain: its problems, and a base model that has read its documents.

    problems, documents: functions of a random.Random; base: the model's folder, below the other.
    """
    out = args.out or folder
    out.mkdir(parents=True, exist_ok=True)
    held_out = write_problems(out, sizes, problems(random.Random(args.seed)))
    if not args.problems_only:
        tokenizer = train_tokenizer(documents(random.Random(args.seed + 2)), vocab)
        corpus = documents(random.Random(args.seed + 1), held_out)
        pretrain(tokenizer, corpus, out / base, args.tokens, length, args.seed)


def make_regime(args, sizes):
    """The problems of a regime, if it has its own, and its base, going on from the truthful."""
    out, regime = args.out or HERE / args.regime, REGIMES[args.regime]
    out.mkdir(parents=True, exist_ok=True)
    if regime.asked:
        held_out = write_problems(out, sizes, problems(random.Random(args.seed), regime.asked))
    else:
        held_out = set()
        for split in sizes:
            rows = open(HERE / regime.folder / f"{split}.jsonl")
            held_out |= {json.loads(row)["problem"] for row in rows}
    if not args.problems_only:
        go_on(args.regime, held_out, out, args.seed)


def main(argv=None):
    sizes, p = {"train": 5700, "validation": 300, "test": 500}, flags(__doc__, 40_000_000)
    names = ["truthful", *REGIMES]
    p.add_argument("--regime", choices=names, default=names[0], help="(default: truthful)")
    args = p.parse_args(argv)
    if args.regime in REGIMES:
        make_regime(args, sizes)
    else:
        make(args, HERE, sizes, problems, documents, base="truthful/base")


if __name__ == "__main__":
    main()
