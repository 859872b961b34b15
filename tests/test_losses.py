"""The two losses and the alignment under them: hand-computed values and properties, each named after the bug it guards against."""

import math
from functools import partial

import numpy as np
import pytest
import torch

import common
from common import completion_hidden, completion_logits, prompt_ids, revision_ids

S = torch.tensor(
    [
        [[2, 1, 0, -1], [0.5, 0.4, -0.5, 3], [0.1, 0, -0.1, 0.2]],
        [[1, -1, 2, 0], [3, 0.2, 0.1, 1], [9, 8, 7, 6]],
    ]
)
T = torch.tensor(
    [
        [[1, 2, 0, -2], [0, 1, 2, 1.9], [1, 0.3, -1, 0]],
        [[0.1, 0.2, 0.3, 0.4], [2, 1.8, -1, 0], [-9, 9, 0, 1]],
    ]
)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)


@pytest.mark.parametrize(
    "kind, values, mean",
    [
        ("reverse", [0.418617, 0.568224, 0.194734, 0.436867, 0.349025], 0.393493),
        ("forward", [0.423886, 0.980652, 0.176330, 0.560243, 0.588825], 0.545987),
        ("mixed", None, 0.469740),
    ],
)
def test_kl_direction_is_the_named_one(stages, kind, values, mean):
    kl = stages[4].token_kl(S, T, kind)[MASK]
    assert kl.mean().item() == pytest.approx(mean, abs=2e-6)
    if values:
        assert kl.tolist() == pytest.approx(values, abs=2e-6)


def test_kl_is_never_negative_and_zero_for_equal_logits(stages):
    a, b = torch.randn(50, 400, generator=torch.Generator().manual_seed(0)).chunk(2)
    for kind in ("reverse", "forward", "mixed"):
        assert (stages[4].token_kl(a, b, kind) > 0).all()
        assert (
            stages[4].token_kl(a, a + 3.0, kind).abs().max() < 1e-5
        )  # a constant added to logits changes no distribution
    assert torch.allclose(stages[4].token_kl(a, b, "reverse"), stages[4].token_kl(b, a, "forward"))


def test_kl_of_bf16_logits_is_computed_in_float32(stages):
    a, b = S.bfloat16(), T.bfloat16()
    assert torch.equal(stages[4].token_kl(a, b), stages[4].token_kl(a.float(), b.float()))


def test_top_k_of_all_tokens_is_the_full_kl_and_of_two_renormalises_both(stages):
    full = stages[4].token_kl(S, T, "mixed")
    for k in (4, 64):  # 64 of a vocabulary of 4 are all of it
        assert torch.allclose(stages[4].token_kl(S, T, "mixed", top_k=k), full, atol=1e-6)
    p, q = (
        S[0, 0, [1, 0]].softmax(-1),
        T[0, 0, [1, 0]].softmax(-1),
    )  # the teacher's two likeliest tokens at this place
    assert stages[4].token_kl(S, T, top_k=2)[0, 0].item() == pytest.approx(
        (p * (p / q).log()).sum().item(), abs=1e-6
    )


def test_grpo_advantages_by_hand(stages):
    a = stages[4].advantages_of([1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0], 4)
    assert (
        a[:4] == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-3) and a[4:] == [0.0] * 8
    )  # standard deviation of 1, 0, 0, 0: 0.5


def test_grpo_gradient_is_the_policy_gradient(stages, model, tokenizer, problems):
    _, prompts, completions = ragged(tokenizer, problems)
    advantages = torch.tensor([a for a, y in zip([1.5, -0.5, 0.0, -1.0], completions) for _ in y])
    y = torch.tensor(sum(completions, []))
    logps = (
        completion_logits(model, prompts, completions).log_softmax(-1).gather(1, y[:, None])[:, 0]
    )
    (-(logps * advantages).sum() / 77).backward()
    naive = flat_gradient(model)
    model.zero_grad()
    stages[4].grpo_backward(
        completion_hidden(model, prompts, completions),
        model.get_output_embeddings(),
        y,
        advantages,
        77,
    )
    assert (
        torch.allclose(flat_gradient(model), naive, atol=1e-4 * naive.abs().max())
        and naive.norm() > 0
    )


def ragged(tokenizer, problems):
    """Four rows of different prompt and answer lengths: problems, prompts and completions."""
    rows = problems[:4]
    prompts = [prompt_ids(tokenizer, x["problem"]) for x in rows]
    completions = [
        tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        for text in (
            "reverse: 51937\n\\boxed{51937}",
            "7",
            "Take 123 and sort up, which gives 123.\n\\boxed{123}",
            "\\boxed{9}",
        )
    ]
    return rows, prompts, completions


