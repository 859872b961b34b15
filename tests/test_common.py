"""Sampling, the verifier, records: the pieces that all stages share."""

import json
import random
import re
import time
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
from common import last_boxed, prompt_ids, row_seed, sample, verify
from conftest import load


def prompts_of(tokenizer, problems, n):
    return [prompt_ids(tokenizer, x["problem"]) for x in problems[:n]], [
        row_seed(0, "test", x["id"]) for x in problems[:n]
    ]


def test_sample_does_not_depend_on_neighbours_order_or_batch_size(model, tokenizer, problems):
    prompts, seeds = prompts_of(tokenizer, problems, 12)
    together = sample(model, prompts, seeds, 60)
    assert together == sample(model, prompts, seeds, 60, batch_rows=5)
    assert together[::-1] == sample(model, prompts[::-1], seeds[::-1], 60)
    assert together[3] == sample(model, prompts[3:4], seeds[3:4], 60)[0]
    assert together != sample(model, prompts, [s + 1 for s in seeds], 60)


def test_the_cache_of_half_precision_is_in_half_precision(model, tokenizer, problems):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        cache = common.prefill(model, [prompt_ids(tokenizer, x["problem"]) for x in problems[:2]])
        model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
    assert {x.dtype for layer in cache.layers for x in (layer.keys, layer.values, *layer.room)} == {
        torch.bfloat16
    }


def test_sampling_in_half_precision_casts_the_weights_once(model, tokenizer, problems, monkeypatch):
    monkeypatch.setattr(
        common,
        "autocast",
        lambda device: (lambda: torch.autocast("cpu", torch.bfloat16), torch.bfloat16),
    )
    with torch.profiler.profile(record_shapes=True) as profile:
        (answer,) = sample(model, [prompt_ids(tokenizer, problems[0]["problem"])], [0], 5)
    casts = {
        tuple(e.input_shapes[0]): e.count
        for e in profile.key_averages(group_by_input_shape=True)
        if e.key == "aten::_to_copy"
    }
    weights = Counter(
        tuple(p.shape) for name, p in model.named_parameters() if "proj" in name or "embed" in name
    )
    assert len(answer) > 1 and {shape: casts[shape] for shape in weights} == weights


def test_sample_is_the_same_when_rows_wait_and_join(model, tokenizer, problems):
    """Prompts of very different lengths, some of them twice, in batches so small that rows leave, wait and join many times."""
    prompts, seeds = prompts_of(tokenizer, problems, 12)
    prompts, seeds = (
        [p[:1] * (7 * (i % 3)) + p for i, p in enumerate(prompts)] + prompts[:4],
        seeds + seeds[:2] + [1, 2],
    )
    alone = [sample(model, [p], [s], 50)[0] for p, s in zip(prompts, seeds)]
    ended = []
    for batch_rows in (3, 4, 16):
        bar = SimpleNamespace(update=ended.append)
        assert sample(model, prompts, seeds, 50, batch_rows=batch_rows, progress=bar) == alone
    assert sum(ended) == 3 * len(prompts)
    assert len({len(y) for y in alone}) > 3 and alone[0] != alone[3]


def test_sampling_with_a_growing_cache_computes_each_equal_prefix_once(
    model, tokenizer, problems, monkeypatch
):
    seen, real = [], model.base_model.forward
    monkeypatch.setattr(
        model.base_model,
        "forward",
        lambda *a, **k: seen.append(k["input_ids"].shape) or real(*a, **k),
    )
    prompts, _ = prompts_of(tokenizer, problems, 2)
    sample(model, [prompts[0]] * 5 + [prompts[1]] * 3, range(8), 4)
    assert seen[:2] == [(2, max(map(len, prompts)) - 1), (8, 1)]


def test_micro_batches_hold_every_row_once_and_keep_the_budget():
    rng = random.Random(0)
    rows = [(i, rng.randint(1, 50)) for i in range(200)]
    for budget in (10, 60, 1000):
        batches = common.micro_batches(rows, lambda r: r[1], budget)
        assert sorted(r for b in batches for r in b) == rows
        assert all(len(b) * max(r[1] for r in b) <= budget or len(b) == 1 for b in batches)
    assert common.micro_batches([], len, 10) == []


