"""The losses and the alignment under them: hand-computed values, and properties."""

import math
from functools import partial

import pytest
import torch

import common
from common import completion_hidden, prompt_ids, revision_ids
from conftest import BASE, completion_logits

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
KINDS = "reverse", "forward", "mixed"


# ---------------------------------------------------------------- the KL


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
    token_kl = stages[4].token_kl
    a, b = torch.randn(50, 400, generator=torch.Generator().manual_seed(0)).chunk(2)
    for kind in KINDS:
        assert (token_kl(a, b, kind) > 0).all()
        # a constant added to logits changes no distribution
        assert token_kl(a, a + 3.0, kind).abs().max() < 1e-5
    assert torch.allclose(token_kl(a, b, "reverse"), token_kl(b, a, "forward"))


def test_kl_of_bf16_logits_is_computed_in_float32(stages):
    a, b = S.bfloat16(), T.bfloat16()
    assert torch.equal(stages[4].token_kl(a, b), stages[4].token_kl(a.float(), b.float()))


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
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
        teacher = teacher_hidden, teacher_head
        kl = stages[4].kl_backward(h * 1, head, *teacher, kind, 50, chunk=chunk)
        for ours, theirs in zip((kl, h.grad, head.weight.grad, head.bias.grad), expected):
            assert (ours - theirs).abs().max() <= close * theirs.abs().max()
    assert teacher_head.weight.grad is None


def test_no_more_than_a_chunk_of_positions_has_logits(stages):
    seen, head = [], torch.nn.Linear(8, 2**20)
    head.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    h = torch.randn(40, 8)
    student = h.clone().requires_grad_(), head
    stages[4].kl_backward(*student, h, head.requires_grad_(False), "reverse", 1)
    assert seen == [32, 32, 8, 8]  # 2^25 logits, of the student and of the teacher


# ---------------------------------------------------------------- alignment


def ragged(tokenizer, problems):
    """Four rows of different prompt and answer lengths: problems, prompts and completions."""
    texts = (
        "reverse: 51937\n\\boxed{51937}",
        "7",
        "Take 123 and sort up, which gives 123.\n\\boxed{123}",
        "\\boxed{9}",
    )
    rows, end = problems[:4], [tokenizer.eos_token_id]
    prompts = [prompt_ids(tokenizer, x["problem"]) for x in rows]
    return rows, prompts, [tokenizer(text)["input_ids"] + end for text in texts]


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def close(ours, theirs, within=1e-4):
    return (ours - theirs).abs().max() <= within * theirs.abs().max()


def test_batch_equals_one_by_one_and_the_plain_forward(model, tokenizer, problems):
    _, prompts, completions = ragged(tokenizer, problems)
    together = completion_logits(model, prompts, completions).split([len(c) for c in completions])
    for p, c, logits in zip(prompts, completions, together):
        assert torch.allclose(logits, completion_logits(model, [p], [c]), atol=1e-4)
        # the prompt's last token predicts c[0], and c[-2] the end token
        plain = model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1]
        assert torch.allclose(logits, plain, atol=1e-4)


def test_pad_id_and_end_token_inside_the_prompt_are_not_masked(model, tokenizer):
    odd = [tokenizer.pad_token_id, tokenizer.eos_token_id, 30, 31]
    y = [32, tokenizer.eos_token_id]
    alone = completion_logits(model, [odd], [y])
    padded = completion_logits(model, [odd, list(range(20, 60))], [y, [33]])
    assert alone.shape[0] == 2 and torch.allclose(alone, padded[:2], atol=1e-4)


@torch.no_grad()
def test_same_context_gives_no_kl_but_shifted_by_one_it_does(stages, model, tokenizer, problems):
    _, prompts, completions = ragged(tokenizer, problems)
    a = completion_logits(model, prompts, completions)
    b = completion_logits(model, prompts, completions)
    assert stages[4].token_kl(a, b).abs().max() < 1e-6
    assert stages[4].token_kl(a[1:], b[:-1]).mean() > 0.1


