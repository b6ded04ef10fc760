"""SAM2 against what the PyTorch reference computed (tests/golden), and the rules of volumes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from measured import assert_close
from PIL import Image
from places import GOLDEN
from safetensors.numpy import load_file

from unibiomed_jax.config.precision import BFLOAT16, FLOAT32
from unibiomed_jax.config.presets import SAM2_VARIANTS
from unibiomed_jax.conversion.tables.sam2 import rows
from unibiomed_jax.errors import InputError
from unibiomed_jax.masks.resize import resize_logits, upscale_masks
from unibiomed_jax.models import ops
from unibiomed_jax.models.sam2 import Sam2, plan_frames, store

pytestmark = pytest.mark.slow

CONFIG = SAM2_VARIANTS["micro"]
PROMPTED = CONFIG.max_conditioning_frames


def load_model(precision=FLOAT32):
    """`Sam2` with the weights of the golden checkpoint."""
    tensors = load_file(GOLDEN / "micro" / "checkpoint" / "model.safetensors")
    values = {}
    for row in rows(CONFIG):
        parts = [row.rearrangement.forward(tensors[name]) for name in row.names]
        values[row.path.removeprefix("sam2.")] = np.stack(parts) if row.stack is not None else parts[0]
    model = nnx.eval_shape(lambda: Sam2(CONFIG, precision, rngs=nnx.Rngs(0)))

    def value(path, leaf):
        array = values.pop(".".join(str(key.key) for key in path))
        assert array.shape == leaf.shape, path
        return jnp.asarray(array)

    nnx.update(model, jax.tree_util.tree_map_with_path(value, nnx.to_pure_dict(nnx.state(model))))
    assert not values
    return model


@pytest.fixture(scope="module")
def model():
    return load_model()


def compiled(model, call):
    """call(model, *inputs) as a jitted function of the inputs."""
    graphdef, state = nnx.split(model)
    function = jax.jit(lambda state, *inputs: call(nnx.merge(graphdef, state), *inputs))
    return lambda *inputs: function(state, *inputs)


@pytest.fixture(scope="module")
def encode(model):
    return compiled(model, lambda model, pixels: model.encode_image(pixels))


@pytest.fixture(scope="module")
def decode(model):
    return compiled(model, lambda model, *inputs: model.decode(*inputs))


@pytest.fixture(scope="module")
def segment(model):
    return compiled(model, lambda model, *inputs: model.segment_frames(*inputs))


def golden(case):
    # allow_pickle: the file is the repository's own, and holds its texts as object arrays.
    return np.load(GOLDEN / "micro" / f"{case}.npz", allow_pickle=True)


@pytest.fixture(scope="module")
def video():
    """The eight frames of the golden volume as RGB bytes at SAM2's size, padded by two black ones."""
    image = Image.open(GOLDEN / "images" / "CT_abdomen.png").convert("RGB").resize((410, 410))
    crops = [image.crop((10 * i, 12 * i, 10 * i + 320, 12 * i + 240)) for i in range(8)]
    frames = [np.asarray(crop.resize((256, 256), Image.Resampling.BICUBIC)) for crop in crops]
    return np.stack(frames + [np.zeros_like(frames[0])] * 2)


def nchw(x):
    return np.moveaxis(np.asarray(x), -1, -3)


def test_positions_equal_the_reference():
    case = golden("image_abdomen")
    assert_close(nchw(ops.sine_position((16, 16), 32)), case["vision_pos2"][0], 1e-6)
    assert_close(nchw(ops.sine_position((16, 16), 8)), case["maskmem_pos_enc"][0], 1e-6)


