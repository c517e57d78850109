"""The order of the streams along the sequence axis."""

import pytest
import torch

from bdtrain.errors import ShapeError


@pytest.mark.parametrize(
    ("chunks", "wanted"),
    [
        (1, [10, 11, 12, 13, 20, 21, 22, 23, 0, 1, 2, 3]),
        (2, [10, 11, 20, 21, 0, 1, 12, 13, 22, 23, 2, 3]),
        (4, [10, 20, 0, 11, 21, 1, 12, 22, 2, 13, 23, 3]),
    ],
)
@pytest.mark.parametrize("dim", [0, 1])
def test_each_chunk_holds_the_same_positions_of_every_stream(chunks, wanted, dim):
    from bdtrain.model.streams import to_chunks, to_streams
    from bdtrain.model.transformer import assemble_streams

    clean = torch.arange(4)[None]
    noisy = torch.stack((clean + 10, clean + 20), dim=1)
    plain = assemble_streams(noisy, clean)
    assert plain.tolist() == [[10, 11, 12, 13, 20, 21, 22, 23, 0, 1, 2, 3]]
    rows = plain if dim else plain.t()[:, None, :].expand(-1, 2, 3)
    cut = to_chunks(rows, chunks=chunks, seq=4, dim=dim)
    assert cut.shape == rows.shape
    assert (cut[0] if dim else cut[:, 1, 2]).tolist() == wanted
    assert to_streams(cut, chunks=chunks, seq=4, dim=dim).equal(rows)


def test_one_kind_of_stream_may_be_alone():
    from bdtrain.model.transformer import assemble_streams

    clean = torch.arange(8).view(2, 4)
    assert assemble_streams(None, clean).equal(clean)
    assert assemble_streams(clean[:, None], None).equal(clean)


def test_streams_that_do_not_fit_are_refused():
    from bdtrain.model.transformer import assemble_streams

    clean = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ShapeError, match="neither"):
        assemble_streams(None, None)
    with pytest.raises(ShapeError, match="must agree"):
        assemble_streams(clean[:, None, :2], clean)
