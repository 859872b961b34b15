"""The five scripts in miniature: runs, resumption, determinism, and a user's mistakes."""

import errno
import fcntl
import json
import math
import re
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parameters_to_vector

import common
from conftest import BASE, MINI, ROOT, completion_logits, rows_of

ALL = "responses.jsonl", "verified.jsonl", "revisions.jsonl", "srt", "sd_zero", "eval.jsonl"
BARS = r"(generate|revise|verify|SRT|distill|base|warning):"


@pytest.fixture()
def lab(stages, mini, tmp_path, capsys, monkeypatch):
    """A run of one's own, and what the tests do with it."""

    def part_of_mini(*names, out=tmp_path):
        """It has made these artifacts of the miniature and no others; NAME.best is NAME."""
        out.mkdir(exist_ok=True)
        run, made = run_of(mini), {}
        for name in ("base", *names):
            source = mini / name.removesuffix(".best")
            made[name] = run["made"][source.name]
            if name != "base":
                (shutil.copytree if source.is_dir() else shutil.copy)(source, out / name)
        (out / "run.json").write_text(json.dumps({**run, "made": made}))

    def run(stage, *flags, out=tmp_path):
        stages[stage].main([*MINI[stage], *map(str, flags), "--out", str(out)])

    def refused(stage, *flags, out=tmp_path):
        """The one line on stderr that names a user's mistake."""
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            common.run_stage(lambda: run(stage, *flags, out=out))
        lines = capsys.readouterr().err.splitlines()
        lines = [line for line in lines if line.strip() and not re.match(BARS, line)]
        assert e.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    def calls_of(stage, name):
        spy = Mock(wraps=getattr(stages[stage], name))
        monkeypatch.setattr(stages[stage], name, spy)
        return spy.call_args_list

    return SimpleNamespace(part_of_mini=part_of_mini, run=run, refused=refused, calls_of=calls_of)


def run_of(out):
    return json.loads((out / "run.json").read_text())


def weights(folder):
    return torch.cat([x.flatten() for x in load_file(folder / "model.safetensors").values()])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_run_json_says_how_each_artifact_was_made(mini):
    run = run_of(mini)
    assert run["embedded"] and run["from"] is None and "Start with" in run["prompt"]
    assert run["made"].keys() == {"base", *ALL}
    keys = {"arguments", "versions", "commit", "id", "device", "counts", "seconds", "threads"}
    assert all(run["made"][name].keys() == keys for name in ALL)
    for name in ("srt.jsonl", "distill.jsonl", "summary.json", "stages.png", "answers.html"):
        assert (mini / name).stat().st_size > 0, name
    lrs = [r["lr"] for r in rows_of(mini / "srt.jsonl")]  # warm-up of a step, then a decay
    assert len(lrs) >= 3 and lrs[0] == 8e-4 and lrs == sorted(lrs, reverse=True) and lrs[-1] < 4e-4


def test_no_row_is_dropped_and_kept_means_finished_new_and_right(mini):
    responses, verified, revisions = (rows_of(mini / name) for name in ALL[:3])
    assert all(r.items() <= v.items() for r, v in zip(responses, verified, strict=True))
    expected = {v["id"]: 1 if v["reward"] else 4 for v in verified if v["finished"]}
    assert Counter(r["id"] for r in revisions) == expected
    seen = set()  # of copies one is graded, right or wrong
    for r in (r for r in revisions if r["revised_finished"]):
        said = r["id"], tuple(r["revised_ids"])
        why = "yes" if r["revised_reward"] else "revision " + r["revised_verdict"]
        assert r["kept"] == ("duplicate" if said in seen else why)
        seen.add(said)
    assert len({r["kept"] for r in revisions}) > 3


def test_distillation_does_not_depend_on_micro_batches_and_what_saves_memory(lab, mini, tmp_path):
    lab.part_of_mini(*ALL[:4])
    lab.run(4, "--micro-tokens", 500, "--gradient-checkpointing", "--offload-teacher")
    start, whole, split = map(weights, (mini / "srt", mini / "sd_zero", tmp_path / "sd_zero"))
    assert (whole - split).abs().max() < 0.05 * (whole - start).abs().max()