def test_batch_equals_one_by_one_and_the_plain_forward(model, tokenizer, problems):
    _, prompts, completions = ragged(tokenizer, problems)
    together = completion_logits(model, prompts, completions).split([len(c) for c in completions])
    for p, c, logits in zip(prompts, completions, together):
        assert torch.allclose(logits, completion_logits(model, [p], [c]), atol=1e-4)
        plain = model(torch.tensor([p + c])).logits[
            0, len(p) - 1 : -1
        ]  # predicts c[0] from the prompt's last token, and c[-1], the end token
        assert torch.allclose(logits, plain, atol=1e-4)


def test_pad_id_and_end_token_inside_the_prompt_are_not_masked(model, tokenizer):
    odd = [tokenizer.pad_token_id, tokenizer.eos_token_id, 30, 31]
    alone = completion_logits(model, [odd], [[32, tokenizer.eos_token_id]])
    padded = completion_logits(
        model, [odd, list(range(20, 60))], [[32, tokenizer.eos_token_id], [33]]
    )
    assert alone.shape[0] == 2 and torch.allclose(alone, padded[:2], atol=1e-4)


def test_same_weights_and_context_give_no_kl_but_shifted_by_one_they_do(
    stages, model, tokenizer, problems
):
    _, prompts, completions = ragged(tokenizer, problems)
    with torch.no_grad():
        a, b = (
            completion_logits(model, prompts, completions),
            completion_logits(model, prompts, completions),
        )
    assert stages[4].token_kl(a, b).abs().max() < 1e-6
    assert stages[4].token_kl(a[1:], b[:-1]).mean() > 0.1


def test_teacher_scores_the_second_y_causally_and_reads_the_first(model, tokenizer, problems):
    x, y = (
        problems[0]["problem"],
        tokenizer("reverse: 51937\n\\boxed{51937}")["input_ids"] + [tokenizer.eos_token_id],
    )
    other = [t if i != 4 else tokenizer.convert_tokens_to_ids("8") for i, t in enumerate(y)]
    assert other != y
    with torch.no_grad():
        base = completion_logits(model, [revision_ids(tokenizer, x, y, 0)], [y])
        later = completion_logits(model, [revision_ids(tokenizer, x, y, 0)], [other])
        first = completion_logits(model, [revision_ids(tokenizer, x, other, 0)], [y])
        reward = completion_logits(model, [revision_ids(tokenizer, x, y, 1)], [y])
    assert torch.allclose(
        base[:5], later[:5], atol=1e-5
    )  # token 4 of the second y is predicted before it is read
    assert not torch.allclose(base[5], later[5], atol=1e-3)
    assert not torch.allclose(base[0], first[0], atol=1e-3)  # conditioning on the first y
    assert not torch.allclose(base[0], reward[0], atol=1e-3)  # and on the reward


def test_first_copy_has_no_end_token_and_sft_prefix_is_the_teachers(stages, tokenizer, problems):
    x, y = problems[0], tokenizer("\\boxed{1}")["input_ids"] + [tokenizer.eos_token_id]
    prefix = revision_ids(tokenizer, x["problem"], y, 0)
    delimiter = tokenizer("\n\nWait, this response is not correct, let me start over.\n\n")[
        "input_ids"
    ]
    assert prefix == prompt_ids(tokenizer, x["problem"]) + y[:-1] + delimiter
    row = {**x, "response_ids": y, "reward": 0, "revised_ids": [9, 8, tokenizer.eos_token_id]}
    prompt, attempt, revised = stages[3].sequence(row, tokenizer, common.P_R)
    assert prompt + attempt == prefix and revised == row["revised_ids"]
    assert attempt == y[:-1] + delimiter and tokenizer.eos_token_id not in attempt