@torch.no_grad()
def test_teacher_scores_the_second_y_causally_and_reads_the_first(model, tokenizer, problems):
    x, end = problems[0]["problem"], [tokenizer.eos_token_id]
    y = tokenizer("reverse: 51937\n\\boxed{51937}")["input_ids"] + end
    other = [*y[:4], tokenizer.convert_tokens_to_ids("8"), *y[5:]]
    assert other != y

    def logits(first, reward, second):
        prefix = revision_ids(tokenizer, x, first, reward)
        return completion_logits(model, [prefix], [second])

    base, later = logits(y, 0, y), logits(y, 0, other)
    assert torch.allclose(base[:5], later[:5], atol=1e-5)  # token 4 is predicted before it is read
    assert not torch.allclose(base[5], later[5], atol=1e-3)
    assert not torch.allclose(base[0], logits(other, 0, y)[0], atol=1e-3)  # the first y matters
    assert not torch.allclose(base[0], logits(y, 1, y)[0], atol=1e-3)  # and so does the reward


def test_first_copy_has_no_end_token_and_sft_prefix_is_the_teachers(stages, tokenizer, problems):
    x, end = problems[0], [tokenizer.eos_token_id]
    y = tokenizer("\\boxed{1}")["input_ids"] + end
    prefix = revision_ids(tokenizer, x["problem"], y, 0)
    told = "\n\nWait, this response is not correct, let me start over.\n\n"
    told = tokenizer(told)["input_ids"]
    assert prefix == prompt_ids(tokenizer, x["problem"]) + y[:-1] + told
    row = {**x, "response_ids": y, "reward": 0, "revised_ids": [9, 8, *end]}
    prompt, attempt, revised = stages[3].sequence(row, tokenizer, common.P_R)
    assert prompt + attempt == prefix and revised == row["revised_ids"]
    assert attempt == y[:-1] + told and end[0] not in attempt


# ---------------------------------------------------------------- the losses on a model


class Scaler:
    """As GradScaler scales."""

    def scale(self, loss):
        return 8 * loss


def test_srt_loss_is_the_sum_of_two_token_means_and_so_is_its_gradient(
    stages, model, tokenizer, problems, monkeypatch
):
    batch = []
    for i, (x, _, y) in enumerate(zip(*ragged(tokenizer, problems))):
        row = {**x, "response_ids": y, "reward": i % 2, "revised_ids": y[::-1]}
        batch.append(stages[3].sequence(row, tokenizer, common.P_R))
    n_revision = sum(len(revised) for _, _, revised in batch)
    n_generation = n_revision + sum(len(attempt) for _, attempt, _ in batch)

    def nll(prefix, completion):
        """-log π of the completion, summed, from a plain forward pass."""
        logits = model(torch.tensor([prefix + completion])).logits[0, len(prefix) - 1 : -1]
        return -logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()

    l_revision = sum(nll(x + a, r) for x, a, r in batch) / n_revision
    l_generation = sum(nll(x, a + r) for x, a, r in batch) / n_generation
    (l_revision + l_generation).backward()
    naive, gradient = (l_revision + l_generation).item(), flat_gradient(model)

    def backward(parts, **how):
        model.zero_grad()
        losses = [
            stages[3].srt_backward(model, part, n_revision, n_generation, **how) for part in parts
        ]
        return sum(losses)

    assert backward([batch]) == pytest.approx(naive, rel=1e-4)
    assert close(flat_gradient(model), gradient)
    ones = [[row] for row in batch]  # four micro-batches of one are one of four
    assert backward(ones) == pytest.approx(naive, rel=1e-4)
    assert close(flat_gradient(model), gradient)
    assert backward([batch], scaler=Scaler()) == pytest.approx(naive, rel=1e-4)
    assert close(flat_gradient(model), 8 * gradient)
    for dtype in (torch.bfloat16, torch.float16):
        half = partial(torch.autocast, "cpu", dtype)
        assert backward([batch], context=half) == pytest.approx(naive, rel=0.02)
        assert torch.cosine_similarity(flat_gradient(model), gradient, dim=0) > 0.99
    by_threes = partial(common.backward_through_head, chunk=3)
    monkeypatch.setattr(stages[3], "backward_through_head", by_threes)
    assert backward([batch]) == pytest.approx(naive, rel=1e-4)
    assert close(flat_gradient(model), gradient)