def test_teacher_is_frozen_and_synchronised_between_rounds_only(lab, stages, mini, monkeypatch):
    seen, real = [], stages[4].hidden_after

    def hidden_after(prefix, rows, model):
        assert torch.is_grad_enabled() == (prefix == "generator")
        seen.append((prefix, model, parameters_to_vector(model.parameters()).detach()))
        return real(prefix, rows, model)

    monkeypatch.setattr(stages[4], "check", lambda *args: None)  # asks the teacher, too
    monkeypatch.setattr(stages[4], "hidden_after", hidden_after)
    samples, asked = lab.calls_of(4, "sample"), lab.calls_of(4, "prompt_ids")
    lab.part_of_mini(*ALL[:4])
    lab.run(4, "--rounds", 2, "--micro-tokens", 100_000)
    prefixes, models, of = zip(*seen)
    assert prefixes == ("reviser", "generator") * 4  # two steps a round
    (t0, t1, t2, t3), (s0, s1, s2, _) = of[::2], of[1::2]
    assert torch.equal(t0, t1) and torch.equal(t2, t3) and not torch.equal(t0, t2)
    assert torch.equal(s0, t0) and torch.equal(s2, t2) and not torch.equal(s1, t1)
    assert all(call.args[0] is models[1] for call in samples)  # on-policy
    problems, used = {call.args[1] for call in asked}, rows_of(mini / "responses.jsonl")
    assert len(problems) == 32 and not problems & {row["problem"] for row in used}


@pytest.mark.parametrize("stage, made", [(3, ALL[:2]), (4, ALL[:4]), (5, ALL[:1])])
def test_the_reviser_is_told_the_true_reward(lab, tokenizer, stages, monkeypatch, stage, made):
    monkeypatch.setattr(stages[4], "check", lambda *args: None)  # tells the opposite, on purpose
    asked = lab.calls_of(stage, "revision_ids")
    lab.part_of_mini(*made)
    lab.run(stage)
    splits = (common.load_problems(ROOT / "data", split) for split in ("train", "test"))
    answers = {x["problem"]: x for x in sum(splits, [])}
    assert {call.args[3] for call in asked} == {0, 1}
    for _, problem, ids, reward, p_r in (call.args for call in asked):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert reward == common.verify(answers[problem], text)[0] and p_r == common.P_R


def test_answers_that_do_not_fit_twice_are_not_learned_from(lab, stages, tmp_path, monkeypatch):
    lab.part_of_mini(*ALL[:4])
    for stage in (4, 5):
        monkeypatch.setattr(stages[stage], "positions", lambda model: 200)
    lab.run(4)
    assert all(0 < r["too_long"] < 8 and r["kl"] > 0 for r in rows_of(tmp_path / "distill.jsonl"))
    lab.run(5, "--checkpoints", "srt")
    rows = [r for r in rows_of(tmp_path / "eval.jsonl") if r["sample"] == 0]
    assert {bool(r["kl"]) for r in rows} == {True, False}
    assert all(len(r["kl"]) in (0, len(r["response_ids"])) for r in rows)