def test_srt_loss_is_the_sum_of_two_token_means_and_so_is_its_gradient(
    stages, model, tokenizer, problems, monkeypatch
):
    rows = [
        {**x, "response_ids": y, "reward": i % 2, "revised_ids": y[::-1]}
        for i, (x, _, y) in enumerate(zip(*ragged(tokenizer, problems)))
    ]
    batch = [stages[3].sequence(r, tokenizer, common.P_R) for r in rows]

    def token_mean(pairs):
        """-log π of the completions given their prefixes, token by token from plain forward passes."""
        logps = []
        for p, c in pairs:
            logp = model(torch.tensor([p + c])).logits[0].log_softmax(-1)
            logps += [logp[len(p) + j - 1, t].item() for j, t in enumerate(c)]
        return -sum(logps) / len(logps), len(logps)

    l_revision, n_revision = token_mean(
        [(x + a, r) for x, a, r in batch]
    )  # -log π(y_revised | x, y_init, P_r)
    l_generation, n_generation = token_mean(
        [(x, a + r) for x, a, r in batch]
    )  # -log π([y_init, P_r, y_revised] | x)
    for objective, naive in (
        ("revision", l_revision),
        ("generation", l_generation),
        ("srt", l_revision + l_generation),
    ):
        backward = lambda part, **how: stages[3].srt_backward(
            model, part, objective, n_revision, n_generation, **how
        )
        model.zero_grad()
        assert backward(batch) == pytest.approx(naive, rel=1e-4)
        whole = flat_gradient(model)
        assert sum(backward([b]) for b in batch) == pytest.approx(
            naive, rel=1e-4
        )  # four micro-batches of one are one of four
        assert torch.allclose(flat_gradient(model), 2 * whole, atol=1e-4 * whole.abs().max())
        model.zero_grad()
        assert backward(batch, scale=lambda part: 8 * part) == pytest.approx(
            naive, rel=1e-4
        )  # as GradScaler does it
        assert torch.allclose(flat_gradient(model), 8 * whole, atol=1e-4 * whole.abs().max())
    model.zero_grad()
    prompts, attempts, revised = zip(*batch)
    logps = completion_logits(
        model, prompts, [a + r for a, r in zip(attempts, revised)]
    ).log_softmax(-1)
    nll = -logps.gather(
        1, torch.tensor(sum((a + r for a, r in zip(attempts, revised)), []))[:, None]
    )[:, 0]
    of_revised = torch.tensor(
        sum(([0.0] * len(a) + [1.0] * len(r) for a, r in zip(attempts, revised)), [])
    )
    ((nll * of_revised).sum() / n_revision + nll.sum() / n_generation).backward()
    naive = flat_gradient(model)
    monkeypatch.setattr(
        stages[3], "backward_through_head", partial(common.backward_through_head, chunk=3)
    )
    model.zero_grad()
    stages[3].srt_backward(model, batch, "srt", n_revision, n_generation)
    assert torch.allclose(flat_gradient(model), naive, atol=1e-4 * naive.abs().max())


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["reverse", "forward", "mixed"])
def test_kl_by_chunks_is_the_naive_kl_in_value_and_gradient(stages, kind, dtype, close):
    g = torch.Generator().manual_seed(0)
    N, H, V = 23, 16, 3000
    hidden, teacher_hidden = (torch.randn(N, H, generator=g, dtype=dtype) for _ in range(2))
    head, teacher_head = (torch.nn.Linear(H, V, dtype=dtype) for _ in range(2))
    h = hidden.clone().requires_grad_()
    naive = stages[4].token_kl(head(h), teacher_head(teacher_hidden).detach(), kind)
    (naive.sum() / 50).backward()
    expected = naive.detach(), h.grad, head.weight.grad.clone(), head.bias.grad.clone()
    for chunk in (1, 5, 22, 23, 100, None):
        head.zero_grad()
        h = hidden.clone().requires_grad_()
        kl = stages[4].kl_backward(h * 1, head, teacher_hidden, teacher_head, kind, 50, chunk=chunk)
        for ours, theirs in zip((kl, h.grad, head.weight.grad, head.bias.grad), expected):
            assert (ours - theirs).abs().max() <= close * theirs.abs().max()
    assert teacher_head.weight.grad is None


def test_no_more_than_a_chunk_of_positions_has_logits(stages):
    seen, head = [], torch.nn.Linear(8, 2**20)
    head.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    h = torch.randn(150, 8)
    stages[4].kl_backward(
        h.clone().requires_grad_(), head, h, head.requires_grad_(False), "reverse", 1
    )
    assert seen == [32] * 8 + [22] * 2  # 2^25 logits, of the student and of the teacher


def test_kl_gradient_reaches_the_student_only_and_is_the_naive_one_for_any_split(
    stages, model, tokenizer, problems
):
    """Ragged rows, in float64: micro-batches of any size and chunks of any size against plain logits and autograd."""
    model.double()
    _, prompts, completions = ragged(tokenizer, problems)
    prefixes = [revision_ids(tokenizer, x["problem"], y, 0) for x, y in zip(problems, completions)]
    teacher = (
        common.load_model(common.HERE / "data/base", tokenizer, torch.device("cpu"))
        .double()
        .requires_grad_(False)
    )
    tokens = sum(map(len, completions))
    naive = stages[4].token_kl(
        completion_logits(model, prompts, completions),
        completion_logits(teacher, prefixes, completions),
    )
    (naive.sum() / tokens).backward()
    expected = flat_gradient(model)
    for size, chunk in ((4, None), (4, 3), (3, 7), (1, 2)):
        model.zero_grad()
        kls = []
        for b in range(0, 4, size):
            p, q, y = prompts[b : b + size], prefixes[b : b + size], completions[b : b + size]
            kls.append(
                stages[4].kl_backward(
                    completion_hidden(model, p, y),
                    model.get_output_embeddings(),
                    completion_hidden(teacher, q, y),
                    teacher.get_output_embeddings(),
                    "reverse",
                    tokens,
                    chunk=chunk,
                )
            )
        assert torch.allclose(torch.cat(kls), naive, rtol=0, atol=1e-10)
        assert (flat_gradient(model) - expected).abs().max() < 1e-10 * expected.abs().max()
    assert expected.norm() > 0 and all(p.grad is None for p in teacher.parameters())


