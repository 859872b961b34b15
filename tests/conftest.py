"""The real scripts, loaded by file name, and the embedded model: every test runs what users run."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "data/obedient/base"
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "data/claims")]
# a thread for each of xdist's processes
THREADS = int(os.environ.get("OMP_NUM_THREADS", 1 if "PYTEST_XDIST_WORKER" in os.environ else 2))
torch.set_num_threads(THREADS)

import common  # noqa: E402

NAMES = "01_generate.py", "02_verify.py", "03_revise_sft.py", "04_self_distill.py", "05_eval.py"


def working_sandbox():
    """What --allow-code may be here; None if no program can be run."""
    for kind in ("bubblewrap", "limits"):
        with contextlib.suppress(SystemExit):
            common.check_code([{"kind": "code"}], kind)
            return kind


SANDBOX = working_sandbox()
needs_sandbox = pytest.mark.skipif(SANDBOX is None, reason="no program can be run here")
needs_bubblewrap = pytest.mark.skipif(
    SANDBOX != "bubblewrap", reason="bubblewrap does not run here"
)
MINI = {  # flags of the stages in miniature
    1: ["--limit", "24", "--max-new-tokens", "120"],
    2: [],
    3: ["--epochs", "2", "--batch-size", "3", "--max-new-tokens", "120"],
    4: ["--steps", "2", "--batch-size", "8", "--max-new-tokens", "120"],
    5: ["--limit", "6", "--n", "2", "--max-new-tokens", "120"],
}


LONGEST = ["test_smollm2", "test_ranks", "test_pipeline", "test_ablations", "test_claims"]


def pytest_collection_modifyitems(items):
    """What takes long comes first, so that no process waits for the other at the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_unconfigure():
    if SANDBOX != "bubblewrap":
        print("bubblewrap does not run here: the tests of the sandbox were skipped")


def pytest_runtest_setup():
    torch.set_num_threads(THREADS)  # a test may have left another number, which rounds otherwise


def load(name, patch=None):
    """A script as a module; patch: the stem of a file in tests/ablations, applied to a copy of it.

    With a patch, the name may be None: the patch names its stage.
    """
    file = ROOT / f"tests/ablations/{patch}.patch"
    name = name or re.search(r"^\+\+\+ b/(\S+)", file.read_text(), re.M)[1]
    with tempfile.TemporaryDirectory() as folder:  # in a repository git would look at its index
        path = ROOT / name
        if patch:
            path = Path(shutil.copy(path, folder))
            subprocess.run(["git", "apply", file], cwd=folder, check=True)
        spec = importlib.util.spec_from_file_location(path.stem.lstrip("0123456789_"), path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def rows_of(path):
    return [json.loads(line) for line in open(path)]


def filled_in(text, name, body):
    """The text with `body` between the markers of `name`."""
    head, rest = text.split(f"<!-- {name} -->\n")
    return f"{head}<!-- {name} -->\n{body}\n<!-- /{name} -->" + rest.split(f"<!-- /{name} -->")[1]


def completion_logits(model, prefixes, completions):
    """Logits where each token of each completion is predicted: [N, V]."""
    return model.get_output_embeddings()(common.completion_hidden(model, prefixes, completions))


@pytest.fixture(scope="session")
def stages():
    """{1: the module of 01_generate.py, ..., 5: that of 05_eval.py}"""
    return {number: load(name) for number, name in enumerate(NAMES, 1)}


@pytest.fixture(scope="session")
def tokenizer():
    return common.load_tokenizer(BASE)


@pytest.fixture()
def model(tokenizer):
    return common.load_model(BASE, tokenizer, torch.device("cpu"))


@pytest.fixture(scope="session")
def problems():
    return common.load_problems(ROOT / "data", "train", 40)


@pytest.fixture()
def prompts(tokenizer, problems):
    return [common.prompt_ids(tokenizer, x["problem"]) for x in problems[:12]]


@pytest.fixture(scope="session")
def mini(stages, tmp_path_factory):
    """The folder of a run whose stages have all run in miniature; read only."""
    out = tmp_path_factory.mktemp("mini")
    for i, stage in stages.items():
        stage.main([*MINI[i], "--out", str(out)])
    return out
