from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from leanbert.callbacks.techniques.pruning import MagnitudePruning, MovementPruning
from leanbert.class_paths import find_class
from leanbert.compression.pruning import prunable, sparsity_of
from leanbert.errors import UserError
from leanbert.settings import SHIPPED
from tests.callbacks.techniques.runs import Logger, Module, Watch, fit, state
from tests.corpus import write_corpus
from tests.tiny import tiny_model
from tests.training import fit as fit_program

KINDS = pytest.mark.parametrize("kind", [MagnitudePruning, MovementPruning])


@KINDS
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_sparsity_follows_the_schedule_and_holds_after_every_step(kind, scope, optimizer):
    watch, logger = Watch(), Logger()
    pruning = kind(0.6, scope, start_step=2, end_step=8, every_n_steps=3)
    module = fit(pruning, watch, module=Module(optimizer=optimizer), logger=logger)
    half = 0.6 * (1 - 0.5**3)
    expected = {**dict.fromkeys(range(1, 5), 0.0), **dict.fromkeys((5, 6, 7), half), **dict.fromkeys((8, 9, 10), 0.6)}
    tolerance = 1e-3 if scope == "layer" else 3e-5  # one of the weights of a matrix, or of all
    assert watch.sparsity == pytest.approx(expected, abs=tolerance)
    weights = prunable(module.model)
    if scope == "layer":
        assert all(sparsity_of({"": weight}) == pytest.approx(0.6, abs=tolerance) for weight in weights.values())
    others = [parameter for name, parameter in module.model.named_parameters() if name not in weights]
    assert all((parameter != 0).float().mean() > 0.9 for parameter in others if parameter.numel() != 128)
    found = {step: metrics["pruning/sparsity"] for step, metrics in logger.logged.items()}
    assert found == {step: watch.sparsity[step] for step in (4, 5, 8)}  # every 4 steps and at each change


def test_embeddings_are_pruned_only_if_asked():
    for asked in (False, True):
        module = fit(MagnitudePruning(start_step=0, end_step=0, include_embeddings=asked), steps=2)
        zeros = (module.model.encoder.embeddings.token.weight[:100] == 0).float().mean()
        assert zeros.item() == pytest.approx(0.5, abs=0.1) if asked else zeros == 0


@KINDS
@pytest.mark.parametrize(("scope", "group", "dense"), [("2:4", 4, 0), ("4:8", 8, 2)])
def test_patterns_are_pruned_once_and_what_does_not_come_in_groups_stays_dense(kind, scope, group, dense, capsys):
    """8/3 x 32 are 84 neurons: in fours, not in eights."""
    watch = Watch()
    module = fit(kind(scope=scope, start_step=3), watch, steps=5)
    assert (watch.sparsity[2], watch.sparsity[3] > 0.3) == (0.0, True)
    found = []
    for name, weight in prunable(module.model).items():
        if weight.shape[-1] % group == 0:
            assert ((weight.unflatten(-1, (-1, group)) == 0).sum(-1) == group // 2).all(), name
        else:
            assert (weight != 0).all(), name
            found.append(name)
    assert len(found) == dense
    notice = f"pruning leaves {dense} matrices dense that are no multiple of 1 x {group}: encoder.blocks.0.feed_forward"
    assert (notice in capsys.readouterr().err) is bool(dense)


@KINDS
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_blocks_leave_together(kind, scope, capsys):
    """Of 96 x 32, 32 x 32, 168 x 32 and 32 x 84 in two blocks and 32 x 32 in the head; 168 and 84 are no multiples."""
    module = fit(kind(0.75, scope, start_step=1, end_step=2, block_size=16), steps=4)
    assert "pruning leaves 4 matrices dense that are no multiple of 16 x 16" in capsys.readouterr().err
    counts, blocks = 0, 0
    for name, weight in prunable(module.model).items():
        if "feed_forward" in name:
            assert (weight != 0).all()
            continue
        zeros = (weight == 0).unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).sum((1, 3))
        assert set(zeros.unique().tolist()) <= {0, 256}
        if scope == "layer":
            assert int((zeros == 256).sum()) == 0.75 * zeros.numel()
        counts, blocks = counts + int((zeros == 256).sum()), blocks + zeros.numel()
    assert counts == round(0.75 * blocks) == 27


def test_blocks_that_no_matrix_consists_of_are_refused():
    with pytest.raises(UserError, match=r"^MagnitudePruning\.block_size: 64 matches no weight of this model\."):
        fit(MagnitudePruning(block_size=64))