def test_image_equals_the_reference(model, encode, decode):
    case = golden("image_abdomen")
    features = encode(np.moveaxis(case["g_pixel_values0"], 1, -1))
    for mine, name in zip(features, ("fpn0", "fpn1", "fpn2"), strict=True):
        assert_close(nchw(mine), case[name], 1e-5)
    decoding = decode(features, case["seg_embed"][None])
    assert_close(decoding.multimasks, case["sam_multimasks"], 2**-11)  # stored in float16
    assert_close(decoding.masks, case["sam_lowres"][:, 0], 1e-5)
    assert_close(decoding.ious, case["sam_ious"], 1e-5)
    assert_close(decoding.object_scores, case["sam_obj_score"][..., 0], 1e-5)
    assert_close(model.object_pointer(decoding), case["sam_obj_ptr"], 1e-5)
    memory = compiled(model, lambda model, *inputs: model.remember(*inputs))(features, decoding)
    assert_close(nchw(memory.reshape(1, 1, 16, 16, 8)), case["maskmem_features"], 1e-5)


def test_memory_attention_equals_the_reference(model, encode, video):
    """Fed with the reference's memories, frame by frame, for both objects at once."""
    case = golden("video8")
    by_frame = {  # the reference goes through all frames for one object after the other
        name: case[name].reshape(2, -1, *case[name].shape[1:]).swapaxes(0, 1)
        for name in ("maskmem_features", "sam_obj_ptr", "memattn_out", "memattn_n_memory")
    }
    read = compiled(model, lambda model, image, memory: model.memory_attention(image, memory))
    plan, state = plan_frames(8, CONFIG), model.empty_state(2)
    for step, (index, direction) in enumerate(zip(plan.index[:8], plan.direction[:8], strict=True)):
        if direction:
            memory = model.recall(state, plan, index, direction)
            pointers = int(memory.pointers_valid.sum())
            total = int(memory.frames_valid.sum()) * 256 + pointers
            assert by_frame["memattn_n_memory"][step - PROMPTED].tolist() == [[total, pointers]] * 2
            features = encode(ops.normalize(video[index : index + 1]))
            result = read(features.image[0], memory).reshape(2, 256, 1, 32)
            assert_close(result, by_frame["memattn_out"][step - PROMPTED], 1e-4)
        stored = by_frame["maskmem_features"][step][:, 0].reshape(2, 8, 256).swapaxes(1, 2)
        pointer = by_frame["sam_obj_ptr"][step][:, 0]
        state = store(state, stored, pointer, step, index * direction, PROMPTED)


def test_volume_equals_the_reference(segment, video):
    case = golden("video8")
    result = segment(video, case["seg_embed"], plan_frames(8, CONFIG, padded_to=10))
    masks, ious, scores = (np.asarray(x)[:8].swapaxes(0, 1) for x in result)
    assert_close(masks, case["sam_lowres"].reshape(masks.shape), 1e-4)
    assert_close(ious, case["sam_ious"].reshape(ious.shape), 1e-4)
    assert_close(scores, case["sam_obj_score"].reshape(scores.shape), 1e-4)
    square = resize_logits(masks, (256, 256))[..., 8::16, 8::16]
    assert_close(square, case["video_res_logits_sub16"][:, :, 0], 1e-4)
    for i, logits in enumerate(upscale_masks(masks, (240, 320), 256)):
        bits = np.unpackbits(case[f"mask{i}_bits"])[: logits.size].reshape(case[f"mask{i}_shape"])
        differs = (logits > 0) != bits.astype(bool)
        assert not (differs & (np.abs(logits) >= 1e-3)).any()
        assert differs.mean() < 1e-4
    assert not np.asarray(result.masks[8:]).any(), "padding answers zeros"


def test_objects_and_images_do_not_influence_each_other(encode, decode, video):
    features = encode(ops.normalize(video[:2]))
    language = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
    together = decode(features, language)
    one_image = jax.tree.map(lambda x: x[1:], features)
    for k in range(3):
        alone = decode(one_image, language[1:, k : k + 1])
        for mine, theirs in zip(alone, together, strict=True):
            assert_close(mine[0, 0], theirs[1, k], 1e-5)