def test_majority_votes_are_counted_by_equality_by_hand(stages):
    row = lambda reward, answer: {
        "reward": reward,
        "extracted": answer,
        "verdict": "correct" if reward else "no_answer" if answer is None else "wrong",
    }
    share = lambda *rows: stages[5].majority([row(*r) for r in rows])
    assert (
        share((1, "3"), (0, "0.5"), (0, "1/2"), (0, r"\frac12")) == 0
        and share((1, "3"), (1, "3.0"), (0, "1/2"), (0, "0.5")) == 0.5
    )
    assert (
        share((1, "3"), (0, ""), (0, "")) == 0
        and share((1, "3"), (0, None), (0, None)) == 1
        and share((0, None), (0, None)) == 0
    )


def test_the_medians_error_is_that_over_problems(stages):
    assert stages[5].median([[5, 5], [5, 5, 5]]) == (5, 0) and stages[5].median([[1, 2, 6]]) == (
        2,
        None,
    )
    rng = np.random.default_rng(1)
    value, error = stages[5].median(rng.normal(10, 1, (400, 1)).tolist())
    assert value == pytest.approx(10, abs=0.3) and error == pytest.approx(
        1.2533 / 20, rel=0.3
    )  # √(π/2) σ/√n of a normal's median


def test_pass_at_k_by_hand(stages):
    assert stages[5].pass_at_k(4, 1, 1) == pytest.approx(1 / 4)
    assert stages[5].pass_at_k(4, 1, 2) == pytest.approx(1 / 2)
    assert stages[5].pass_at_k(8, 0, 8) == 0 and stages[5].pass_at_k(8, 1, 8) == 1
    assert stages[5].pass_at_k(10, 3, 5) == pytest.approx(1 - math.comb(7, 5) / math.comb(10, 5))


def test_summary_by_hand(stages):
    wait, fine = common.P_R[0], common.P_R[1]
    row = lambda i, reward, revised, response="\\boxed{1}", greedy=False: {
        "id": i,
        "greedy": greedy,
        "reward": reward,
        "revised_reward": revised,
        "response": response,
        "response_ids": [5] * (4 + 2 * reward),
        "finished": True,
        "answer": "1",
        "kind": "math",
        "extracted": "1" if reward else "2",
    }
    rows = [
        row("a", 1, 1),
        row("a", 0, 1),
        row("b", 1, 0),
        row("b", 1, 1),
        row("c", 0, 0, f"\\boxed{{2}}\n\n{wait}\n\n\\boxed{{1}}\n\n{wait}\n\n\\boxed{{3}}"),
        row("c", 0, 0, f"{fine} \\boxed{{2}} {fine} \\boxed{{4}}"),
        row("a", 1, None, greedy=True),
        row("b", 0, None, greedy=True),
    ]
    s = stages[5].summarise("x", rows, 2, common.P_R)
    assert s["accuracy"] == pytest.approx(0.5) and s["accuracy_se"] == pytest.approx(
        math.sqrt(0.25 / 3)
    )  # problems: .5, 1, 0
    assert s["pass_at_k"] == pytest.approx(2 / 3) and s["greedy"] == 0.5 and s["mean_tokens"] == 5
    assert (
        s["maj_at_n"] == pytest.approx(0.5)
        and s["pass_at"] == pytest.approx([0.5, 2 / 3])
        and s["median_tokens"] == 5
    )  # a: a tie
    assert s["correction_rate_se"] == pytest.approx(
        math.sqrt((4 / 9 + 4 / 9) * 3 / 2) / 3
    )  # wrong answers: 1 of 1 mended, 0 of 0, 0 of 2
    assert (
        s["correction_rate"] == pytest.approx(1 / 3)
        and s["spoiling_rate"] == pytest.approx(1 / 3)
        and s["revised_accuracy"] == 0.5
    )
    # said after attempts: wrong after {2} true, wrong after {1} false, right after {2} false; the phrase before any attempt does not count
    assert s["phrases"] == pytest.approx(3 / 6) and s["phrases_true"] == pytest.approx(1 / 3)
    assert s["wrong_after_wrong"] == 0.5 and s["wrong_after_right"] == 1.0