def test_pruning_at_step_0_comes_before_the_first_forward():
    seen = []

    class First(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            seen.append(sparsity_of(prunable(pl_module.model)))

    fit(MagnitudePruning(start_step=0, end_step=0), First(), steps=1)
    assert seen == pytest.approx([0.5], abs=3e-5)


@KINDS
@pytest.mark.parametrize("at", [1, 3, 5, 8])
def test_a_resumed_run_equals_one_that_was_not_killed(tmp_path, kind, at):
    """Killed before, between and after updates of the masks."""

    def pruning():
        return kind(0.6, start_step=2, end_step=8, every_n_steps=2)

    whole = fit(pruning(), folder=tmp_path, save_every=1)
    watch = Watch()
    resumed = fit(pruning(), watch, ckpt_path=tmp_path / f"step={at}.ckpt")
    assert min(watch.sparsity) == at + 1
    assert all(torch.equal(tensor, state(whole)[name]) for name, tensor in state(resumed).items())


def test_checkpoints_hold_plain_weights_and_no_mask(tmp_path):
    module = fit(MagnitudePruning(start_step=1, end_step=2), steps=4, folder=tmp_path, save_every=4)
    stored = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert stored["state_dict"].keys() == module.state_dict().keys()
    assert stored["callbacks"]["MagnitudePruning"] == {"sparsity": 0.5}
    other = tiny_model(dtype=torch.float32, seed=1)
    other.load_state_dict({name.removeprefix("model."): tensor for name, tensor in stored["state_dict"].items()})
    assert sparsity_of(prunable(other)) == pytest.approx(0.5, abs=3e-5)


@KINDS
def test_a_run_made_longer_never_brings_weights_back(tmp_path, kind):
    fit(kind(), steps=5, folder=tmp_path, save_every=5)
    watch = Watch()
    fit(kind(), watch, steps=20, ckpt_path=tmp_path / "step=5.ckpt")
    assert len(watch.sparsity) == 15
    assert all(sparsity == pytest.approx(0.5, abs=3e-5) for sparsity in watch.sparsity.values())


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("final_sparsity", {"final_sparsity": 0.0}),
        ("final_sparsity", {"final_sparsity": 1.0}),
        ("scope", {"scope": "row"}),
        ("start_step", {"start_step": -1}),
        ("end_step", {"start_step": 5, "end_step": 4}),
        ("every_n_steps", {"every_n_steps": 0}),
        ("final_sparsity", {"scope": "2:4", "final_sparsity": 0.6}),
        ("end_step", {"scope": "2:4", "end_step": 9}),
        ("every_n_steps", {"scope": "2:4", "every_n_steps": 9}),
        ("final_sparsity", {"scope": "4:8", "final_sparsity": 0.6}),
        ("block_size", {"scope": "4:8", "block_size": 4}),
        ("block_size", {"block_size": 0}),
    ],
)
def test_senseless_settings_are_named(setting, values):
    with pytest.raises(UserError, match=rf"^MagnitudePruning\.{setting}: [^\n]*\.$"):
        MagnitudePruning(**values)


def test_movement_needs_a_step_before_the_first_weight_goes():
    with pytest.raises(UserError, match=r"^MovementPruning\.start_step: 0, but importance is of gradients\. Give 1"):
        MovementPruning(start_step=0)
    watch = Watch()
    fit(MovementPruning(scope="2:4"), watch, steps=2)  # a tenth of two steps is none
    assert watch.sparsity == {1: pytest.approx(0.5), 2: pytest.approx(0.5)}


@pytest.mark.parametrize("setting", ["start_step", "end_step"])
def test_a_run_that_ends_too_early_is_refused(setting):
    with pytest.raises(UserError, match=rf"^MagnitudePruning\.{setting}: 11 is after the last step"):
        fit(MagnitudePruning(**{setting: 11}))


def test_nothing_to_prune_raises():
    module = Module()
    module.model.encoder.blocks = torch.nn.ModuleList()
    module.model.head.dense = torch.nn.Identity()
    with pytest.raises(UserError, match=r"^MagnitudePruning\.scope: global matches no weight"):
        MagnitudePruning().on_train_start(SimpleNamespace(), module)


