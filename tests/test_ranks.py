"""Two processes by torchrun do what one does, and go on where it stopped. The same file is what
torchrun starts: it runs the stages one after the other, and at the end rank 1 kills itself."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import NAMES, ROOT, common, load, rows_of  # noqa: E402

SHORT = ["--max-new-tokens", "120"]
ONE = ["--limit", "30", *SHORT], [], ["--epochs", "1", "--batch-size", "99", *SHORT]
DISTILL = ["--batch-size", "7", "--start", "base", "--save-every", "1", *SHORT]
EVAL = ["--limit", "5", "--checkpoints", "srt", "sd_zero", *SHORT]


def run_all(out, killed):
    """A run of all stages with one step each, and a variant of four that ends after two."""
    torch.set_num_threads(1)
    stages = [load(name) for name in NAMES]
    for stage, flags in zip(stages, [*ONE, [*DISTILL, "--steps", "1"], EVAL]):
        stage.main([*flags, "--out", str(out)])
    log_step = stages[3].log_step

    def end(path, history, row, progress):
        log_step(path, history, row, progress)
        if row["step"] == 2 and killed:
            os.kill(os.getpid(), signal.SIGKILL)

    stages[3].log_step = end
    stages[3].main(four(out))


def four(out):
    return [*DISTILL, "--steps", "4", "--from", str(out), "--out", f"{out}_four"]


def torchrun(*command):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*start, *command], env=env, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(the folder of two processes' run, that of one's)"""
    folder = tmp_path_factory.mktemp("ranks")
    ran = torchrun(__file__, str(folder / "two"))
    assert "SIGKILL" in ran.stderr or "-9" in ran.stderr, ran.stderr
    run_all(folder / "one", killed=False)
    return folder / "two", folder / "one"


def near(a, b):
    return all(abs(x - y) <= 1e-5 * abs(y) for x, y in zip(a, b, strict=True))


def same_weights(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert a.keys() == b.keys()
    return all((a[k] - b[k]).norm() <= 1e-5 * b[k].norm() for k in a)


def test_answers_and_revisions_are_those_of_one_process_in_the_same_order(runs):
    for name in ("responses.jsonl", "verified.jsonl", "revisions.jsonl"):
        two, one = (rows_of(run / name) for run in runs)
        assert two == one and len(one) >= 30, name
    two, one = (rows_of(run / "eval.jsonl") for run in runs)
    fields = "checkpoint", "id", "sample", "response_ids", "reward", "revised_ids"
    alike = [all(a.get(f) == b.get(f) for f in fields) for a, b in zip(two, one, strict=True)]
    assert sum(alike) >= 0.9 * len(one)  # weights differ in the last digit


def test_a_step_of_srt_and_of_distillation_is_that_of_one_process(runs):
    for log, name in (("srt.jsonl", "srt"), ("distill.jsonl", "sd_zero")):
        (two,), (one,) = (rows_of(run / log) for run in runs)
        loss = [name for name in ("loss", "kl", "gradient_norm", "tokens") if name in one]
        assert near([two[name] for name in loss], [one[name] for name in loss])
        assert same_weights(*(run / name for run in runs))


def test_a_killed_rank_ends_all_and_another_number_of_ranks_goes_on(runs, stages):
    two, one = (Path(f"{run}_four") for run in runs)
    assert len(rows_of(two / "distill.jsonl")) in (2, 3) and (two / "sd_zero.resume").exists()
    torch.set_num_threads(1)
    stages[4].main(four(runs[0]))
    logs = [[m["kl"] for m in rows_of(run / "distill.jsonl")] for run in (two, one)]
    assert near(*logs) and same_weights(two / "sd_zero", one / "sd_zero")


def test_a_mistake_is_told_once(runs):
    ran = torchrun("04_self_distill.py", "--out", str(runs[1]), "--seed", "4")
    assert ran.returncode and ran.stderr.count("error: ") == 1, ran.stderr


if __name__ == "__main__":
    common.join_ranks()
    run_all(Path(sys.argv[1]), killed=common.RANK == 1)
