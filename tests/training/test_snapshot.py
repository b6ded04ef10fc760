import errno
import json
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from places import ROOT

from unibiomed_jax.errors import InputError
from unibiomed_jax.inputs.tokenizer import Tokenizer
from unibiomed_jax.training.config import CheckpointConfig
from unibiomed_jax.training.snapshot import Checkpointer, find_damage

pytestmark = pytest.mark.slow

TOKENIZER = ROOT / "configs" / "unibiomed_tiny" / "tokenizer"


def state(seed):
    parameters = {
        "a.b.0.kernel": jax.random.normal(jax.random.key(seed), (300, 40)),
        "a.norm": jnp.full((3,), seed, jnp.bfloat16),
    }
    return {
        "step": jnp.int32(seed),
        "trainable": parameters,
        "moments": optax.adam(1e-3).init(parameters),
        "key": jax.random.key_data(jax.random.key(seed)),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(checkpointer, step, belongs_to=None, **measures):
    checkpointer.save(
        step, state(step), position={"step": step}, config={}, measures=measures, belongs_to=belongs_to
    )


def equal(first, second):
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second))
    )


@pytest.fixture
def checkpointer(tmp_path):
    return Checkpointer(tmp_path / "run", CheckpointConfig(keep_last=2, keep_best=1))


def test_what_was_saved_comes_back_to_the_bit(checkpointer):
    assert checkpointer.restore(abstract(state(0))) is None
    save(checkpointer, 3)
    save(checkpointer, 7)
    checkpointer.wait()
    restored = checkpointer.restore(abstract(state(0)))
    assert restored.step == 7 and restored.position == {"step": 7}
    assert equal(restored.state, state(7))


def test_the_state_may_be_given_up_while_it_is_written(checkpointer):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    current = state(5)
    checkpointer.save(5, current, position={}, config={})
    for _ in range(20):
        current = overwrite(current)
    checkpointer.wait()
    assert equal(checkpointer.restore(abstract(state(0))).state, state(5))


def test_the_newest_and_the_best_stay(checkpointer):
    for step, dice in [(1, 0.3), (2, 0.9), (3, 0.5), (4, None), (5, 0.4)]:
        save(checkpointer, step, **({} if dice is None else {"dice": dice}))
    checkpointer.wait()
    assert checkpointer.steps() == [2, 4, 5]
    assert checkpointer.best() == 2
    assert {path.name for path in checkpointer.folder.iterdir()} == {"00000002", "00000004", "00000005"}


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "{", "[]", '{"files": 3}', "dtype", "digest"])
def test_a_damaged_newest_is_said_and_the_one_before_is_used(checkpointer, caplog, harm):
    save(checkpointer, 1)
    save(checkpointer, 2)
    checkpointer.wait()
    newest = checkpointer.path(2)
    data = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if harm == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif harm == "truncate":
        os.truncate(data, 100)
    elif harm == "remove":
        data.unlink()
    elif harm == "dtype":
        about = newest / "about.json"
        about.write_text(about.read_text().replace("float32", "float33"))
    elif harm == "digest":
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["files"]["about.json"][1] = "0" * 64
        (newest / "manifest.json").write_text(json.dumps(manifest))
    else:
        (newest / "manifest.json").write_text(harm)
    assert find_damage(newest)
    assert checkpointer.measures(2) == {}
    with pytest.raises(InputError, match=r"00000002 is damaged: .*; take another one \(there are 1\)"):
        checkpointer.restore(abstract(state(0)), step=2)
    restored = checkpointer.restore(abstract(state(0)))
    assert restored.step == 1 and equal(restored.state, state(1))
    assert "00000002 is damaged" in caplog.text
    save(checkpointer, 3, dice=0.5)
    checkpointer.wait()
    assert checkpointer.best() == 3
    assert checkpointer.steps() == [1, 3] and checkpointer.restore(abstract(state(0))).step == 3
    for step in checkpointer.steps():
        (checkpointer.path(step) / "manifest.json").unlink()
    with pytest.raises(InputError, match="no undamaged checkpoint"):
        checkpointer.restore(abstract(state(0)))


