"""The real scripts, loaded by file name, and the embedded model: every test runs what users run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
torch.set_num_threads(2)

import common  # noqa: E402


def load(name):
    spec = importlib.util.spec_from_file_location(
        Path(name).stem.lstrip("0123456789_"), ROOT / name
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(path):
    return [json.loads(line) for line in open(path)]


def filled_in(readme, name, text):
    """The README's text with `text` between the markers of `name`."""
    head, rest = readme.split(f"<!-- {name} -->\n")
    return f"{head}<!-- {name} -->\n{text}\n<!-- /{name} -->" + rest.split(f"<!-- /{name} -->")[1]


@pytest.fixture(scope="session")
def stages():
    """{1: the module of 01_generate.py, ..., 5: that of 05_eval.py}"""
    return {
        i: load(name)
        for i, name in enumerate(
            (
                "01_generate.py",
                "02_verify.py",
                "03_revise_sft.py",
                "04_self_distill.py",
                "05_eval.py",
            ),
            1,
        )
    }


@pytest.fixture(scope="session")
def tokenizer():
    return common.load_tokenizer(ROOT / "data/base")


@pytest.fixture()
def model(tokenizer):
    return common.load_model(ROOT / "data/base", tokenizer, torch.device("cpu"))


@pytest.fixture(scope="session")
def problems():
    return common.load_problems(ROOT / "data", "train", 40)


MINI = {
    1: ["--limit", "24", "--max-new-tokens", "120"],
    2: [],
    3: ["--epochs", "2", "--batch-size", "3", "--max-new-tokens", "120"],
    4: ["--steps", "2", "--batch-size", "8", "--max-new-tokens", "120"],
    5: ["--limit", "6", "--n", "2", "--k", "2", "--max-new-tokens", "120"],
}


@pytest.fixture(scope="session")
def mini(stages, tmp_path_factory):
    """A folder in which all five stages have run in miniature; read only."""
    out = tmp_path_factory.mktemp("mini")
    for i, stage in stages.items():
        stage.main([*MINI[i], "--out", str(out)])
    return out
