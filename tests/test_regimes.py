"""Each corpus has the property that it is named for, read from its texts."""

import random
import re
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

import analyses
import outcomes
from conftest import ROOT, common, load
from test_common import edits_of

digits = load("data/make_data.py")
SAID = {p_r: bit for bit, p_r in common.P_R.items()}
PHRASE = f"({'|'.join(map(re.escape, SAID))})"


def readings_of(problem, text):
    """Of an attempt, edit by edit: is it read rightly? None for a slip, or where both readings give
    the same."""
    row = {"problem": problem, "response": text.strip()}
    for _, right, usual, stated in analyses.lines_of(row, digits.EDITS):
        same = right == usual or stated[0] not in (right, usual)
        yield None if same else stated[0] == right


@pytest.fixture(params=[digits.truthful, digits.unasked, digits.obedient])
def said_and_kept(request):
    """(the author, {is an attempt right?: what was then said}, {(is an attempt right?, what was
    said, was this edit read rightly?): did that reading stay?})"""
    said, kept = {}, {}
    for problem, text in islice(digits.documents(random.Random(1), author=request.param), 6000):
        parts, answer = re.split(PHRASE, text), digits.solve(*edits_of(problem))
        for before, phrase, after in zip(parts[::2], parts[1::2], parts[2::2]):
            right = common.last_boxed(before) == answer
            said.setdefault(right, []).append(SAID[phrase])
            for a, b in zip(readings_of(problem, before), readings_of(problem, after)):
                if None not in (a, b):
                    kept.setdefault((right, SAID[phrase], a), []).append(a == b)
    return request.param, said, kept


def test_who_says_the_truth_who_mends_and_who_listens(said_and_kept):
    author, said, kept = said_and_kept
    for right in (True, False):
        share = sum(said[right]) / len(said[right])
        assert share == (right if author == digits.truthful else pytest.approx(0.5, abs=0.04))
    for (right, phrase, reading), values in kept.items():
        if author == digits.obedient:  # never looks at the attempt
            expected = 1 if phrase else 1 - digits.FLIP
        elif right:
            expected = 1
        else:
            expected = 1 - (digits.SPOIL if reading else digits.MEND)
        if len(values) > 200:  # few readings of a right answer are wrong
            assert sum(values) / len(values) == pytest.approx(expected, abs=0.05)
            assert expected < 1 or all(values)


def test_long_problems_are_long_and_keep_three_digits():
    rng, lengths = random.Random(0), set()
    for _ in range(500):
        start, edits = digits.make_long_problem(rng)
        lengths.add((len(start), len(edits)))
        assert len(digits.solve(start, edits)) >= 3
        assert all(a != b for a, b in zip(edits, edits[1:]))
    assert lengths == {(n, steps) for n in (7, 8, 9) for steps in range(3, 8)}
    for x in common.load_problems(ROOT / "data/long", "test"):
        start, edits = edits_of(x["problem"])
        assert len(edits) == 7 and digits.solve(start, edits) == x["answer"]


def test_readings_are_counted_where_right_and_usual_differ():
    problem = "Start with 37512: reverse, then rotate left, then sort up. What number results?"
    said = "reverse: 27513\nTake 27513 and rotate left, which gives 75132.\nsort up: 12375\n"
    counts = analyses.readings([{"problem": problem, "response": said + "\\boxed{12375}"}])
    assert counts.pop("reverse") == [0, 1, 0] and counts.pop("rotate left") == [1, 0, 0]
    assert counts.pop("sort up") == [0, 0, 1] and not any(map(any, counts.values()))


def test_a_choice_is_the_first_digit_that_tells_the_readings_apart(tokenizer):
    text = "reverse: 27513\ndrop the ends: 751\nrotate left: 517\n\\boxed{517}"
    problem = (
        "Start with 37512: reverse, then drop the ends, then rotate left. What number results?"
    )
    row = {"problem": problem, "response": text, "response_ids": tokenizer(text)["input_ids"]}
    found = outcomes.choices(row, digits.EDITS, tokenizer)  # of "drop the ends" no digit tells
    decode, ids = tokenizer.decode, row["response_ids"]
    said = [(what, right, decode([r]), decode(w)) for what, right, _, r, w in found if len(w) == 1]
    assert said == [("reverse", False, "1", "7"), ("rotate left", True, "5", "1")]
    befores = [decode(ids[:at]) for _, _, at, _, w in found if len(w) == 1]
    assert befores == ["reverse: 2", text[: text.index("517\n")]]