def test_sample_ends_at_the_end_token_or_at_the_limit(model, tokenizer, problems):
    prompts, seeds = prompts_of(tokenizer, problems, 20)
    answers = sample(model, prompts, seeds, 80)
    assert {len(y) == 80 for y in answers} == {True, False}, (
        "the limit should cut some and not others"
    )
    for y in answers:
        assert tokenizer.eos_token_id not in y[:-1]
        assert y[-1] == tokenizer.eos_token_id or len(y) == 80


def test_sample_cuts_a_row_where_the_models_positions_end(model, tokenizer, problems, monkeypatch):
    prompts, seeds = prompts_of(tokenizer, problems, 8)
    whole, room = sample(model, prompts, seeds, 60), max(map(len, prompts)) + 20
    monkeypatch.setattr(model.config, "max_position_embeddings", room)
    assert sample(model, prompts, seeds, 60) == [y[: room - len(p)] for p, y in zip(prompts, whole)]
    lengths, real = [], model.base_model.forward
    monkeypatch.setattr(
        model.base_model,
        "forward",
        lambda *a, **k: lengths.append(int(k["position_ids"].max())) or real(*a, **k),
    )
    assert [len(y) for y in sample(model, [[5] * (room + 2)], [0], 60)] == [1] and max(
        lengths
    ) < room  # learned positions would fail


def test_sample_greedy_is_generates_greedy(model, tokenizer, problems):
    model.generation_config.eos_token_id = [
        10**6
    ]  # which does not come: so long that the cache must grow several times
    prompts, seeds = prompts_of(tokenizer, problems, 6)
    prompts[2] = prompts[2][-1:]  # a prefix of one token
    for p, y in zip(prompts, sample(model, prompts, seeds, 150, temperature=0, batch_rows=4)):
        expected = model.generate(
            torch.tensor([p]),
            attention_mask=torch.ones(1, len(p)),
            do_sample=False,
            max_new_tokens=150,
        )[0, len(p) :]
        assert y == expected.tolist() and len(y) == 150


def test_sample_follows_the_models_distribution(model, tokenizer, problems):
    prompt, n = prompt_ids(tokenizer, problems[0]["problem"]), 2000
    first = torch.tensor([y[0] for y in sample(model, [prompt] * n, range(n), 1, batch_rows=n)])
    p = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    frequency = torch.bincount(first, minlength=len(p)) / n
    assert (frequency - p).abs().max() < 4 * 0.5 / n**0.5  # four standard errors of the worst case
    assert len(set(first.tolist())) > 1


def test_a_uniform_of_exactly_0_does_not_take_a_token_of_no_probability(
    model, tokenizer, problems, monkeypatch
):
    monkeypatch.setattr(
        common.np.random, "default_rng", lambda seed: SimpleNamespace(random=np.zeros)
    )
    prompt = prompt_ids(tokenizer, problems[0]["problem"])
    token = sample(model, [prompt], [0], 1)[0][0]
    assert model(torch.tensor([prompt])).logits[0, -1].softmax(-1)[token] > 1e-9 and token != 0


def test_sampling_in_eval_mode_puts_the_training_mode_back(model, tokenizer, problems):
    prompts, seeds = prompts_of(tokenizer, problems, 2)
    expected = sample(model, prompts, seeds, 20)
    model.train()
    model.activation_checkpointing_enable()  # which would switch the cache off
    assert sample(model, prompts, seeds, 20) == expected and model.training