def test_a_damaged_checkpoint_ahead_displaces_nothing(checkpointer):
    save(checkpointer, 500, dice=0.6)
    save(checkpointer, 1000, dice=0.9)
    checkpointer.wait()
    (checkpointer.path(1000) / "position.json").unlink()
    again = Checkpointer(checkpointer.folder, CheckpointConfig(keep_last=1, keep_best=1))
    assert again.restore(abstract(state(0))).step == 500 == again.best()
    save(again, 600)
    again.wait()
    assert again.steps() == [500, 600, 1000]
    save(again, 700, dice=0.7)
    again.wait()
    assert again.steps() == [700, 1000]
    save(again, 1000)
    again.wait()
    assert again.steps() == [700, 1000] and again.restore(abstract(state(0))).step == 1000


def test_all_that_were_measured_stay_while_they_are_fewer_than_wanted(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep_last=1, keep_best=3))
    save(checkpointer, 1, dice=0.3)
    save(checkpointer, 2, dice=0.9)
    save(checkpointer, 3)
    checkpointer.wait()
    assert checkpointer.steps() == [1, 2, 3]


def test_a_checkpoint_of_another_model_names_the_leaf(checkpointer):
    save(checkpointer, 1)
    checkpointer.wait()
    other = abstract(state(0))
    other["trainable"]["a.norm"] = jax.ShapeDtypeStruct((4,), jnp.bfloat16)
    with pytest.raises(InputError, match=r"trainable/a\.norm is \[\[3\], 'bfloat16'\] there and \[\[4\]"):
        checkpointer.restore(other)


def test_a_checkpoint_of_equal_shapes_but_another_model_or_start_is_refused(checkpointer):
    heads = {"model.vision.num_heads": 2, "model.sizes": (1, 2), "initial": "seed 1"}
    save(checkpointer, 1, belongs_to=heads)
    checkpointer.wait()
    assert checkpointer.restore(abstract(state(0)), belongs_to=heads).step == 1
    with pytest.raises(
        InputError, match=r"num_heads is 2 there and 4 here; resume with the configuration in"
    ):
        checkpointer.restore(abstract(state(0)), belongs_to=heads | {"model.vision.num_heads": 4})
    with pytest.raises(InputError, match=r"initial is seed 1 there and missing here"):
        checkpointer.restore(
            abstract(state(0)), belongs_to={k: v for k, v in heads.items() if k != "initial"}
        )


def test_a_checkpoint_holds_configuration_and_tokenizer_and_nothing_beside(checkpointer, tmp_path):
    folder = tmp_path / "release"
    shutil.copytree(TOKENIZER, folder)
    (folder / "model.safetensors").write_bytes(b"the weights of a whole release")
    checkpointer.save(1, state(1), position={"step": 9}, config={"seed": 4}, tokenizer=folder)
    checkpointer.wait()
    saved = checkpointer.path(1)
    assert json.loads((saved / "config.json").read_text()) == {"seed": 4}
    assert json.loads((saved / "position.json").read_text()) == {"step": 9}
    assert {path.name for path in (saved / "tokenizer").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert Tokenizer.from_folder(saved / "tokenizer").backend.to_str() == (
        Tokenizer.from_folder(folder).backend.to_str()
    )


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run cannot be created \(.*\); choose another --folder"):
        Checkpointer(tmp_path / "file" / "run", CheckpointConfig())


def test_a_full_disk_leaves_the_last_good_checkpoint(checkpointer, monkeypatch):
    save(checkpointer, 1)
    checkpointer.wait()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("unibiomed_jax.training.snapshot.digests", full)
    save(checkpointer, 2)
    with pytest.raises(InputError, match=r"full \(checkpoint 1 is intact\)"):
        checkpointer.wait()
    monkeypatch.undo()
    assert {path.name for path in checkpointer.folder.iterdir()} == {"00000001"}
    assert checkpointer.restore(abstract(state(0))).step == 1


def test_an_error_of_the_background_shows_without_waiting(checkpointer, monkeypatch):
    monkeypatch.setattr("unibiomed_jax.training.snapshot.digests", lambda _: 1 / 0)
    save(checkpointer, 1)
    with pytest.raises(ZeroDivisionError):
        for _ in range(200):
            checkpointer.check()
            time.sleep(0.05)


def test_leftovers_of_a_killed_run_are_removed(checkpointer):
    leftover = checkpointer.folder / "00000009.partial"
    leftover.mkdir()
    again = Checkpointer(checkpointer.folder, checkpointer.config)
    assert leftover.exists()  # for all it knows, the save of a run that goes on
    with again.claim():
        assert not leftover.exists() and again.steps() == []
