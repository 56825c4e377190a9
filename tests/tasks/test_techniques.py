"""Every technique alone and in pairs, through the command line's code, on a tiny model."""

from pathlib import Path

import pytest

from leanbert.errors import UserError
from leanbert.memory.offload import DiskStorage
from leanbert.tasks.techniques import TECHNIQUES, Surroundings, Technique, Techniques, apply, refuse
from tests.corpus import write_corpus
from tests.tiny import tiny_model
from tests.training import fit, scalars

ROOT = Path(__file__).parents[2]
SMALL = ("--data.batch_size=16",)  # so that the micro-batches of the overlays cut it

UNTOUCHED = ("oom_recovery", "return_pages")
"""Exact techniques that leave the order of sums as it is, so that losses are the same bit for bit."""
TAYLOR = '{"class_path": "StructuredPruning", "init_args": {"at_step": 3, "importance": "taylor"}}'
MOVES = {
    "bf16_mixed": 0.02,
    "fp16_mixed": 0.02,
    "bf16_true": 0.05,
    "adamw_8bit": 0.02,
    "adamw_4bit": 0.05,
    "adama": 0.05,
    "adafactor": 0.5,
    "lean": 0.05,
    "pruning": 0.1,
    "pruning_2_4": 0.1,
    "movement_pruning": 0.1,
    "quantization_aware": 0.02,
    "structured_pruning": 0.1,
}
"""How far approximate techniques may move the loss of 4 steps."""
ON_CPU = [technique for technique in TECHNIQUES if technique.name != "offload_host"]