@pytest.mark.parametrize("name", ["pruning", "pruning_2_4", "movement_pruning", "structured_pruning"])
def test_overlays_name_settings_that_exist(name):
    overlay = yaml.safe_load((SHIPPED[1] / "memory" / f"{name}.yaml").read_text())
    (callback,) = overlay["trainer"]["callbacks+"]
    find_class(callback["class_path"])(**callback["init_args"])


# ---- movement


class Products(Callback):
    """Adds up minus weight x gradient as the first updates find them, in float32."""

    def __init__(self, steps):
        self.steps, self.sums = steps, {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step >= self.steps:
            return
        for name, weight in prunable(pl_module.model).items():
            product = -weight.detach().float() * weight.grad.float()
            self.sums[name] = self.sums.get(name, 0.0) + product


def test_importance_is_minus_weight_times_gradient_of_all_steps(tmp_path):
    products = Products(3)
    fit(MovementPruning(start_step=4, end_step=4), products, steps=4, folder=tmp_path, save_every=3)
    stored = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["callbacks"]["MovementPruning"]
    assert stored["sparsity"] == 0.0
    assert stored["scores"].keys() == products.sums.keys()
    for name, scores in stored["scores"].items():
        assert scores.dtype == torch.float32
        assert torch.allclose(scores, products.sums[name], rtol=1e-5, atol=1e-9), name


def test_what_moved_towards_zero_leaves_and_has_no_importance_any_more(tmp_path):
    products = Products(2)
    module = fit(MovementPruning(0.3, start_step=2, end_step=2), products, steps=2, folder=tmp_path, save_every=2)
    stored = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["callbacks"]["MovementPruning"]
    weights = prunable(module.model)
    gone = torch.cat([products.sums[name][weight == 0] for name, weight in weights.items()])
    kept = torch.cat([products.sums[name][weight != 0] for name, weight in weights.items()])
    assert len(gone) == round(0.3 * (len(gone) + len(kept)))
    assert gone.max() <= kept.min() + 1e-9
    for name, weight in weights.items():
        assert torch.equal(stored["scores"][name] == -torch.inf, weight == 0)


def scores_of(folder, *arguments, **options):
    """Return the last checkpoint of a run of the command line's own code, and the importance in it as one tensor."""
    overlay = folder / "movement.yaml"
    overlay.write_text("trainer: {callbacks+: [{class_path: MovementPruning, init_args: {start_step: 9}}]}\n")
    arguments = ["--data.batch_size=16", "--trainer.limit_train_batches=2", "--trainer.max_epochs=1", *arguments]
    path = fit_program(folder, f"--config={overlay}", *arguments, steps=9, **options).runs.find("last").path
    scores = torch.load(path, weights_only=True)["callbacks"]["MovementPruning"]["scores"]
    return path, torch.cat([each.flatten() for each in scores.values()])


def test_importance_is_of_the_whole_batch_in_every_precision(tmp_path):
    """Micro-batches change float32 sums alone, 16-mixed has gradients that are no longer scaled, bf16-true its own."""
    write_corpus(tmp_path / "train.txt")
    start, plain = scores_of(tmp_path)
    _, accumulated = scores_of(tmp_path, overlays=("accumulation",))
    assert torch.allclose(accumulated, plain, rtol=1e-3, atol=1e-6)
    same_weights = f"--model.init_from={start}"  # which in bfloat16 not every torch draws as in float32
    _, plain = scores_of(tmp_path, same_weights)
    for overlay, least in (("fp16_mixed", 0.99), ("bf16_true", 0.9)):
        _, found = scores_of(tmp_path, same_weights, overlays=(overlay,))
        assert found.dtype == torch.float32
        assert torch.cosine_similarity(found, plain, dim=0) > least, overlay
        assert float(found.norm()) == pytest.approx(float(plain.norm()), rel=0.1), overlay


def test_a_step_whose_update_is_left_out_adds_nothing():
    module, callback = Module(), MovementPruning()
    callback._weights = prunable(module.model)
    callback._prepare()
    weight = module.model.head.dense.weight
    scaled = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()))
    for gradient in (None, torch.full_like(weight, torch.inf)):
        weight.grad = gradient
        callback.on_before_optimizer_step(scaled, module, None)
    assert all((scores == 0).all() for scores in callback.state_dict()["scores"].values())
    weight.grad = torch.ones_like(weight)
    callback.on_before_optimizer_step(scaled, module, None)
    assert torch.equal(callback.state_dict()["scores"]["head.dense.weight"], -weight.detach())
