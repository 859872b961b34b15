"""Every patch of tests/ablations applies to today's stages, and does what its first line says."""

from math import inf

import pytest
import torch

from conftest import ROOT, common, load, rows_of
from test_losses import S, T

PATCHES = sorted(path.stem for path in (ROOT / "tests/ablations").glob("*.patch"))
TINY = {
    "03": ["--epochs", "1", "--batch-size", "4", "--max-new-tokens", "120"],
    "04": ["--steps", "1", "--batch-size", "8", "--max-new-tokens", "60"],
}


def test_every_patch_says_first_what_it_shows_and_which_claim_it_serves():
    assert len(PATCHES) == 19
    for name in PATCHES:
        first = (ROOT / f"tests/ablations/{name}.patch").read_text().splitlines()[0]
        assert len(first) > 20 and ("C1" in first or "erves" in first), name


def run(patch, mini, out, *flags, spy=None):
    """The patched stage in miniature, as a variant of `mini`; spy: (function of the stage, list)
    collects its arguments. Returns the stage's module."""
    stage = load(None, patch)
    number = "03" if hasattr(stage, "srt_backward") else "04"
    if spy:
        name, calls = spy
        real = getattr(stage, name)
        setattr(stage, name, lambda *a, **k: calls.append(a) or real(*a, **k))
    stage.main([*TINY[number], *flags, "--from", str(mini), "--out", str(out)])
    return stage


def two_tuples(tokenizer):
    """[(x, y_init P_r, y_revised)] as token ids."""
    text = ("reverse: 51937\n", "7", "\\boxed{73915}"), ("sort up: 123", "swap", "123\n\\boxed{9}")
    return [tuple(tokenizer(part)["input_ids"] for part in row) for row in text]


