"""What must hold whatever the weights are: passes that are one equation, and nothing seen that should be
hidden."""

import itertools

import pytest
import torch

from bdtrain.diffusion.visibility import build_layout
from bdtrain.model.transformer import assemble_streams


def nll(model, case, *, rows=None, layout=None, xt=None, clean=True):
    """nll of the masked tokens of every copy, [batch, copies, seq], 0 elsewhere."""
    xt = case.xt if xt is None else xt
    rows = case.masked if rows is None else rows
    tokens = assemble_streams(xt, case.x0 if clean else None)
    view = model(tokens, layout or case.layout, noisy_copies=xt.shape[1], clean=clean, rows=rows)
    targets = case.x0[:, None].expand_as(xt)
    return torch.zeros(xt.shape, dtype=torch.float64).masked_scatter(rows, view.nll(targets[rows]))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
def test_one_pass_equals_the_loop_over_blocks(build, make_case, ragged, oracle, shape):
    from bdtrain.model.cache import as_denoiser

    case = make_case(documents=ragged)
    model = build(shape)
    one = nll(model, case)

    # A loop over blocks with stored keys and values, a row at a time.
    denoiser = as_denoiser(model)
    loop = torch.zeros_like(one)
    for b in range(case.batch):
        for start in sorted(set(case.layout.block_start[b].tolist())):
            end, doc = int(case.layout.block_end[b, start]), int(case.layout.doc_start[b, start])
            cache = denoiser.start(1, case.seq)
            for s in sorted(set(case.layout.block_start[b, doc:start].tolist())):
                e = int(case.layout.block_end[b, s])
                denoiser.logits(case.x0[b : b + 1, s:e], torch.arange(s, e)[None], cache, True)
            logits = denoiser.logits(case.xt[b, :, start:end], torch.arange(start, end)[None], cache, False)
            loop[b, 0, start:end] = oracle.nll(logits[0].double(), case.x0[b, start:end])
    torch.testing.assert_close(one, loop * case.masked, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
def test_one_pass_equals_two_passes(build, make_case, ragged, monkeypatch, shape):
    """The clean text alone fills keys and values; the noisy text alone then asks them, its own block beside
    them."""
    from bdtrain.model import attention

    case = make_case(documents=ragged)
    model = build(shape)
    one = nll(model, case)
    clean, seq = {}, case.seq
    position = torch.arange(seq)
    start, end, doc = (
        x[:, None, :, None] for x in (case.layout.block_start, case.layout.block_end, case.layout.doc_start)
    )

    def attend(self, q, k, v, *, layer, scale):
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        if not self.noisy_copies:
            clean[layer] = k, v
            mask = (position >= doc) & (position < end)
        else:
            own = (position >= start) & (position < end)
            mask = torch.cat((own, (position >= doc) & (position < start)), -1)
            k, v = torch.cat((k, clean[layer][0]), 2), torch.cat((v, clean[layer][1]), 2)
        score = (q @ k.mT * scale).masked_fill(~mask, float("-inf"))
        return score.softmax(-1) @ v

    monkeypatch.setattr(attention.StreamContext, "attend", attend)
    model(case.x0, case.layout, noisy_copies=0, clean=True)
    two = nll(model, case, clean=False)
    torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)
    monkeypatch.undo()
    second = gradients(model, two.sum())
    for name, grad in gradients(model, one.sum()).items():
        torch.testing.assert_close(grad, second[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("shape", ["qwen3", "bd3lm"])
def test_each_noisy_block_behind_its_clean_prefix_gives_the_same_loss_and_gradients(
    build, make_case, ragged, oracle, shape
):
    """The equation itself: the loop over blocks, each a pass of its own of the serial transformer."""
    from bdtrain.model.weights import full_state
    from bdtrain.testing import tiny_model_config

    case = make_case(documents=ragged)
    model = build(shape)
    state = {name: value.requires_grad_() for name, value in full_state(model).items()}
    loop = []
    for b in range(case.batch):
        for start in sorted(set(case.layout.block_start[b].tolist())):
            end, doc = int(case.layout.block_end[b, start]), int(case.layout.doc_start[b, start])
            tokens = torch.cat((case.x0[b, doc:start], case.xt[b, 0, start:end]))[None]
            position = torch.arange(doc, end, dtype=torch.float64)
            block = (torch.arange(doc, end) - doc) // case.block_size
            mask = (block[:, None] >= block[None])[None]
            logits = oracle.logits(state, tiny_model_config(shape), tokens, position, mask)
            loop.append(oracle.nll(logits[0, start - doc :], case.x0[b, start:end]))
    wanted = torch.cat(loop).view(case.batch, 1, case.seq) * case.masked
    one = nll(model, case)
    torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-10)
    wanted.sum().backward()
    for name, grad in gradients(model, one.sum()).items():
        torch.testing.assert_close(grad, state[name].grad, rtol=1e-8, atol=1e-9, msg=name)


def test_three_copies_in_one_pass_equal_three_passes(build, make_case, ragged):
    case = make_case(copies=3, documents=ragged)
    model = build()
    together = nll(model, case)
    joint = gradients(model, together.sum())
    apart = [nll(model, case, xt=case.xt[:, [c]], rows=case.masked[:, [c]]) for c in range(3)]
    separate = gradients(model, sum(part.sum() for part in apart))
    torch.testing.assert_close(together, torch.cat(apart, 1), rtol=1e-11, atol=1e-11)
    for name, grad in joint.items():
        torch.testing.assert_close(grad, separate[name], rtol=1e-9, atol=1e-10, msg=name)


def test_loss_of_masked_rows_alone_equals_the_full_computation(build, make_case):
    case = make_case(copies=2)
    model = build()
    few = nll(model, case)
    grads = gradients(model, few.sum())
    every = nll(model, case, rows=torch.ones_like(case.masked)) * case.masked
    torch.testing.assert_close(few, every, rtol=1e-12, atol=1e-12)
    for name, grad in gradients(model, every.sum()).items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("backend", ["dense", "tree"])
def test_no_logit_moves_with_a_clean_token_of_its_own_or_a_later_block(
    build, make_case, ragged, isolate, backend
):
    case = make_case(copies=2, documents=ragged, isolate=isolate)
    model = build(attention_backend=backend)
    every = torch.ones_like(case.masked)

    def logits(x0):
        tokens = assemble_streams(case.xt, x0)
        view = model(tokens, case.layout, noisy_copies=2, clean=True, rows=every)
        return view.logits().detach()[:, 5:29].unflatten(0, (2, 2, 16))

    before = logits(case.x0)
    for j in range(case.seq):
        x0 = case.x0.clone()
        x0[:, j] = 5 + (x0[:, j] - 4) % 24  # another ordinary token; xt stays
        moved = (logits(x0) != before).any(-1)
        start = case.layout.block_start
        later = (start > start[:, [j]]) & (case.layout.doc_start == case.layout.doc_start[:, [j]])
        assert moved.equal(later[:, None].expand(-1, 2, -1)), j


@pytest.mark.parametrize("backend", ["dense", "tree"])
def test_no_gradient_reaches_what_a_block_must_not_see(build, make_case, ragged, backend):
    case = make_case(copies=2, documents=ragged)
    model = build(attention_backend=backend)
    seen = {}

    def keep(module, args, output):
        output.retain_grad()
        seen["embedded"] = output

    model.embedding.register_forward_hook(keep)
    for b, copy, position in itertools.product(range(2), range(2), (0, 4, 5, 8, 12, 15)):
        rows = torch.zeros_like(case.masked)
        rows[b, copy, position] = True
        tokens = assemble_streams(case.xt, case.x0)
        model(tokens, case.layout, noisy_copies=2, clean=True, rows=rows).logits()[:, 5:29].sum().backward()
        touched = (seen["embedded"].grad != 0).any(-1).t().unflatten(1, (3, 16))  # [batch, streams, seq]
        start, end = int(case.layout.block_start[b, position]), int(case.layout.block_end[b, position])
        doc = int(case.layout.doc_start[b, position])
        wanted = torch.zeros(2, 3, 16, dtype=torch.bool)
        wanted[b, copy, start:end] = True
        wanted[b, 2, doc:start] = True
        assert touched.equal(wanted), (b, copy, position)


def test_one_block_per_row_equals_mdlm(build, make_case):
    case = make_case(block_size=16)
    model = build()
    with_clean = nll(model, case)
    grads = gradients(model, with_clean.sum())
    alone = nll(model, case, clean=False)
    torch.testing.assert_close(with_clean, alone, rtol=1e-13, atol=1e-13)
    for name, grad in gradients(model, alone.sum()).items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-11, atol=1e-12, msg=name)


