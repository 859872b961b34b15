"""The driver of the claims: its judgement, its analyses by hand, its paths in miniature, and that
the READMEs hold what is filed."""

import json
import math

import pytest
import torch

import analyses
import budgets
import claims
import report
from conftest import ROOT, common, load


def test_a_claim_needs_a_confidence_interval_beyond_zero():
    assert report.judge([0.1]) is None
    mean, error, verdict = report.judge([0.1, 0.2, 0.3])  # t = 0.2 / (0.1 / √3) = 3.46 < 4.30
    assert (mean, error, verdict) == (pytest.approx(0.2), pytest.approx(0.1 / 3**0.5), "not shown")
    verdicts = [report.judge([0.19 * sign, 0.2 * sign, 0.21 * sign])[2] for sign in (1, -1)]
    assert verdicts == ["shown", "opposite"]


def test_steps_until_a_level_count_the_whole_window():
    assert report.until([0.9] * 10) is None and report.until([1.0] * 5) == 5
    assert report.until([0.5] + [1.0] * 9) == 6


def test_methods_are_paired_by_seed_and_missing_metrics_left_out():
    a, b = {0: 0.5, 1: 0.75, 2: 1.0, 3: 0.1}, {1: 0.5, 0: 0.25, 2: None}
    runs = {}
    for name, values in (("a", a), ("b", b)):
        runs[name] = {seed: {"metrics": {"accuracy": v}} for seed, v in values.items()}
    assert report.differences(runs, "accuracy", "a", "b") == [0.25, 0.25]
    assert report.differences(runs, "accuracy", "a", "none") == []


def test_claims_name_methods_that_exist_and_methods_patches_that_exist():
    for _, _, more, less, _ in claims.CLAIMS:
        assert {more, less} <= claims.METHODS.keys()
    for name, method in claims.METHODS.items():
        stage = claims.patched_stage(method.patch)
        assert not method.patch or any(c.startswith(stage) for c in method.commands), name
    said = report.short(claims.METHODS["top_64"], {"srt": 1, "sd_zero": 2})
    assert said.startswith(
        "01 --limit 1500 --model data/truthful/base, 02, 03 --lr 1, 04 --lr 2 --s"
    )
    assert said.endswith("--steps 50 --kl mixed; with top_k_renormalised.patch")


def test_the_baselines_have_sd_zeros_sample_budget():
    runs, _ = report.read(ROOT / "data/claims")
    for seed, sd_zero in runs["sd_zero"].items():
        for name in ("rft", "grpo", "sdft", "no_srt_long"):
            assert abs(runs[name][seed]["answers"] / sd_zero["answers"] - 1) < 0.02, (name, seed)


@pytest.mark.parametrize("budget", budgets.BUDGETS)
def test_baselines_sample_their_budget_and_every_method_has_three_rates(budget):
    (rft, _), (sdft, steps) = (budgets.sizes(name, budget, 0) for name in ("rft", "sdft"))
    assert 4 * rft == 4 * sdft + 64 * steps == budget
    assert all(64 * budgets.sizes(name, budget, 0)[1] == budget for name in ("grpo", "no_srt"))
    tries = {name: len({rate for rate, _ in budgets.choices(name)}) for name in budgets.METHODS}
    assert set(tries.values()) == {3}


PROBLEM = "Start with 37512: reverse, then swap the ends. What number results?"
WRONG = "reverse: 21753\nswap the ends: 31752\n\\boxed{31752}"


@pytest.mark.parametrize(
    "response, first",
    [
        ("reverse: 21573\nswap the ends: 31572\n\\boxed{31572}", None),
        (WRONG, "753"),
        ("reverse: 21573\nswap the ends: 31572\n\\boxed{31527}", "27}"),
        (f"{WRONG}\n\n{common.P_R[0]}\n\nreverse: 21573\nswap the ends: 31527", "27"),
        ("Take 37521 and reverse, which gives 12573.", None),  # miscopied
        ("swap the ends: 27513\nreverse: 31572\n\\boxed{31572}", None),  # in another order
    ],
)
def test_the_first_mistake_is_the_first_digit_that_no_right_reading_gives(response, first):
    row = {"problem": PROBLEM, "response": response}
    place = analyses.first_mistake(row, load("data/make_data.py").EDITS)
    assert (place and response[place[1] : place[2] + 1].rstrip("\n")) == first
    assert not place or response[place[0] :].startswith(("reverse", "Take"))


def test_a_mistake_is_hit_where_the_largest_kl_lies_on_it(tokenizer):
    ids = tokenizer(WRONG)["input_ids"] + [tokenizer.eos_token_id]
    at = len(tokenizer("reverse: 21")["input_ids"])
    row = {"problem": PROBLEM, "response": WRONG, "response_ids": ids, "kind": "math"}
    row |= {"finished": True, "reward": 0}
    for j, expected in ((at, (1, 1)), (at + 2, (0, 1)), (at - 1, (0, 0)), (at + 4, (0, 0))):
        kl = [float(i == j) for i in range(len(ids))]  # at + 3 is the end of the line
        wrong = {**row, "kl": kl, "kl_reward": kl}
        found = analyses.mistakes([wrong, {**wrong, "reward": 1}], tokenizer)
        assert (found["answers"], found["kl_on_it"], found["kl_by_line_end"]) == (1, *expected)
        assert 0 < found["chance"] < 0.3


