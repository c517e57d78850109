"""What a re-fit measures: rows in shards without loss; what cannot be measured is refused."""

import json

import pytest

from bdtrain.config import RunConfig
from bdtrain.errors import RefitError
from bdtrain.refit.request import MIN_SEQUENCES, SHARDS, RefitRequest, make_request
from bdtrain.testing import tiny_model_config


def run_config(**refit):
    return RunConfig.model_validate(
        {
            "run": {"seed": 11},
            "model": tiny_model_config(),
            "data": {"kind": "synthetic", "seq_len": 32},
            "diffusion": {"block_size": 4},
            "train": {"steps": 1, "global_batch_size": 8, "micro_batch_size": 2},
            "refit": {"mode": "clip", **refit},
        }
    )


@pytest.mark.parametrize("batch", [1, 3, 8, 500])
@pytest.mark.parametrize("rows", [(1,), (128,), (130, 7), (129, 512, 16)])
def test_shards_hold_every_row_once_in_whole_batches(rows, batch):
    sizes = tuple(range(4, 4 + len(rows)))
    request = RefitRequest("", sizes, rows, batch, 0)
    assert request.shards == len(request.parts) <= SHARDS * len(rows)
    assert request.measured_sequences == sum(rows)
    for size, count in zip(sizes, rows, strict=True):
        parts = [part for part in request.parts if part.block_size == size]
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(count))
        # A forward pass must see the same rows however many shards there are.
        assert all(part.start % batch == 0 for part in parts)
    assert request.parts == RefitRequest("", sizes, rows, batch, 0).parts


def test_a_request_survives_json_and_refuses_other_keys():
    request = make_request(run_config(), snapshot="/somewhere", rows=1000, block_sizes=(4, 16))
    record = json.loads(json.dumps(request.to_dict()))
    assert RefitRequest.from_dict(record) == request
    with pytest.raises(RefitError, match=r"has the keys .*surplus"):
        RefitRequest.from_dict({**record, "surplus": 1})
    with pytest.raises(RefitError, match=r"expected are .*seed"):
        RefitRequest.from_dict({key: value for key, value in record.items() if key != "seed"})


def test_as_many_rows_as_the_blocks_take_and_no_fewer_than_the_bootstrap_needs():
    # 32 tokens hold 8 blocks of 4 and 2 of 16: 4,096 blocks are 512 and 2,048 rows.
    config = run_config(blocks=4096)
    assert make_request(config, snapshot="", rows=10**6, block_sizes=(4, 16)).sequences == (512, 2048)
    assert make_request(config, snapshot="", rows=600, block_sizes=(4, 16)).sequences == (512, 600)
    few = make_request(run_config(blocks=256), snapshot="", rows=10**6)
    assert few.sequences == (MIN_SEQUENCES,) and few.block_sizes == (4,)


def test_a_request_carries_the_settings_of_the_run():
    request = make_request(run_config(), snapshot="s", rows=1000, device="cuda", data_path="/text")
    assert (request.batch_sequences, request.seed, request.precision) == (8, 11, "fp32")
    assert (request.device, request.threads, request.data_path) == ("cuda", None, "/text")
    own = make_request(run_config(batch_sequences=5, worker_cpus=3), snapshot="s", rows=1000)
    assert (own.batch_sequences, own.device, own.threads) == (5, "cpu", 3)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(RefitError, match=r"block sizes 5, 64 do not divide data.seq_len=32"):
        make_request(run_config(), snapshot="", rows=1000, block_sizes=(4, 5, 64))
    with pytest.raises(RefitError, match="block sizes 0 do not divide"):
        make_request(run_config(), snapshot="", rows=1000, block_sizes=(0,))
    with pytest.raises(RefitError, match=r"has 1 row; .* at least 2"):
        make_request(run_config(), snapshot="", rows=1)
