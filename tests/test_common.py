"""Sampling, the verifier of mathematics, rows and problems: the pieces that all stages share."""

import json
import random
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from types import SimpleNamespace
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import torch

import common
from common import last_boxed, row_seed, sample, same_answer, verify
from conftest import ROOT, SANDBOX, load, needs_sandbox, rows_of
from data.problems import unusable

digits, code = load("data/make_data.py"), load("data/make_code.py")


# ---------------------------------------------------------------- sampling


def test_sample_does_not_depend_on_neighbours_order_or_batch_size(model, tokenizer, prompts):
    """Prompts of very different lengths, some twice, in batches so small that some wait."""
    prompts = [p[:1] * (7 * (i % 3)) + p for i, p in enumerate(prompts)] + prompts[:3]
    seeds, ended = [row_seed("test", i) for i in range(15)], []
    alone = [sample(model, [p], [s], 60)[0] for p, s in zip(prompts, seeds)]
    for y in alone:
        assert tokenizer.eos_token_id not in y[:-1]
        assert (y[-1] == tokenizer.eos_token_id) or len(y) == 60
    assert len({len(y) for y in alone}) > 3 and alone[0] != alone[12]
    for batch_rows in (3, 4, 16):
        bar = SimpleNamespace(update=ended.append)
        assert sample(model, prompts, seeds, 60, batch_rows=batch_rows, progress=bar) == alone
    assert sum(ended) == 3 * len(prompts)
    assert sample(model, prompts[::-1], seeds[::-1], 60) == alone[::-1]


def test_sampling_computes_each_equal_prefix_once(model, prompts):
    seen, (a, b, *_) = [], prompts
    model.base_model.register_forward_pre_hook(
        lambda module, args, how: seen.append(how["input_ids"].shape), with_kwargs=True
    )
    sample(model, [a] * 5 + [b] * 3, range(8), 4)
    assert seen[:2] == [(2, max(len(a), len(b)) - 1), (8, 1)]


def test_the_cache_of_half_precision_is_in_half_precision(model, prompts):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        cache = common.prefill(model, prompts[:2])
        model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
    for layer in cache.layers:
        assert {x.dtype for x in (layer.keys, layer.values, *layer.room)} == {torch.bfloat16}


def test_sampling_in_half_precision_casts_the_weights_once(model, prompts, monkeypatch):
    half = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(common, "autocast", lambda device: (lambda: half, torch.bfloat16))
    with torch.profiler.profile(record_shapes=True) as profile:
        (answer,) = sample(model, prompts[:1], [0], 5)
    events = profile.key_averages(group_by_input_shape=True)
    casts = {tuple(e.input_shapes[0]): e.count for e in events if e.key == "aten::_to_copy"}
    cast = [p for name, p in model.named_parameters() if "proj" in name or "embed" in name]
    weights = Counter(tuple(p.shape) for p in cast)
    assert len(answer) > 1 and {shape: casts[shape] for shape in weights} == weights


def test_sample_cuts_a_row_where_the_models_positions_end(model, prompts, monkeypatch):
    whole, room = sample(model, prompts, range(12), 60), max(map(len, prompts)) + 20
    monkeypatch.setattr(model.config, "max_position_embeddings", room)
    cut = [y[: room - len(p)] for p, y in zip(prompts, whole)]
    assert sample(model, prompts, range(12), 60) == cut != whole
    at = []  # positions: learned ones would fail beyond the last
    model.base_model.register_forward_pre_hook(
        lambda module, args, how: at.append(int(how["position_ids"].max())), with_kwargs=True
    )
    (one,) = sample(model, [[5] * (room + 2)], [0], 60)
    assert len(one) == 1 and max(at) < room


def test_sample_greedy_is_generates_greedy(model, prompts):
    model.generation_config.eos_token_id = [10**6]  # never: so long that the cache must grow twice
    prompts = [*prompts[:3], prompts[3][-1:]]  # a prefix of one token
    for p, y in zip(prompts, sample(model, prompts, range(4), 140, temperature=0, batch_rows=3)):
        how = {"attention_mask": torch.ones(1, len(p)), "do_sample": False, "max_new_tokens": 140}
        expected = model.generate(torch.tensor([p]), **how)[0, len(p) :]
        assert y == expected.tolist() and len(y) == 140


