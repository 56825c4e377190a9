import copy
import shutil
from types import SimpleNamespace

import pytest
import torch

from leanbert import load
from leanbert.cli.app import CLI
from leanbert.compression.distillation import _relations, soft_loss
from leanbert.compression.structured import remove_blocks
from leanbert.data.batches.batch import IGNORED
from leanbert.errors import UserError
from leanbert.memory.checkpointing import set_checkpointing
from leanbert.memory.step import optimizer_step
from leanbert.models.kernels.loss import cross_entropy_sum
from leanbert.planning.dry_run import dry_run
from leanbert.pretrained.build import build_model
from leanbert.tasks.base import Task
from leanbert.tasks.classification import TextClassification
from leanbert.tasks.distillation import Distillation
from leanbert.tasks.teachers import DistillationConfig
from tests.planning.test_predict import settings
from tests.pretrained.pairs import packed_batch, tiny_seq2seq
from tests.tiny import tiny_config, tiny_model, unequal_batch
from tests.training import TINY, fit, scalars

ALL = {"logits": 0.5, "hidden": 1.0, "relations": 1.0}


class Plain:
    """What a student's task is asked, without a trainer."""

    soft_criterion = Task.soft_criterion

    def __init__(self, model):
        self.model = model.train()

    def count_targets(self, batch):
        return (batch.targets != IGNORED).sum()

    def sum_over_ranks(self, value):
        return value

    def model_inputs(self, batch):
        return batch.inputs, batch.decoder_inputs if hasattr(batch, "decoder_inputs") else batch.target_index

    def criterion(self, scores, targets):
        return cross_entropy_sum(scores, targets)