def test_kl_gradient_reaches_the_student_only_and_is_the_naive_one_for_any_split(
    stages, model, tokenizer, problems
):
    """Ragged rows, in float64: batches and chunks of any size against plain logits and autograd."""
    model.double()
    _, prompts, completions = ragged(tokenizer, problems)
    prefixes = [revision_ids(tokenizer, x["problem"], y, 0) for x, y in zip(problems, completions)]
    teacher = common.load_model(BASE, tokenizer, torch.device("cpu"))
    teacher.double().requires_grad_(False)
    heads = model.get_output_embeddings(), teacher.get_output_embeddings()
    tokens = sum(map(len, completions))
    logits = completion_logits(model, prompts, completions)
    naive = stages[4].token_kl(logits, completion_logits(teacher, prefixes, completions))
    (naive.sum() / tokens).backward()
    expected = flat_gradient(model)
    for size, chunk in ((4, None), (4, 3), (3, 7), (1, 2)):
        model.zero_grad()
        kls = []
        for b in range(0, 4, size):
            p, q, y = prompts[b : b + size], prefixes[b : b + size], completions[b : b + size]
            student = completion_hidden(model, p, y), heads[0]
            taught = completion_hidden(teacher, q, y), heads[1]
            kls.append(stages[4].kl_backward(*student, *taught, "reverse", tokens, chunk=chunk))
        assert torch.allclose(torch.cat(kls), naive, rtol=0, atol=1e-10)
        assert close(flat_gradient(model), expected, 1e-10)
    assert expected.norm() > 0 and all(p.grad is None for p in teacher.parameters())


# ---------------------------------------------------------------- the numbers of 05


def test_majority_votes_are_counted_by_equality_by_hand(stages):
    def share(*rows):
        votes = []
        for reward, answer in rows:
            wrong = "no_answer" if answer is None else "wrong"
            verdict = "correct" if reward else wrong
            votes.append({"reward": reward, "extracted": answer, "verdict": verdict})
        return stages[5].majority(votes)

    assert share((1, "3"), (0, "0.5"), (0, "1/2"), (0, r"\frac12")) == 0
    assert share((1, "3"), (1, "3.0"), (0, "1/2"), (0, "0.5")) == 0.5  # a tie
    assert share((1, "3"), (0, ""), (0, "")) == 0
    assert share((1, "3"), (0, None), (0, None)) == 1
    assert share((0, None), (0, None)) == 0


def test_summary_by_hand(stages):
    wait, fine = common.P_R[0], common.P_R[1]

    def row(i, reward, revised, response="\\boxed{1}", greedy=False):
        of = {"id": i, "kind": "math", "answer": "1", "reward": reward, "revised_reward": revised}
        of |= {"response": response, "response_ids": [5] * (4 + 2 * reward), "finished": True}
        return of | {"greedy": greedy, "extracted": "1" if reward else "2"}

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
    summary = stages[5].summarise("x", rows, common.P_R)
    expected = {
        "accuracy": 1 / 2,
        "accuracy_se": math.sqrt(0.25 / 3),  # the problems: 0.5, 1, 0
        "pass_at_k": 2 / 3,
        "maj_at_n": 1 / 2,  # a: a tie
        "greedy": 1 / 2,
        "mean_tokens": 5,
        "revised_accuracy": 1 / 2,
        "correction_rate": 1 / 3,
        "correction_rate_se": math.sqrt((4 / 9 + 4 / 9) * 3 / 2) / 3,  # 1 of 1, 0 of 0, 0 of 2
        "spoiling_rate": 1 / 3,
        "phrases": 4 / 6,
    }
    assert {key: summary[key] for key in expected} == pytest.approx(expected)
    of_no_wrong_answer = stages[5].summarise("x", [row("a", 1, 1)], common.P_R)
    assert of_no_wrong_answer["correction_rate"] is None
