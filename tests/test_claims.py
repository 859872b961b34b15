"""The driver of the claims: its judgement, its analyses by hand, all of its paths in miniature, and the README's figures."""

import json

import pytest
import torch

import claims
import common
import report
from conftest import ROOT, load


def test_a_claim_needs_a_confidence_interval_beyond_zero():
    assert report.judge([0.1]) is None
    mean, error, verdict = report.judge([0.1, 0.2, 0.3])  # t = 0.2 / (0.1 / √3) = 3.46 < 4.30
    assert (mean, error, verdict) == (pytest.approx(0.2), pytest.approx(0.1 / 3**0.5), "not shown")
    assert (
        report.judge([0.19, 0.2, 0.21])[2] == "shown"
        and report.judge([-0.19, -0.2, -0.21])[2] == "opposite"
    )


def test_steps_until_a_level_count_the_whole_window():
    assert (
        report.until([0.9] * 10) is None
        and report.until([1.0] * 5) == 5
        and report.until([0.5] + [1.0] * 9) == 6
    )


def test_methods_are_paired_by_seed_and_missing_metrics_left_out():
    run = lambda accuracy: {"metrics": {"accuracy": accuracy}}
    runs = {
        "a": {0: run(0.5), 1: run(0.75), 2: run(1.0), 3: run(0.1)},
        "b": {1: run(0.5), 0: run(0.25), 2: run(None)},
    }
    assert (
        report.differences(runs, "accuracy", "a", "b") == [0.25, 0.25]
        and report.differences(runs, "accuracy", "a", "none") == []
    )


def test_claims_name_rows_that_exist_and_every_method_can_be_read_in_its_commands():
    for _, _, _, more, less in claims.CLAIMS:
        assert {more, less} <= claims.METHODS.keys()
    commands = [
        "python 01_generate.py --n 4 --limit 2080 --out a/b --seed 0",
        "python 03_revise_sft.py --objective rft --lr 1 --srt a --seed 0",
        "python 04_self_distill.py --srt data/base --kl mixed --top-k 64 --p-r-wrong 'Let me.' --seed 0",
        "python 05_eval.py --seed 0",
    ]
    assert (
        report.short(commands)
        == "01 --n 4 --limit 2080, 03 --objective rft --lr 1, 04 --srt data/base --kl mixed --top-k 64 --p-r-wrong 'Let me.'"
    )


def test_the_baselines_have_sd_zeros_sample_budget():
    runs, _ = report.read(ROOT / "data/claims")
    for seed, sd_zero in runs["sd_zero"].items():
        for name in ("rft", "grpo", "sdft", "no_srt_long"):
            if seed in runs.get(name, {}):
                assert abs(runs[name][seed]["answers"] / sd_zero["answers"] - 1) < 0.02, (
                    name,
                    seed,
                )


@pytest.mark.parametrize(
    "response, first",
    [
        ("reverse: 21573\nswap the ends: 31572\n\\boxed{31572}", None),
        ("reverse: 21753\nswap the ends: 31572\n\\boxed{31572}", "753"),
        (
            "Take 37512 and reverse, which gives 21573.\nTake 21573 and swap the ends, which gives 12573.\n\\boxed{12573}",
            "12573.",
        ),
        ("reverse: 21573\nswap the ends: 31572\n\\boxed{31527}", "27}"),
        ("reverse: 2157\nswap the ends: 7152\n\\boxed{7152}", ""),
        ("reverse: 2157", ""),  # too short: the line's end
        (
            f"reverse: 21753\nswap the ends: 31752\n\\boxed{{31752}}\n\n{common.P_R[0]}\n\nreverse: 21573\nswap the ends: 31527",
            "27",
        ),
        (
            "Take 37521 and reverse, which gives 12573.\nTake 12573 and swap the ends, which gives 32571.\n\\boxed{32571}",
            None,
        ),  # miscopied
        ("swap the ends: 27513\nreverse: 31572\n\\boxed{31572}", None),  # in another order
    ],
)
def test_the_first_mistake_is_the_first_digit_that_no_right_reading_gives(response, first):
    row = {
        "problem": "Start with 37512: reverse, then swap the ends. What number results?",
        "response": response,
    }
    place = claims.first_mistake(row, load("data/make_data.py").EDITS)
    assert (place and response[place[1] : place[2] + 1].rstrip("\n")) == first
    assert not place or response[place[0] :].startswith(("reverse", "Take"))


def test_a_mistake_is_hit_where_the_largest_kl_lies_on_it(tokenizer):
    response = "reverse: 21753\nswap the ends: 31752\n\\boxed{31752}"
    ids = tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
    at = len(tokenizer("reverse: 21")["input_ids"])
    for j, expected in (
        (at, (1, 1)),
        (at + 2, (0, 1)),
        (at - 1, (0, 0)),
        (at + 4, (0, 0)),
    ):  # at + 3 is the end of the line
        kl = [0.0] * len(ids)
        kl[j] = 1.0
        row = {
            "problem": "Start with 37512: reverse, then swap the ends. What number results?",
            "response": response,
            "response_ids": ids,
            "kl": kl,
            "kl_reward": kl,
            "finished": True,
            "reward": 0,
        }
        found = claims.mistakes([row, {**row, "reward": 1}], tokenizer)
        assert (found["answers"], found["kl_on_it"], found["kl_by_line_end"]) == (
            1,
            *expected,
        ) and 0 < found["chance"] < 0.3