def test_the_best_model_did_not_fall_at_the_end_of_a_good_stretch(stages, monkeypatch):
    monkeypatch.setattr(stages[4], "save_state", lambda *args, **state: None)
    stretch, none = [0.7] * 10 + [0.95] * 7, {"model": None}
    for every, last, best in ((10, 0.5, 10), (10, 0.8, 20), (1, 0.5, 17)):
        args, saved = SimpleNamespace(save_every=every), []
        monkeypatch.setattr(stages[4], "save_model", lambda *_: saved.append(n))
        history = [{"accuracy": a, "gradient_norm": 1.0} for a in stretch + [last] * 3]
        for n in range(every, 21, every):
            stages[4].save("x", history[:n], None, args, none, last=False)
        assert saved[-1] == best


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_distils(lab, stages, tmp_path, monkeypatch, dtype):
    half = Mock(return_value=(partial(torch.autocast, "cpu", dtype), dtype))
    monkeypatch.setattr(common, "autocast", half)
    monkeypatch.setattr(stages[4], "autocast", half)
    lab.part_of_mini(*ALL[:4])
    lab.run(4, "--batch-size", 4, "--max-new-tokens", 40)
    for row in rows_of(tmp_path / "distill.jsonl"):
        assert row["kl"] > 0 and 0 < row["gradient_norm"] < 10


@pytest.mark.parametrize("stage, name", [(1, ALL[0]), (2, ALL[1]), (3, ALL[2]), (5, ALL[5])])
def test_a_torn_artifact_is_continued_to_the_same_bytes(lab, mini, tmp_path, stage, name):
    lab.part_of_mini(*(ALL if stage == 5 else ALL[:stage]))
    run, whole = run_of(tmp_path), (mini / name).read_bytes()
    before = run["made"][name].pop("id"), run["made"][name].pop("counts")
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
    lab.run(stage, *(["--batch-rows", 5] if stage in (1, 3) else []))
    after = run_of(tmp_path)["made"][name]
    assert (tmp_path / name).read_bytes() == whole and (after["id"], after["counts"]) == before
    assert stage != 3 or torch.equal(weights(mini / "srt"), weights(tmp_path / "srt"))


@pytest.mark.parametrize("stage, name, log", [(3, "srt", "srt"), (4, "sd_zero", "distill")])
def test_interruptions_change_no_training(lab, stages, tmp_path, monkeypatch, stage, name, log):
    flags = [*["--rounds", 2] * (stage == 4), "--batch-size", 4, "--save-every", 2]
    whole, torn, real = tmp_path / "whole", tmp_path / "torn", stages[stage].update
    for out in (whole, torn):
        lab.part_of_mini(*ALL[:stage], out=out)
    lab.run(stage, *flags, out=whole)
    stops = iter([False, False, True, True])  # in the third step, and in the first after going on

    def update(*args):
        norm = real(*args)
        if next(stops, False):
            raise KeyboardInterrupt
        return norm

    monkeypatch.setattr(stages[stage], "update", update)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            lab.run(stage, *flags, out=torn)
    lab.run(stage, *flags, out=torn)
    assert torch.equal(weights(whole / name), weights(torn / name))
    a, b = (rows_of(out / f"{log}.jsonl") for out in (whole, torn))
    assert [{**row, "seconds": 0} for row in a] == [{**row, "seconds": 0} for row in b]
    assert not (torn / f"{name}.resume").exists()


def test_what_a_machine_lacks_is_one_line_and_a_mistake_of_ours_is_not(monkeypatch, capsys):
    monkeypatch.setattr(common, "_graders", Mock())
    of_torch, of_safetensors = RuntimeError("enforce fail"), Exception("I/O error (os error 28)")
    of_torch.__context__ = OSError(errno.EDQUOT, "full")

    def swallowed():  # as a library does while it imports another
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        common.die("no weights could be loaded")

    for happens, code, says in (
        (swallowed, 130, "goes on where it stopped"),
        (partial(signal.raise_signal, signal.SIGTERM), 130, "goes on where it stopped"),
        (OSError(errno.ENOSPC, "full"), 2, "the disk is full"),
        (of_torch, 2, "the disk is full"),
        (of_safetensors, 2, "the disk is full"),
        (OSError(errno.EACCES, "no"), 2, "cannot be written"),
    ):
        with pytest.raises(SystemExit) as e:
            common.run_stage(Mock(side_effect=happens))
        assert e.value.code == code and says in capsys.readouterr().err, happens
    with pytest.raises(FileNotFoundError):
        common.run_stage(Mock(side_effect=FileNotFoundError(errno.ENOENT, "ours")))