class Nothing(torch.optim.Optimizer):
    """Leaves the gradients to be looked at."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.gradients = []

    def step(self, closure=None):
        self.gradients = [None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]]


def mlm_pair():
    """A student of one narrow block and its teacher of three wide ones."""
    return tiny_model(num_layers=1), tiny_model(seed=1, num_layers=3, hidden_size=64), unequal_batch()


def seq2seq_pair():
    return tiny_seq2seq(layers=1), tiny_seq2seq(seed=1, layers=2, hidden_size=64), packed_batch()


def step_of(student, teacher, batch, micro_batch=None, **config):
    """Loss and gradients of a step, of the projections too."""
    torch.manual_seed(5)
    distillation = Distillation(DistillationConfig(teacher="t", **{**ALL, **config}), teacher, Plain(student))
    distillation.projections.double()
    optimizer = Nothing([*student.parameters(), *distillation.projections.parameters()])
    loss = optimizer_step(distillation, batch, optimizer, micro_batch=micro_batch)
    return loss, optimizer.gradients


def assert_same_step(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=0)
    for a, b in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("pair", [mlm_pair, seq2seq_pair])
def test_micro_batches_add_up_to_the_step_of_the_whole_batch(pair):
    student, teacher, batch = pair()
    whole = step_of(copy.deepcopy(student), teacher, batch)
    assert_same_step(whole, step_of(copy.deepcopy(student), teacher, batch, micro_batch=3))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert whole[1][-1].abs().sum() > 0  # of a projection


@pytest.mark.parametrize("technique", ["checkpointing", "layer_major", "chunked_head"])
def test_memory_techniques_leave_the_step_as_it_is(technique):
    student, teacher, batch = mlm_pair()
    whole = step_of(copy.deepcopy(student), teacher, batch)
    if technique == "checkpointing":
        set_checkpointing(student.blocks, "input", 1)
    elif technique == "chunked_head":
        student.head_chunk = 16
    else:
        for block in student.blocks:
            block.slice_rows = 3
    assert_same_step(whole, step_of(student, teacher, batch))


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    teacher, batch = tiny_model(), unequal_batch()
    loss, gradients = step_of(copy.deepcopy(teacher), teacher, batch, logits=1.0)
    assert loss.abs() < 1e-9
    assert max(gradient.abs().max() for gradient in gradients if gradient is not None) < 1e-7


def test_weights_mix_the_losses_of_task_and_teacher():
    student, teacher, batch = mlm_pair()
    without = {"hidden": 0.0, "relations": 0.0}
    hard, soft, mixed = (
        step_of(copy.deepcopy(student), teacher, batch, **{**without, **more}, logits=share)[0]
        for share, more in ((0.0, {"hidden": 1e-12}), (1.0, {}), (0.25, {}))
    )
    torch.testing.assert_close(mixed, 0.75 * hard + 0.25 * soft, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logits": 0.0, "hidden": 0.0, "relations": 0.0}, "nothing of the teacher is learnt"),
        ({"relation_heads": 7}, "7 do not divide the 32 numbers of the student's queries"),
        ({"logits": 0.0, "temperature": 3.0}, r"model\.distillation\.temperature: has no effect"),
        ({"hidden": 0.0, "relations": 0.0, "layers": [1]}, r"model\.distillation\.layers: has no effect"),
        ({"relations": 0.0, "relation_heads": 2}, r"model\.distillation\.relation_heads: has no effect"),
        ({"layers": [1, 2]}, "a student of 1 blocks needs 1 numbers from 1 to 3"),
        ({"temperature": 0.0}, "model.distillation.temperature"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    student, teacher, batch = mlm_pair()
    with pytest.raises(UserError, match=message):
        step_of(student, teacher, batch, **settings)


def test_layers_say_which_block_teaches_which():
    student, teacher, batch = mlm_pair()
    even, first = (step_of(copy.deepcopy(student), teacher, batch, layers=layers)[0] for layers in ([3], [1]))
    assert torch.equal(even, step_of(student, teacher, batch)[0])
    assert not torch.equal(even, first)


def test_a_teacher_with_more_rows_than_tokens_teaches_the_tokens():
    student, teacher, batch = mlm_pair()
    whole = step_of(copy.deepcopy(student), teacher, batch)
    wide = build_model(tiny_config(num_layers=3, hidden_size=64), 110).double()
    weights = wide.state_dict()
    for name, tensor in teacher.state_dict().items():
        weights[name][tuple(map(slice, tensor.shape))] = tensor
    wide.load_state_dict(weights)
    assert_same_step(whole, step_of(student, wide, batch))


def test_relations_hold_large_numbers_in_16_bits():
    states = torch.full((1, 4, 32), 90.0, dtype=torch.float16)
    assert _relations(states.view(1, 1, 4, 32), torch.ones(1, 1, 4, 4, dtype=torch.bool)).isfinite().all()


def test_weights_of_labels_count_for_the_teachers_part_too():
    task = TextClassification(class_weights={"b": 4.0})
    task.model = SimpleNamespace(labels=["a", "b"])
    scores, taught = torch.randn(2, 1, 3, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    found = task.soft_criterion(scores, taught, torch.tensor([[0, 1, -100]]), 2.0)
    plain = soft_loss(scores, taught, 2.0)[0]
    torch.testing.assert_close(found, plain[0] + 4.0 * plain[1])


@pytest.mark.parametrize(("fraction", "fails"), [(0.5, False), (0.25, True)])
def test_blocks_keep_their_kind_of_attention(fraction, fails):
    model = tiny_model(num_layers=12, local_window=4)
    if fails:
        with pytest.raises(UserError, match="block 4 would come to place 3, where attention is global"):
            remove_blocks(model, fraction)
    else:
        remove_blocks(model, fraction)
        assert model.config.num_layers == 6


def test_a_decoder_of_one_block_keeps_it():
    model = tiny_seq2seq(layers=1, num_layers=4)
    remove_blocks(model, 0.5)
    assert [len(stack.blocks) for stack in model.stacks] == [2, 1]
    with pytest.raises(UserError, match=r"0\.9 of 1 blocks is less than one\. A single one has to stay"):
        remove_blocks(tiny_seq2seq(layers=1, num_layers=1), 0.9)


def test_a_student_of_the_teachers_blocks_is_what_is_left_of_it():
    teacher = tiny_model(num_layers=5)
    student = copy.deepcopy(teacher)
    remove_blocks(student, 0.6)
    for kept, number in zip(student.blocks, (0, 2), strict=True):
        for one, other in zip(kept.parameters(), teacher.blocks[number].parameters(), strict=True):
            assert torch.equal(one, other)
    assert [block.layer for block in student.blocks] == [0, 1]
    assert student.config.num_layers == 2


# ---- through the command line


def corpus(folder):
    (folder / "train.txt").write_text("".join(f"the {i} tests of words {i * i}\n\n" for i in range(400)))


def distil(folder, *more, steps=4):
    teacher = "init_from" if any("init_from" in word for word in more) else str(folder / "teacher.ckpt")
    return fit(
        folder, "--model.init_from=" + str(folder / "teacher.ckpt"), "--config=configs/distillation.yaml",
        f"--model.distillation.teacher={teacher}", *more, steps=steps,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation")
    corpus(folder)
    run = fit(folder, "--model.encoder.num_layers=4")
    shutil.copy(run.runs.find("last").path, folder / "teacher.ckpt")
    return folder


def test_a_student_is_trained_resumed_and_used_like_any_model(folder, capsys):
    whole = distil(folder, steps=4)
    assert whole.model.model.config.num_layers == 2
    assert "teacher     modern, 4 x 32" in capsys.readouterr().err
    losses = scalars(whole)["train/loss"]
    half = distil(folder, steps=2)
    checkpoint = torch.load(half.runs.find("last").path, weights_only=True)
    assert not any("teacher" in name for name in checkpoint["state_dict"])
    resumed = distil(folder, "--ckpt_path=last", steps=4)
    assert [scalars(resumed)["train/loss"][step] for step in (3, 4)] == [losses[step] for step in (3, 4)]
    student = load(resumed.trainer.log_dir)
    assert student.model.config.num_layers == 2
    CLI(["validate", "--config=configs/mlm.yaml", "--config=configs/distillation.yaml", "--ckpt_path=last",
         f"--data.train_files={folder / 'train.txt'}", f"--data.cache_dir={folder / 'cache'}", *TINY,
         f"--trainer.default_root_dir={folder / 'runs'}", "--trainer.accelerator=cpu"])  # fmt: skip


def test_a_wider_teacher_teaches_by_a_projection_that_resumes_and_is_left_behind(folder):
    narrow = (
        "--model.init_from=null", "--model.encoder.hidden_size=16", "--trainer.callbacks=[]",
        f"--data.tokenizer={folder / 'teacher.ckpt'}", f"--trainer.default_root_dir={folder / 'narrow'}",
    )  # fmt: skip
    losses = scalars(distil(folder, *narrow, f"--model.distillation.teacher={folder / 'teacher.ckpt'}", steps=4))
    distil(folder, *narrow, f"--model.distillation.teacher={folder / 'teacher.ckpt'}", steps=2)
    resumed = distil(
        folder, *narrow, f"--model.distillation.teacher={folder / 'teacher.ckpt'}", "--ckpt_path=last", steps=4
    )
    assert [scalars(resumed)["train/loss"][step] for step in (3, 4)] == [losses["train/loss"][s] for s in (3, 4)]
    assert [tuple(weight.shape) for weight in resumed.model.projections.parameters()] == [(32, 16)]
    assert load(resumed.trainer.log_dir).model.config.hidden_size == 16


def test_a_run_with_projections_does_not_go_on_without_its_teacher(folder):
    with pytest.raises(UserError, match=r"^model\.distillation: the checkpoint was trained with another"):
        distil(folder, "--model.init_from=null", "--model.encoder.hidden_size=16", "--trainer.callbacks=[]",
               f"--data.tokenizer={folder / 'teacher.ckpt'}", f"--trainer.default_root_dir={folder / 'narrow'}",
               f"--model.distillation.teacher={folder / 'teacher.ckpt'}", "--model.distillation.hidden=0",
               "--ckpt_path=last", steps=6)  # fmt: skip


def test_without_a_start_there_is_no_teacher(folder):
    with pytest.raises(UserError, match="is the model that training starts from, but none is named"):
        fit(folder, "--config=configs/distillation.yaml")


def test_another_tokenizer_is_refused(folder):
    with pytest.raises(UserError, match="has another tokenizer than the data"):
        fit(folder, f"--model.distillation.teacher={folder / 'teacher.ckpt'}", f"--data.tokenizer={other(folder)}")


def other(folder):
    (folder / "other").mkdir(exist_ok=True)
    (folder / "other/train.txt").write_text("".join(f"{i} of quite other things\n\n" for i in range(400)))
    run = fit(folder / "other", steps=1)
    return run.runs.find("last").path


def test_the_plan_counts_the_teacher_also_while_it_waits(folder):
    found = []
    for teacher, dtype in (
        (None, None),
        (str(folder / "teacher.ckpt"), None),
        (str(folder / "teacher.ckpt"), "bfloat16"),
    ):
        run = settings(encoder={"num_layers": 2}, rows=2)
        run.task.teacher_source, run.task.distillation_config.dtype = teacher, dtype
        found.append(dry_run(run, 2).validation.categories_by_phase["validation"]["other"])
    weights = load(folder / "teacher.ckpt").model.parameters()
    size = sum(weight.nbytes for weight in weights)
    assert [each - found[0] for each in found[1:]] == [size, size // 2]