@pytest.mark.parametrize(
    "text, boxed",
    [
        (r"\boxed{1}", "1"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        ("no box", None),
        (r"\boxed{1} and an open \boxed{2", "1"),
        (r"\boxed {3}", "3"),
        ("", None),
        (r"{ \boxed{4} ", "4"),
        (r"} \boxed{5}", "5"),
        (r"\boxed{\boxed{6}}", "6"),
        (r"\boxed{\left\{ x=1 \right.}", r"\left\{ x=1 \right."),
    ],
)
def test_the_last_whole_box_counts(text, boxed):
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    "answer, text, verdict",
    [
        ("7135", r"\boxed{7135}", "correct"),
        ("7135", r"\boxed{7153}", "wrong"),
        ("7135", "7135", "no_answer"),
        ("5", r"\boxed{05}", "correct"),
        ("7135", r"\boxed{}", "wrong"),
        ("1/2", r"\boxed{0.5}", "correct"),
        (r"\frac{1}{2}", r"\boxed{\frac12}", "correct"),
        ("3", r"\boxed{x=3}", "correct"),
        ("3", r"\boxed{4-1}", "correct"),
        ("", r"\boxed{3}", "error"),
        ("", r"\boxed{}", "error"),
        ("3", r"\boxed{__import__('os')}", "wrong"),
        ("1", "\\boxed{" + "1" * 5000 + "}", "wrong"),
    ],
)
def test_verdicts(answer, text, verdict):
    reward, got, extracted = verify({"answer": answer}, text)
    assert (got, reward) == (verdict, int(verdict == "correct"))
    assert (extracted is None) == (verdict == "no_answer")


MATHEMATICS = {  # reference: (answers that are equal to it, answers that are not)
    r"\frac12": (
        ["0.5", "1/2", r"\dfrac{1}{2}", "x = 1/2", "50\\%", r"\frac{2}{4}", "0.50."],
        ["0.499", "2", "", "?", r"\frac12, 1", "50"],
    ),
    "12": (
        [
            "12.0",
            "12.",
            "$12$",
            r"12\text{ cm}",
            r"\$12",
            r"\boxed{12}",
            "5+7=12",
            "x=12",
            "12 \\text{ dollars}",
        ],
        [
            "-12",
            "12, 13",
            r"\{12, 13\}",
            "12 or 13",
            r"12 \text{ or } 13",
            r"12 \lor 13",
            "x=12 or x=13",
            r"\pm 12",
            "13=12",
            "12!",
        ],
    ),
    "41": (
        [
            "m+n=41",
            "m + n = 41",
            "a_{10}=41",
            r"f(2)=41",
            r"\text{Area} = 41",
            r"\theta = 41",
            "41 = x",
            r"\sum_{i=1}^{9} i = 41",
        ],
        ["m+n=40", "40=41", "40+2=41", r"\frac{80}{2}=41"],
    ),
    r"P(X=2)=\frac12": ([r"\frac12", r"P(X=2)=\frac{1}{2}"], [r"\frac13"]),
    "6m": (["6m", "6 m"], ["6", "6t", "m"]),
    "x^2+2x": (["x(x+2)", "2x+x^2"], ["x^2", "x^2+2"]),
    r"\frac{1}{3}\pi r^2 h": ([r"\frac{\pi r^2 h}{3}"], [r"\frac{1}{3}\pi r^2"]),  # h is no hour
    r"2\text{ hours }30\text{ minutes}": (
        [r"2\text{ hours } 30\text{ min}"],
        [r"2\text{ hours }45\text{ minutes}", "2"],
    ),
    "R-r": (["-r+R"], ["r-R", "0"]),
    "[1,3]": ([r"1 \le x \le 3"], ["1<x<3", "(1,3)", "1,3"]),
    r"0.1\overline{6}": ([r"\frac{1}{6}"], ["0.16"]),
    "10 000": (["10000", "10,000"], ["0", "10"]),
    r"\{(1,2),(3,4)\}": (["(3,4),(1,2)"], ["(1,2)", r"\{(2,1),(3,4)\}"]),
    "1,234,567": (
        ["1234567", "1{,}234{,}567", r"1\,234\,567", r"1\ 234\ 567"],
        ["1.234567", "(1,234,567)", "1,234,568"],
    ),
    r"90^\circ": (["90", r"90\degree", "90°", r"90 \text{ degrees}"], ["100", r"\frac{\pi}{4}"]),
    r"\{1,2,3\}": (["3, 2, 1", r"\{2,1,3\}"], ["1,2", r"\{1,2\}", "1,2,3,4", "(1,2,3)"]),
    "1,2": (
        ["2,1", r"1 \text{ and } 2", r"1 \text{ or } 2", "x=1 or x=2"],
        ["1", "2", "1,3", "1,2,3"],
    ),
    "(1,2)": (
        [r"\left(1,2\right)", r"(\frac22, 2)"],
        ["(2,1)", "2,1", "[1,2]", r"\{1,2\}", "(1,2,3)", "(1,2),(3,4)", "(1,2]"],
    ),
    "(0,5]": ([r"\left(0, \frac{10}{2}\right]"], ["(0,5)", "[0,5]", "(0,6]", "5"]),
    "((1,2),3)": (["((1, 2), 3.0)"], ["(1,(2,3))", "(1,2,3)", "((1,2),4)"]),
    r"(-\infty,3)\cup(4,\infty)": (
        [r"(4,\infty)\cup(-\infty,3)"],
        [r"(-\infty,3]\cup(4,\infty)", r"(-\infty,3)"],
    ),
    "x<3": ([r"(-\infty,3)", "x < 3"], [r"x \le 3", "x>3", "3"]),
    r"\text{Tuesday}": (["Tuesday", r"\textbf{Tuesday}"], ["Monday", r"\text{Tuesday or Monday}"]),
    "x^2-1": (["(x-1)(x+1)", "y=x^2-1"], ["y^2-1", "x^2+1"]),
    r"2\sqrt{2}": ([r"\sqrt{8}", r"2\sqrt2"], ["2.8", "8"]),
    "0.0000001": (["0.00000010", "x=0.0000001"], ["0.0000002", "0", "x=0.0"]),
}


