"""Stock transformers runs our weights: the same logits under an explicit mask, every key accounted for."""

import pytest
import torch

from bdtrain.diffusion.visibility import build_layout
from bdtrain.errors import CheckpointError
from bdtrain.export.hf import from_qwen3, qwen3_config, to_qwen3
from bdtrain.testing import tiny_model_config

MASK, VOCAB, SEQ, BLOCK = 4, 29, 24, 4


@pytest.fixture(scope="module", params=[4, 1])
def pair(groups, request):
    """Our model and transformers' with its weights; as many key heads as given."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from bdtrain.model.build import build_model
    from bdtrain.model.weights import full_state

    section = tiny_model_config(num_kv_heads=request.param, head_dim=16, rope_base=5000.0, num_layers=3)
    ours = build_model(section, pg_collection=groups, mask_id=MASK)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "layernorm" in name:
                parameter.uniform_(0.5, 1.5)
    config = qwen3_config(section, vocab_size=VOCAB, seq_len=SEQ, block_size=BLOCK, mask_id=MASK)
    config = Qwen3Config(**config, attn_implementation="eager")
    theirs = Qwen3ForCausalLM(config).eval()
    theirs.load_state_dict(to_qwen3(full_state(ours), section, vocab_size=VOCAB), strict=True)
    return section, ours, theirs


def tokens_and_layout():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(5, VOCAB, (2, SEQ), generator=generator)
    xt = torch.where(torch.rand(2, SEQ, generator=generator) < 0.5, MASK, x0)
    return x0, xt, build_layout(torch.zeros(2, SEQ, dtype=torch.int32), BLOCK, isolate=True)


def compare(ours, theirs, tokens, visible, layout, *, copies):
    streams = tokens.shape[1] // SEQ
    bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        wanted = theirs(
            input_ids=tokens,
            attention_mask=bias.expand(2, 1, -1, -1),
            position_ids=torch.arange(SEQ).repeat(streams).expand(2, -1),
            use_cache=False,
        ).logits
        out = copies or 1
        rows = torch.ones(2, out, SEQ, dtype=torch.bool)
        view = ours(tokens, layout, noisy_copies=copies, clean=True, rows=rows)
        logits = view.logits().unflatten(0, (2, out * SEQ))
    ordinary = [i for i in range(VOCAB) if i != MASK]  # ours is -inf at [MASK], Qwen3 knows none
    torch.testing.assert_close(logits[..., ordinary], wanted[:, : out * SEQ, ordinary], rtol=1e-5, atol=1e-5)


def test_logits_agree_under_the_block_causal_mask(pair):
    _, ours, theirs = pair
    x0, _, layout = tokens_and_layout()
    block = torch.arange(SEQ) // BLOCK
    compare(ours, theirs, x0, block[:, None] >= block[None], layout, copies=0)


def test_logits_agree_under_the_two_stream_mask(pair):
    _, ours, theirs = pair
    x0, xt, layout = tokens_and_layout()
    block = torch.arange(SEQ) // BLOCK
    same, earlier = block[:, None] == block[None], block[:, None] > block[None]
    visible = torch.cat((torch.cat((same, earlier), 1), torch.cat((same & False, same | earlier), 1)))
    compare(ours, theirs, torch.cat((xt, x0), 1), visible, layout, copies=1)


def test_reading_back_what_was_written_gives_the_same_weights(pair):
    from bdtrain.model.weights import full_state

    section, ours, theirs = pair
    state = full_state(ours)
    back = from_qwen3(theirs.state_dict(), section, padded_vocab_size=32)
    assert back.keys() == state.keys()
    for name, value in back.items():
        kept = state[name][:VOCAB] if name in ("embedding.weight", "output_layer.weight") else state[name]
        assert value[: kept.shape[0]].equal(kept), name


def test_the_configuration_keeps_the_keys_that_block_decoders_read(pair, tmp_path):
    from transformers import AutoConfig

    _, _, theirs = pair
    theirs.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.block_size, config.mask_token_id) == (BLOCK, MASK)
    assert config.architectures == ["Qwen3ForCausalLM"]


def test_tied_embeddings_are_read_as_two_matrices(pair):
    section, _, theirs = pair
    state = dict(theirs.state_dict())
    del state["lm_head.weight"]
    back = from_qwen3(state, section, padded_vocab_size=32)
    assert back["output_layer.weight"].equal(back["embedding.weight"])


def test_foreign_weights_are_refused_by_name(pair):
    section, _, theirs = pair
    state = dict(theirs.state_dict())
    state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(1)
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError) as caught:
        from_qwen3(state, section, padded_vocab_size=32)
    assert "missing: model.layers.1.mlp.up_proj.weight" in str(caught.value)
    assert "unknown: model.layers.0.self_attn.q_proj.bias" in str(caught.value)
    with pytest.raises(CheckpointError, match="29 rows, the model 16"):
        from_qwen3(theirs.state_dict(), section, padded_vocab_size=16)
    with pytest.raises(CheckpointError, match=r"only model\.shape=qwen3"):
        to_qwen3({}, tiny_model_config("bd3lm"), vocab_size=VOCAB)