def test_sample_follows_the_models_distribution(model, prompts):
    prompt, n = prompts[0], 2000
    first = torch.tensor([y[0] for y in sample(model, [prompt] * n, range(n), 1, batch_rows=n)])
    p = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    frequency = torch.bincount(first, minlength=len(p)) / n
    assert (frequency - p).abs().max() < 4 * 0.5 / n**0.5  # four standard errors, at most


def test_a_state_half_written_is_never_kept_for_a_whole_one(model, tmp_path):
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    log = tmp_path / "log.jsonl"
    common.append_jsonl(log, [{}] * 40)
    (tmp_path / "srt.resume/000040").mkdir(parents=True)
    common.save_state(tmp_path / "srt", 25, **state)
    assert len(common.load_state(tmp_path / "srt", log, **state)) == 25


def test_top_p_keeps_the_likeliest_tokens_that_make_it_up():
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1]] * 99).log()
    uniform = torch.arange(0.005, 1, 0.01101)[:90, None]
    for top_p, kept in ((0.4, {0}), (0.5, {0}), (0.6, {0, 2}), (1.0, {0, 1, 2, 3}), (0.0, {0})):
        drawn = common.draw(logits[:90], 1.0, top_p, uniform[:90]).tolist()
        assert set(drawn) == kept
        if top_p == 0.6:  # 5 : 3
            assert abs(drawn.count(0) / 90 - 5 / 8) < 0.02
        assert common.draw(logits[:1] * torch.nan, 1.0, top_p, uniform[:1]) == 4  # no token


def test_a_uniform_of_exactly_0_takes_no_token_of_no_probability(model, prompts, monkeypatch):
    zeros = SimpleNamespace(random=np.zeros)
    monkeypatch.setattr(common.np.random, "default_rng", lambda seed: zeros)
    token = sample(model, prompts[:1], [0], 1)[0][0]
    assert model(torch.tensor(prompts[:1])).logits[0, -1].softmax(-1)[token] > 1e-9 and token != 0


def test_sampling_in_eval_mode_puts_the_training_mode_back(model, prompts):
    expected = sample(model, prompts, range(12), 20)
    model.train()
    model.activation_checkpointing_enable()  # which would switch the cache off
    assert sample(model, prompts, range(12), 20) == expected and model.training


def test_micro_batches_hold_every_row_once_and_keep_the_budget():
    rng = random.Random(0)
    rows = [(i, rng.randint(1, 50)) for i in range(200)]
    for budget in (10, 60, 1000):
        batches = common.micro_batches(rows, lambda r: r[1], budget)
        assert sorted(sum(batches, [])) == rows
        assert all(len(b) * max(r[1] for r in b) <= budget or len(b) == 1 for b in batches)


