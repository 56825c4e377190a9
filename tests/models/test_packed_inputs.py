import torch

from leanbert.models.packed_inputs import PackedInputs

IDS = torch.arange(20).view(5, 4)


def test_split_gives_views_and_a_smaller_last_piece():
    for segments in (None, IDS + 3):
        inputs = PackedInputs(IDS, IDS + 1, IDS + 2, segments)
        pieces = inputs.split(2)
        assert [len(piece) for piece in pieces] == [2, 2, 1]
        assert pieces[1].input_ids.data_ptr() == IDS[2:].data_ptr()
        for name, tensor in inputs.tensors().items():
            assert torch.equal(torch.cat([piece.tensors()[name] for piece in pieces]), tensor)
        assert (pieces[2].segment_ids is None) == (segments is None)


def test_whole_rows_are_one_document_each():
    inputs = PackedInputs.whole_rows(IDS)
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3]] * 5
    assert inputs.document_ids.tolist() == [[0] * 4] * 5
    assert inputs.real.all()


def test_documents_are_taken_apart_in_their_order():
    ids = torch.tensor([[5, 6, 7, 8], [9, 0, 0, 0]])
    documents = torch.tensor([[0, 0, 1, 1], [0, -1, -1, -1]])
    apart = PackedInputs(ids, torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]]), documents, ids + 1).unpacked()
    assert apart.inputs.input_ids.tolist() == [[5, 6], [7, 8], [9, 0]]
    assert apart.inputs.position_ids.tolist() == [[0, 1], [0, 1], [0, 0]]
    assert apart.inputs.document_ids.tolist() == [[0, 0], [0, 0], [0, -1]]
    assert apart.inputs.segment_ids.tolist() == [[6, 7], [8, 9], [10, 0]]
    assert (apart.row.tolist(), apart.place.tolist()) == ([[0, 0, 1, 1], [2, 0, 0, 0]], [[0, 1, 0, 1], [0, 0, 0, 0]])


def test_whole_rows_stay_as_they_are_when_taken_apart():
    inputs = PackedInputs.whole_rows(torch.tensor([[5, 6], [7, 8]]))
    apart = inputs.unpacked()
    assert apart.inputs is inputs
    assert (apart.row.tolist(), apart.place.tolist()) == ([[0, 0], [1, 1]], [[0, 1], [0, 1]])