@torch.no_grad()
def log_likelihood(model, prefix, completion):
    logits = model(torch.tensor([prefix + completion])).logits[0, len(prefix) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum().item()


@pytest.mark.parametrize("patch", ["generation_only", "revision_only"])
def test_one_of_the_two_srt_losses_alone(patch, mini, tmp_path, model, tokenizer):
    stage, tuples, loss = run(patch, mini, tmp_path / "out"), two_tuples(tokenizer), 0.0
    n_revision = sum(len(revised) for _, _, revised in tuples)
    n_generation = n_revision + sum(len(attempt) for _, attempt, _ in tuples)
    for x, attempt, revised in tuples:
        if patch == "generation_only":
            loss -= log_likelihood(model, x, attempt + revised) / n_generation
        else:
            loss -= log_likelihood(model, x + attempt, revised) / n_revision
    assert stage.srt_backward(model, tuples, n_revision, n_generation) == pytest.approx(
        loss, rel=1e-4
    )


@pytest.mark.parametrize("patch", ["unfiltered", "wrong_only", "rft"])
def test_srt_trains_on_what_the_patch_says(patch, mini, tmp_path):
    seen = []
    run(patch, mini, tmp_path / "out", spy=("srt_backward", seen))
    tuples = sum((call[1] for call in seen), [])
    trained = sorted(revised for _, _, revised in tuples)
    if patch == "rft":
        right = [r for r in rows_of(mini / "verified.jsonl") if r["reward"] and r["finished"]]
        assert trained == sorted(row["response_ids"] for row in right)
        assert not any(attempt for _, attempt, _ in tuples)
        return
    rows = rows_of(tmp_path / "out/revisions.jsonl")
    kept = [row for row in rows if row["kept"] == "yes"]
    if patch == "unfiltered":
        kept += [r for r in rows if r["kept"] in ("revision wrong", "revision no_answer")]
        assert {row["revised_reward"] for row in kept} == {0, 1}
    else:
        assert {row["reward"] for row in rows} == {0} and len(rows) > 4
    assert trained == sorted(row["revised_ids"] for row in kept)


def test_rft_scores_every_token_of_an_answer_once(mini, tmp_path, model, tokenizer):
    stage = load(None, "rft")
    (x, _, y), _ = two_tuples(tokenizer)
    loss = -log_likelihood(model, x, y) / len(y)
    assert stage.srt_backward(model, [(x, [], y)], len(y), len(y)) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("patch", ["neutral", "inverted"])
def test_the_teacher_is_told_another_reward(patch, mini, tmp_path, tokenizer):
    asked = []
    run(patch, mini, tmp_path / "out", spy=("revision_ids", asked))
    problems = {x["problem"]: x for x in common.load_problems(ROOT / "data")}
    true = []
    for _, problem, ids, told, p_r in asked[:8]:  # then the check asks
        text = tokenizer.decode(ids, skip_special_tokens=True)
        true.append(common.verify(problems[problem], text)[0])
        assert told == (1 if patch == "neutral" else 1 - true[-1]) and p_r == common.P_R
    assert set(true) == {0, 1}


def test_sdfts_teacher_has_read_a_right_answer_to_the_same_problem(mini, tmp_path):
    asked = []
    flags = "--start", "base", "--batch-size", "4"
    run("sdft", mini, tmp_path / "out", *flags, spy=("revision_ids", asked))
    right = {r["problem"]: r for r in rows_of(mini / "verified.jsonl") if r["reward"]}
    assert len(asked) == 4
    for _, problem, ids, reward, p_r in asked:
        assert right[problem]["response_ids"] == ids and p_r[reward] == common.P_R[1]


def test_top_k_renormalised_sees_nothing_but_the_teachers_likeliest(mini, tmp_path):
    stage = run("top_k_renormalised", mini, tmp_path / "out", "--kl", "mixed")
    full = load("04_self_distill.py").token_kl(S, T, "mixed")
    assert torch.allclose(stage.token_kl(S, T, "mixed"), full, atol=1e-6)  # 64 of 4 are all
    stage.K = 2
    p, q = S[0, 0, [1, 0]].softmax(-1), T[0, 0, [1, 0]].softmax(-1)
    by_hand = (p * (p / q).log()).sum().item()
    assert stage.token_kl(S, T)[0, 0].item() == pytest.approx(by_hand, abs=1e-6)


def test_top_k_with_a_tail_is_a_lower_bound_that_is_never_negative(mini, tmp_path):
    stage = run("top_k_tail", mini, tmp_path / "out")
    full = load("04_self_distill.py").token_kl(S, T)
    assert torch.allclose(stage.token_kl(S, T), full, atol=1e-5)
    stage.K = 2
    kl = stage.token_kl(S, T)
    assert kl[0].tolist() == pytest.approx([0.408770, 0.530988, 0.119719], abs=2e-6)
    assert (kl >= 0).all() and (kl <= full + 1e-6).all()


def test_grpo_samples_groups_and_needs_no_teacher(mini, tmp_path):
    loaded = []
    stage = run("grpo", mini, tmp_path / "out", "--start", "base", spy=("load_model", loaded))
    step = rows_of(tmp_path / "out/distill.jsonl")[0]
    assert len(loaded) == 1 and len(step["problems"]) == 8 == stage.N
    assert len(set(step["problems"])) == 1 and step["gradient_norm"] is not None
    advantages = stage.advantages_of([1, 0, 0, 0, 1, 0, 0, 0] + [1] * 8)
    deviation = (2 / 8 * 6 / 8 * 8 / 7) ** 0.5  # of two ones in eight, unbiased
    assert advantages[0] == pytest.approx(0.75 / deviation, rel=1e-3)
    assert advantages[1] == pytest.approx(-0.25 / deviation, rel=1e-3)
    assert advantages[8:] == [0.0] * 8  # all alike: nothing to learn


def test_grpo_gradient_is_the_policy_gradient(model, tokenizer):
    stage, tuples = load(None, "grpo"), two_tuples(tokenizer)
    prompts, completions = [x for x, _, _ in tuples], [a + r for _, a, r in tuples]
    y = torch.tensor(sum(completions, []))
    advantages = torch.tensor([1.5] * len(completions[0]) + [-0.5] * len(completions[1]))
    head, gradients = model.get_output_embeddings(), []

    def naive():
        logps = head(common.completion_hidden(model, prompts, completions)).log_softmax(-1)
        chosen = logps.gather(1, y[:, None])[:, 0]
        (-(chosen * advantages).sum() / 77).backward()

    def ours():
        hidden = common.completion_hidden(model, prompts, completions)
        stage.grpo_backward(hidden, head, y, advantages, 77, chunk=3)

    for backward in (naive, ours):
        model.zero_grad()
        backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*gradients, atol=1e-4 * gradients[0].abs().max())
    assert gradients[0].norm() > 0