def test_equality_is_a_mathematicians_and_two_answers_are_no_way_to_be_right():
    cases = [
        (a, b, right)
        for a, lists in MATHEMATICS.items()
        for right, of in zip(("correct", "wrong"), lists)
        for b in of
    ]
    got = common.verify_all(
        [{"answer": a} for a, _, _ in cases], [f"\\boxed{{{b}}}" for _, b, _ in cases]
    )
    assert [(a, b, verdict) for (a, b, _), (_, verdict, _) in zip(cases, got)] == cases


def test_what_math_verify_cannot_read_is_an_error_and_no_number_in_it_an_answer():
    unreadable = r"n \equiv 3 \pmod{7}"
    assert [
        common.same_answer(unreadable, b) for b in (unreadable, r"n \equiv 3 \pmod{8}", "3")
    ] == ["correct", "error", "error"]
    assert [
        common.readable(a) for a in (unreadable, r"\frac{1}{", "", "1/2", r"\text{Evelyn}", "7")
    ] == [False, False, False, True, True, True]


def test_verdicts_of_many_come_in_order_though_one_hangs():
    answers = ["x=1", "9^{9^{9^9}}", "x=3", "x=4"] + [f"x={i}" for i in range(5, 40)]
    got = list(
        common._graders.map(
            lambda i: common.same_answer(str(i + 1), answers[i], seconds=1.0), range(len(answers))
        )
    )
    assert (
        got[1] in ("timeout", "error")
        and got[0] == got[2] == "correct"
        and set(got[3:]) == {"correct"}
    )


def test_a_verifier_that_hangs_is_killed_and_the_next_answer_is_graded(monkeypatch):
    assert common.same_answer("3", "x=3") == "correct"
    assert common.same_answer("3", "9^{9^{9^9}}", seconds=1.0) in ("timeout", "wrong", "error")
    assert common.same_answer("3", r"\frac{6}{2}") == "correct"
    common._thread.grader.kill()  # as if it had died; that may be seen before or after it is asked
    assert common.same_answer("3", r"\frac{6}{2}") in ("error", "correct")
    assert common.same_answer("3", r"\frac{6}{2}") == "correct"


