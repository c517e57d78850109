"""The benchmarks of the training step measure what they say, on a CPU and a tiny size."""

import contextlib
import io
import json
import sys

import pytest
import torch

from bdtrain.model.forward import forward_losses
from bdtrain.testing import single_process_groups
from tools.bench import bench_meters, efficiency_ablation, model_step, train_step, training_passes
from tools.bench.presets import preset_config

CPU = torch.device("cpu")
TINY = "--seq 32 --block-size 8 --layers 2 --hidden 32 --heads 2 --vocab 64 --rounds 1"


@pytest.fixture(scope="module")
def groups():
    with single_process_groups() as collection:
        yield collection


@pytest.fixture(scope="module")
def job(groups):
    return model_step.ModelStep(groups, preset_config("tiny"), device=CPU, dtype=torch.float64, documents=2)


def run_command(*arguments):
    """What the command returns and prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["train_step.py", "--threads", "1", *arguments])
        return train_step.main(), printed.getvalue()


@pytest.fixture(scope="module")
def tiny(groups, tmp_path_factory):
    """Result and text of the code that a GPU runs."""
    path = tmp_path_factory.mktemp("bench") / "result.json"
    code, text = run_command("--tiny", "--steps", "2", "--peak-tflops", "0.5", "--json", str(path))
    assert code == 0
    (preset,) = json.loads(path.read_text())["presets"]
    return preset, text


def test_the_code_of_the_gpu_runs_on_a_cpu(tiny):
    tiny, _ = tiny
    assert list(tiny["sides"]) == ["bdtrain", "dense + full rows"]
    assert tiny["loss_difference"] < 1e-5
    assert tiny["rows"] == tiny["wanted_rows"] == 4
    for side in tiny["sides"].values():
        parts = ["noise", "layers, forward", "head and loss", "layers, backward", "optimizer"]
        assert list(side["parts"]) == parts
        assert len(side["raw"]) == 2
        # Weight and two moments, and a count of steps for each of 2 layers x 8 tensors and 3 others.
        assert side["peak_bytes"] > tiny["state_bytes"] == 3 * 4 * tiny["parameters"] + 4 * 19
    assert list(tiny["noise_copies"]) == ["1", "2", "4"]


def test_the_table_divides_useful_operations_by_the_roof(tiny):
    tiny, text = tiny
    side = tiny["sides"]["bdtrain"]
    share = side["useful_flops"] / side["seconds"] / 0.5e12
    assert "float32, roof 0.5 TFLOP/s (given)." in text
    assert f"| {share:.1%} |" in text
    assert f"{tiny['sides']['dense + full rows']['parts']['noise'] * 1e3:.1f} |" in text


def test_every_length_is_measured_with_every_block_size_and_what_is_measured_stays(tmp_path):
    path = tmp_path / "result.json"
    words = ["--tiny", "--steps", "1", "--peak-tflops", "1", "--json", str(path)]
    code, text = run_command(*words, "--length", "64", "32", "--block-size", "4", "16")
    assert code == 0
    presets = json.loads(path.read_text())["presets"]
    shapes = [(preset["seq"], preset["block_size"], preset["rows"]) for preset in presets]
    # The preset's 4 rows of 32 tokens, cut otherwise.
    assert shapes == [(64, 4, 2), (64, 16, 2), (32, 4, 4), (32, 16, 4)]
    for preset in presets:
        ours, baseline = preset["sides"].values()
        ratio = baseline["seconds"] / ours["seconds"]
        row = f"| tiny | {preset['seq']} | {preset['block_size']} | {ours['tokens_per_second']:,.0f} |"
        (line,) = [line for line in text.splitlines() if line.startswith(row)]
        assert f"| {baseline['tokens_per_second']:,.0f} | {ratio:.2f} | 1.00, " in line


@pytest.mark.parametrize("wrong", [("--block-size", "4", "5"), ("--length", "32", "0"), ("--length", "-8")])
def test_a_shape_that_cannot_be_is_refused_before_any_is_measured(groups, tmp_path, wrong):
    path = tmp_path / "result.json"
    code, _ = run_command("--tiny", "--peak-tflops", "1", "--json", str(path), *wrong)
    assert code == 3 and not path.exists()


def test_full_rows_give_the_loss_and_the_gradients_of_masked_rows(job):
    micro_batch = job.corrupt(job.batch(3, 5), 5, copies=2)
    gradients = []
    for losses in (
        model_step.full_row_losses(job.model, micro_batch),
        forward_losses(job.model, job.objective, micro_batch),
    ):
        job.model.zero_grad(set_to_none=True)
        # The usual way computes the logits in float32.
        losses.double().sum().backward()
        gradients.append([p.grad.clone() for p in job.model.parameters()])
        assert losses.sum() > 1
    for full, masked in zip(*gradients, strict=True):
        assert (full - masked).norm() < 1e-5 * masked.norm()


def test_the_baseline_of_the_gpu_gives_our_loss(job):
    ours, baseline = model_step.sides_of(torch.device("cuda"))
    assert (baseline.backend, baseline.full_rows) == ("flex", True)
    # Its forward runs on a CPU, too.
    assert job.loss_difference((ours, baseline), 3) < 1e-6


def test_a_side_that_fails_is_a_row_that_says_so_and_costs_no_other(groups, monkeypatch):
    whole = model_step.full_row_losses
    made = []

    def failing(*arguments):
        made.append(1)
        if len(made) > 4:
            raise RuntimeError("no kernel\nof this shape")
        return whole(*arguments)

    monkeypatch.setattr(model_step, "full_row_losses", failing)
    facts = {"device": CPU, "dtype": torch.float32, "steps": 2, "documents": 1}
    preset = model_step.measure_preset(groups, "tiny", preset_config("tiny"), **facts)
    assert list(preset["sides"]) == ["bdtrain"]
    assert preset["failed"] == {"dense + full rows": "RuntimeError: no kernel"}
    assert preset["loss_difference"] is None
    assert preset["rows"] == 4
    result = {"machine": "cpu", "versions": {"torch": "2"}, "dtype": "float32", "peak_tflops": 1.0}
    text = train_step.describe_presets({**result, "peak_measured": False, "presets": [preset]})
    assert "| dense + full rows | failed: RuntimeError: no kernel |" in text
    assert "times as long" not in text
    assert "| failed |  |" in text


def test_rows_are_halved_until_every_side_fits(job, monkeypatch):
    sides, failed = model_step.sides_of(CPU), {}

    def step(side, rows, number):
        if rows > (1 if side.full_rows else 2):
            raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(job, "step", step)
    assert job.fit_rows(sides, failed) == 1
    assert failed == {}
    monkeypatch.setattr(job, "step", lambda side, rows, number: step(side, 2 * rows, number))
    assert job.fit_rows(sides, failed) == 1
    assert failed == {"dense + full rows": "out of memory"}


def test_flex_forgets_what_was_compiled_for_other_shapes(monkeypatch):
    resets = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    for backend in ("auto", "dense", "flex"):
        bench_meters.forget_compiled(backend)
    assert resets == [1]


def test_both_sides_meet_the_same_tokens_and_noise(job):
    first, again, other = (job.corrupt(job.batch(2, n), n) for n in (1, 1, 2))
    assert first.corrupted.noisy.equal(again.corrupted.noisy)
    assert not first.corrupted.clean.equal(other.corrupted.clean)
    documents = job.batch(2, 1).documents
    assert documents[:, 0].tolist() == [0, 0]
    assert documents[:, -1].tolist() == [1, 1]


def test_the_optimizer_keeps_float32_weights_behind_bfloat16_ones():
    torch.manual_seed(0)
    weight = torch.randn(40).bfloat16()
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad_dtype = torch.float32
    module = torch.nn.ParameterList([parameter])
    optimizer = model_step.MasterAdamW(module, lr=1e-4)
    plain = torch.nn.Parameter(weight.float())
    reference = torch.optim.AdamW([plain], lr=1e-4)
    for _ in range(5):
        gradient = torch.randn(40)
        parameter.grad, plain.grad = gradient.clone(), gradient
        optimizer.step()
        reference.step()
    assert parameter.grad is None
    torch.testing.assert_close(optimizer.masters[0], plain)
    assert parameter.detach().equal(optimizer.masters[0].detach().bfloat16())
    assert optimizer.state_bytes() == 40 * (2 + 4 + 4 + 4) + 4


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, text = run_command("--device", "cuda")
    assert (code, text) == (1, "")
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_parts_of_one_name_add_up(monkeypatch):
    moments = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr(bench_meters.time, "process_time", lambda: next(moments))
    marks = bench_meters.Marks(CPU)
    for name in ("start", "head", "layers", "head"):
        marks.mark(name)
    assert marks.seconds() == {"head": 4.0, "layers": 2.0}


def test_what_takes_long_is_timed_once_and_order_turns_round(monkeypatch):
    calls = []
    monkeypatch.setattr(bench_meters, "time_call", lambda run, device: run())
    sides = {
        name: lambda name=name: calls.append(name) or (9.0 if name == "slow" else 1.0)
        for name in ("a", "slow")
    }
    seconds = bench_meters.in_turns(sides, 3, CPU, warm_up=2, slow_s=5.0)
    assert seconds == {"a": [1.0, 1.0, 1.0], "slow": [9.0]}
    assert calls == ["a", "a", "slow", "a", "slow", "a", "a"]


def test_a_timed_side_that_raises_is_left_out():
    calls, failed = [], {}

    def breaks_later():
        calls.append(1)
        if len(calls) == 3:
            raise torch.cuda.OutOfMemoryError("of 3 GiB")

    sides = {"a": lambda: None, "b": breaks_later}
    seconds = bench_meters.in_turns(sides, 3, CPU, warm_up=1, failed=failed)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3}
    assert failed == {"b": "out of memory"}
    with pytest.raises(ZeroDivisionError):
        bench_meters.in_turns({"c": lambda: 1 / 0}, 1, CPU)


def test_peak_is_the_most_that_lived_together():
    def run():
        first, second = torch.empty(1 << 18), torch.empty(1 << 18)
        del first
        return torch.ones(1 << 18) + second  # with its two operands: 3 MiB

    assert bench_meters.peak_bytes(run, CPU) == 3 << 20


def test_kept_bytes_count_storages_once_and_end_with_the_backward():
    layer = torch.nn.Linear(100, 100, bias=False)
    x = torch.randn(50, 100)
    with bench_meters.watch_kept_bytes(layer) as kept:
        y = layer(x).exp()  # the layer keeps x and its weight, exp its output
        z = y * y[:, :]  # twice the same storage, kept already
        assert kept.now == 2 * 50 * 100 * 4
        z.sum().backward()
    assert kept.now == 0
    assert kept.most == 2 * 50 * 100 * 4


def test_ablation_measures_every_way_that_has_a_backward(groups):
    options = efficiency_ablation.parse_options(TINY.split())
    result = efficiency_ablation.measure(groups, options, CPU)
    (case,) = result["cases"]
    assert list(case["refused"]) == ["one pass, FlexAttention"]
    assert "does not support backward on CPU" in case["refused"]["one pass, FlexAttention"]
    assert len(case["passes"]) == 7
    for name, fact in case["passes"].items():
        assert fact["loss_difference"] < 1e-5, name
        assert fact["gradient_difference"] < 1e-4, name
        assert fact["peak_bytes"] > 0
        assert len(fact["raw"]) == 1
    kept = {name: fact["kept_bytes"] for name, fact in case["passes"].items()}
    assert kept["loop over blocks, backward in each"] < kept["loop over blocks, one backward"]
    assert "| one pass, our attention |" in efficiency_ablation.describe(result)


def test_ablation_leaves_out_loops_over_too_many_blocks(groups):
    options = efficiency_ablation.parse_options([*TINY.split(), "--max-blocks", "3"])
    (case,) = efficiency_ablation.measure(groups, options, CPU)["cases"]
    assert [name for name in case["refused"] if name.startswith("loop")] == [
        "loop over blocks, one backward",
        "loop over blocks, backward in each",
    ]


def test_a_way_that_fails_costs_no_other_its_row(groups, monkeypatch):
    passes = training_passes.all_passes()

    def breaks(*_):
        raise RuntimeError("cannot be compiled | here\nand more")

    chosen = {name: passes[name] for name in ("one pass, dense masks", training_passes.OURS)}
    options = efficiency_ablation.parse_options(TINY.split())
    for broken in chosen:
        monkeypatch.setattr(training_passes, "all_passes", lambda broken=broken: {**chosen, broken: breaks})
        result = efficiency_ablation.measure(groups, options, CPU)
        (case,) = result["cases"]
        assert case["refused"] == {broken: "RuntimeError: cannot be compiled / here"}
        assert list(case["passes"]) == [name for name in chosen if name != broken]
        assert f"| {broken} | RuntimeError: cannot be compiled / here |" in efficiency_ablation.describe(
            result
        )
