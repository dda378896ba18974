"""Rows that wait for calls outside: the others go on, nothing depends on when calls return, errors end the stream."""

import random
import threading
import time

import pytest

from cai_jax import Sampler, Sampling, load_model
from cai_jax.errors import UserError
from cai_jax.sampler import Generate, Outside, Score, WithoutModel

FEW = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def sampler():
    return Sampler(load_model("random:llama"), max_length=256, rows=3)


def chain(number: int, delay):
    """A row that writes, asks outside about its text, writes on, scores, and asks outside again."""
    turns = [{"role": "user", "content": f"Question {number}"}]
    first = yield Generate(turns, FEW, number)
    told = yield Outside(lambda: (time.sleep(delay()), f"{number}: {len(first.text)} characters")[1])
    turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": told}]
    second = yield Generate(turns, FEW, number)
    scores = yield Score(turns, ["A", "B"])
    doubled = yield Outside(lambda: 2 * number)
    return first.text, told, second.text, second.logprobs, [score.tolist() for score in scores], doubled


def test_bits_do_not_depend_on_when_calls_return(sampler):
    at_once = sampler.run(chain(i, lambda: 0) for i in range(8))
    for seed in range(3):
        draw = random.Random(seed)
        assert sampler.run(chain(i, lambda: draw.uniform(0, 0.05)) for i in range(8)) == at_once  # noqa: B023
    alone = [sampler.run([chain(i, lambda: 0)])[0] for i in (0, 5)]
    assert alone == [at_once[0], at_once[5]]


def test_rows_go_on_while_another_waits(sampler):
    freed = threading.Event()

    def waits():
        yield Outside(lambda: freed.wait(60))
        return "waited"

    def writes(number):
        return (yield Generate([{"role": "user", "content": "Hi"}], FEW, number)).text

    ended = []
    for place, _ in sampler.stream([waits(), *(writes(i) for i in range(7))]):
        ended.append(place)
        if len(ended) == 7:
            freed.set()  # only the waiting row is left
    assert sorted(ended[:7]) == list(range(1, 8)) and ended[7] == 0


def test_an_engine_whose_rows_all_wait_does_not_spin(sampler):
    looks = []
    sampler.on_progress = looks.append

    def waits():
        return (yield Outside(lambda: time.sleep(0.3)))

    began = time.process_time()
    assert sampler.run(waits() for _ in range(3)) == [None] * 3
    sampler.on_progress = lambda counts: None
    assert len(looks) < 8 and time.process_time() - began < 0.2


@pytest.mark.parametrize("error", [UserError("no budget left"), ValueError("broken")])
def test_what_a_call_raises_ends_the_stream_and_the_sampler_can_be_used_again(sampler, error):
    def fails():
        yield Generate([{"role": "user", "content": "Hi"}], FEW, 1)

        def call():
            raise error

        yield Outside(call)

    forever = threading.Event()

    def waits():
        yield Outside(lambda: forever.wait(30))

    began = time.monotonic()
    with pytest.raises(type(error), match=str(error)):
        sampler.run([waits(), fails(), waits()])
    assert time.monotonic() - began < 10
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("outside"))
    forever.set()
    assert sampler.run([chain(0, lambda: 0)])[0][-1] == 0  # answers of the stream before are not taken for its own


def test_rows_without_a_model_need_no_sampler():
    now, most, lock = [0], [0], threading.Lock()

    def call(number):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02 * (number % 3))
        with lock:
            now[0] -= 1
        return number

    def row(number):
        if number == 5:
            return "nothing to ask"
        first = yield Outside(lambda: call(number))
        return first + (yield Outside(lambda: call(100)))

    driver = WithoutModel(rows=3)
    expected = [number + 100 if number != 5 else "nothing to ask" for number in range(12)]
    assert driver.run(row(number) for number in range(12)) == expected
    assert driver.counts.done == 12 and most[0] == 3
    with pytest.raises(TypeError, match="row 0 asks for Generate, which needs a model"):
        driver.run([chain(0, lambda: 0)])


def test_what_a_call_raises_ends_a_driver_without_model():
    def fails():
        yield Outside(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        WithoutModel(rows=2).run([fails()])