def test_fully_masked_blocks_of_one_give_the_one_step_conditionals(build, make_case, oracle):
    from bdtrain.model.weights import full_state
    from bdtrain.testing import tiny_model_config

    case = make_case(block_size=1, seq=7)
    model = build()
    case.masked = torch.ones_like(case.masked)
    ours = nll(model, case, xt=torch.full_like(case.xt, 4))
    state = full_state(model)
    for i in range(case.seq):  # a forward of its own: prefix and one [MASK], causal
        tokens = torch.cat((case.x0[:, :i], torch.full((2, 1), 4)), 1)
        causal = torch.ones(i + 1, i + 1, dtype=torch.bool).tril().expand(2, -1, -1)
        logits = oracle.logits(
            state, tiny_model_config(), tokens, torch.arange(i + 1, dtype=torch.float64), causal
        )
        torch.testing.assert_close(
            ours[:, 0, i], oracle.nll(logits[:, -1], case.x0[:, i]), rtol=1e-10, atol=1e-10
        )


def test_probabilities_of_all_sequences_sum_to_one(build, make_case):
    model = build(vocab_size=8, vocab_multiple=16, mask_id=2)
    ordinary = [t for t in range(8) if t != 2]
    x0 = torch.tensor(list(itertools.product(ordinary, repeat=3)))
    layout = build_layout(torch.zeros(x0.shape, dtype=torch.int32), 1, isolate=True)
    rows = torch.ones(x0.shape[0], 1, 3, dtype=torch.bool)
    tokens = assemble_streams(torch.full_like(x0, 2)[:, None], x0)
    with torch.no_grad():
        view = model(tokens, layout, noisy_copies=1, clean=True, rows=rows)
        log_p = -view.nll(x0.flatten()).view(-1, 3).sum(1)
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize(("copies", "clean"), [(1, True), (2, True), (1, False), (0, True)])
def test_dense_and_tree_backends_agree(build, make_case, ragged, copies, clean):
    case = make_case(copies=max(copies, 1), documents=ragged)
    tokens = assemble_streams(case.xt if copies else None, case.x0 if clean else None)
    rows = torch.ones(2, copies or 1, 16, dtype=torch.bool)
    results = []
    for backend in ("dense", "tree"):
        model = build(attention_backend=backend)
        logits = model(tokens, case.layout, noisy_copies=copies, clean=clean, rows=rows).logits()[:, 5:29]
        results.append((logits, gradients(model, logits.square().sum())))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-9)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], rtol=1e-7, atol=1e-7, msg=name)
