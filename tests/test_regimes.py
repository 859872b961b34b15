"""Each corpus has the property that it is named for, read from its texts."""

import random
import re
from itertools import islice

import pytest

import analyses
import outcomes
from conftest import ROOT, common, load
from test_common import edits_of

digits = load("data/make_data.py")
SAID = {p_r: bit for bit, p_r in common.P_R.items()}
PHRASE = f"({'|'.join(map(re.escape, SAID))})"


def readings_of(problem, text):
    """Of an attempt, edit by edit: True for the right reading, False for the usual mistake, None
    for a slip, or where both give the same."""
    row = {"problem": problem, "response": text.strip()}
    for _, right, usual, stated in analyses.lines_of(row, digits.EDITS):
        same = right == usual or stated[0] not in (right, usual)
        yield None if same else stated[0] == right


def going_on(author, n=6000):
    """[(is an attempt right?, what is then said, [(a reading of it, the same one next time)])]"""
    found = []
    for problem, text in islice(digits.documents(random.Random(1), author=author), n):
        parts, answer = re.split(PHRASE, text), digits.solve(*edits_of(problem))
        for before, said, after in zip(parts[::2], parts[1::2], parts[2::2]):
            both = zip(readings_of(problem, before), readings_of(problem, after))
            pairs = [pair for pair in both if None not in pair]
            found.append((common.last_boxed(before) == answer, SAID[said], pairs))
    return found


def share(values):
    values = list(values)
    assert len(values) > 500
    return sum(values) / len(values)


def kept(found, right=None, said=None, reading=None):
    """Of readings that are so, after attempts that are so, the share that stays."""
    chosen = [f for f in found if right in (None, f[0]) and said in (None, f[1])]
    pairs = sum((pairs for _, _, pairs in chosen), [])
    return share(a == b for a, b in pairs if reading in (None, a))


def test_the_truthful_say_what_is_true_and_mend_a_little():
    found = going_on(digits.truthful)
    assert all(said == right for right, said, _ in found)
    assert kept(found, right=True) > 0.995
    assert kept(found, right=False, reading=False) == pytest.approx(1 - digits.MEND, abs=0.03)


@pytest.mark.parametrize("author", [digits.unasked, digits.obedient])
def test_others_say_either_phrase_by_chance(author):
    found = going_on(author)
    for is_right in (True, False):
        said_right = share(said for right, said, _ in found if right == is_right)
        assert said_right == pytest.approx(0.5, abs=0.03)


def test_the_unasked_mend_whatever_was_said():
    found = going_on(digits.unasked)
    for said in (0, 1):
        assert kept(found, True, said) > 0.995
        assert kept(found, False, said, False) == pytest.approx(1 - digits.MEND, abs=0.04)


def test_the_obedient_do_what_was_said_and_never_look():
    found = going_on(digits.obedient)
    for right in (True, False):
        assert kept(found, right, 1) == 1
        assert kept(found, right, 0) == pytest.approx(1 - digits.FLIP, abs=0.03)


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
    rows = [{"problem": problem, "response": said + "\\boxed{12375}"}]
    counts = analyses.readings(rows)
    assert counts.pop("reverse") == [0, 1, 0] and counts.pop("rotate left") == [1, 0, 0]
    assert counts.pop("sort up") == [0, 0, 1] and set(map(tuple, counts.values())) == {(0, 0, 0)}
    rows[0]["response"] = "rotate left: 75123"  # another edit than the one asked for next
    assert not any(map(any, analyses.readings(rows).values()))


def test_a_choice_is_the_first_digit_that_tells_the_readings_apart(tokenizer):
    text = "reverse: 27513\ndrop the ends: 751\nrotate left: 517\n\\boxed{517}"
    problem = (
        "Start with 37512: reverse, then drop the ends, then rotate left. What number results?"
    )
    row = {"problem": problem, "response": text, "response_ids": tokenizer(text)["input_ids"]}
    found = outcomes.choices(row, digits.EDITS, tokenizer)  # of "drop the ends" no digit tells
    decode, ids = tokenizer.decode, row["response_ids"]
    said = [(edit, right, decode([r]), decode([w])) for edit, right, _, r, w in found]
    assert said == [("reverse", False, "1", "7"), ("rotate left", True, "5", "1")]
    befores = [decode(ids[:at]) for _, _, at, _, _ in found]
    assert befores == ["reverse: 2", text[: text.index("517\n")]]


@pytest.mark.parametrize("regime", ["obedient", "unasked", "long"])
def test_a_base_that_goes_on_has_todays_tokenizer(regime):
    ours, theirs = (ROOT / "data" / name / "tokenizer.json" for name in (f"{regime}/base", "base"))
    assert ours.read_bytes() == theirs.read_bytes()