def test_steps_without_a_finite_gradient_are_skipped_and_end_the_training(lab, tmp_path):
    lab.part_of_mini(*ALL[:3])
    assert "no finite gradient" in lab.refused(3, "--epochs", 9, "--save-every", 2, "--lr", 1e38)
    norms = [row["gradient_norm"] for row in rows_of(tmp_path / "srt.jsonl")]
    assert norms[0] > 0 and norms[1:] == [None] * 8
    assert not (tmp_path / "srt.resume").exists() and not (tmp_path / "srt").exists()


def test_answers_sampled_elsewhere_take_the_place_of_our_own(lab, mini, tmp_path):
    file, ours = tmp_path / "answers.jsonl", rows_of(mini / "responses.jsonl")
    fields = "id", "response", "finished"
    common.append_jsonl(file, [{name: row[name] for name in fields} for row in ours])
    lab.run(1, "--answers", file)
    rows = rows_of(tmp_path / "responses.jsonl")
    assert [row.keys() for row in rows] == [row.keys() for row in ours]
    end = common.load_tokenizer(BASE).eos_token_id
    for row, own in zip(rows, ours, strict=True):
        assert all(row[name] == own[name] for name in fields)
        assert (row["response_ids"][-1] == end) == row["finished"]
    lab.run(2)
    assert [r["reward"] for r in rows_of(tmp_path / "verified.jsonl")] == [
        r["reward"] for r in rows_of(mini / "verified.jsonl")
    ]
    common.append_jsonl(file, [{"id": "nobody", "response": "?"}])
    assert ":25: 'response'" in lab.refused(1, "--answers", file, out=tmp_path / "other")


def test_an_evaluation_without_greedy_answers_and_revisions(lab, tmp_path):
    lab.part_of_mini(*ALL[:1])
    lab.run(5, "--no-greedy", "--no-revise", "--checkpoints", "base")
    rows = rows_of(tmp_path / "eval.jsonl")
    assert len(rows) == 12 and not any(row["greedy"] or "revised" in row for row in rows)
    (summary,) = json.loads((tmp_path / "summary.json").read_text())
    assert summary["greedy"] is None is summary["revised_accuracy"] and summary["accuracy"] >= 0


def data_of(page):
    """What 05 filled in, read as a browser does: the script's text ends at the first end tag."""
    return json.loads(page.split('<script type="application/json" id="data">')[1].split("</")[0])


def test_the_page_asks_no_network_and_no_text_ends_its_script(stages, tmp_path, monkeypatch):
    template = (ROOT / "data/page.html").read_text()
    assert "default-src 'none'" in template and template.count("/*DATA*/") == 1
    for word in ("://", "url(", "import", "fetch", "src=", "href", "innerHTML", "document.write"):
        assert word not in template, word
    evil = "</script><script>alert(1)</script><!--"
    row = {"checkpoint": "base", "id": evil, "problem": evil, "tokens": [[evil, 1, [], []]]}
    monkeypatch.setattr(stages[5], "reread", lambda *_: [row])
    args = SimpleNamespace(out=tmp_path, p_r={0: evil, 1: evil})
    stages[5].write_page({"base": []}, [], {"base": None}, None, args)
    page = (tmp_path / "answers.html").read_text()
    assert page.count("</script>") == template.count("</script>") and "<!--" not in page
    assert data_of(page)["answers"] == [row] and data_of(page)["p_r"]["1"] == evil