def test_integer_shortcut_agrees_with_math_verify():
    from math_verify import parse, verify as equal

    rng = random.Random(0)
    for _ in range(40):
        a, b = (str(rng.randint(-30, 30)).replace("7", "07") for _ in range(2))
        for b in (a, b, "0" + a.lstrip("-")):
            assert (common.same_answer(a, b) == "correct") == equal(
                parse(f"\\boxed{{{a}}}"), parse(f"\\boxed{{{b}}}")
            ), (a, b)


def test_jsonl_keeps_token_ids_and_odd_text(tmp_path):
    rows = [{"id": "ü\u2028", "response_ids": [0, 399, 2]}, {"id": "\n\x00", "response_ids": [7]}]
    common.append_jsonl(tmp_path / "a.jsonl", rows)
    assert common.read_jsonl(tmp_path / "a.jsonl", ["id", "response_ids"], "nothing") == rows


def edits_of(problem):
    """(number, its edits) of a problem of the first domain."""
    number, edits = re.fullmatch(
        r"Start with (\d+): (.*)\. What number results\?", problem
    ).groups()
    return number, edits.split(", then ")


def test_splits_and_corpus_share_no_problem(monkeypatch):
    data = load("data/make_data.py")
    train, validation, test = (
        common.load_problems(common.HERE / "data", split)
        for split in ("train", "validation", "test")
    )
    texts, ids = ([x[k] for x in train + validation + test] for k in ("problem", "id"))
    assert (len(train), len(validation), len(test)) == (5700, 300, 500) and len(set(texts)) == len(
        set(ids)
    ) == len(texts)
    # a generator that draws a test problem first and another one second: only the second reaches the corpus
    start, edits = edits_of(test[0]["problem"])
    assert (
        data.problem_text(start, edits) == test[0]["problem"]
        and data.solve(start, edits) == test[0]["answer"]
    )
    draws = iter(
        [
            (start, edits),
            ("12345", ["reverse", "sort up", "swap pairs"]),
            ("98765", ["sort up", "reverse", "swap pairs"]),
        ]
    )
    monkeypatch.setattr(data, "make_problem", lambda rng: next(draws))
    tokenizer = common.load_tokenizer(common.HERE / "data/base")
    ids, labels, number, position = next(
        data.packed_rows(tokenizer, data.documents(random.Random(0), {test[0]["problem"]}), 64)
    )
    assert "12345" in tokenizer.decode(ids) and start not in tokenizer.decode(ids)
    assert labels[0] == -100 and len(ids) == len(labels) == len(number) == len(position) == 64


def test_edits_by_hand():
    data = load("data/make_data.py")
    by_hand = {
        "reverse": "53197",
        "sort up": "13579",
        "drop the ends": "913",
        "drop the largest": "7135",
        "swap the ends": "59137",
        "swap pairs": "97315",
        "rotate left": "91357",
        "smallest to the front": "17935",
    }
    assert {name: right("79135") for name, (right, _, _) in data.EDITS.items()} == by_hand
    for name, (right, mistake, _) in data.EDITS.items():
        assert right("79135") != mistake("79135"), name


def test_every_embedded_answer_is_right():
    data = load("data/make_data.py")
    for split in ("train", "validation", "test"):
        for x in common.load_problems(common.HERE / "data", split):
            start, edits = edits_of(x["problem"])
            assert (
                data.problem_text(start, edits) == x["problem"]
                and data.solve(start, edits) == x["answer"]
            )


@pytest.fixture()
def code_domain():
    return load("data/make_code.py")