@pytest.mark.parametrize(
    "lines, astray",
    [
        (["xs[3:]", "sorted(xs)", "[x for x in xs if x >= 4]"], 0),
        (["xs[:-2]", "sorted(xs, reverse=True)", "[x for x in xs if x > 5]"], 0),
        (["xs[3:]", "sorted(xs)"], 1),
        (["sorted(xs)", "xs[3:]", "[x for x in xs if x >= 4]"], 1),
    ],
)
def test_a_program_is_off_its_task_if_its_lines_are_not_the_steps(lines, astray):
    problem = "Write f(xs). From a list of integers it should drop the first 3, then sort from "
    problem += "largest to smallest, then keep those of at least 4."
    program = "\n    ".join(["def f(xs):", *(f"xs = {line}" for line in lines), "return xs"])
    row = {"kind": "code", "greedy": False, "problem": problem}
    row["response"] = f"```python\nxs = 1\n```\n\nHmm.\n\n```python\n{program}\n```"
    assert analyses.off_task([row, {**row, "greedy": True, "response": ""}]) == astray
    other = {"greedy": False, "kind": "math", "problem": "What is 1 + 1?"}
    assert analyses.off_task([other]) is None


def test_an_answer_is_off_its_task_if_it_takes_another_edit_than_the_next():
    row = {"kind": "math", "greedy": False, "problem": PROBLEM}
    rows = [{**row, "response": WRONG}, {**row, "response": "swap the ends: 2\nreverse: 3"}]
    assert analyses.off_task(rows) == 0.5


def test_reviser_kl_is_the_loss_of_phase_2_in_any_batch(stages, model, tokenizer, problems):
    rows = []
    for x, n in zip(problems, (9, 4, 17, 8)):
        rows.append({**x, "response_ids": list(range(40, 40 + n)), "reward": n % 2})
    stages[5].reviser_kl(model, tokenizer, rows, common.P_R)
    head = model.get_output_embeddings()
    for row in rows:
        y, reward = row["response_ids"], row["reward"]
        prefixes = common.prompt_ids(tokenizer, row["problem"]), None
        prefixes = prefixes[0], common.revision_ids(tokenizer, row["problem"], y, reward)
        both = [head(common.completion_hidden(model, [p], [y])).detach() for p in prefixes]
        kl = stages[4].token_kl(*both)
        assert torch.tensor(row["kl"]) == pytest.approx(kl, abs=2e-4)
        ratio = (both[0].log_softmax(-1) - both[1].log_softmax(-1))[range(len(y)), y]
        assert torch.tensor(row["kl_reward"]) == pytest.approx(ratio, abs=2e-4)


def test_where_the_kl_lies_by_hand():
    assert analyses.spread_of([]) is None and analyses.spread_of([[0.0, 0.0]]) is None
    one = analyses.spread_of([[1.0] + [0.0] * 18 + [3.0], [0.2] * 20])
    assert one["answers"] == 2 and one["nats"] == pytest.approx(4.0)
    shares = [(0.75 + 0.05) / 2, (1 + 0.1) / 2, (1 + 0.2) / 2, (1 + 0.5) / 2]
    assert one["top"] == pytest.approx(shares)
    assert one["position"] == pytest.approx([0.35] + [0.1] * 8 + [0.85])


def test_judgements_and_pass_at_k_by_hand():
    assert analyses.pass_at_k(4, 1, 2) == pytest.approx(1 / 2)
    assert analyses.pass_at_k(10, 3, 5) == pytest.approx(1 - math.comb(7, 5) / math.comb(10, 5))
    wait, fine = common.P_R[0], common.P_R[1]
    row = {"kind": "math", "answer": "1"}
    twice = f"\\boxed{{2}}\n\n{wait}\n\n\\boxed{{1}}\n\n{wait}\n\n\\boxed{{3}}"
    rows = [{**row, "response": twice}, {**row, "response": f"{fine} \\boxed{{2}} {fine} 4"}]
    assert analyses.judgements(rows, common.P_R) == [(0, 0), (0, 1), (1, 0)]


def test_methods_and_their_searches_run_in_miniature_and_are_not_run_twice(tmp_path):
    """A baseline and the second domain: commands, patches, places, what is filed."""
    methods, filed = ["rft", "code_base"], tmp_path / "filed"
    argv = ["--miniature", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path), "--methods"]
    claims.main([*argv, *methods])
    made = {path: path.stat().st_mtime_ns for path in filed.iterdir()}
    assert {path.name for path in made} == {"rft-0.json", "code_base-0.json", "search-rft.json"}
    for name in methods:
        run = json.loads((filed / f"{name}-0.json").read_text())
        assert run["metrics"]["problems"] == 6 and (run["answers"] > 0) == (name != "code_base")
        assert f"| `{name}` |" in (tmp_path / "data/claims/README.md").read_text()
    claims.run_all(methods, 1, filed, tmp_path, 1, True)
    assert made == {path: path.stat().st_mtime_ns for path in filed.iterdir()}


def test_readmes_and_figures_are_those_of_the_filed_runs(tmp_path):
    assert report.check(ROOT / "data/claims", claims.CLAIMS, tmp_path) == []
