"""Models and templates of kinds that broke something, built here: each is handled, or refused."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Metaspace

import common
from conftest import BASE, MINI, ROOT, rows_of
from data.models import positions

CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 400}
SMALL |= {"intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8}
LONG |= {"long_factor": [4.0] * 8, "original_max_position_embeddings": 64}


@pytest.fixture()
def build(tmp_path, tokenizer):
    """A folder with a random model of a configuration, and the embedded tokenizer."""

    def save(name, edit=None, **more):
        config = getattr(transformers, f"{name}Config")(**{**SMALL, **more, "eos_token_id": 2})
        kind = "ConditionalGeneration" if config.is_encoder_decoder else "CausalLM"
        torch.manual_seed(0)
        kind = kind.replace("CausalLM", "LMHeadModel" if name == "GPT2" else "ForCausalLM")
        model = getattr(transformers, name + kind.replace("Cond", "ForCond"))(config)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        if edit:
            path = tmp_path / name / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
        return tmp_path / name

    return save


def load(folder):
    return common.load_model(folder, common.load_tokenizer(folder), CPU)


def logits_of(model, ids):
    """(the model's own, those of the head on hidden states) after all but the last."""
    own = model(torch.tensor([ids])).logits[0, :-1]
    return own, model.get_output_embeddings()(common.completion_hidden(model, [ids[:1]], [ids[1:]]))


def test_the_padding_of_a_vocabulary_is_never_sampled(model, tokenizer, tmp_path):
    prompt = common.prompt_ids(tokenizer, "Start with 12345: reverse. What number results?")
    likeliest = model(torch.tensor([prompt])).logits[0, -1].argmax()
    model.resize_token_embeddings(464, mean_resizing=False)
    weights = model.get_input_embeddings().weight.data
    weights[400:] = 1.2 * weights[likeliest]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    padded = load(tmp_path)
    assert padded(torch.tensor([prompt])).logits[0, -1].argmax() >= 400
    for temperature in (0.0, 1.0):
        answers = common.sample(padded, [prompt] * 40, range(40), 20, temperature)
        assert max(map(max, answers)) < 400


def test_what_would_go_wrong_is_refused_in_one_line(build, capsys, tmp_path, monkeypatch):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    common.load_tokenizer(BASE).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("data.models.find_spec", lambda name: None)
    for folder, says in (
        (build("Llama", {"quantization_config": {"quant_method": "awq"}}), "is quantised"),
        (build("Qwen2", {"layer_types": ["chunked_attention"]}), "chunked attention"),
        (build("T5", num_layers=1, d_model=32), "encoder and a decoder"),
        (build("Mamba"), "other than attention"),
        (tmp_path / "adapter", "pip install peft"),
    ):
        with pytest.raises(SystemExit):
            load(folder)
        error = capsys.readouterr().err
        assert says in error and error.count("error: ") == 1, (says, error)


def test_what_training_takes_is_said_before_anything_is_loaded(build, monkeypatch, capsys):
    folder = build("Llama", {"tie_word_embeddings": False})
    n = sum(p.numel() for p in load(folder).parameters())
    for there, teacher, says in ((15.9, False, "more GPUs"), (18, True, "--offload-teacher")):
        memory = {"SC_PAGE_SIZE": n, "SC_PHYS_PAGES": there}
        monkeypatch.setattr("data.models.os.sysconf", memory.get)
        with suppress(SystemExit):
            common.check_memory(folder, CPU, teacher)
        assert says in capsys.readouterr().err
    monkeypatch.setattr("data.models.os.sysconf", {"SC_PAGE_SIZE": n, "SC_PHYS_PAGES": 23}.get)
    common.check_memory(folder, CPU, True)
    assert capsys.readouterr().err == ""


def test_the_head_caps_logits_as_the_model_does_and_so_does_a_saved_copy(build, tmp_path):
    folder = build("Gemma2", final_logit_softcapping=2.0, initializer_range=1.0)
    ids, model = list(range(5, 25)), load(folder)
    own, ours = logits_of(model, ids)
    before = transformers.AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits
    assert own.abs().max() > 1.9 and torch.allclose(own, ours, atol=1e-5)
    assert torch.allclose(before[0, :-1], own, atol=1e-5)
    common.save_model(model, common.load_tokenizer(folder), tmp_path / "copy")
    assert torch.allclose(logits_of(load(tmp_path / "copy"), ids)[0], own, atol=1e-5)
    assert torch.allclose(*logits_of(model, ids), atol=1e-5)


def test_dropout_of_a_configuration_is_off_in_training(build, capsys):
    model = load(build("GPT2", n_embd=32, n_layer=1, n_head=2, attn_pdrop=0.5, resid_pdrop=0.5))
    assert "dropout" in capsys.readouterr().err
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
    model = load(build("Llama", attention_dropout=0.5)).train()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_an_answer_ends_where_the_template_ends_a_turn(build):
    folder = build("Llama")
    for name, more in (("config.json", {}), ("generation_config.json", {"temperature": 0.6})):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 0, **more}))
    tokenizer, model = common.load_tokenizer(folder), load(folder)
    assert common.end_ids(model) == [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    common.save_model(model, tokenizer, folder.parent / "saved")  # with that temperature


def test_frequencies_that_change_with_the_length_bound_it(build, model):
    folder = build("Phi3", rope_parameters=LONG, original_max_position_embeddings=64)
    assert positions(load(folder)) == 64
    (y,) = common.sample(load(folder), [[5] * 60], [0], 20)
    assert len(y) == 4 and positions(model) == model.config.max_position_embeddings


def test_logits_that_are_not_finite_end_a_stage_and_are_no_token(model, capsys):
    model.get_input_embeddings().weight.data[7] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(SystemExit):
            common.sample(model, [[5, 7, 6]], [0], 4, temperature)
        assert "not finite" in capsys.readouterr().err


@pytest.mark.skipif(not find_spec("peft"), reason="no peft")
def test_an_adapter_is_merged_into_its_base(build, tmp_path, tokenizer):
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(build("Llama"))
    lora = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    torch.nn.init.ones_(next(p for name, p in lora.named_parameters() if "lora_B" in name))
    lora.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    merged = load(tmp_path / "adapter")
    assert torch.allclose(merged(ids).logits, lora.eval()(ids).logits, atol=1e-5)
    assert type(merged).__name__ == "LlamaForCausalLM"


def test_no_blank_stands_between_an_answer_and_what_the_reviser_is_told(tokenizer):
    """SentencePiece puts one before whatever it reads alone."""
    pieces = [chr(i) for i in range(32, 127)] + ["\n", "▁", "<s>"]
    spm = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    spm.pre_tokenizer, spm.decoder = pre_tokenizers.Metaspace(), Metaspace()
    spm = transformers.PreTrainedTokenizerFast(tokenizer_object=spm, eos_token="<s>")
    assert spm.decode(spm("\n")["input_ids"]) == "\n" and len(spm("\n")["input_ids"]) == 2
    spm.chat_template = "{{ messages[0].content }}:"
    y = spm("x=2", add_special_tokens=False)["input_ids"][1:]
    ids = common.revision_ids(spm, "1+1", y, 0)
    told = ids[len(common.prompt_ids(spm, "1+1")) + len(y) :]
    assert spm.convert_ids_to_tokens(told)[:4] == ["\n", "\n", "W", "a"]


def test_a_run_keeps_its_date_and_another_prompt_is_refused(monkeypatch, tmp_path, mini, capsys):
    tokenizer = common.load_tokenizer(BASE)
    args = common.parse(common.arguments("03", ""), ["--from", str(mini), "--out", str(tmp_path)])
    common.check_prompt(args, tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"
    monkeypatch.setattr(common, "_today", "2020-02-29")
    assert tokenizer.decode(common.prompt_ids(tokenizer, "x")) == "2020-02-29 x"
    with pytest.raises(SystemExit):
        common.check_prompt(args, tokenizer)
    assert "prompts differ" in capsys.readouterr().err


def test_a_template_that_opens_a_thought_is_said_and_one_that_closes_it_is_not(tmp_path, capsys):
    tokenizer = common.load_tokenizer(BASE)
    for end, said in (("<think>", True), ("<think></think>", False)):
        tokenizer.chat_template = "{{ messages[0].content }}" + end
        tokenizer.save_pretrained(tmp_path)
        common.load_tokenizer(tmp_path)
        assert ("<think>" in capsys.readouterr().err) == said


def test_a_terminal_without_our_characters_and_a_full_memory_are_no_traceback():
    program = "import common, sys\nprint('x')\ncommon.run_stage(lambda: print('⟨1.4⟩ → ⏎'))\n"
    program += "def full():\n    raise MemoryError\ncommon.run_stage(full)"
    env = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True)
    assert ran.returncode == 2 and b"?1.4? ? ?" in ran.stdout and b"memory is full" in ran.stderr


@pytest.mark.skipif(not find_spec("peft"), reason="no peft")
def test_lora_trains_an_adapter_alone_and_its_teacher_is_the_start(
    stages, tmp_path, tokenizer, mini
):
    out = ["--from", str(mini), "--out", str(tmp_path)]
    stages[3].main([*MINI[3], "--lora", "4", *out])
    assert (tmp_path / "srt/adapter_config.json").exists()
    steps = [*MINI[4], "--rounds", "2", "--steps", "1", "--lora", "4", "--lr", "1e-2"]
    stages[4].main([*steps, *out])
    first, _ = rows_of(tmp_path / "distill.jsonl")
    whole = ["--from", str(tmp_path), "--out", f"{tmp_path}/whole", "--steps", "1"]
    stages[4].main([*MINI[4], *whole])
    (merged,) = rows_of(tmp_path / "whole/distill.jsonl")
    assert first["kl"] == pytest.approx(merged["kl"], rel=1e-3)
    base, student = load(BASE), load(tmp_path / "sd_zero")
    differ = [not torch.equal(a, b) for a, b in zip(base.parameters(), student.parameters())]
    assert any(differ) and not differ[0]  # embeddings stay
    adapter = common.load_model(tmp_path / "sd_zero", tokenizer, CPU, lora=4)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(adapter(ids).logits, student(ids).logits, atol=1e-4)
    with common.as_teacher(adapter):
        assert not torch.equal(adapter(ids).logits, student(ids).logits)
    common.copy_weights(adapter, adapter)
    with common.as_teacher(adapter):
        assert torch.allclose(adapter(ids).logits, student(ids).logits, atol=1e-4)


@pytest.mark.skipif(not find_spec("peft"), reason="no peft")
def test_adapters_of_a_model_in_half_precision_are_float32_and_the_teacher_has_their_shape(
    build, tokenizer, monkeypatch, tmp_path
):
    import peft

    monkeypatch.setattr("data.models.autocast", lambda device: (None, torch.bfloat16))
    base = transformers.AutoModelForCausalLM.from_pretrained(build("Llama"))
    how = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    lora = peft.get_peft_model(base, how)
    torch.nn.init.ones_(next(p for name, p in lora.named_parameters() if "lora_B" in name))
    lora.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    model = common.load_model(tmp_path / "adapter", tokenizer, CPU, lora=4)
    assert model.dtype == torch.bfloat16
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 and all(p.dtype == torch.float32 for p in trained)
    common.copy_weights(model.float(), model)
    ids = torch.tensor([[5, 6, 7, 8]])
    student = model(ids).logits
    with common.as_teacher(model):
        assert torch.equal(model(ids).logits, student)