def allowed(technique):
    """Return how far a technique may move the loss: float32 sums in another order, at most, if it is exact."""
    return (0.0 if technique.name in UNTOUCHED else 1e-5) if technique.exact else MOVES[technique.name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("techniques")
    write_corpus(folder / "train.txt")
    return folder


@pytest.fixture(scope="module")
def plain(folder):
    return losses(fit(folder, *SMALL))


def losses(cli):
    return scalars(cli)["train/loss"]


def shipped():
    return {path.stem for path in (ROOT / "configs" / "memory").glob("*.yaml")}


def test_every_overlay_is_a_technique_of_the_list():
    assert shipped() == {technique.name for technique in TECHNIQUES}
    assert len(shipped()) == len(TECHNIQUES)


def test_the_documents_have_the_table_of_the_list():
    """When this fails, put the table below into docs/memory.md."""
    lines = ["| overlay (`configs/memory/`) | lowers | costs | |", "| --- | --- | --- | --- |"]
    for technique in TECHNIQUES:
        kind = "exact" if technique.exact else "approximate"
        lines.append(f"| `{technique.name}` | {technique.lowers} | {technique.costs} | {kind} |")
    table = "\n".join(lines)
    print(table)
    assert f"\n\n{table}\n\n" in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("technique", ON_CPU, ids=lambda technique: technique.name)
def test_alone_and_resumed(folder, plain, technique):
    name = technique.name
    cli = fit(folder, *SMALL, "--checkpoint.every_n_steps=2", overlays=(name,))
    whole = losses(cli)
    assert whole.keys() == plain.keys()
    for step, value in whole.items():
        assert value == pytest.approx(plain[step], rel=allowed(technique), abs=0), step
    if not technique.exact:
        assert whole != plain, "the technique has done nothing"
    middle = Path(cli.trainer.log_dir) / "checkpoints" / "step-00000002.ckpt"
    assert middle.is_file()
    other = folder / "elsewhere.ckpt"
    other.write_bytes(middle.read_bytes())
    resumed = losses(fit(folder, *SMALL, f"--ckpt_path={other}", overlays=(name,)))
    assert resumed == {step: whole[step] for step in (3, 4)}


@pytest.mark.parametrize("importance", ["weight", "taylor"])
def test_a_run_pruned_in_the_middle_resumes_before_and_after(folder, importance):
    overlay = folder / "structured.yaml"
    overlay.write_text(
        "trainer:\n  callbacks+:\n    - class_path: leanbert.callbacks.techniques.pruning.StructuredPruning\n"
        f"      init_args: {{at_step: 3, importance: {importance}, importance_steps: 2}}\n"
    )
    arguments = (*SMALL, f"--config={overlay}", "--checkpoint.every_n_steps=2", "--checkpoint.keep=9")
    cli = fit(folder, *arguments, steps=6)
    whole, model = losses(cli), cli.model.model
    assert (model.config.num_heads, model.config.head_size, model.config.intermediate_size) == (1, 16, 42)
    for step in (2, 4):
        kept = folder / f"{importance}-{step}.ckpt"
        kept.write_bytes((Path(cli.trainer.log_dir) / "checkpoints" / f"step-0000000{step}.ckpt").read_bytes())
        resumed = fit(folder, *arguments, f"--ckpt_path={kept}", steps=6)
        assert losses(resumed) == {later: whole[later] for later in range(step + 1, 7)}
        assert resumed.model.model.num_parameters == model.num_parameters


def test_a_trained_model_that_was_pruned_at_the_start_is_not_pruned_again_where_the_run_goes_on(folder):
    trained, middle = folder / "trained.ckpt", folder / "pruned.ckpt"
    cli = fit(folder, *SMALL, steps=1)
    trained.write_bytes((Path(cli.trainer.log_dir) / "checkpoints" / "step-00000001.ckpt").read_bytes())
    arguments = (*SMALL, f"--model.init_from={trained}", "--checkpoint.every_n_steps=2")
    cli = fit(folder, *arguments, overlays=("structured_pruning",))
    middle.write_bytes((Path(cli.trainer.log_dir) / "checkpoints" / "step-00000002.ckpt").read_bytes())
    resumed = fit(folder, *arguments, f"--ckpt_path={middle}", overlays=("structured_pruning",))
    assert losses(resumed) == {step: losses(cli)[step] for step in (3, 4)}
    assert resumed.model.model.num_parameters == cli.model.model.num_parameters


def test_offload_to_the_host_is_refused_on_a_cpu(folder):
    with pytest.raises(UserError, match="in host memory already"):
        fit(folder, overlays=("offload_host",))


@pytest.mark.parametrize(
    ("overlay", "arguments", "reason"),
    [
        ("checkpointing", ["--config=configs/memory/selective_checkpointing.yaml"], "is given 2 times"),
        ("lean", ["--config=configs/memory/accumulation.yaml"], "gradient accumulation"),
        ("optimizer_in_backward", ["--trainer.gradient_clip_val=1.0"], "gradient_clip_val"),
        ("selective_checkpointing", ["--model.compile=true"], "keep=input"),
        ("accumulation", ["--data.batch_size=8"], "does not cut"),
        ("adama", ["--model.optimizer.name=sgd"], "moments"),
        (
            "optimizer_in_backward",
            ["--config=configs/memory/movement_pruning.yaml"],
            "MovementPruning: looks at gradients, which OptimizerInBackward has freed by then",
        ),
        (
            "layer_major",
            [
                "--config=configs/memory/optimizer_in_backward.yaml",
                f"--trainer.callbacks+={TAYLOR}",
            ],
            "StructuredPruning.importance: taylor: looks at gradients",
        ),
        ("pruning", ["--config=configs/memory/movement_pruning.yaml"], "sets weights to zero already"),
    ],
)
def test_refused_surroundings(folder, overlay, arguments, reason):
    with pytest.raises(UserError, match=reason):
        fit(folder, *SMALL, *arguments, overlays=(overlay,))


@pytest.mark.parametrize(
    ("techniques", "around", "reason"),
    [
        ({"in_backward": "update"}, {"world_size": 2}, "frees nothing with ddp"),
        ({"in_backward": "accumulate"}, {}, "no effect without GradientAccumulation"),
        ({"slice_rows": 2}, {"shards": True}, "not gathered"),
        ({"recovery": True}, {"shards": True}, "smaller micro-batch before the run"),
        ({"storage": "host"}, {}, "to=disk"),
        ({"precision": "16-mixed"}, {"shards": True}, "each rank has a part only. Use bf16-mixed"),
        (
            {"masks": {"MagnitudePruning", "MovementPruning"}},
            {},
            r"^MovementPruning: MagnitudePruning sets weights to zero already\. Leave one of them out",
        ),
        (
            {"gradient_readers": {"MovementPruning"}, "in_backward": "update"},
            {},
            "MovementPruning: looks at gradients, which OptimizerInBackward has freed by then",
        ),
        (
            {"gradient_readers": {"MovementPruning"}, "in_backward": "accumulate", "micro_batch": 2},
            {},
            "MovementPruning: looks at gradients",
        ),
        ({"rounds": True}, {"shards": True, "precision": "bf16-mixed"}, "gathered in bfloat16, which rounds weights"),
        ({"removal_step": 1}, {"shards": True}, "StructuredPruning has to see them whole"),
        ({"removal_step": 1}, {"world_size": 2}, "at_step: is 1, but several devices exchange"),
        ({"removal_step": 1, "masks": {"MagnitudePruning"}}, {}, "MagnitudePruning would no longer fit"),
    ],
)
def test_refusals_that_need_other_devices(techniques, around, reason):
    with pytest.raises(UserError, match=reason):
        refuse(Techniques(**techniques), Surroundings("adamw", **{"precision": "32-true", **around}))
    refuse(Techniques(), Surroundings("adamw", **{"precision": "32-true", **around}))


def test_techniques_are_applied_to_the_model(tmp_path):
    model = tiny_model(num_layers=3)
    apply(Techniques(keep="input", keep_every=2, head_chunk=5, storage=tmp_path), model, compile_blocks=True)
    assert [block.keep for block in model.encoder.blocks] == ["input", "all", "input"]
    assert model.head_chunk == 5
    assert isinstance(model.encoder.storage, DiskStorage)
    assert all(block._compiled_call_impl is not None for block in model.encoder.blocks)
    assert list(model.state_dict()) == list(tiny_model(num_layers=3).state_dict())


@pytest.mark.parametrize(("shares", "setting"), [((0.0, 0.0, 0.1), "blocks"), ((0.1, 0.0, 0.0), "heads")])
def test_shares_of_which_nothing_leaves_are_named_with_their_setting(shares, setting):
    with pytest.raises(UserError, match=rf"^StructuredPruning\.{setting}: 0\.1 of 2 "):
        apply(Techniques(structured=shares), tiny_model())


def test_a_technique_of_ones_own_is_refused_and_applied_like_ours():
    own = Technique(
        "mine", exact=False, lowers="nothing", costs="nothing",
        conflicts=lambda techniques, around: ["Mine: not with this. Leave it out."] * (techniques.keep != "all"),
        apply=lambda model, techniques: setattr(model, "mine", techniques.head_chunk),
    )  # fmt: skip
    model = tiny_model()
    apply(Techniques(head_chunk=7, own=[own]), model)
    assert model.mine == 7
    around = Surroundings("adamw", "32-true")
    refuse(Techniques(own=[own]), around)
    with pytest.raises(UserError, match="Mine: not with this"):
        refuse(Techniques(keep="input", own=[own]), around)