def test_the_page_shows_the_models_own_probabilities_of_rows_side_by_side(mini, model, tokenizer):
    shown = data_of((mini / "answers.html").read_text())["answers"]
    problems = [x["id"] for x in shown if x["checkpoint"] == "base"]
    assert 0 < len(problems) <= 8 and [x["id"] for x in shown] == problems * 3
    rows = {(r["checkpoint"], r["id"], r["sample"]): r for r in rows_of(mini / "eval.jsonl")}
    for x in shown[: len(problems)]:
        row = rows["base", x["id"], 0]
        y = row["response_ids"]
        texts, rewards, *both = zip(*x["tokens"])
        assert "".join(texts) == tokenizer.decode(y) and list(rewards) == row["kl_reward"]
        reviser = common.revision_ids(tokenizer, row["problem"], y, row["reward"])
        for prefix, pairs in zip((common.prompt_ids(tokenizer, row["problem"]), reviser), both):
            p = completion_logits(model, [prefix], [y]).softmax(-1).detach()
            for at, of in enumerate(pairs):
                best = p[at].topk(5)
                kept = [(tokenizer.decode(i), q) for q, i in zip(*best) if q >= 0.0005]
                assert [text for text, _ in of] == [text for text, _ in kept]
                assert [q for _, q in of] == pytest.approx([float(q) for _, q in kept], abs=6e-4)


def test_the_page_picks_by_rewards_in_the_order_of_the_test_set(stages):
    first, last = "0000001101", "1111100011"  # of ten problems, the two checkpoints' rewards
    rows = {}
    for name, bits in (("base", first), ("srt", "0" * 10), ("sd_zero", last)):
        rows[name] = [
            {"id": i, "sample": 0, "kl": [0.1], "reward": int(bit)} for i, bit in enumerate(bits)
        ]
    assert stages[5].choose(rows) == [0, 1, 2, 3, 5, 6, 9]
    rows["srt"][0]["kl"] = []  # an answer too long for the reviser: not all have it
    assert stages[5].choose(rows) == [1, 2, 3, 4, 5, 6, 9]
    assert stages[5].choose({"srt": rows["srt"]}) == [1, 2, 3, 4]


def test_a_problem_of_ones_own_is_answered_and_nothing_is_written(lab, mini, capsys):
    before, said = contents(mini), []
    problem = "Start with 63849: sort up, then reverse, then swap pairs. What number results?"
    for flags in ([], [], ["--checkpoints", "srt", "--temperature", 0]):
        capsys.readouterr()
        lab.run(5, "--ask", problem, *flags, out=mini)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and re.findall(r"── (\w+)", said[0]) == ["base", "srt", "sd_zero"]
    assert re.findall(r"── (\w+)", said[2]) == ["srt"] and "boxed" in said[2]
    assert contents(mini) == before


def test_rewards_that_are_mostly_errors_end_a_stage(lab, stages, monkeypatch):
    lab.part_of_mini(*ALL[:1])
    monkeypatch.setattr(stages[2], "verify_all", lambda rows, _: [(0, "error", "1")] * len(rows))
    assert "rewards mean nothing" in lab.refused(2)
    assert "only in part" in lab.refused(3)


def test_another_model_brings_the_papers_numbers(stages, tmp_path):
    base, code = str(BASE), str(ROOT / "data/code")
    for flags in ([], ["--model", base], ["--data", code], ["--model", "owner/name"]):
        p, embedded = common.arguments("01", ""), "owner/name" not in flags
        p.add_argument("--limit", type=int, help="so many")
        args = common.parse(p, [*flags, "--out", str(tmp_path)])
        assert args.run["embedded"] == embedded == Path(args.model).is_dir()
        assert (args.limit, "OpenR1" in args.data) == ((400, False) if embedded else (10_000, True))
    (tmp_path / "run.json").write_text(json.dumps(args.run))
    for flags, lr in ([], 5e-6), (["--lora", "4"], 1e-4), (["--lora", "4", "--lr", "1"], 1):
        assert common.parse(stages[4].flags(), [*flags, "--out", str(tmp_path)]).lr == lr


def test_help_shows_both_defaults_and_every_flag_of_the_readmes_commands(stages, capsys):
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    for i, stage in stages.items():
        with pytest.raises(SystemExit):
            stage.main(["--help"])
        said = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
        for name, pair in common.DEFAULTS.items():
            small, paper = ("–" if value is None else value for value in pair)
            shown = f"(default: {small}; with --model: {paper})" in said
            assert shown or not name.startswith(f"0{i}"), name
        for flags in re.findall(rf"python 0{i}_\w+\.py([^&\n#]*)", readme):
            assert {*re.findall(r"--[a-z-]+", flags)} <= {*re.findall(r"--[a-z-]+", said)}, flags


