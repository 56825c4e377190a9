from __future__ import annotations

from leanbert.callbacks.reporting.sampling import TIME_FRACTION, SampleClock


class Time:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def sampled_steps(clock: SampleClock, time: Time, steps: int, cost: float, first: int = 1) -> list[int]:
    """Return which of the steps are sampled, where a plain one takes 1 second, and another `cost` to sample it."""
    found = []
    for step in range(first, first + steps):
        sampled = clock.begin(step)
        time.now += 1.0 + cost * sampled
        clock.end(sampled)
        found += [step] * sampled
    return found


def test_samples_take_their_part_of_the_time() -> None:
    time = Time()
    # 0.29 / 0.015: at least 19.3 seconds lie between the end of a sample and the beginning of the next
    assert sampled_steps(SampleClock(clock=time), time, steps=80, cost=0.29) == [2, 11, 32, 53, 74]


def test_a_long_run_spends_no_more_than_its_part() -> None:
    time = Time()
    samples = sampled_steps(SampleClock(clock=time), time, steps=5000, cost=0.1)
    assert len(samples) == 2 + (5000 - 11) // 8  # 0.1 / 0.015: 7 plain steps between two
    assert 0.1 * len(samples) / 5000 < TIME_FRACTION


def test_one_slow_step_before_a_sample_does_not_make_it_cheap() -> None:
    time = Time()
    clock = SampleClock(clock=time)
    assert sampled_steps(clock, time, steps=9, cost=0.29) == [2]
    clock.begin(10)
    time.now += 60.0
    clock.end(sampled=False)
    assert sampled_steps(clock, time, steps=30, cost=0.29, first=11) == [11, 32]


def test_steps_are_sampled_as_often_as_is_asked() -> None:
    time = Time()
    clock = SampleClock(every_n_steps=4, clock=time)
    assert sampled_steps(clock, time, steps=13, cost=9.0) == [2, 4, 8, 12]
    always = SampleClock(every_n_steps=1, clock=time)
    assert sampled_steps(always, time, steps=13, cost=9.0) == list(range(1, 14))


def test_in_a_process_that_goes_on_the_second_step_is_sampled_too() -> None:
    time = Time()
    assert sampled_steps(SampleClock(clock=time), time, steps=12, cost=0.29, first=501) == [502, 511]
