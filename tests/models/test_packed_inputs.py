import torch

from leanbert.models.packed_inputs import Documents, PackedInputs

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


PACKED = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, -1], [0, 0, -1, -1]])


def test_documents_begin_where_ids_change():
    found = PackedInputs(PACKED, PACKED, PACKED).delimited().documents
    assert found.cu_seqlens.tolist() == [0, 2, 4, 8, 9, 10, 11, 12, 14, 16]
    assert found.cu_seqlens.dtype == torch.int32
    assert (found.max_seqlen, found.length, found.before) == (4, 4, (0, 2, 3, 7, 9))


def test_the_longest_document_counts_in_blocks():
    ids = torch.arange(300)[None].repeat(2, 1)
    assert [Documents.of(ids // size).max_seqlen for size in (1, 128, 129, 256, 257)] == [128, 128, 256, 256, 300]


def test_documents_of_whole_rows_are_those_of_their_ids():
    ids = torch.zeros(3, 5, dtype=torch.int64)
    for one, other in zip(Documents.whole_rows(ids), Documents.of(ids), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_documents_of_some_rows_are_those_found_of_them():
    whole = PackedInputs(PACKED, PACKED, PACKED).delimited()
    pieces = whole.split(3)
    for piece, ids in zip(pieces, (PACKED[:3], PACKED[3:]), strict=True):
        alone = Documents.of(ids)
        assert piece.documents.cu_seqlens.tolist() == alone.cu_seqlens.tolist()
        assert piece.documents.before == alone.before
    again = pieces[0].documents.rows(slice(1, 3))
    assert (again.cu_seqlens.tolist(), again.before) == ([0, 4, 5, 6, 7, 8], (0, 1, 5))


def test_documents_are_moved_with_the_rest():
    moved = PackedInputs(PACKED, PACKED, PACKED).delimited().map(lambda tensor: tensor.to("meta"))
    assert moved.documents.cu_seqlens.device.type == moved.input_ids.device.type == "meta"
    assert moved.documents.max_seqlen == 4