def test_steps_of_the_short_functions_by_hand(code_domain):
    xs, n = [5, -3, 2, 5, 8], 2
    by_hand = {
        "keep the even ones": [2, 8],
        "keep those of at least {n}": [5, 2, 5, 8],
        "keep those below {n}": [-3],
        "drop the first {n}": [2, 5, 8],
        "keep the last {n}": [5, 8],
        "take every second one from the first on": [5, 2, 8],
        "reverse the order": [8, 5, 2, -3, 5],
        "sort from largest to smallest": [8, 5, 5, 2, -3],
        "move the first to the end": [-3, 2, 5, 8, 5],
        "square each": [25, 9, 4, 25, 64],
        "replace negative ones by 0": [5, 0, 2, 5, 8],
        "halve each and round down": [2, -2, 1, 2, 4],
        "drop repeats": [5, -3, 2, 8],
        "add to each its place from 1 on": [6, -1, 5, 9, 13],
    }
    for step, (right, mistake, _) in code_domain.OPS.items():
        assert (
            code_domain.apply([right.format(n=n)], xs)
            == by_hand[step]
            != code_domain.apply([mistake.format(n=n)], xs)
        ), step


def steps_of(code_domain, problem):
    said = (
        problem.removeprefix("Write f(xs). From a list of integers it should ")
        .removesuffix(".")
        .split(", then ")
    )
    steps = [
        next((step, n) for step in code_domain.OPS for n in range(2, 6) if step.format(n=n) == text)
        for text in said
    ]
    assert code_domain.problem_text(steps) == problem
    return steps


def test_short_functions_right_programs_pass_and_each_single_mistake_fails(code_domain):
    train, test = (
        common.load_problems(common.HERE / "data/code", split, allow_code=True)
        for split in ("train", "test")
    )
    assert len({x["problem"] for x in train + test}) == len(train + test) == 5200
    for x in test[:4]:
        readings = [[True] * 3] + [[i != j for j in range(3)] for i in range(3)]
        steps, rng = steps_of(code_domain, x["problem"]), random.Random(0)
        programs = [
            code_domain.attempt(rng, steps, r, terse=i % 2 == 0, slips=False)[0]
            for i, r in enumerate(readings)
        ]
        assert [reward for reward, _, _ in common.verify_all([x] * 4, programs)] == [1, 0, 0, 0]


def test_the_second_corpus_judges_truthfully_and_never_says_p_r(code_domain):
    lists, true = code_domain.inputs(random.Random(1), 16), []
    for problem, text in islice(code_domain.documents(random.Random(0)), 300):
        assert not any(phrase in text for phrase in common.P_R.values())
        right = code_domain.expressions(steps_of(code_domain, problem), [True] * 3)
        for program, word in re.findall(r"```python\n(.*?)```\n\n(\w+), ", text, re.S):
            names = {}
            exec(program, names)
            assert (word in code_domain.RIGHT[0]) != (word in code_domain.WRONG[0])
            true.append(
                (word in code_domain.RIGHT[0])
                == all(names["f"](xs) == code_domain.apply(right, xs) for xs in lists)
            )
    assert len(true) > 100 and sum(true) > 0.98 * len(
        true
    )  # authors try a program on lists of their own


def test_many_open_boxes_take_no_quadratic_time():
    began = time.time()
    assert (
        last_boxed("\\boxed{" * 50_000) is None and last_boxed("{" * 50_000 + "\\boxed{1}") == "1"
    )
    assert time.time() - began < 2