def test_equal_ious_choose_the_first_mask_and_scores_hide_nothing(video):
    model = load_model()
    last = model.sam_mask_decoder.iou_prediction_head.layers[-1]
    last.kernel[...] = jnp.zeros_like(last.kernel[...])
    last.bias[...] = jnp.zeros_like(last.bias[...])
    for sign in (-1, 1):
        score = model.sam_mask_decoder.pred_obj_score_head.layers[-1]
        score.kernel[...] = jnp.zeros_like(score.kernel[...])
        score.bias[...] = jnp.full_like(score.bias[...], sign)
        pixels, language = ops.normalize(video[:1]), jnp.ones((1, 1, 32))
        decoding = compiled(model, lambda m, x, y: m.decode(m.encode_image(x), y))(pixels, language)
        assert (decoding.object_scores == sign).all()
        assert (decoding.masks == decoding.multimasks[:, :, 0]).all()
        unseen = (model.object_pointer(decoding)[0, 0] == model.no_obj_ptr[...]).all()
        assert unseen == (sign < 0)


def test_no_gradient_flows_through_the_choice(model, encode, video):
    features = encode(ops.normalize(video[:1]))
    graphdef, state = nnx.split(model)

    def loss(state, language):
        return jnp.square(nnx.merge(graphdef, state).decode(features, language).masks).mean()

    grads, language_grad = jax.jit(jax.grad(loss, argnums=(0, 1)))(state, jnp.ones((1, 2, 32)))
    grads = nnx.to_pure_dict(grads)
    heads = [grads["sam_mask_decoder"][f"{name}_head"] for name in ("iou_prediction", "pred_obj_score")]
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(heads))
    matrix = grads["sam_prompt_encoder"]["positional_encoding_gaussian_matrix"]
    assert not np.asarray(matrix).any(), "the random matrix of the positions is fixed"
    assert np.asarray(language_grad).any()


def test_bfloat16_policy_stores_memories_in_bfloat16(video):
    model = load_model(BFLOAT16)
    case = golden("video8")
    assert model.empty_state(2).frames.dtype == jnp.bfloat16
    run = compiled(model, lambda model, *inputs: model.segment_frames(*inputs))
    result = run(video, case["seg_embed"], plan_frames(8, CONFIG, padded_to=10))
    masks = np.asarray(result.masks)[:8].swapaxes(0, 1)
    assert masks.dtype == np.float32
    exact = case["sam_lowres"].reshape(masks.shape)
    assert 0 < np.abs(masks - exact).mean() < 0.1 * np.abs(exact).mean()


@pytest.mark.parametrize(
    ("num_frames", "conditioning", "steps"),
    [
        (1, None, [(0, 0)]),
        (4, None, [(0, 0), (1, 0), (2, 0), (3, 0)]),
        (7, None, [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (5, 1), (6, 1)]),
        (5, [3, 1], [(1, 0), (3, 0), (2, 1), (4, 1), (0, -1)]),
        (4, [3], [(3, 0), (2, -1), (1, -1), (0, -1)]),
    ],
)
@pytest.mark.parametrize("padded_to", [None, 9])
def test_order_of_frames(num_frames, conditioning, steps, padded_to):
    plan = plan_frames(num_frames, CONFIG, conditioning, padded_to)
    assert [x.shape for x in plan] == [(PROMPTED + (padded_to or num_frames),)] * 3
    valid = plan.valid
    assert list(zip(plan.index[valid].tolist(), plan.direction[valid].tolist(), strict=True)) == steps
    assert not plan.direction[:PROMPTED].any()


@pytest.mark.parametrize(
    ("num_frames", "conditioning", "message"),
    [
        (0, None, "at least one frame"),
        (9, [], "1 to 5 conditioning frames, not 0"),
        (9, range(6), "1 to 5 conditioning frames, not 6"),
        (9, [2, 2], r"\[2, 2\] repeats one"),
        (9, [2, 9], "between 0 and 8"),
        (9, [-1], "between 0 and 8"),
    ],
)
def test_impossible_conditioning_is_refused(num_frames, conditioning, message):
    with pytest.raises(InputError, match=message):
        plan_frames(num_frames, CONFIG, conditioning)


