"""Groups of one for the session, and a serial transformer in plain torch to compare with."""

import math

import pytest
import torch
import torch.nn.functional as F

from bdtrain.diffusion.visibility import build_layout
from bdtrain.testing import single_process_groups, tiny_model_config

MASK = 4
VOCAB = 29


@pytest.fixture(scope="session")
def groups():
    """Process groups of size 1."""
    with single_process_groups() as collection:
        yield collection


@pytest.fixture
def build(groups):
    """A function that builds a tiny float64 model."""
    from bdtrain.model.build import build_model

    def make(shape="qwen3", *, seed=7, dtype=torch.float64, mask_id=MASK, jitter=True, **changes):
        overrides = changes.pop("overrides", {})
        model = build_model(
            tiny_model_config(shape, **changes),
            pg_collection=groups,
            mask_id=mask_id,
            seed=seed,
            dtype=dtype,
            **overrides,
        )
        if jitter:  # norms and biases away from 1 and 0, so that a test sees them
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "layernorm" in name or name.endswith("bias"):
                        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


def brute_mask(documents, block_size, *, noisy_copies, clean):
    """Who sees whom by the words of the rule, pair by pair: bool [batch, streams * seq, streams * seq]."""
    batch, seq = documents.shape
    streams = noisy_copies + int(clean)
    document, block = documents.tolist(), []
    for row in document:
        numbers, start = [], 0
        for i in range(seq):
            if i and row[i] != row[i - 1]:
                start = i
            numbers.append((start, (i - start) // block_size))
        block.append(numbers)
    mask = torch.zeros(batch, streams * seq, streams * seq, dtype=torch.bool)
    for b in range(batch):
        for q in range(streams * seq):
            for k in range(streams * seq):
                (sq, iq), (sk, ik) = divmod(q, seq), divmod(k, seq)
                (dq, bq), (dk, bk) = block[b][iq], block[b][ik]
                q_clean, k_clean = clean and sq == noisy_copies, clean and sk == noisy_copies
                if dq != dk:
                    sees = False
                elif k_clean:
                    sees = bq >= bk if q_clean else bq > bk
                else:
                    sees = not q_clean and sq == sk and bq == bk
                mask[b, q, k] = sees
    return mask


def serial_logits(state, model, tokens, positions, mask):
    """Logits of every row from whole weights, in plain torch; [MASK] and padding not yet excluded.

    Args:
        state: full state by our names.
        model: model section.
        tokens: [batch, rows].
        positions: [rows].
        mask: bool [batch, rows, rows].
    """
    heads, kv, dim, eps = model.num_heads, model.num_kv_heads, model.head_dim, model.norm_epsilon
    plain = model.shape == "qwen3"

    def norm(x, name):
        w = state[name + ".weight"]
        if plain:
            return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w + state[name + ".bias"]

    def rope(x):  # [batch, rows, heads, dim], pairs (i, i + dim/2) as complex numbers
        angle = positions[:, None] * model.rope_base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        turned = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * torch.polar(
            torch.ones_like(angle), angle
        ).unsqueeze(1)
        return torch.cat((turned.real, turned.imag), -1)

    x = state["embedding.weight"][tokens]
    for i in range(model.num_layers):
        name = f"decoder.layers.{i}."
        fused = norm(x, name + "input_layernorm") @ state[name + "self_attention.linear_qkv.weight"].T
        per_group = heads // kv
        fused = fused.view(*tokens.shape, kv, per_group + 2, dim)
        q, k, v = (
            fused[..., :per_group, :].flatten(2, 3),
            fused[..., per_group, :],
            fused[..., per_group + 1, :],
        )
        if plain:
            q, k = (norm(z, f"{name}self_attention.{w}_layernorm") for z, w in ((q, "q"), (k, "k")))
        q, k = rope(q), rope(k).repeat_interleave(per_group, 2)
        score = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(dim)
        p = score.masked_fill(~mask[:, None], -math.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", p, v.repeat_interleave(per_group, 2)).flatten(2)
        x = x + mixed @ state[name + "self_attention.linear_proj.weight"].T
        h = norm(x, name + "pre_mlp_layernorm") @ state[name + "mlp.linear_fc1.weight"].T
        if plain:
            gate, up = h.chunk(2, -1)
            h = gate * torch.sigmoid(gate) * up
            x = x + h @ state[name + "mlp.linear_fc2.weight"].T
        else:
            h = h + state[name + "mlp.linear_fc1.bias"]
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            x = x + h @ state[name + "mlp.linear_fc2.weight"].T + state[name + "mlp.linear_fc2.bias"]
    logits = norm(x, "final_layernorm") @ state["output_layer.weight"].T
    return logits if plain else logits + state["output_layer.bias"]


class Case:
    """A batch: clean tokens, noisy copies, documents."""

    def __init__(self, *, seq=16, block_size=4, copies=1, batch=2, documents=None, isolate=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.seq, self.block_size, self.copies, self.batch = seq, block_size, copies, batch
        self.x0 = torch.randint(MASK + 1, VOCAB, (batch, seq), generator=generator)
        self.masked = torch.rand(batch, copies, seq, generator=generator) < 0.6
        self.masked[..., 0] = True
        self.xt = torch.where(self.masked, MASK, self.x0[:, None])
        self.documents = torch.zeros(batch, seq, dtype=torch.int32) if documents is None else documents
        self.layout = build_layout(self.documents, block_size, isolate=isolate)
        self.targets = self.x0[:, None].expand_as(self.xt)

    def positions(self, streams):
        return torch.arange(self.seq, dtype=torch.float64).repeat(streams)


RAGGED = torch.tensor([[0] * 5 + [1] * 9 + [2] * 2, [0] * 3 + [1] * 13], dtype=torch.int32)
"""Two rows of 16: fragments whose last blocks are short."""


@pytest.fixture
def make_case():
    """The Case class, so that test files need no import of this one."""
    return Case


@pytest.fixture
def ragged():
    """Document numbers with short last blocks."""
    return RAGGED.clone()


@pytest.fixture
def oracle():
    """The serial transformer and the mask by brute force."""

    class Oracle:
        mask = staticmethod(brute_mask)
        logits = staticmethod(serial_logits)

        @staticmethod
        def nll(logits, targets, *, vocab_size=VOCAB, mask_id=MASK):
            logits = logits.clone()
            logits[..., mask_id] = -math.inf
            return F.cross_entropy(
                logits[..., :vocab_size].reshape(-1, vocab_size), targets.reshape(-1), reduction="none"
            ).view(targets.shape)

    return Oracle
