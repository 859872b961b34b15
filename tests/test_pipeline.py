"""The five scripts in miniature on the embedded model: artifacts, resumption, determinism, and a user's mistakes."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
from conftest import MINI, ROOT, load, rows_of


# ---------------------------------------------------------------- the miniature


def test_every_stage_leaves_its_artifacts_and_says_what_made_them(mini):
    for name in (
        "responses.jsonl",
        "verified.jsonl",
        "revisions.jsonl",
        "srt.jsonl",
        "distill.jsonl",
        "eval.jsonl",
        "summary.json",
        "stages.png",
        "token_kl.html",
    ):
        assert (mini / name).stat().st_size > 0, name
    for name in ("responses", "verified", "revisions", "srt", "distill", "sd_zero", "eval"):
        meta = json.loads((mini / f"{name}.meta.json").read_text())
        assert {
            "made_of",
            "arguments",
            "versions",
            "device",
            "commit",
            "seconds",
            "counts",
        } <= meta.keys(), name


def test_stages_only_add_fields_and_drop_no_row(mini):
    responses, verified, revisions = (
        rows_of(mini / f"{n}.jsonl") for n in ("responses", "verified", "revisions")
    )
    assert [{k: v[k] for k in r} for r, v in zip(responses, verified, strict=True)] == responses
    by_id = {v["id"]: v for v in verified}
    for r in revisions:
        assert {k: r[k] for k in by_id[r["id"]]} == by_id[r["id"]]
    for v in verified:
        if v["finished"]:
            assert sum(r["id"] == v["id"] for r in revisions) == (1 if v["reward"] else 4)
    assert {r["p_r"] for r in revisions if r["reward"]} <= {common.P_R[1]} and {
        r["p_r"] for r in revisions if not r["reward"]
    } == {common.P_R[0]}


def test_kept_means_finished_verified_and_new(mini):
    kept = [r for r in rows_of(mini / "revisions.jsonl") if r["kept"] == "yes"]
    assert kept and all(
        r["revised_reward"] == 1 and r["revised_finished"] and r["finished"] for r in kept
    )
    assert len({(r["id"], tuple(r["revised_ids"])) for r in kept}) == len(kept)


def test_response_is_for_people_and_ids_are_exact(mini, tokenizer):
    for r in rows_of(mini / "responses.jsonl"):
        assert tokenizer.decode(r["response_ids"], skip_special_tokens=True) == r["response"]
        assert r["finished"] == (r["response_ids"][-1] == tokenizer.eos_token_id)


def test_training_moves_the_weights(mini):
    weights = [
        common.load_model(m, common.load_tokenizer(m), torch.device("cpu")).state_dict()
        for m in (ROOT / "data/base", mini / "srt", mini / "sd_zero")
    ]
    for a, b in zip(weights, weights[1:]):
        assert any(not torch.equal(a[k], b[k]) for k in a)


def test_summary_has_the_promised_columns(mini):
    summary = json.loads((mini / "summary.json").read_text())
    assert [r["checkpoint"] for r in summary] == ["base", "srt", "sd_zero"]
    assert {
        "n",
        "k",
        "accuracy",
        "accuracy_se",
        "pass_at_k",
        "mean_tokens",
        "finished",
        "revised_accuracy",
        "correction_rate",
        "spoiling_rate",
    } <= summary[0].keys()


# ---------------------------------------------------------------- what 04 trains on, and with whom


def run_distill(stages, mini, out, *flags):
    shutil.copy(mini / "verified.jsonl", out)
    stages[4].main([*MINI[4], "--srt", str(mini / "srt"), "--out", str(out), *flags])
    return common.load_model(
        out / "sd_zero", common.load_tokenizer(out / "sd_zero"), torch.device("cpu")
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--micro-tokens", "500"],
        ["--gradient-checkpointing", "--offload-teacher", "--batch-rows", "3"],
    ],
)
def test_distillation_does_not_depend_on_the_micro_batch_and_on_what_saves_memory(
    stages, mini, tmp_path, flags
):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole, split = (
        run_distill(stages, mini, tmp_path / "a"),
        run_distill(stages, mini, tmp_path / "b", *flags),
    )
    start = common.load_model(
        mini / "srt", common.load_tokenizer(mini / "srt"), torch.device("cpu")
    )
    for w, s, p in zip(whole.parameters(), split.parameters(), start.parameters()):
        assert (w - s).abs().max() < 0.05 * (w - p).abs().max() + 1e-7


def test_teacher_is_frozen_and_synchronised_between_rounds_only(
    stages, mini, tmp_path, monkeypatch
):
    models, teachers, real_load, real_hidden = (
        [],
        [],
        stages[4].load_model,
        stages[4].completion_hidden,
    )
    monkeypatch.setattr(
        stages[4], "load_model", lambda *a: models.append(real_load(*a)) or models[-1]
    )

    def spy(model, prefixes, completions):
        if model is models[1]:
            assert not torch.is_grad_enabled() and not any(
                p.requires_grad for p in model.parameters()
            )
            teachers.append(torch.cat([p.flatten() for p in model.parameters()]).clone())
            students.append(
                torch.cat([p.detach().flatten() for p in models[0].parameters()]).clone()
            )
        return real_hidden(model, prefixes, completions)

    students, samplers = [], []
    monkeypatch.setattr(stages[4], "completion_hidden", spy)
    real_sample = stages[4].sample
    monkeypatch.setattr(
        stages[4], "sample", lambda model, *a: samplers.append(model) or real_sample(model, *a)
    )
    run_distill(stages, mini, tmp_path, "--rounds", "2", "--micro-tokens", "100000")
    assert all(m is models[0] for m in samplers)  # on-policy: the student samples
    assert len(teachers) == 4  # one micro-batch a step, two steps a round
    assert torch.equal(teachers[0], teachers[1]) and torch.equal(teachers[2], teachers[3])
    assert (
        torch.equal(teachers[0], students[0])
        and torch.equal(teachers[2], students[2])
        and not torch.equal(teachers[0], teachers[2])
    )
    assert not torch.equal(teachers[1], students[1])


def test_distillation_leaves_phase_1_problems_out(stages, mini, tmp_path, monkeypatch):
    asked, real = [], stages[4].prompt_ids
    monkeypatch.setattr(
        stages[4],
        "prompt_ids",
        lambda tokenizer, problem: asked.append(problem) or real(tokenizer, problem),
    )
    run_distill(stages, mini, tmp_path)
    assert len(set(asked)) == 16 and not set(asked) & {
        r["problem"] for r in rows_of(mini / "verified.jsonl")
    }


@pytest.mark.parametrize("stage", [3, 4, 5])
def test_the_reviser_is_told_the_true_reward(stages, mini, tmp_path, monkeypatch, tokenizer, stage):
    asked, real = [], stages[stage].revision_ids
    monkeypatch.setattr(stages[stage], "revision_ids", lambda *a: asked.append(a) or real(*a))
    for name in ("responses.jsonl", "verified.jsonl"):
        shutil.copy(mini / name, tmp_path)
    if stage == 4:
        shutil.copytree(mini / "srt", tmp_path / "srt")
    one = ["--checkpoints", f"base={ROOT / 'data/base'}"] if stage == 5 else []
    stages[stage].main([*MINI[stage], *one, "--out", str(tmp_path)])
    answers = {
        x["problem"]: x
        for split in ("train", "test")
        for x in common.load_problems(ROOT / "data", split)
    }
    assert asked and {a[3] for a in asked} == {0, 1}
    for _, problem, ids, reward, p_r in asked:
        assert (
            reward
            == common.verify(answers[problem], tokenizer.decode(ids, skip_special_tokens=True))[0]
        )
        assert p_r == common.P_R


def test_sdft_teacher_has_read_a_right_answer_to_the_same_problem(
    stages, mini, tmp_path, monkeypatch
):
    asked, real = [], stages[4].revision_ids
    monkeypatch.setattr(stages[4], "revision_ids", lambda *a: asked.append(a) or real(*a))
    run_distill(
        stages,
        mini,
        tmp_path,
        "--objective",
        "sdft",
        "--srt",
        str(ROOT / "data/base"),
        "--batch-size",
        "4",
    )
    right = {
        r["problem"]: r["response_ids"] for r in rows_of(mini / "verified.jsonl") if r["reward"]
    }
    assert len(asked) == 8 and all(
        right[problem] == ids and reward == 1 for _, problem, ids, reward, _ in asked
    )


def test_grpo_samples_groups_and_loads_no_teacher(stages, mini, tmp_path, monkeypatch, capsys):
    models, batches, real_load, real_sample = [], [], stages[4].load_model, stages[4].sample
    monkeypatch.setattr(stages[4], "load_model", lambda *a: models.append(a) or real_load(*a))
    monkeypatch.setattr(stages[4], "sample", lambda *a: batches.append(a[1:3]) or real_sample(*a))
    stages[4].main(
        [
            *MINI[4],
            "--objective",
            "grpo",
            "--n",
            "4",
            "--srt",
            str(ROOT / "data/base"),
            "--out",
            str(tmp_path),
        ]
    )
    assert len(models) == 1 and len(batches) == 2
    for prompts, seeds in batches:
        assert [prompts.count(p) for p in prompts] == [4] * 8 and len(set(seeds)) == 8
    assert "boxed" in capsys.readouterr().out  # the samples that it shows have text
    log = rows_of(tmp_path / "distill.jsonl")
    assert log[0]["kl"] is None and log[0]["gradient_norm"] > 0


@pytest.mark.parametrize(
    "flags, expected",
    [
        (
            ["--objective", "rft"],
            lambda verified, revisions: [
                r["response_ids"] for r in verified if r["reward"] and r["finished"]
            ],
        ),
        (
            ["--unfiltered"],
            lambda verified, revisions: [
                r["revised_ids"]
                for r in revisions
                if r["kept"] in ("yes", "revision wrong", "revision no_answer")
            ],
        ),
    ],
)
def test_rft_and_unfiltered_srt_train_on_what_they_say(
    stages, mini, tmp_path, monkeypatch, flags, expected
):
    seen, real = [], stages[3].srt_backward
    monkeypatch.setattr(
        stages[3],
        "srt_backward",
        lambda model, batch, *a: seen.extend(batch) or real(model, batch, *a),
    )
    for name in ("verified.jsonl", "verified.meta.json", "revisions.jsonl", "revisions.meta.json"):
        shutil.copy(mini / name, tmp_path)
    stages[3].main([*MINI[3], "--epochs", "1", *flags, "--out", str(tmp_path)])
    verified, revisions = (
        rows_of(tmp_path / "verified.jsonl"),
        rows_of(tmp_path / "revisions.jsonl"),
    )
    assert sorted(r for _, _, r in seen) == sorted(expected(verified, revisions))
    assert all(not attempt for _, attempt, _ in seen) == (flags[-1] == "rft")


def test_srt_learning_rate_warms_up_and_decays(mini):
    lrs = [r["lr"] for r in rows_of(mini / "srt.jsonl")]
    assert len(lrs) >= 3 and lrs[0] == 8e-4 and lrs == sorted(lrs, reverse=True) and lrs[-1] < 4e-4


# ---------------------------------------------------------------- interruption and determinism


@pytest.mark.parametrize(
    "stage, name", [(1, "responses"), (2, "verified"), (3, "revisions"), (5, "eval")]
)
def test_a_torn_artifact_is_continued_to_the_same_bytes(stages, mini, tmp_path, stage, name):
    out = tmp_path / "run"
    shutil.copytree(mini, out)
    whole = (mini / f"{name}.jsonl").read_bytes()
    (out / f"{name}.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
    if stage == 3:
        shutil.rmtree(out / "srt")
    stages[stage].main(
        [*MINI[stage], *(["--batch-rows", "5"] if stage in (1, 3) else []), "--out", str(out)]
    )
    assert (out / f"{name}.jsonl").read_bytes() == whole
    if stage == 3:
        a, b = (
            torch.cat(
                [
                    p.flatten()
                    for p in common.load_model(
                        f / "srt", common.load_tokenizer(f / "srt"), torch.device("cpu")
                    ).parameters()
                ]
            )
            for f in (mini, out)
        )
        assert torch.equal(a, b)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "stage, model, flags",
    [(3, "srt", []), (4, "sd_zero", ["--steps", "2", "--rounds", "2", "--batch-size", "4"])],
)
def test_an_interrupted_training_becomes_the_uninterrupted_one(
    stages, mini, tmp_path, monkeypatch, stage, model, flags
):
    inputs = ["verified", "revisions", *(["srt"] if stage == 4 else [])]
    argv = lambda out: [*MINI[stage], *flags, "--save-every", "2", "--out", str(out)]
    for out in ("whole", "torn"):
        (tmp_path / out).mkdir()
        for path in (p for p in mini.iterdir() if p.name.split(".")[0] in inputs):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / out / path.name)
    stages[stage].main(argv(tmp_path / "whole"))
    for steps in (
        2,
        1,
    ):  # interrupted in the third step, before anything could be saved twice, and again one or two steps later
        seen, real = [], stages[stage].update

        def interrupted(*a):
            seen.append(real(*a))
            if len(seen) > steps:
                raise KeyboardInterrupt
            return seen[-1]

        monkeypatch.setattr(stages[stage], "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stages[stage].main(argv(tmp_path / "torn"))
        monkeypatch.setattr(stages[stage], "update", real)
    stages[stage].main(argv(tmp_path / "torn"))
    whole, torn = weights_of(tmp_path / "whole" / model), weights_of(tmp_path / "torn" / model)
    assert all(torch.equal(whole[k], torn[k]) for k in whole)
    log = "srt.jsonl" if stage == 3 else "distill.jsonl"
    losses = [
        [r.get("loss", r.get("kl")) for r in rows_of(tmp_path / out / log)]
        for out in ("whole", "torn")
    ]
    assert losses[0] == losses[1] and not (tmp_path / "torn" / f"{model}.resume").exists()


def test_ctrl_c_during_the_imports_says_how_to_go_on(tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "01_generate.py", "--out", tmp_path],
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(1)  # torch and transformers take longer
    process.send_signal(signal.SIGINT)
    message = process.communicate()[1]
    assert (
        "the same command goes on" in message
        and "Traceback" not in message
        and process.returncode != 0
    )


def test_steps_without_a_finite_gradient_are_skipped_and_end_the_training(
    stages, mini, tmp_path, monkeypatch, capsys
):
    (
        shutil.copy(mini / "verified.jsonl", tmp_path),
        shutil.copy(mini / "revisions.jsonl", tmp_path),
        shutil.copy(mini / "revisions.meta.json", tmp_path),
    )
    real = stages[3].srt_backward
    monkeypatch.setattr(
        stages[3],
        "srt_backward",
        lambda model, *a: (
            real(model, *a) + next(model.parameters()).grad.fill_(float("nan")).sum().item()
        ),
    )
    assert "not finite" in refused(
        stages[3],
        [*MINI[3], "--epochs", "4", "--save-every", "2", "--overwrite", "--out", tmp_path],
        capsys,
    )
    rows = rows_of(tmp_path / "srt.jsonl")
    assert (
        len(rows) == 8
        and not (tmp_path / "srt.resume").exists()
        and all(r["gradient_norm"] is None for r in rows)
        and not (tmp_path / "srt").exists()
    )


def test_a_training_without_any_finite_gradient_has_no_result_and_one_with_some_has():
    rows = lambda *norms: [{"step": i, "gradient_norm": norm} for i, norm in enumerate(norms)]
    common.stop_if_broken(rows(1.0, None), "x", 2)
    common.stop_if_broken(rows(*[None] * 7), "x", 50)
    for broken, steps in ((rows(None, None, None), 3), (rows(1.0, *[None] * 8), 50)):
        with pytest.raises(SystemExit):
            common.stop_if_broken(broken, "x", steps)


def test_rewards_that_are_mostly_errors_end_a_stage():
    common.stop_if_ungraded(["error"] * 4 + ["wrong"] * 4, False, "x")
    common.stop_if_ungraded(["timeout"] * 8, True, "x")  # programs may be slow
    common.stop_if_ungraded(["error"] * 7, False, "x", least=8)
    for verdicts, any_code in (
        (["error"] * 3 + ["timeout"] * 2 + ["wrong"] * 4, False),
        (["error"] * 5 + ["wrong"] * 4, True),
    ):
        with pytest.raises(SystemExit):
            common.stop_if_ungraded(verdicts, any_code, "x")


def test_an_ablation_on_the_same_revisions_samples_nothing(stages, mini, tmp_path, monkeypatch):
    for name in ("verified.jsonl", "verified.meta.json", "revisions.jsonl", "revisions.meta.json"):
        shutil.copy(mini / name, tmp_path)
    monkeypatch.setattr(stages[3], "sample", None)
    stages[3].main([*MINI[3], "--epochs", "1", "--objective", "revision", "--out", str(tmp_path)])


def test_of_copies_of_a_revision_one_is_kept_right_or_wrong(stages, mini, tmp_path, monkeypatch):
    for name in ("verified.jsonl", "verified.meta.json"):
        shutil.copy(mini / name, tmp_path)
    tokenizer = common.load_tokenizer(ROOT / "data/base")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    same = [*tokenizer("\\boxed{1}", add_special_tokens=False)["input_ids"], end]
    monkeypatch.setattr(stages[3], "sample", lambda model, prefixes, *a: [same] * len(prefixes))
    with pytest.raises(SystemExit):  # none is right
        stages[3].main([*MINI[3], "--out", str(tmp_path)])
    rows = rows_of(tmp_path / "revisions.jsonl")
    assert {r["kept"] for r in rows} == {"revision wrong", "duplicate"}
    assert all((r["kept"] == "duplicate") == (r["revision"] > 0) for r in rows)


def test_answers_that_do_not_fit_the_models_positions_twice_are_not_learned_from(
    stages, mini, tmp_path
):
    for name in ("verified.jsonl", "verified.meta.json", "srt", "srt.meta.json"):
        (shutil.copytree if name == "srt" else shutil.copy)(mini / name, tmp_path / name)
    config = tmp_path / "srt/config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 200})
    )
    stages[4].main([*MINI[4], "--mix", "--out", str(tmp_path)])
    log = rows_of(tmp_path / "distill.jsonl")
    assert all(0 < r["too_long"] < 8 and r["kl"] > 0 for r in log)
    stages[5].main(
        [*MINI[5], "--mix", "--checkpoints", f"srt={tmp_path / 'srt'}", "--out", str(tmp_path)]
    )
    asked = [r for r in rows_of(tmp_path / "eval.jsonl") if r["sample"] == 0]
    assert {bool(r["kl"]) for r in asked} == {True, False} and all(
        len(r["kl"]) in (0, len(r["response_ids"])) for r in asked
    )


def test_the_best_model_is_not_one_that_fell_at_the_end_of_a_good_stretch(stages):
    history = [{"accuracy": a} for a in [0.7] * 10 + [0.95] * 7 + [0.5] * 3]
    assert (
        stages[4].best_of(history, 10) == 10
        and stages[4].best_of(history[:17] + [{"accuracy": 0.8}] * 3, 10) == 20
    )
    assert stages[4].best_of(history, 1) == 17


def test_what_goes_wrong_in_distillation_is_said(stages):
    row = lambda **more: {"gradient_norm": 1.0, "finished": 0.9, "accuracy": 0.5, "kl": 0.1, **more}
    say = lambda rows: stages[4].trouble(rows, 4, 4, 64)
    assert say([row()] * 4) is None and say([row()] * 5) is None and say([row(kl=None)] * 3) is None
    assert all(
        "nothing to learn" in say([small] * 3) and say([small] * 2) is None
        for small in (row(gradient_norm=1e-9), row(kl=1e-6))
    )
    assert (
        "cut" in say([row(finished=0)] * 4)
        and "wrong" in say([row(accuracy=0)] * 4)
        and "right" in say([row(accuracy=1)] * 4)
    )
    history = (
        [row()] * 4 + [row(accuracy=0.8)] * 4 + [row(accuracy=0.5)] * 4
    )  # as good as at the start, and far below what it was
    assert (
        "50.0% are right" in say(history)
        and "after step 8" in say(history)
        and stages[4].best_of(history[:11], 4) == 8
    )
    assert (
        say([row(accuracy=0.1)] * 4 + [row(accuracy=0.08)] * 4) is None
    )  # five of 256 answers: by chance


# ---------------------------------------------------------------- a user's mistakes: one line, exit code 2, nothing overwritten


def refused(stage, argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        stage.main([str(a) for a in argv])
    message = capsys.readouterr().err.strip().splitlines()
    message = [
        line
        for line in message
        if line.strip()
        and not re.match(r"(generate|revise|verify|SRT|distill|base|warning):", line)
    ]
    assert e.value.code == 2 and len(message) == 1 and message[0].startswith("error: "), message
    return message[0]


def test_a_stage_before_its_predecessor_names_the_command(stages, tmp_path, mini, capsys):
    for stage, command in (
        (2, "01_generate.py"),
        (3, "02_verify.py"),
        (4, "02_verify.py"),
        (5, "03_revise_sft.py"),
    ):
        assert command in refused(stages[stage], ["--out", tmp_path], capsys)
    shutil.copy(mini / "verified.jsonl", tmp_path)
    assert "03_revise_sft.py" in refused(stages[4], ["--out", tmp_path], capsys)
    assert not (tmp_path / "sd_zero").exists()


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "is empty"),
        ("{\n", ":1: not JSON"),
        ('{"problem": "\\ud800", "answer": "1"}\n', ":1: not JSON in UTF-8"),
        ('{"id": "a", "problem": "x"}\n', ":1: a row whose 'answer'"),
        ("[1]\n", ":1: not an object"),
        ("\x00\n", ":1: not JSON"),
        (
            '{"problem": "x", "answer": "1"}\n{"problem": "x", "answer": ""}\n',
            ":2: a row whose 'answer'",
        ),
        ('{"problem": "x", "answer": 1}\n', ":1: a row whose 'answer'"),
        ('{"problem": 5, "answer": "1"}\n', ":1: a row whose 'problem'"),
        ('{"problem": "x", "tests": []}\n', ":1: a row whose 'tests'"),
        ('{"problem": "x", "tests": [{"stdin": "1"}]}\n', ":1: a row whose 'tests'"),
        ('{"id": [], "problem": "x", "answer": "1"}\n', ":1: a row whose 'id'"),
        (
            '{"problem": "x", "tests": [{"stdin": "1", "stdout": "2"}, {"call": "f", "args": [], "expected": 1}]}\n',
            ":1: a row whose 'tests'",
        ),
        (
            '{"problem": "x", "tests": [{"stdin": "1", "stdout": "2", "call": "f"}]}\n',
            ":1: a row whose 'tests'",
        ),
        ('{"problem": "x", "tests": [{"stdin": "1", "stdout": "2"}]}\n', "--allow-code"),
        (
            '{"id": "a", "problem": "x", "answer": "1"}\n{"id": "a", "problem": "y", "answer": "1"}\n',
            ":2: a row whose 'id' is there already",
        ),
        ('{"kind": "poem", "problem": "x", "answer": "1"}\n', ":1: a row of kind 'poem'"),
    ],
)
def test_bad_problem_files_are_named_by_file_and_line(stages, tmp_path, capsys, text, says):
    (tmp_path / "p.jsonl").write_text(text)
    message = refused(
        stages[1], ["--data", tmp_path / "p.jsonl", "--out", tmp_path / "run"], capsys
    )
    assert (
        says in message
        and ("p.jsonl" in message or "allow" in message)
        and not (tmp_path / "run").exists()
    )


def test_bad_flags_and_bad_models(stages, tmp_path, capsys, mini):
    one = stages[1]
    assert "--seeed" in refused(one, ["--seeed", 1], capsys)
    assert "--limit" in refused(one, ["--limit", 0], capsys) and "--n" in refused(
        one, ["--n", "x"], capsys
    )
    assert "'poem'" in refused(stages[3], ["--objective", "poem"], capsys) and "'poem'" in refused(
        stages[4], ["--kl", "poem"], capsys
    )
    assert "--temperature" in refused(one, ["--temperature", "nan"], capsys) and "--lr" in refused(
        stages[3], ["--lr", "-1"], capsys
    )
    assert "--device" in refused(one, ["--device", "abacus", "--out", tmp_path / "r"], capsys)
    assert "config.json" in refused(one, ["--model", tmp_path, "--out", tmp_path / "r"], capsys)
    assert "does not exist" in refused(
        one, ["--model", tmp_path / "none", "--out", tmp_path / "r"], capsys
    )
    assert "does not exist" in refused(
        one, ["--data", tmp_path / "none.jsonl", "--out", tmp_path / "r"], capsys
    )
    assert "--k 4" in refused(stages[5], ["--n", 2, "--k", 4, "--out", mini], capsys)
    for flags in (
        ["--eval", tmp_path / "results.json"],
        ["--eval", mini / "eval.jsonl", "--summary", mini / "x/../eval.jsonl"],
        ["--summary", mini / "eval.meta.json"],
    ):
        assert "written over" in refused(stages[5], [*flags, "--out", mini], capsys)
    assert "NAME=MODEL" in refused(stages[5], ["--checkpoints", "base", "--out", mini], capsys)
    shutil.copytree(ROOT / "data/base", tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    assert "weights" in refused(one, ["--model", tmp_path / "m", "--out", tmp_path / "r"], capsys)
    (tmp_path / "m/model.safetensors").write_bytes(
        (ROOT / "data/base/model.safetensors").read_bytes()[:100_000]
    )
    assert "weights" in refused(one, ["--model", tmp_path / "m", "--out", tmp_path / "r"], capsys)
    weights = load_file(ROOT / "data/base/model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "m/model.safetensors", {"format": "pt"})
    assert "model.norm.weight" in refused(
        one, ["--model", tmp_path / "m", "--out", tmp_path / "r"], capsys
    )
    (tmp_path / "m/chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert "template fails" in refused(
        one, ["--model", tmp_path / "m", "--out", tmp_path / "r"], capsys
    )
    (tmp_path / "m/chat_template.jinja").unlink()
    assert "chat template" in refused(
        one, ["--model", tmp_path / "m", "--out", tmp_path / "r"], capsys
    )


@pytest.mark.parametrize(
    "stage, flags, says",
    [
        (1, ["--seed", "1"], "seed"),
        (1, ["--limit", "25"], "limit"),
        (3, ["--lr", "1"], "lr"),
        (4, ["--kl", "forward"], "kl"),
        (5, ["--temperature", "0.5"], "temperature"),
        (3, ["--p-r-wrong", "No."], "p_r_wrong"),
    ],
)
def test_artifacts_of_other_arguments_are_not_overwritten(stages, mini, capsys, stage, flags, says):
    before = {f: f.read_bytes() for f in mini.rglob("*") if f.is_file()}
    message = refused(stages[stage], [*MINI[stage], *flags, "--out", mini], capsys)
    assert says in message and "--overwrite" in message
    assert {f: f.read_bytes() for f in mini.rglob("*") if f.is_file()} == before


def test_bad_outputs(stages, mini, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        assert "cannot be written" in refused(stages[1], ["--limit", 1, "--out", out], capsys)
    assert "is a folder" in refused(stages[1], ["--limit", 1, "--responses", tmp_path], capsys)
    assert "is a file" in refused(
        stages[4], [*MINI[4], "--out", mini, "--sd-zero", tmp_path / "file"], capsys
    )
    assert "write its log over" in refused(
        stages[3], [*MINI[3], "--out", mini, "--srt", mini / "revisions"], capsys
    )
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    "stage, source, field, value",
    [
        (2, "responses", "response", 5),
        (2, "responses", "answer", None),
        (2, "responses", "finished", "no"),
        (2, "responses", "response_ids", "abc"),
        (3, "verified", "response_ids", [1.5]),
        (3, "verified", "response_ids", []),
        (3, "verified", "reward", 7),
        (3, "verified", "reward", True),
        (4, "verified", "id", []),
        (3, "verified", "response_ids", [99999]),
    ],
)
def test_a_field_of_a_wrong_type_is_named_by_file_and_line(
    stages, mini, tmp_path, capsys, stage, source, field, value
):
    rows = rows_of(mini / f"{source}.jsonl")
    rows[1][field] = value
    common.append_jsonl(tmp_path / f"{source}.jsonl", rows)
    message = refused(stages[stage], [*MINI[stage], "--out", tmp_path], capsys)
    assert f"{source}.jsonl" in message and (":2: field" in message or "token ids" in message)


@pytest.mark.parametrize(
    "stage, flags, says",
    [
        (4, ["--seed", "1"], "seed"),
        (4, ["--p-r-wrong", "No."], "p_r_wrong"),
        (3, ["--model", "other"], "model"),
        (5, ["--model", "other"], "model"),
    ],
)
def test_inputs_of_another_model_seed_or_p_r_are_refused_and_mixed_if_told_to(
    stages, mini, tmp_path, capsys, stage, flags, says
):
    for path in mini.iterdir():
        if (
            path.name.split(".")[0]
            in {3: ("verified",), 4: ("verified", "srt"), 5: ("verified", "srt", "sd_zero")}[stage]
        ):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    if says == "model":  # the same weights, another template
        shutil.copytree(ROOT / "data/base", tmp_path / "other")
        (tmp_path / "other/chat_template.jinja").write_text(
            (tmp_path / "other/chat_template.jinja").read_text() + " "
        )
        flags = ["--model", tmp_path / "other"]
    message = refused(stages[stage], [*MINI[stage], *flags, "--out", tmp_path], capsys)
    assert says in message and "--mix" in message
    if stage == 4:
        stages[4].main([*MINI[4], *flags, "--mix", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b" \n"),
            "is not what its stage left",
        ),
        (
            lambda path: common.write_json(
                common.meta_file(path),
                {k: v for k, v in common.read_meta(path).items() if k != "counts"},
            ),
            "is not complete",
        ),
    ],
)
def test_inputs_that_were_changed_or_are_not_complete_are_refused(
    stages, mini, tmp_path, capsys, change, says
):
    for name in ("responses.jsonl", "responses.meta.json"):
        shutil.copy(mini / name, tmp_path)
    change(tmp_path / "responses.jsonl")
    assert says in refused(stages[2], ["--out", tmp_path], capsys)
    if "left" in says:
        stages[2].main(["--mix", "--out", str(tmp_path)])


def test_no_tensor_is_on_another_device_than_its_model():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/pretended_gpu.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_as_float32(
    stages, model, tokenizer, mini, tmp_path, monkeypatch, dtype
):
    half = lambda: torch.autocast("cpu", dtype)
    tuples = [
        stages[3].sequence(row, tokenizer, common.P_R)
        for row in rows_of(mini / "revisions.jsonl")
        if row["kept"] == "yes"
    ][:4]
    losses, gradients = [], []
    for context in ({}, {"context": half}):
        losses.append(stages[3].srt_backward(model, tuples, "srt", 100, 200, **context))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99 and all(
        p.dtype == torch.float32 for p in model.parameters()
    )

    for module in (common, stages[4]):
        monkeypatch.setattr(module, "autocast", lambda device: (half, dtype))
    stages[4].main(
        [
            "--srt",
            str(mini / "srt"),
            "--verified",
            str(mini / "verified.jsonl"),
            "--batch-size",
            "4",
            "--max-new-tokens",
            "40",
            "--steps",
            "2",
            "--out",
            str(tmp_path),
        ]
    )
    for row in rows_of(tmp_path / "distill.jsonl"):
        assert row["kl"] > 0 and 0 < row["gradient_norm"] < 10


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="a process that has used a GPU cannot be forked"
)
def test_a_few_of_the_faults_of_the_readmes_table_lose_nothing(mini, tmp_path):
    faults = load("tests/faults.py")
    for name, fault in {
        "killed": lambda: faults.killed(tmp_path, mini, {1: 2.0, 2: 1.0}, 2, most=1),
        "damaged": lambda: faults.damaged_files(tmp_path, mini, 4),
        "mutated": lambda: faults.mutated_files(tmp_path, mini, 4),
        "mixed": lambda: faults.mixed_runs(tmp_path, mini),
    }.items():
        tried, lost, _ = fault()
        assert tried and not lost, (name, lost)


def test_an_sd_zero_of_another_srt_is_refused(stages, mini, tmp_path, capsys):
    for name in ("verified", "revisions", "srt", "sd_zero"):
        for path in mini.glob(f"{name}*"):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    stages[3].main([*MINI[3], "--lr", "1e-4", "--overwrite", "--out", str(tmp_path)])
    assert "comes from srt" in refused(stages[5], [*MINI[5], "--out", tmp_path], capsys)
    stages[5].main(
        [
            *MINI[5],
            "--limit",
            "1",
            "--checkpoints",
            f"srt={tmp_path / 'srt'}",
            f"other={tmp_path / 'sd_zero'}",
            "--out",
            str(tmp_path),
        ]
    )  # asked for


def test_two_processes_do_not_write_one_artifact(stages, mini, tmp_path, capsys):
    import fcntl

    with open(tmp_path / ".responses.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process" in refused(stages[1], [*MINI[1], "--out", tmp_path], capsys)
    stages[1].main([*MINI[1], "--out", str(tmp_path)])
    assert (tmp_path / "responses.jsonl").read_bytes() == (mini / "responses.jsonl").read_bytes()


def test_evaluation_refuses_the_problems_of_phase_1(stages, mini, capsys):
    assert "trained on" in refused(
        stages[5], [*MINI[5], "--data", ROOT / "data/train.jsonl", "--out", mini], capsys
    )


def test_overwrite_keeps_the_old_artifact_until_the_new_one_is_complete(
    stages, mini, tmp_path, capsys
):
    old = (mini / "responses.jsonl").read_bytes()
    for name in ("responses.jsonl", "responses.meta.json"):
        shutil.copy(mini / name, tmp_path)
    shutil.copytree(ROOT / "data/base", tmp_path / "m")
    (tmp_path / "m/model.safetensors").write_bytes(b"no weights")
    refused(
        stages[1], [*MINI[1], "--model", tmp_path / "m", "--overwrite", "--out", tmp_path], capsys
    )
    assert (tmp_path / "responses.jsonl.old").read_bytes() == old
    stages[1].main([*MINI[1], "--seed", "1", "--overwrite", "--out", str(tmp_path)])
    assert (
        not (tmp_path / "responses.jsonl.old").exists()
        and (tmp_path / "responses.jsonl").read_bytes() != old
    )


def test_the_best_model_is_kept_until_a_new_run_has_one_or_is_complete(
    stages, mini, tmp_path, monkeypatch
):
    command = [
        *MINI[4],
        "--srt",
        str(mini / "srt"),
        "--verified",
        str(mini / "verified.jsonl"),
        "--out",
        str(tmp_path),
        "--overwrite",
    ]
    (tmp_path / "sd_zero.best").mkdir()
    (tmp_path / "sd_zero.best/model.safetensors").write_bytes(b"an earlier run's")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(stages[4], "update", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        stages[4].main(command)
    assert (tmp_path / "sd_zero.best/model.safetensors").read_bytes() == b"an earlier run's"
    stages[4].main([*command, "--save-every", "1"])
    assert (
        load_file(tmp_path / "sd_zero.best/model.safetensors").keys()
        == load_file(tmp_path / "sd_zero/model.safetensors").keys()
    )
    stages[4].main(command)
    assert not (tmp_path / "sd_zero.best").exists()


def test_new_responses_make_the_old_rewards_refused(stages, mini, tmp_path, capsys):
    shutil.copytree(mini, tmp_path / "run")
    stages[1].main([*MINI[1], "--seed", "1", "--overwrite", "--out", str(tmp_path / "run")])
    assert "responses (hash)" in refused(stages[2], ["--out", tmp_path / "run"], capsys)


def test_all_answers_wrong_or_ungradable_is_said_before_training(stages, tmp_path, capsys):
    rows = [
        {
            "id": str(i),
            "sample": 0,
            "problem": "x",
            "answer": "",
            "response": "\\boxed{1}",
            "response_ids": [5, 2],
            "finished": True,
        }
        for i in range(3)
    ]
    common.append_jsonl(tmp_path / "responses.jsonl", rows)
    assert "rewards mean nothing" in refused(stages[2], ["--out", tmp_path], capsys)
    assert "is not complete" in refused(stages[3], ["--out", tmp_path], capsys)


def test_readme_benchmark_is_that_of_the_run():
    with pytest.raises(SystemExit) as e:
        load("tests/bench.py").main(["--check"])
    assert e.value.code == 0


def test_readme_commands_have_flags_that_exist(stages, capsys):
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    variables, known = dict(re.findall(r'\b([A-Z])="([^"]*)"', text)), {}
    for i, stage in stages.items():
        with pytest.raises(SystemExit):
            stage.main(["--help"])
        known[i] = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    commands = re.findall(r"python 0(\d)_\w+\.py([^&\n]*)", text)
    assert len(commands) >= 20
    for stage, flags in commands:
        flags = re.sub(r"\$([A-Z])", lambda m: variables[m[1]], flags)
        assert set(re.findall(r"--[a-z-]+", flags)) <= known[int(stage)], (stage, flags)


def test_readme_line_counts_are_the_files():
    table = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert len(table) >= 7
    for name, lines in table:
        assert len((ROOT / name).read_text().splitlines()) == int(lines), name


def test_the_gpu_part_of_the_benchmark_runs_in_miniature():
    shape = dict(
        vocabulary=500, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=128
    )
    bench = load("tests/bench.py")
    rows = bench.large(1, shape, square=64, lengths=(16, 32), n=8)
    assert len(rows) == 5 and all(
        v > 0 for row in rows for v in row.values() if isinstance(v, float)
    )
    assert "a training step on one answer of 32 tokens: " in bench.markdown(rows, "a machine")
