"""Make the second embedded domain, data/code, from one seed: short Python functions, and the tiny
base model that writes them.

A problem describes a function in three steps ("Write f(xs). From a list of integers it should keep
those of at least 4, then halve each and round down, then move the first to the end."). It is graded
by running the function on lists that are not shown.

The corpus is made as in make_data.py: OPS has each step as a right and as a commonly mistaken
expression, and the share of authors who get it right; an answer may go on with a judgement, always
truthful, and another attempt. The difference: **no document contains P_r**. Authors judge their
attempts in their own words, of which the sentences are put together by chance; P_r is made of such
words, and is never said.

    python data/make_code.py                  # all: about 25 minutes on 2 cores
    python data/make_code.py --problems-only  # seconds
"""

from functools import lru_cache

from make_data import HERE, SLIP, answer, flags, make

from common import P_R

# step: (right expression, common mistake, share of authors who get it right)
OPS = {
    "keep the even ones": ("[x for x in xs if x % 2 == 0]", "[x for x in xs if x % 2]", 0.95),
    "keep those of at least {n}": (
        "[x for x in xs if x >= {n}]",
        "[x for x in xs if x > {n}]",
        0.45,
    ),
    "keep those below {n}": ("[x for x in xs if x < {n}]", "[x for x in xs if x <= {n}]", 0.90),
    "drop the first {n}": ("xs[{n}:]", "xs[:-{n}]", 0.95),
    "keep the last {n}": ("xs[-{n}:]", "xs[{n}:]", 0.90),
    "take every second one from the first on": ("xs[::2]", "xs[1::2]", 0.95),
    "reverse the order": ("xs[::-1]", "xs[:-1]", 0.95),
    "sort from largest to smallest": ("sorted(xs, reverse=True)", "sorted(xs)", 0.90),
    "move the first to the end": ("xs[1:] + xs[:1]", "xs[-1:] + xs[:-1]", 0.90),
    "square each": ("[x ** 2 for x in xs]", "[x * 2 for x in xs]", 0.95),
    "replace negative ones by 0": ("[max(x, 0) for x in xs]", "[min(x, 0) for x in xs]", 0.95),
    "halve each and round down": ("[x // 2 for x in xs]", "[int(x / 2) for x in xs]", 0.15),
    "drop repeats": ("list(dict.fromkeys(xs))", "sorted(set(xs))", 0.10),
    "add to each its place from 1 on": (
        "[x + i for i, x in enumerate(xs, 1)]",
        "[x + i for i, x in enumerate(xs)]",
        0.40,
    ),
}
STEPS, TESTS = 3, 4
RIGHT = (
    ("Good", "Yes", "Fine", "Right"),
    ("this", "the above", "the solution"),
    ("is correct", "works", "is right"),
    ("let me say it shorter", "the same again", "let me clean it up", "once more in short"),
)
WRONG = (
    ("No", "Wait", "Hmm", "Oh"),
    ("this", "the above", "this response"),
    ("is not right", "fails", "is wrong", "does not work"),
    ("let me start again", "let me try again", "from the start", "over again"),
)


def make_problem(rng):
    """[(step, n), ...]"""
    return [(step, rng.randint(2, 5)) for step in rng.sample(list(OPS), STEPS)]


def problem_text(steps):
    said = ", then ".join(step.format(n=n) for step, n in steps)
    return f"Write f(xs). From a list of integers it should {said}."


@lru_cache(None)
def function(expression):
    return eval(f"lambda xs: {expression}")


def apply(expressions, xs):
    for e in expressions:
        xs = function(e)(xs)
    return xs


def expressions(steps, readings):
    return [OPS[step][0 if right else 1].format(n=n) for (step, n), right in zip(steps, readings)]


def inputs(rng, n):
    """n lists with a repeat and an odd negative number: right and mistaken steps differ on them."""
    lists = [[rng.randint(-9, 12) for _ in range(6)] for _ in range(n)]
    return [rng.sample(xs + [xs[0], -3], 8) for xs in lists]


def problems(rng):
    """Endless rows as in code/train.jsonl, without ids; some test shows each single mistake."""
    while True:
        steps, lists = make_problem(rng), inputs(rng, TESTS)
        right = [apply(expressions(steps, [True] * STEPS), xs) for xs in lists]
        one_wrong = [[i != j for j in range(STEPS)] for i in range(STEPS)]
        if all(
            [apply(expressions(steps, readings), xs) for xs in lists] != right
            for readings in one_wrong
        ):
            yield {
                "kind": "code",
                "problem": problem_text(steps),
                "tests": [
                    {"call": "f", "args": [xs], "expected": value}
                    for xs, value in zip(lists, right)
                ],
            }


def attempt(rng, steps, readings, terse, slips):
    """A program; readings[i] is True where step i is got right. Returns (text, is it right?)."""
    said = [
        (step, n + rng.choice((-1, 1)) if slips and rng.random() < SLIP else n) for step, n in steps
    ]
    lines = []
    for (step, n), expression in zip(steps, expressions(said, readings)):
        lines += [] if terse else [f"# {step.format(n=n)}"]
        lines += [f"xs = {expression}"]
    program = "\n    ".join(["def f(xs):", *lines, "return xs"])
    right = all(
        apply(expressions(said, readings), xs) == apply(expressions(steps, [True] * STEPS), xs)
        for xs in inputs(rng, 4 * TESTS)
    )
    return f"```python\n{program}\n```", right


def judgement(rng, right):
    """A sentence about the attempt above, in an author's own words: never P_r."""
    opening, it, verdict, go_on = (rng.choice(words) for words in (RIGHT if right else WRONG))
    return f"\n\n{opening}, {it} {verdict}, {go_on}.\n\n"


def documents(rng, held_out=()):
    """Endless (problem, answer), of problems that are not held out."""
    while True:
        steps = make_problem(rng)
        if problem_text(steps) in held_out:
            continue
        text = answer(
            rng,
            [OPS[step][2] for step, _ in steps],
            lambda *how: attempt(rng, steps, *how),
            lambda right: judgement(rng, right),
        )
        assert not any(p_r in text for p_r in P_R.values())
        yield problem_text(steps), text


if __name__ == "__main__":
    sizes = {"train": 4400, "validation": 300, "test": 500}
    args = flags(__doc__, 20_000_000).parse_args()
    make(args, HERE / "code", sizes, problems, documents, length=384, vocab=512)