def test_other_arguments_are_refused_and_nothing_is_lost(lab, mini):
    before = contents(mini)
    for stage, flags, says in (
        (1, ["--limit", 25], "limit: 24 there, 25 now"),
        (3, ["--lr", 1], "lr"),
        (4, ["--kl", "forward"], "kl"),
        (5, ["--temperature", 0.5], "temperature"),
        (1, ["--seed", 1], "--seed"),
        (3, ["--p-r-wrong", "No."], "--p-r-wrong"),
        (5, ["--model", "other"], "--model"),
        (5, ["--test-data", ROOT / "data/train.jsonl"], "problems of training"),
    ):
        assert says in lab.refused(stage, *flags, out=mini), flags
        assert contents(mini) == before


def test_a_folder_that_is_in_use_damaged_or_of_the_first_edition_is_refused(lab, tmp_path):
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "in use by another process" in lab.refused(1)
    lab.run(1)
    (tmp_path / "run.json").write_text("{")
    assert "run.json is damaged" in lab.refused(1)
    (tmp_path / "responses.meta.json").write_text("{}")
    assert "first edition" in lab.refused(1)


def test_what_is_not_there_changed_cut_short_or_made_anew_upstream_is_named(lab, mini, tmp_path):
    for stage in (2, 3, 4, 5):
        assert "01_generate.py" in lab.refused(stage)
    lab.part_of_mini(*ALL[:4])
    path, whole = tmp_path / "responses.jsonl", (mini / "responses.jsonl").read_bytes()
    for content in (whole[:-1] + b" \n", whole[: len(whole) // 2], None):
        path.write_bytes(content) if content else path.unlink()
        message = lab.refused(2)
        assert "responses.jsonl is gone or was changed" in message
        assert f"01_generate.py --out {tmp_path} --overwrite" in message
    lab.run(1, "--limit", 12, "--overwrite")
    assert "02_verify.py" in lab.refused(3) and "03_revise_sft.py" in lab.refused(4)
    lab.run(2, "--overwrite")
    assert "03_revise_sft.py" in lab.refused(4) and "--overwrite" in lab.refused(3)
    run = run_of(tmp_path)
    run["made"]["base"]["id"] = "of another model"
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert "data/obedient/base is gone or was changed" in lab.refused(3)


def test_a_variant_reads_in_place_and_needs_no_from_later(lab, stages, mini, tmp_path, monkeypatch):
    origin, variant, other = (tmp_path / name for name in ("origin", "variant", "other"))
    lab.part_of_mini(*ALL[:4], out=origin)
    before = contents(origin)
    with monkeypatch.context() as m:
        m.setattr(stages[3], "sample", None)  # revisions are there
        lab.run(3, "--from", origin, "--epochs", 1, out=variant)
    assert [name for name in ALL if (variant / name).is_symlink()] == [*ALL[:3]]
    run = run_of(variant)
    assert run["settings"] == run_of(origin)["settings"] and run["from"] == str(origin)
    lab.run(3, "--from", origin, "--revisions-wrong", 1, out=other)
    assert not (other / "revisions.jsonl").is_symlink() and contents(origin) == before
    lab.run(5, "--limit", 1, "--n", 1, out=variant)
    assert len(json.loads((variant / "summary.json").read_text())) == 2
    assert "not a variant of" in lab.refused(4, "--from", mini, out=variant)
    (origin / "verified.jsonl").write_text("")
    for _ in ("changed", "gone"):
        assert "verified.jsonl is gone or was changed" in lab.refused(3, "--epochs", 1, out=variant)
        shutil.rmtree(origin, ignore_errors=True)
    assert "no run.json" in lab.refused(3, "--from", origin, out=tmp_path / "new")


def test_phase_2_starts_from_what_it_is_told_and_does_not_mix_the_two(lab, mini):
    loads = lab.calls_of(4, "load_model")
    lab.run(4, "--from", mini, "--start", "base")
    assert [call.args[0] for call in loads] == [BASE] * 2
    assert "--overwrite" in lab.refused(4)


def test_a_checkpoint_more_only_adds_rows_and_best_goes_with_its_model(lab, tmp_path, capsys):
    lab.part_of_mini(*ALL, "sd_zero.best")
    old, before = weights(tmp_path / "sd_zero"), (tmp_path / "eval.jsonl").read_bytes()
    lab.run(5, "--checkpoints", "sd_zero.best")
    assert (tmp_path / "eval.jsonl").read_bytes().startswith(before)
    rows = {r.pop("checkpoint"): r for r in json.loads((tmp_path / "summary.json").read_text())}
    assert rows.keys() == {"base", "srt", "sd_zero", "sd_zero.best"}
    assert rows["sd_zero.best"] == rows["sd_zero"]  # the same weights, and the same noise
    lab.run(4)
    assert "is there already" in capsys.readouterr().out
    lab.run(4, "--lr", 1e-3, "--overwrite")
    assert not torch.equal(weights(tmp_path / "sd_zero"), old)
    assert "sd_zero.best is not made" in lab.refused(5, "--checkpoints", "sd_zero.best")


A = '{"id": "a", "problem": "x", "answer": "1"}'
BAD = {
    "": "no row that can be graded",
    "[1]\n": ":1: no JSON object",
    '{"problem": "\\ud800", "answer": "1"}\n': ":1: a row whose 'problem'",
    f'{A}\n{{"problem": "x", "answer": ""}}\n': ":2: a row whose 'answer'",
    f"{A}\n{A}\n": ":2: a row whose 'id' is there already",
    '{"problem": "x", "tests": [{"stdin": "", "stdout": "", "call": "f"}]}\n': "'tests'",
    '{"problem": "x", "tests": [{"stdin": "", "stdout": ""}]}\n': "--allow-code",
    '{"kind": "poem", "problem": "x", "answer": "1"}\n': ":1: a row of kind 'poem'",
}


def test_bad_problem_files_are_named_by_file_and_line(lab, tmp_path):
    for text, says in BAD.items():
        (tmp_path / "p.jsonl").write_text(text)
        assert says in lab.refused(1, "--data", tmp_path / "p.jsonl"), text
        assert not (tmp_path / "run.json").exists()  # it can be mended and read again


def test_bad_flags_and_bad_outputs(lab, tmp_path):
    (tmp_path / "file").write_text("x")
    for says, *flags in (
        ("--seeed", "--seeed", 1),
        ("--temperature", "--temperature", "nan"),
        ("--device", "--device", "abacus"),
        ("does not exist", "--model", tmp_path / "none", "--data", ROOT / "data"),
        ("does not exist", "--data", tmp_path / "none.jsonl"),
    ):
        assert says in lab.refused(1, *flags), flags
    for out in (tmp_path / "file", tmp_path / "file/below"):
        assert "cannot be written" in lab.refused(1, out=out)


def test_models_that_would_give_wrong_losses_are_refused(lab, tmp_path):
    shutil.copytree(BASE, tmp_path / "m")
    flags = "--model", tmp_path / "m", "--data", ROOT / "data", "--limit", 1
    file = tmp_path / "m/model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, file, {"format": "pt"})
    assert "model.norm.weight" in lab.refused(1, *flags, out=tmp_path / "a")
    save_file({**tensors, "model.norm.weight": norm * math.nan}, file, {"format": "pt"})
    assert "not finite" in lab.refused(1, *flags, out=tmp_path / "b")
    (tmp_path / "m/chat_template.jinja").write_text("hello")
    assert "leaves the problem out" in lab.refused(1, *flags, out=tmp_path / "c")