@pytest.fixture(scope="module")
def papers_step(mini, tmp_path_factory):
    """The gradient's norm of a step of phase 2 without a patch."""
    out = tmp_path_factory.mktemp("paper")
    load("04_self_distill.py").main([*TINY["04"], "--from", str(mini), "--out", str(out)])
    return rows_of(out / "distill.jsonl")[0]["gradient_norm"]


@pytest.mark.parametrize(
    "patch, constant, value, share",
    [
        ("gate", "GATE", -1, 1),  # telling matters at each token
        ("gate", "GATE", inf, 0),  # at none: the student starts as its own target
        ("mask", "GATE", -1, 1),
        ("mask", "GATE", inf, 0),
        ("contrast", "TIMES", 0, 0),
        ("clip", "CLIP", inf, 1),
        ("anchor", "BETA", 1, 1),  # KL(student ‖ start) is 0 at the start
        ("ema", "EMA", 0.5, 1),
        ("refresh", "EVERY", 1, 1),
    ],
)
def test_a_first_step_is_the_papers_or_none(
    patch, constant, value, share, mini, tmp_path, papers_step
):
    stage = load(None, patch)
    setattr(stage, constant, value)
    stage.main([*TINY["04"], "--from", str(mini), "--out", str(tmp_path / "out")])
    norm = rows_of(tmp_path / "out/distill.jsonl")[0]["gradient_norm"]
    assert norm == pytest.approx(share * papers_step, rel=1e-3, abs=1e-3 * papers_step)


def test_the_contrast_adds_to_the_generator_what_the_truth_changes_in_the_reviser():
    stage, logits = load(None, "contrast"), torch.tensor([[[0.3, 0.7], [0.4, 0.6], [0.5, 0.5]]])
    (low, high), (a, b) = stage.target_of(logits.log())[0], (4 * 0.3 / 0.4, 4 * 0.7 / 0.6)
    assert (high - low).item() == pytest.approx(4 * (torch.tensor(b / a)).log().item(), rel=1e-4)
    far = torch.tensor([[[1e-9, 1.0], [1.0, 1e-9], [0.5, 0.5]]]).log()
    low, high = stage.target_of(far)[0]
    assert (high - low).item() == pytest.approx(2 * stage.MOST)


def test_a_teacher_that_follows_goes_a_share_of_the_way():
    stage, (student, teacher) = load(None, "ema"), (torch.nn.Linear(2, 1) for _ in range(2))
    before, target = teacher.weight.clone(), student.weight
    stage.follow(student, teacher)
    assert torch.allclose(teacher.weight, before + stage.EMA * (target - before))


@pytest.mark.parametrize(
    "accuracy, tokens, due",
    [
        ([0.5] * 9 + [0.6], [100] * 10, True),
        ([0.5] * 9 + [0.4], [100] * 10, False),
        ([0.5] * 10, [100] * 7 + [130] * 3, False),
        ([0.5] * 9, [100] * 9, False),
    ],
)
def test_a_teacher_is_refreshed_only_if_nothing_got_worse(accuracy, tokens, due):
    history = [{"accuracy": a, "mean_tokens": n} for a, n in zip(accuracy, tokens)]
    assert load(None, "refresh").is_due(history) == due


def test_right_answers_get_the_policy_gradient_and_wrong_ones_the_kl(mini, tmp_path, model):
    stage, head = run("wrong_kl", mini, tmp_path / "out"), model.get_output_embeddings()
    hidden, hidden_t, y = torch.randn(4, 128), torch.randn(4, 128), torch.tensor([5, 6, 7, 8])
    gain, gradients = torch.tensor([0.3, 0.0, -1, -1]), []  # the second: all were right
    for ours in (True, False):
        states = hidden.clone().requires_grad_()
        if ours:
            stage.kl_backward(states, head, hidden_t, head, "reverse", 4, y=y, gain=gain)
        else:
            logits, logits_t = head(states), head(hidden_t).detach()
            nll = -logits.log_softmax(-1)[range(4), y]
            kl = stage.token_kl(logits, logits_t)
            ((gain * nll)[:2].sum() / 4 + kl[2:].sum() / 4).backward()
        gradients.append(states.grad)
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].norm() > 0
