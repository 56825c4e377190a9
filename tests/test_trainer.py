import math

import pytest

from leanbert.callbacks.loop.bad_steps import StopOnBadSteps
from leanbert.callbacks.reporting.samples import Samples
from leanbert.errors import UserError
from leanbert.trainer import Trainer


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_bad_steps", [0, True, math.nan]),
        ("max_steps", [0, -5, math.nan, True]),
        ("max_epochs", [0, -2]),
        ("min_steps", [-1]),
        ("gradient_clip_val", [math.nan, math.inf, -1.0, True]),
        ("val_check_interval", [math.nan, math.inf, 0, -3, 0.0, 1.5, True]),
        ("limit_train_batches", [math.nan, -1, 1.5, -0.5]),
        ("limit_val_batches", [math.nan, -1, 1.5, True]),
        ("overfit_batches", [math.nan, -1]),
        ("log_every_n_steps", [0, -1]),
        ("num_nodes", [0]),
    ],
)
def test_numbers_that_make_no_sense_are_refused(name, values):
    for value in values:
        with pytest.raises(UserError, match=rf"^trainer\.{name}: {value} is out of range\. Give a .* number"):
            Trainer(**{name: value})


QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def test_all_that_lightning_means_by_a_number_is_taken():
    for more in (
        {"max_steps": -1, "max_epochs": -1, "gradient_clip_val": 0, "limit_val_batches": 0},
        {"max_steps": 3, "val_check_interval": 1.0, "limit_val_batches": 0.5, "log_every_n_steps": None},
        {"val_check_interval": "00:00:10:00", "check_val_every_n_epoch": None},
        {},
    ):
        Trainer(**QUIET, **more)


@pytest.mark.parametrize("given", [None, Samples(), [Samples()]])
def test_every_trainer_looks_for_bad_steps(given):
    kinds = [type(callback) for callback in Trainer(**QUIET, callbacks=given, enable_model_summary=False).callbacks]
    assert kinds == [*([] if given is None else [Samples]), StopOnBadSteps]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": "nosuch"}, "trainer: .*devices.* should be an int > 0"),
        *(({"devices": none}, r"trainer\.devices: (0|\[\]) leaves none .* Give 1 or more") for none in (0, "0", [])),
        ({"accelerator": "gpu"}, "trainer: No supported gpu backend found"),
        ({"barebones": True, "log_every_n_steps": 10}, "trainer: .*barebones"),
        ({"overfit_batches": 1}, r"trainer\.overfit_batches: is not supported"),
    ],
)
def test_what_lightning_refuses_is_bad_input(settings, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        Trainer(**{"logger": False, **({"accelerator": "cpu"} if "accelerator" not in settings else {}), **settings})
