"""Groups of questions on their way to a model beside each other, with a model that answers by waiting."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unibiomed_jax.evaluation.answering import STAGES, Asker
from unibiomed_jax.evaluation.records import Sample
from unibiomed_jax.inference.answer import OpenedImage

LONG = 20  # seconds after which a test has failed


class Model:
    """Says "x" to everything."""

    def __init__(self, devices: int = 1):
        self.layout = SimpleNamespace(batch_shares=1, mesh=SimpleNamespace(size=devices))
        # Calls so far, those going on now, and the most that went on at a time.
        self.calls, self.now, self.most = 0, 0, 0
        self.lock = threading.Lock()
        self.wait = lambda requests: None

    def open(self, path):
        return OpenedImage([Image.open(path)], (), np.zeros((1, 4, 4, 3), np.uint8))

    def prompt_of(self, request):
        return SimpleNamespace(ids=[1, 2])

    def predict_batch(self, requests, **options):
        with self.lock:
            self.calls += 1
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            self.wait(requests)
        finally:
            with self.lock:
                self.now -= 1
        return [SimpleNamespace(text="x", segments=()) for _ in requests]


@pytest.fixture
def samples(tmp_path):
    for number in range(2 * STAGES):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    return [Sample("vqa", str(n), f"<image>\n{n}?", answer="a", image=f"{n}.png") for n in range(2 * STAGES)]


def answers(model, folder, samples):
    return Asker(model, folder, batch_size=1, max_new_tokens=3).ask(samples)


def test_a_group_waits_for_its_masks_while_the_next_has_its_words(tmp_path, samples):
    model = Model()
    together = threading.Barrier(STAGES, timeout=LONG)
    model.wait = lambda requests: together.wait()  # none goes on before as many have come
    found = list(answers(model, tmp_path, samples))
    assert len(found) == 2 * STAGES and not any(sample.reason for sample in found)
    assert model.most == STAGES


def test_calls_on_several_devices_do_not_meet(tmp_path, samples):
    model = Model(devices=8)
    assert len(list(answers(model, tmp_path, samples))) == 2 * STAGES and model.most == 1


def test_what_is_answered_is_handed_on_before_what_takes_longer(tmp_path, samples):
    model, slow = Model(), threading.Event()
    model.wait = lambda requests: requests[0].prompt.endswith("0?") and slow.wait(LONG)
    found = answers(model, tmp_path, samples)
    assert "0" not in {next(found).doc_id for _ in range(3)}
    slow.set()
    assert len(list(found)) == 2 * STAGES - 3


def test_an_interruption_loses_no_answer_that_is_on_its_way(tmp_path, samples):
    model, stopped = Model(), threading.Event()

    def wait(requests):
        if requests[0].prompt.endswith("0?"):
            threading.Timer(0.5, stopped.set).start()
            raise KeyboardInterrupt
        stopped.wait(LONG)

    model.wait = wait
    found = []
    with pytest.raises(KeyboardInterrupt):
        found.extend(sample.doc_id for sample in answers(model, tmp_path, samples))
    assert model.calls == STAGES and len(found) == STAGES - 1 and "0" not in found
