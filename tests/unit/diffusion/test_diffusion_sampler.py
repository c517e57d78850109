"""Samplers over toy networks with exact answers: distributions, the cache, batches and stop rules."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from bdtrain.diffusion.keyed import NoiseKey, Purpose, uniforms
from bdtrain.diffusion.sampler import generate
from bdtrain.diffusion.token_draws import draw_tokens, keep_top_p, unigram_entropy
from bdtrain.errors import ConfigError

KEY = NoiseKey(3, Purpose.SAMPLE, 11)
ORDINARY, LENGTH, BLOCK = 3, 4, 2
MASK = ORDINARY
METHODS = ("ancestral", "first_hitting", "confidence", "static")


@dataclass
class TokenCache:
    tokens: torch.Tensor
    lengths: torch.Tensor


class ToyNetwork:
    """Keeps the protocol and checks it: stored tokens are final and follow what is stored."""

    def __init__(self, mask_id=MASK):
        self.calls, self.mask_id = 0, mask_id

    def start(self, rows, max_len):
        return TokenCache(torch.full((rows, max_len), self.mask_id), torch.zeros(rows, dtype=torch.int64))

    def logits(self, tokens, positions, cache, store, active=None):
        self.calls += 1
        rows, n = tokens.shape
        active = torch.ones(rows, n, dtype=torch.bool) if active is None else active
        assert active.any()
        assert torch.equal(positions[active], (cache.lengths[:, None] + torch.arange(n))[active])
        known = cache.tokens.clone()
        for row in active.any(1).nonzero().flatten().tolist():
            known[row, positions[row, active[row]]] = tokens[row, active[row]]
        answer = self.predict(known, positions.clamp(max=known.shape[1] - 1))
        if store:
            assert (tokens[active] != self.mask_id).all()
            cache.tokens, cache.lengths = known, cache.lengths + active.sum(1)
        return answer.float()


class ExactNetwork(ToyNetwork):
    """Conditionals of a joint distribution over sequences of LENGTH tokens, given those that are known."""

    def __init__(self, shift=0):
        super().__init__()
        self.shift = shift
        rng = np.random.default_rng(0)
        self.joint = rng.dirichlet(np.full(ORDINARY**LENGTH, 0.4)).reshape((ORDINARY,) * LENGTH)
        self.table = torch.zeros((ORDINARY + 1,) * LENGTH + (LENGTH, ORDINARY + 1), dtype=torch.float64)
        for state in itertools.product(range(ORDINARY + 1), repeat=LENGTH):
            self.table[state] = torch.from_numpy(self.conditionals(state))

    def conditionals(self, state):
        chances = np.zeros((LENGTH, ORDINARY + 1))
        fixed = self.joint[tuple(slice(None) if v == MASK else slice(v, v + 1) for v in state)]
        for place in range(LENGTH):
            others = tuple(i for i in range(LENGTH) if i != place)
            marginal = fixed.sum(axis=others)
            if state[place] == MASK:
                chances[place, :ORDINARY] = marginal / marginal.sum()
        return chances

    def predict(self, known, positions):
        known = torch.nn.functional.pad(known, (0, LENGTH - known.shape[1]), value=MASK)
        chances = self.table[tuple(known[:, :LENGTH].T)]
        places = (positions + self.shift).clamp(max=LENGTH - 1)[..., None].expand(-1, -1, ORDINARY + 1)
        return chances.gather(1, places).log()


class ScriptedNetwork(ToyNetwork):
    """Is certain of one token per position."""

    def __init__(self, script, vocab, shift=0):
        super().__init__(mask_id=vocab - 1)
        self.script, self.vocab, self.shift = torch.tensor(script), vocab, shift

    def predict(self, known, positions):
        token = self.script[(positions + self.shift).clamp(max=len(self.script) - 1)]
        return torch.nn.functional.one_hot(token, self.vocab).double() * 50.0


def run(network, prompts, **options):
    arguments = dict(block_size=BLOCK, max_tokens=LENGTH, mask_id=MASK, eos_id=None, key=KEY)
    return generate(network, prompts, **{**arguments, **options})


def chi_square_excess(samples, expected):
    """Standard deviations by which the chi-square statistic exceeds its mean; tiny cells are pooled."""
    total = len(samples)
    counts = Counter(samples)
    cells, pooled = [], [0.0, 0.0]
    for outcome, chance in expected.items():
        if chance * total < 5:
            pooled[0] += counts[outcome]
            pooled[1] += chance * total
        else:
            cells.append((counts[outcome], chance * total))
    if pooled[1] > 1:
        cells.append(tuple(pooled))
    assert sum(counts[o] for o in expected) == total
    statistic = sum((a - b) ** 2 / b for a, b in cells)
    freedom = len(cells) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


ROWS = 1500


@pytest.mark.parametrize("options", [dict(method="first_hitting"), dict(method="ancestral", steps=100_000)])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_one_token_per_call_samples_the_joint_distribution(options, block_size):
    network = ExactNetwork()
    samples = run(network, [[]] * ROWS, block_size=block_size, **options)
    expected = {s: network.joint[s] for s in itertools.product(range(ORDINARY), repeat=LENGTH)}
    assert chi_square_excess([tuple(s.tokens) for s in samples], expected) < 5
    if options["method"] == "first_hitting":
        assert {s.denoise_calls for s in samples} == {LENGTH}


@pytest.mark.parametrize(("steps", "schedule"), [(1, "linear"), (2, "linear"), (2, "square"), (3, "cosine")])
def test_ancestral_steps_sample_what_enumeration_of_the_steps_gives(steps, schedule):
    network = ExactNetwork()
    move_chance = {
        "linear": lambda t: t,
        "square": lambda t: t**2,
        "cosine": lambda t: 1 - math.cos(math.pi * t / 2),
    }[schedule]
    grid = [move_chance(1 - i / steps) for i in range(steps + 1)]

    # The chain of the paper: a masked token stays with p(s)/p(t), else is drawn; both at once for all tokens.
    def advance(states, r):
        after = Counter()
        for state, mass in states.items():
            chances = network.conditionals(state)
            masked = [i for i, v in enumerate(state) if v == MASK]
            for outcome in itertools.product(range(ORDINARY + 1), repeat=len(masked)):
                chance, new = mass, list(state)
                for place, token in zip(masked, outcome, strict=True):
                    chance *= r if token == MASK else (1 - r) * chances[place, token]
                    new[place] = token
                after[tuple(new)] += chance
        return after

    states = Counter({(MASK,) * LENGTH: 1.0})
    for t, s in itertools.pairwise(grid):
        states = advance(states, s / t)
    expected = {s: m for s, m in states.items() if m > 0}
    samples = run(network, [[]] * ROWS, block_size=LENGTH, steps=steps, schedule=schedule)
    assert chi_square_excess([tuple(s.tokens) for s in samples], expected) < 5
    assert max(s.denoise_calls for s in samples) == min(steps, LENGTH)


def test_the_last_step_lifts_everything_whatever_a_clamped_schedule_says_at_0():
    samples = run(ExactNetwork(), [[]] * ROWS, block_size=LENGTH, steps=1, schedule="reference_cosine")
    assert {s.denoise_calls for s in samples} == {1}


def test_autoregression_samples_the_joint_distribution_one_token_per_call():
    network = ExactNetwork(shift=1)
    samples = run(network, [[1]] * ROWS, max_tokens=LENGTH - 1, autoregressive=True)
    rest = network.joint[1] / network.joint[1].sum()
    expected = {s: rest[s] for s in itertools.product(range(ORDINARY), repeat=LENGTH - 1)}
    assert chi_square_excess([tuple(s.tokens) for s in samples], expected) < 5
    assert {(s.network_calls, s.denoise_calls) for s in samples} == {(LENGTH - 1, LENGTH - 1)}


@pytest.mark.parametrize("method", METHODS)
def test_prompts_condition_the_sample_whatever_part_of_a_block_they_fill(method):
    network = ExactNetwork()
    prompt = [2, 0, 1]
    expected = {(v,): network.conditionals((*prompt, MASK))[3, v] for v in range(ORDINARY)}
    samples = run(network, [prompt] * 1000, max_tokens=1, method=method, steps=1)
    assert chi_square_excess([tuple(s.tokens) for s in samples], expected) < 5
    # One call stores the full block of the prompt, one predicts.
    assert {(s.network_calls, s.denoise_calls) for s in samples} == {(2, 1)}


def test_a_single_row_is_what_a_plain_loop_with_the_documented_draws_makes():
    network = ExactNetwork()
    for sample_id, prompt in ((0, []), (7, [1]), (123456789, [0, 2]), (5, [1, 1, 0])):
        known = list(prompt) + [MASK] * (LENGTH - len(prompt))
        for start in range(0, LENGTH, BLOCK):

            def draw(call, place, number, sample_id=sample_id):
                return uniforms(KEY, torch.tensor(sample_id * 2**24 + call), 0, place, number).item()

            places = [p for p in range(start, start + BLOCK) if known[p] == MASK]
            for call, place in enumerate(sorted(places, key=lambda p: -draw(0, p, 1))):
                state = [v if i < start + BLOCK else MASK for i, v in enumerate(known)]
                cumulative = np.cumsum(network.conditionals(tuple(state))[place])
                known[place] = int((cumulative <= draw(call, place, 0)).sum())
        (sample,) = run(
            network, [prompt], max_tokens=LENGTH - len(prompt), method="first_hitting", sample_ids=[sample_id]
        )
        assert prompt + sample.tokens == known


@pytest.mark.parametrize("method", [*METHODS, "autoregressive"])
def test_a_row_does_not_depend_on_its_batch(method):
    prompts = [[0], [1, 2, 0], [2, 2], [0, 1], [1]]
    ids = [4, 0, 2**38, 17, 9]
    if method == "autoregressive":
        options, shift = dict(autoregressive=True), 1
    else:
        options, shift = dict(method=method, steps=2), 0
        prompts[0] = []
    whole = run(ExactNetwork(shift), prompts, max_tokens=8, sample_ids=ids, **options)
    for index in range(5):
        assert run(
            ExactNetwork(shift), [prompts[index]], max_tokens=8, sample_ids=[ids[index]], **options
        ) == [whole[index]]
    order = [3, 1, 0]
    some = run(
        ExactNetwork(shift),
        [prompts[i] for i in order],
        max_tokens=8,
        sample_ids=[ids[i] for i in order],
        **options,
    )
    assert some == [whole[i] for i in order]


def test_other_ids_seeds_and_steps_give_other_samples():
    network = ExactNetwork()
    base = run(network, [[]] * 50)
    assert len({tuple(s.tokens) for s in base}) > 5
    for key in (NoiseKey(4, Purpose.SAMPLE, 11), NoiseKey(3, Purpose.SAMPLE, 12)):
        assert run(network, [[]] * 50, key=key) != base
    assert run(network, [[]] * 50) == base


SCRIPT = [(7 * i) % 50 for i in range(400)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prompt_length", [0, 3, 8, 13])
def test_length_is_exact_and_finished_blocks_enter_the_cache_once(method, prompt_length):
    network = ScriptedNetwork(SCRIPT, 51)
    prompt = SCRIPT[:prompt_length]
    (sample,) = run(network, [prompt], block_size=8, max_tokens=20, mask_id=50, method=method, steps=4)
    assert sample.tokens == SCRIPT[prompt_length : prompt_length + 20]
    assert sample.stopped_by == "length"
    # Every block before the last one was stored, prompt's blocks included.
    stored = (prompt_length + 20 - 1) // 8
    assert sample.network_calls - sample.denoise_calls == stored
    assert network.calls == sample.network_calls


def test_calls_per_block_are_those_of_the_method():
    def calls(method, steps=None, threshold=0.9, **options):
        network = ScriptedNetwork(SCRIPT, 51)
        return run(
            network,
            [[]],
            block_size=8,
            max_tokens=8,
            mask_id=50,
            method=method,
            steps=steps,
            threshold=threshold,
            **options,
        )[0].denoise_calls

    assert calls("first_hitting") == 8
    assert [calls("static", steps) for steps in (1, 2, 3, 8, 100)] == [1, 2, 3, 8, 8]
    assert calls("confidence") == 1
    assert calls("confidence", threshold=1.0) == 8
    assert calls("ancestral", 1) == 1
    # Steps that lift nothing cost no call.
    assert calls("ancestral", 100_000) == 8


def test_confidence_lifts_the_surest_token_first():
    class Graded(ToyNetwork):
        def __init__(self):
            super().__init__()
            self.seen = []

        def predict(self, known, positions):
            self.seen.append(known[0].tolist())
            gain = torch.tensor([1.0, 9.0, 3.0, 5.0])[positions]
            return torch.stack((gain, torch.zeros_like(gain), torch.zeros_like(gain), gain * 100), -1)

    network = Graded()
    run(network, [[]], block_size=4, method="static", steps=4, temperature=0.0)
    lifted = [[i for i in range(4) if a[i] != b[i]] for a, b in itertools.pairwise([*network.seen, [0] * 4])]
    assert lifted == [[1], [3], [2], [0]]


@pytest.mark.parametrize("method", [*METHODS, "autoregressive"])
def test_each_row_stops_at_its_own_eos_and_prompts_do_not_stop_it(method):
    eos = 49
    script = [1, 2, 3, 4, 5, 6, 7, 8, 9, eos, 11, 12, 13, 14, 15, eos]
    shift = int(method == "autoregressive")
    options = dict(autoregressive=True) if shift else dict(method=method, steps=8)
    prompts = [[eos], [1, 2, 3, 4, 5], [1] * 11]
    samples = run(
        ScriptedNetwork(script, 51, shift),
        prompts,
        block_size=8,
        max_tokens=12,
        mask_id=50,
        eos_id=eos,
        **options,
    )
    assert [s.stopped_by for s in samples] == ["eos"] * 3
    assert samples[0].tokens == script[1:10]
    assert samples[1].tokens == script[5:10]
    assert samples[2].tokens == script[11:16]


def test_tokens_behind_an_eos_are_not_waited_for():
    eos = 49
    calls = []
    for seed in range(20):
        network = ScriptedNetwork([eos] + [1] * 31, 51)
        (sample,) = run(
            network,
            [[]],
            block_size=32,
            max_tokens=32,
            mask_id=50,
            eos_id=eos,
            method="first_hitting",
            key=NoiseKey(seed, Purpose.SAMPLE),
        )
        assert sample.tokens == [eos]
        calls.append(sample.denoise_calls)
    assert 8 < np.mean(calls) < 25  # uniform on 1..32


def test_low_entropy_of_the_last_256_tokens_stops_a_row():
    prompts = [[], [3] * 5]
    for threshold, expected in ((None, ("length", 400)), (4.0, ("entropy", 256)), (0.5, ("length", 400))):
        network = ScriptedNetwork([i % 4 for i in range(500)], 51)
        samples = run(network, prompts, block_size=8, max_tokens=400, mask_id=50, entropy_nats=threshold)
        assert (samples[0].stopped_by, len(samples[0].tokens)) == expected
        # The second row's blocks end at 8 k - 5 generated tokens.
        assert len(samples[1].tokens) == (expected[1] if expected[0] == "length" else 259)
    assert unigram_entropy([0, 1, 2, 3]) == pytest.approx(math.log(4))
    assert unigram_entropy([5] * 9) == 0.0


def test_top_p_keeps_the_token_that_crosses_the_mass():
    chances = torch.tensor([[0.29, 0.6, 0.03, 0.08]], dtype=torch.float64)
    assert (keep_top_p(chances, 0.9) > 0).tolist() == [[True, True, False, True]]
    assert (keep_top_p(chances, 0.5) > 0).tolist() == [[False, True, False, False]]
    assert (keep_top_p(chances, 0.7) > 0).tolist() == [[True, True, False, False]]
    assert torch.equal(keep_top_p(chances, 1.0), chances)


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.8), (0.7, 0.6)]
)
def test_tokens_are_drawn_with_the_tempered_and_truncated_chances(temperature, top_p):
    logits = torch.tensor([1.0, -0.5, 2.0, 9.0, 0.3])  # id 3 is [MASK]
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    tokens, own = draw_tokens(logits.expand(len(u), 5), u, mask_id=3, temperature=temperature, top_p=top_p)
    plain = np.exp(logits.numpy().astype(float)) * (np.arange(5) != 3)
    expected = plain ** (1 / temperature) / (plain ** (1 / temperature)).sum()
    order = np.argsort(-expected)
    kept = np.cumsum(expected[order]) - expected[order] < top_p
    expected[order[~kept]] = 0
    expected /= expected.sum()
    counts = np.bincount(tokens.numpy(), minlength=5) / len(u)
    np.testing.assert_allclose(counts, expected, atol=2e-4)
    np.testing.assert_allclose(own.numpy(), (plain / plain.sum())[tokens.numpy()], rtol=1e-6)


def test_extreme_uniforms_and_temperature_0_draw_possible_tokens():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, 5.0, -torch.inf]])
    for u in (0.0, 1 - 2**-53):
        token, _ = draw_tokens(
            logits, torch.tensor([u], dtype=torch.float64), mask_id=3, temperature=1.0, top_p=1.0
        )
        assert token.item() == (1 if u == 0.0 else 2)
    token, own = draw_tokens(
        torch.tensor([[0.0, 3.0, 1.0, 9.0]]),
        torch.tensor([0.99], dtype=torch.float64),
        mask_id=3,
        temperature=0.0,
        top_p=1.0,
    )
    assert token.item() == 1
    assert own.item() == pytest.approx(math.exp(3) / (1 + math.exp(3) + math.exp(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="greedy"), "ancestral, first_hitting"),
        (dict(steps=0), "steps=0"),
        (dict(max_tokens=0), "max_tokens=0"),
        (dict(block_size=0, steps=1), "block_size=0"),
        (dict(temperature=-1.0), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(key=NoiseKey(1, Purpose.TRAIN)), "Purpose.SAMPLE"),
        (dict(sample_ids=[1, 2]), "sample_ids"),
        (dict(schedule="sine"), "schedule"),
        (dict(autoregressive=True), "begin it with BOS"),
    ],
)
def test_arguments_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        run(ExactNetwork(), [[]], **options)
    with pytest.raises(ConfigError, match="prompt holds mask_id"):
        run(ExactNetwork(), [[MASK]])


def test_no_prompts_give_no_samples():
    assert run(ExactNetwork(), []) == []