def test_jsonl_keeps_token_ids_and_odd_text_and_loses_a_torn_line_only(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    assert list(common.read_jsonl(path, mend=True)) == []
    rows = [{"id": "ü\u2028", "response_ids": [0, 399, 2]}, {"id": "\n\x00", "response_ids": [7]}]
    common.append_jsonl(path, rows)
    whole = path.read_bytes()
    assert list(common.read_jsonl(path)) == rows
    assert [common.row_at(path, place) for place, _ in common.places_jsonl(path)] == rows
    path.write_bytes(whole + b'{"id": "torn')
    assert list(common.read_jsonl(path, mend=True)) == rows and path.read_bytes() == whole
    path.write_bytes(whole + b'{"id": "torn\n')
    with pytest.raises(SystemExit):
        list(common.read_jsonl(path, mend=True))
    assert "a.jsonl:3: no JSON object" in capsys.readouterr().err


# ---------------------------------------------------------------- the verifier of mathematics


BOXES = {
    r"\boxed{1} no, \boxed{\frac{1}{2}}": r"\frac{1}{2}",
    r"\boxed{\{1,2\}}": r"\{1,2\}",
    r"\boxed{1} and an open \boxed{2": "1",
    r"\boxed {3}": "3",
    r"} { \boxed{5} ": "5",
    r"\boxed{\boxed{6}}": "6",
    r"\boxed{\left\{ x=1 \right.}": r"\left\{ x=1 \right.",
}


def test_the_last_whole_box_counts_and_is_found_in_linear_time():
    assert {text: last_boxed(text) for text in BOXES} == BOXES
    began = time.time()
    assert last_boxed("\\boxed{" * 50_000) is None
    assert last_boxed("{" * 50_000 + "\\boxed{1}") == "1"
    assert time.time() - began < 2


def test_no_answer_empty_answers_and_attacks():
    for answer, text, expected in (
        ("7135", "7135", (0, "no_answer", None)),
        ("7135", r"\boxed{}", (0, "wrong", "")),
        ("", r"\boxed{3}", (0, "error", "3")),
        ("3", r"\boxed{__import__('os')}", (0, "wrong", "__import__('os')")),
        ("1", "\\boxed{" + "1" * 5000 + "}", (0, "wrong", "1" * 5000)),
    ):
        assert verify({"answer": answer}, text) == expected, text


MATHEMATICS = rows_of(ROOT / "tests/cases/math.jsonl")
MISSED = {"i times a bracket is no function call"}  # i is a letter there, and not the root of -1


@pytest.mark.parametrize("case", MATHEMATICS, ids=[case["why"] for case in MATHEMATICS])
def test_cases(case):
    reward = verify({"answer": case["reference"]}, case["response"])[0]
    assert reward == case["reward"] or case["why"] in MISSED and reward == 0


def test_equality_is_a_mathematicians_and_two_answers_are_no_way_to_be_right():
    cases, text = [], (ROOT / "tests/cases/equal.txt").read_text()
    for line in text.replace("\n    ", "  ").splitlines()[1:]:
        reference, equal, others = re.split("  [=≠]  ", line)
        cases += [(reference, answer, "correct") for answer in equal.split(" ; ")]
        cases += [(reference, answer, "wrong") for answer in others.split(" ; ")]
    records = [{"answer": reference} for reference, _, _ in cases]
    graded = common.verify_all(records, [f"\\boxed{{{answer}}}" for _, answer, _ in cases])
    got = [(*case[:2], verdict) for case, (_, verdict, _) in zip(cases, graded)]
    assert got == cases and len(cases) > 120


def test_what_math_verify_cannot_read_is_an_error_and_no_number_in_it_an_answer():
    unreadable = r"n \equiv 3 \pmod{7}"
    answers = {unreadable: "correct", r"n \equiv 3 \pmod{8}": "error", "3": "error"}
    assert {answer: same_answer(unreadable, answer) for answer in answers} == answers
    row = {"kind": "math", "id": "a", "problem": "?"}
    usable = {a: not unusable({**row, "answer": a}, {}) for a in (unreadable, r"\frac{1}{", "1/2")}
    assert list(usable.values()) == [False, False, True]
    assert not unusable({**row, "answer": r"\text{Evelyn}"}, {})


def test_a_grader_that_hangs_or_dies_is_replaced_and_verdicts_stay_in_order():
    answers = ["x=1", "9^{9^{9^9}}", *(f"x={i}" for i in range(3, 13))]
    with ThreadPoolExecutor(2) as threads:
        first, hung, *others = threads.map(same_answer, map(str, range(1, 13)), answers)
    assert hung in ("timeout", "error") and {first, *others} == {"correct"}
    assert same_answer("3", r"\frac{6}{2}") == "correct"
    common._thread.grader.kill()  # that may be seen before or after it is asked
    assert same_answer("3", r"\frac{6}{2}") in ("timeout", "error", "correct")
    assert same_answer("3", r"\frac{6}{2}") == "correct"


def test_rules_take_no_time_on_degenerate_answers(monkeypatch):
    monkeypatch.setattr(common, "ask_grader", lambda *question: "wrong")  # whose time is limited
    began = time.time()
    for part in "5 cm |a|5a|1,|7,7,|(|{|\\text{|\\| |~|5 1/2|^".split("|"):
        for answer in ("5" + part * (900 // len(part)) + "!", part * 30_000):
            assert same_answer("5", answer) == "wrong", part
    assert time.time() - began < 3


# ---------------------------------------------------------------- the two domains


def edits_of(problem):
    """(number, its edits)"""
    said = re.fullmatch(r"Start with (\d+): (.*)\. What number results\?", problem)
    return said[1], said[2].split(", then ")


def test_edits_by_hand_every_embedded_answer_is_right_and_splits_share_no_problem():
    # reverse, sort up, drop ends and largest, swap ends and pairs, rotate, smallest first
    by_hand = "53197 13579 913 7135 59137 97315 91357 17935".split()
    assert [right("79135") for right, _, _ in digits.EDITS.values()] == by_hand
    assert all(right("79135") != mistake("79135") for right, mistake, _ in digits.EDITS.values())
    splits = [common.load_problems(ROOT / "data", s) for s in ("train", "validation", "test")]
    rows = sum(splits, [])
    assert list(map(len, splits)) == [5700, 300, 500]
    assert len({x["problem"] for x in rows}) == len({x["id"] for x in rows}) == len(rows)
    for x in rows:
        start, edits = edits_of(x["problem"])
        assert digits.problem_text(start, edits) == x["problem"]
        assert digits.solve(start, edits) == x["answer"]


def test_no_test_problem_reaches_the_corpus(tokenizer):
    known = common.load_problems(ROOT / "data", "test", 1)[0]["problem"]
    start, edits = edits_of(known)
    draws = iter([(start, edits), ("12345", edits), ("98765", edits)])
    how = {"held_out": {known}, "make_problem": lambda rng: next(draws)}
    documents = digits.documents(random.Random(0), **how)
    ids, labels, number, position = next(digits.packed_rows(tokenizer, documents, 64))
    assert "12345" in tokenizer.decode(ids) and start not in tokenizer.decode(ids)
    assert labels[0] == -100 and set(map(len, (ids, labels, number, position))) == {64}


def steps_of(problem):
    said = problem.removeprefix("Write f(xs). From a list of integers it should ").removesuffix(".")
    known = {step.format(n=n): (step, n) for step in code.OPS for n in range(5, 1, -1)}
    steps = [known[text] for text in said.split(", then ")]
    assert code.problem_text(steps) == problem
    return steps


def test_steps_of_the_short_functions_by_hand():
    xs, n, by_hand = [5, -3, 2, 5, 8], 2, []
    by_hand += [[2, 8], [5, 2, 5, 8], [-3]]  # keep the even ones, of at least n, below n
    by_hand += [[2, 5, 8], [5, 8], [5, 2, 8]]  # drop the first n, keep the last n, every second
    by_hand += [[8, 5, 2, -3, 5], [8, 5, 5, 2, -3], [-3, 2, 5, 8, 5]]  # reverse, sort, rotate
    by_hand += [[25, 9, 4, 25, 64], [5, 0, 2, 5, 8], [2, -2, 1, 2, 4]]  # square, clip, halve
    by_hand += [[5, -3, 2, 8], [6, -1, 5, 9, 13]]  # drop repeats, add the places
    for (step, (right, mistake, _)), expected in zip(code.OPS.items(), by_hand, strict=True):
        assert code.apply([right.format(n=n)], xs) == expected, step
        assert code.apply([mistake.format(n=n)], xs) != expected, step


@needs_sandbox
def test_right_programs_pass_and_each_single_mistake_fails():
    folder = ROOT / "data/code"
    splits = "train", "validation", "test"
    train, validation, test = (common.load_problems(folder, s, None, SANDBOX) for s in splits)
    every = train + validation + test
    assert len({x["problem"] for x in every}) == len(every) == 5200
    readings = [True] * 3, [False, True, True], [True, False, True], [True, True, False]
    for x in test[:4]:
        steps, rng, programs = steps_of(x["problem"]), random.Random(0), []
        for i, reading in enumerate(readings):
            programs.append(code.attempt(rng, steps, reading, terse=i % 2 == 0, slips=False)[0])
        assert [reward for reward, _, _ in common.verify_all([x] * 4, programs)] == [1, 0, 0, 0]


def test_the_second_corpus_judges_truthfully_and_never_says_p_r():
    lists, true = code.inputs(random.Random(1), 16), []
    for problem, text in islice(code.documents(random.Random(0)), 300):
        assert not any(phrase in text for phrase in common.P_R.values())
        expressions = code.expressions(steps_of(problem), [True] * 3)
        for program, word in re.findall(r"```python\n(.*?)```\n\n(\w+), ", text, re.S):
            names = {}
            exec(program, names)
            said_right = word in code.RIGHT[0]
            assert said_right != (word in code.WRONG[0])
            right = all(names["f"](xs) == code.apply(expressions, xs) for xs in lists)
            true.append(said_right == right)
    assert len(true) > 100
    assert sum(true) > 0.98 * len(true)  # authors try a program on lists of their own


# ---------------------------------------------------------------- data sets of the hub

PROBLEM = {"problem": "What is 1 + 1?", "solution": "2", "answer": "2"}
EXAMPLES = [{"input": "1 2\n", "output": "3\n"}, {"input": "2 4\n", "output": "6\n"}]
PARTS = {
    "input_format": "Two numbers.",
    "output_format": "Their sum.",
    "note": None,
    "interaction_format": None,
}
CONTEST = {"title": "A. Sum", "description": "Add.", **PARTS, "id": "1/A", "examples": EXAMPLES}
PUBLIC = json.dumps([{**test, "testtype": "stdin"} for test in EXAMPLES])
LIVE = {"question_content": "Add.", "question_id": "1_A", "public_test_cases": PUBLIC}
SETS = {  # a row with the columns and types of these sets
    "open-r1/OpenR1-Math-220k": {**PROBLEM, "uuid": "a"},
    "openai/gsm8k": {"question": "What is 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
    "HuggingFaceH4/MATH-500": {**PROBLEM, "unique_id": "test/a/1.json"},
    "HuggingFaceH4/aime_2024": {**PROBLEM, "id": 60, "year": "2024"},
    "math-ai/aime25": {**PROBLEM, "id": "0"},
    "MathArena/hmmt_feb_2025": {**PROBLEM, "problem_idx": 1, "problem_type": ["Algebra"]},
    "open-r1/codeforces-cots": CONTEST,
    "lighteval/code_generation_lite": LIVE,
    "someone/ours": {"problem": "What is 1 + 1?", "answer": "2"},
}
LEFT_OUT = {  # what makes a row one that cannot be graded, or is there already
    "open-r1/OpenR1-Math-220k": [
        {},
        {"uuid": "b", "answer": ""},
        {"uuid": "c", "answer": "\\frac{"},
    ],
    "openai/gsm8k": [{"question": None}],
    "open-r1/codeforces-cots": [
        {},
        {"id": "2", "examples": None},
        {"id": "3", "examples": []},
        {"id": "4", "note": "This is an interactive problem."},
        {"id": "5", "output_format": "If there are several answers, print any."},
        {"id": "6", "interaction_format": "Ask."},
    ],
    "lighteval/code_generation_lite": [
        {"question_id": "1_B", "public_test_cases": "[]"},
        {"question_id": "1_C", "question_content": "You may output any of them."},
    ],
}


def offer(monkeypatch, rows):
    """A hub whose every data set has these rows."""
    asked = Mock(return_value=datasets.Dataset.from_list(rows))
    monkeypatch.setattr(datasets, "load_dataset", asked)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *name: ["train"])
    return asked


@needs_sandbox
def test_a_colon_asks_for_the_same_problems_in_cpp(monkeypatch, capsys):
    asked = offer(monkeypatch, [CONTEST])
    monkeypatch.setattr("data.sandbox.COMPILER", "g++")
    (problem,) = common.load_problems("open-r1/codeforces-cots:cpp", allow_code=SANDBOX)
    assert asked.call_args.args == ("open-r1/codeforces-cots", "solutions")
    assert problem["language"] == "cpp" and "```cpp" in problem["problem"]
    monkeypatch.setattr("data.sandbox.COMPILER", None)
    with pytest.raises(SystemExit):  # of the hub or not: nothing that could be graded is left
        common.load_problems("open-r1/codeforces-cots:cpp", allow_code=SANDBOX)
    with pytest.raises(SystemExit):
        common.check_code([problem], SANDBOX)
    assert "apt install g++" in capsys.readouterr().err


@needs_sandbox
@pytest.mark.parametrize("name", SETS)
def test_rows_of_known_sets_become_problems_that_can_be_graded(name, monkeypatch, capsys):
    row, left_out = SETS[name], LEFT_OUT.get(name, [])
    offer(monkeypatch, [row, *({**row, **changed} for changed in left_out)])
    (problem,) = common.load_problems(name, "test", allow_code=SANDBOX)  # it has but "train"
    said = re.findall(r"left out (\d+) rows", capsys.readouterr().out)
    assert sum(map(int, said)) == len(left_out) and problem["id"] not in ("", "None")
    answer = r"So \boxed{2}."
    if problem["kind"] == "code":
        answer = "```python\nprint(sum(map(int, input().split())))\n```"
        assert "```python" in problem["problem"]
        assert "6" not in problem["problem"]  # not all of the tests are shown
    assert verify(problem, answer)[0] == 1
    assert verify(problem, answer.replace("2", "3").replace("sum", "max"))[0] == 0