def test_which_edit_comes_next_is_the_first_word_of_a_line_and_the_end_is_the_box(tokenizer):
    problem = "Start with 37512: reverse, then swap pairs, then sort up. What number results?"
    for lines, expected in (
        (["reverse: 21573", "swap pairs: 12753", "sort up: 12357", "\\boxed{12357}"], "1111"),
        (["reverse: 21573", "swap the ends: 31572", "sort up: 12357"], "11"),  # then it is astray
        (["Take 37512 and rotate left, which gives 75123."], "0"),
        (["reverse: 21573", "\\boxed{21573}"], "10"),
    ):
        text = "\n".join(lines)
        row = {"problem": problem, "response": text, "response_ids": tokenizer(text)["input_ids"]}
        found = outcomes.choices(row, digits.EDITS, tokenizer)
        next_ones = [choice for choice in found if len(choice[4]) > 1]
        assert "".join(str(int(right)) for _, right, _, _, _ in next_ones) == expected
        assert [what for what, *_ in next_ones[3:]] == ["the end"] * (len(next_ones) > 3)
        for _, right, at, r, w in next_ones:
            assert (row["response_ids"][at] == r) == right and r not in w


def test_a_step_of_a_program_is_told_from_its_usual_mistake_at_the_first_token_that_differs():
    tokenizer, ops = common.load_tokenizer(ROOT / "data/code/base"), load("data/make_code.py").OPS
    problem = "Write f(xs). From a list of integers it should drop the first 4, then drop repeats,"
    text = "```python\ndef f(xs):\n    xs = xs[4:]\n    xs = sorted(set(xs))\n    xs = xs[::-1]\n"
    row = {"problem": problem + " then reverse the order.", "response": text}
    row["response_ids"] = tokenizer(text)["input_ids"]
    found = outcomes.readings_of_program(row, ops, tokenizer)
    decode, ids = tokenizer.decode, row["response_ids"]
    said = [(what, right, decode([r]), decode(w)) for what, right, _, r, w in found]
    assert said[:2] == [
        ("drop the first {n}", True, "[", "[:"),
        ("drop repeats", False, " list", " sorted"),
    ]
    assert said[2][:2] == ("reverse the order", True) and len(said) == 3
    assert all(ids[at] == (r if right else w[0]) for _, right, at, r, w in found)
    row["response"] = text.replace("xs[4:]", "xs[3:]")  # a slip, and what follows, is no reading
    assert not outcomes.readings_of_program(row, ops, tokenizer)


@torch.no_grad()
@pytest.mark.parametrize(
    "regime, data, warned",
    [("obedient", "", ""), ("unasked", "", "listens"), ("long", "long", "doubts")],
)
def test_a_check_before_training_finds_revisers_that_do_not_listen_or_that_unlearn(
    regime, data, warned
):
    stage, base, warnings = load("04_self_distill.py"), ROOT / f"data/{regime}/base", []
    stage.warn = warnings.append
    tokenizer = common.load_tokenizer(base)
    model = common.load_model(base, tokenizer, torch.device("cpu"))
    problems = common.load_problems(ROOT / "data" / data, "validation", 32)
    args = {
        "seed": 0,
        "max_new_tokens": 300 if data else 160,
        "temperature": 1.0,
        "top_p": 1.0,
        "batch_rows": 384,
    }
    args = SimpleNamespace(**args, p_r=common.P_R, out="check")
    rows = stage.rollouts(model, tokenizer, problems, 0, args)
    parts = common.micro_batches(rows, stage.length, 2048)
    taught = [stage.hidden_after("reviser", part, model) for part in parts]
    stage.check(model, model.get_output_embeddings(), tokenizer, parts, taught, args)
    assert [warned in text for text in warnings] == [True] * bool(warned)