@pytest.mark.parametrize("conditioning", [None, [20, 9, 27]])
def test_a_frame_recalls_what_lies_just_behind_it(model, conditioning):
    """Walk through 40 frames whose memory is their own number, and read back what is valid at each."""
    plan, state = plan_frames(40, CONFIG, conditioning), model.empty_state(1)
    prompted = plan.index[:PROMPTED][plan.valid[:PROMPTED]].tolist()
    recall = compiled(model, lambda model, *inputs: model.recall(*inputs))
    table, seen = np.asarray(model.maskmem_tpos_enc[...]), []
    for step, (index, direction, valid) in enumerate(zip(*plan, strict=True)):
        if not valid:
            continue
        if direction:
            memory = recall(state, plan, index, direction)
            behind = {distance: index - direction * distance for distance in range(1, 16)}
            behind = {distance: j for distance, j in behind.items() if (j, direction) in seen}
            expected = {j: table[-1] for j in prompted}
            expected |= {j: table[distance - 1] for distance, j in behind.items() if distance <= 6}
            slots = np.flatnonzero(memory.frames_valid)
            recalled = {int(memory.frames[slot, 0, 0, 0]): memory.time[slot] for slot in slots}
            assert recalled.keys() == expected.keys() and len(slots) == len(expected)
            assert all((recalled[j] == expected[j]).all() for j in expected)
            pointers = np.asarray(memory.pointers)[0, np.asarray(memory.pointers_valid)].ravel()
            expected = [j for j in prompted if (index - j) * direction >= 0] + list(behind.values())
            assert sorted(pointers.tolist()) == sorted(np.repeat(expected, CONFIG.d_model).tolist())
        seen.append((index, direction))
        state = store(
            state,
            np.full((1, 256, 8), index, np.float32),
            np.full((1, 32), index, np.float32),
            step,
            index * direction,
            PROMPTED,
        )


@pytest.mark.parametrize("size", [(256, 256), (31, 200), (200, 31), (48, 80), (1, 1)])
def test_host_resize_equals_the_compiled_one(size):
    x = np.random.default_rng(0).standard_normal((2, 48, 80)).astype(np.float32)
    expected = ops.resize_bilinear(x[..., None], size)[..., 0]
    assert_close(resize_logits(x, size), expected, 1e-6)


def test_other_image_sizes_are_refused(model):
    with pytest.raises(InputError, match="256x256 pixels, not 240x320"):
        model.encode_image(np.zeros((1, 240, 320, 3), np.float32))
    config = dataclasses.replace(CONFIG, image_size=100)
    with pytest.raises(InputError, match="multiple of 32, not 100"):
        Sam2(config, FLOAT32, rngs=nnx.Rngs(0))


def test_a_gradient_keeps_only_the_memory_between_the_frames_of_a_sequence(model):
    graphdef, state = nnx.split(model)
    size, side = CONFIG.image_size, 4 * CONFIG.grid

    def kept(count):
        """Bytes that the backward pass of a sequence reads."""
        plan = plan_frames(count, CONFIG)

        def backward(state, frames, language):
            def masks(state):
                return nnx.merge(graphdef, state).segment_frames(frames, language, plan).masks

            return jax.vjp(masks, state)[1]

        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((count, size, size, 3), (1, CONFIG.d_model))]
        arrays = jax.tree.leaves(jax.eval_shape(backward, state, *shapes))
        return sum(array.size * array.dtype.itemsize for array in arrays)

    memory = sum(array.nbytes for array in jax.tree.leaves(model.empty_state(1)))
    frame = 4 * (3 * size**2 + side**2)
    assert kept(16) - kept(12) < 1.1 * 4 * (memory + frame)