@pytest.mark.parametrize(
    "lines, astray",
    [
        (["xs[3:]", "sorted(xs)", "[x for x in xs if x >= 4]"], 0),
        (["xs[:-2]", "sorted(xs, reverse=True)", "[x for x in xs if x > 5]"], 0),
        (["xs[3:]", "sorted(xs)"], 1),
        (["sorted(xs)", "xs[3:]", "[x for x in xs if x >= 4]"], 1),
        (["xs[3:]", "sorted(xs)", "[x for x in xs if x >= 4] + xs"], 1),
        (["xs[3:]", "sorted(xs)", "[x for x in xs if x >= 4]", "xs[::2]"], 1),
    ],
)
def test_a_program_is_off_its_task_if_its_lines_are_not_the_steps(lines, astray):
    problem = "Write f(xs). From a list of integers it should drop the first 3, then sort from largest to smallest, then keep those of at least 4."
    program = "\n    ".join(
        ["def f(xs):", "# drop the first 3", *(f"xs = {line}" for line in lines), "return xs"]
    )
    first = "```python\ndef f(xs):\n    xs = xs + 1\n    return xs\n```\n\nHmm, this fails, from the start.\n\n"
    row = {
        "kind": "code",
        "greedy": False,
        "problem": problem,
        "response": f"{first}```python\n{program}\n```",
    }
    assert (
        claims.off_task([row, {**row, "greedy": True, "response": ""}]) == astray
        and claims.off_task([{"greedy": False}]) is None
    )


def test_reviser_kl_is_the_loss_of_phase_2_in_any_batch(stages, model, tokenizer, problems):
    rows = [
        {**x, "response_ids": list(range(40, 40 + n)), "reward": n % 2}
        for x, n in zip(problems, (9, 4, 17, 8))
    ]
    together = stages[5].reviser_kl(model, tokenizer, rows, common.P_R)
    for row, measured in zip(rows, together):
        y = [row["response_ids"]]
        student = common.completion_logits(model, [common.prompt_ids(tokenizer, row["problem"])], y)
        teacher = common.completion_logits(
            model, [common.revision_ids(tokenizer, row["problem"], *y, row["reward"])], y
        )
        assert torch.tensor(measured["kl"]) == pytest.approx(
            stages[4].token_kl(student, teacher).detach(), abs=2e-4
        )
        log_ratio = (student.log_softmax(-1) - teacher.log_softmax(-1))[range(len(y[0])), y[0]]
        assert torch.tensor(measured["kl_reward"]) == pytest.approx(log_ratio.detach(), abs=2e-4)


def test_where_the_kl_lies_by_hand(stages):
    assert stages[5].spread_of([]) is None and stages[5].spread_of([[0.0, 0.0]]) is None
    one = stages[5].spread_of([[1.0] + [0.0] * 18 + [3.0], [0.2] * 20])
    assert one["answers"] == 2 and one["nats"] == pytest.approx(4.0)
    assert one["top"] == pytest.approx(
        [(0.75 + 0.05) / 2, (1 + 0.1) / 2, (1 + 0.2) / 2, (1 + 0.5) / 2]
    )
    assert one["position"] == pytest.approx([0.35] + [0.1] * 8 + [0.85])


def test_coloured_answers_escape_what_the_model_says(stages, tmp_path, tokenizer):
    ids = tokenizer("<script>alert(1)</script>")["input_ids"]
    row = {
        "checkpoint": "a<b",
        "problem": "<b>",
        "answer": "&",
        "reward": 0,
        "finished": True,
        "response_ids": ids,
        "kl": [0.0] * len(ids),
    }
    for strength in (0.0, 2.0, -0.5):
        stages[5].show_token_kl(
            [{**row, "kl_reward": [strength] * len(ids)}], tokenizer, tmp_path / "page.html"
        )
        page = (tmp_path / "page.html").read_text()
        assert "<script" not in page and "<b>" not in page and "a&lt;b" in page


def test_the_methods_and_the_search_run_in_miniature_and_are_not_run_twice(tmp_path, capsys):
    """Methods that take all code paths between them."""
    methods = ["base", "grpo", "srt", "sd_zero", "neutral", "code_base"]
    argv = [
        "--miniature",
        "--seeds",
        "1",
        "--jobs",
        "2",
        "--out",
        str(tmp_path),
        "--methods",
        *methods,
    ]
    claims.main(argv)
    filed = {path: path.stat().st_mtime_ns for path in (tmp_path / "filed").iterdir()}
    assert {p.name for p in filed} == {f"{m}-0.json" for m in methods} | {
        f"search-{m}.json" for m in ("grpo", "srt", "sd_zero")
    }
    for path in filed:
        run = json.loads(path.read_text())
        assert (
            path.name.startswith("search-")
            or run["commands"]
            and run["metrics"]["problems"] == 6
            and (run["answers"] > 0) == ("base" not in path.stem)
        )
    text = (tmp_path / "README.md").read_text()
    assert all(f"| `{m}` | {claims.METHODS[m][0]} |" in text for m in methods)
    assert all(
        (tmp_path / name).stat().st_size > 0
        for name in ("methods.png", "training.png", "token_kl.png")
    )
    claims.run_all(methods, 1, tmp_path / "filed", tmp_path, 2, True)
    assert filed == {path: path.stat().st_mtime_ns for path in (tmp_path / "filed").iterdir()}


def test_readme_and_figures_are_those_of_the_filed_runs(tmp_path):
    assert report.check(ROOT / "data/claims", claims.METHODS, claims.CLAIMS, tmp_path) == []