PROBLEM = {"problem": "What is 1 + 1?", "solution": "2", "answer": "2"}
EXAMPLES = [{"input": "1 2\n", "output": "3\n"}, {"input": "2 4\n", "output": "6\n"}]
CODEFORCES = {
    "title": "A. Sum",
    "description": "Add.",
    "input_format": "Two numbers.",
    "output_format": "Their sum.",
    "note": None,
    "examples": EXAMPLES,
}
LIVE = {
    "question_content": "Add.",
    "public_test_cases": json.dumps([{**t, "testtype": "stdin"} for t in EXAMPLES]),
    "private_test_cases": "eJx",
    "starter_code": "",
}
SETS = {  # rows as these sets publish them: columns and types
    "open-r1/OpenR1-Math-220k": [
        {**PROBLEM, "uuid": "a", "problem_type": "Algebra"},
        {**PROBLEM, "uuid": "b", "answer": ""},
        {**PROBLEM, "uuid": "a"},
        {**PROBLEM, "uuid": "c", "answer": None},
        {**PROBLEM, "uuid": "d", "answer": "proof"},
        {**PROBLEM, "uuid": "e", "answer": r"\frac{1}{"},
    ],
    "openai/gsm8k": [
        {"question": "What is 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
        {"question": None, "answer": "#### 2"},
    ],
    "HuggingFaceH4/MATH-500": [
        {**PROBLEM, "subject": "Algebra", "level": 1, "unique_id": "test/a/1.json"}
    ],
    "HuggingFaceH4/aime_2024": [{**PROBLEM, "id": 60, "year": "2024"}],
    "math-ai/aime25": [{**PROBLEM, "id": "0"}],
    "MathArena/hmmt_feb_2025": [{**PROBLEM, "problem_idx": 1, "problem_type": ["Algebra"]}],
    "open-r1/codeforces-cots": [
        {**CODEFORCES, "id": "1/A"},
        {**CODEFORCES, "id": "1/A"},
        {**CODEFORCES, "id": "1/B", "examples": None},
        {**CODEFORCES, "id": "1/C", "examples": EXAMPLES[:1]},
    ],
    "lighteval/code_generation_lite": [
        {**LIVE, "question_id": "1_A"},
        {**LIVE, "question_id": "1_B", "public_test_cases": "[]"},
    ],
    "someone/ours": [{"problem": "What is 1 + 1?", "answer": "2"}],
}


def test_a_colon_asks_for_the_same_problems_in_cpp(monkeypatch):
    import datasets

    asked, rows = [], [{**CODEFORCES, "id": "1/A"}]
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *a, split: asked.append(a) or datasets.Dataset.from_list(rows),
    )
    monkeypatch.setattr(common, "compiler", lambda: "g++")
    (problem,) = common.load_problems("open-r1/codeforces-cots:cpp", allow_code=True)
    assert (
        asked == [("open-r1/codeforces-cots", "solutions")]
        and problem["language"] == "cpp"
        and "```cpp" in problem["problem"]
    )
    monkeypatch.setattr(common, "compiler", lambda: None)
    assert (
        common.verify(problem, "```cpp\nint main() {}\n```")[:2] == (0, "error")
        and common.verify(problem, "```\nint main() {}\n```")[1] == "error"
    )


@pytest.mark.parametrize("name", SETS)
def test_rows_of_known_sets_become_problems_that_can_be_graded(name, monkeypatch, capsys):
    import datasets

    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda source, configuration, split: datasets.Dataset.from_list(SETS[name]),
    )
    (problem,) = common.load_problems(name, "train", allow_code=True)
    assert (
        problem["id"]
        and name == "someone/ours"
        or common.BOX in problem["problem"]
        or "```python" in problem["problem"]
    )
    answer = (
        "```python\nprint(sum(map(int, input().split())))\n```"
        if problem["kind"] == "code"
        else r"So \boxed{2}."
    )
    assert (
        common.verify(problem, answer)[0] == 1
        and common.verify(problem, answer.replace("2", "3").replace("sum", "max"))[0] == 0
    )
    assert problem["id"] != "None" and (
        problem["kind"] == "math" or "6" not in problem["problem"]
    )  # not all of the tests are shown
    assert capsys.readouterr().out.count("left out") == {
        "open-r1/OpenR1-Math-220k": 4,
        "openai/gsm8k": 1,
        "open-r1/codeforces-cots": 2,
        "lighteval/code_generation_lite": 1,
    }.get(name, 0)


def test_a_known_set_with_other_columns_names_the_column(monkeypatch, capsys):
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list([{"prompt": "x"}])
    )
    with pytest.raises(SystemExit) as e:
        common.load_problems("math-ai/aime25")
    assert e.value.code == 2 and "'id'" in capsys.readouterr().err
