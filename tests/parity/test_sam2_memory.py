"""SAM2's memory and the loop over frames against torch, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unibiomed_jax.models.memory import Memory
from unibiomed_jax.models.sam2 import plan_frames

torch = pytest.importorskip("torch")
pytest.importorskip("sam2.modeling")

from measured import assert_close  # noqa: E402
from module_checks import assert_gradients_close, value_and_gradients  # noqa: E402
from sam2_torch import (  # noqa: E402
    CONFIG,
    huggingface_sam2,
    meta_sam2,
    nchw,
    nhwc,
    our_gradients,
    our_sam2,
    random,
    sine_positions,
    torch_memory_attention,
)

OBJECTS, GRID, DIM, MEMORY_DIM = 2, CONFIG.grid, CONFIG.d_model, CONFIG.memory_dim
CELLS, TOKENS = GRID * GRID, DIM // MEMORY_DIM


@pytest.fixture(scope="module")
def meta():
    return meta_sam2(seed=1)


@pytest.fixture(scope="module")
def huggingface(meta):
    return huggingface_sam2(meta)


@pytest.fixture(scope="module")
def ours(meta):
    return our_sam2(meta)


def double(x, requires_grad=False):
    return torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=requires_grad)


def test_memory_encoder_and_gradients_equal_torch(meta, huggingface, ours):
    image = random((2, GRID, GRID, DIM), 1)
    masks = 3 * random((2, OBJECTS, CONFIG.image_size, CONFIG.image_size), 2)
    cotangent = random((2, OBJECTS, GRID, GRID, MEMORY_DIM), 3)
    torch_image, torch_masks = nchw(image, requires_grad=True), double(masks, requires_grad=True)
    meta.zero_grad()
    per_object = torch_image.repeat_interleave(OBJECTS, 0)
    prompt = (20 * torch_masks.sigmoid() - 10).flatten(0, 1)[:, None]
    output = meta.memory_encoder(per_object, prompt, skip_mask_sigmoid=True)
    expected = nhwc(output["vision_features"]).reshape(cotangent.shape)
    (output["vision_features"] * nchw(cotangent).flatten(0, 1)).sum().backward()

    result, grads, input_grads = value_and_gradients(
        ours, lambda model, inputs: model.memory_encoder(*inputs), (image, masks), cotangent
    )
    assert_close(result, expected, 1e-5)
    assert_close(input_grads[0], nhwc(torch_image.grad), 1e-5)
    assert_close(input_grads[1], torch_masks.grad, 1e-5)
    assert_gradients_close(grads, our_gradients(meta), 1e-5, ("memory_encoder.",))

    with torch.no_grad():
        again, _ = huggingface.memory_encoder(per_object, prompt)
    assert_close(result, nhwc(again).reshape(cotangent.shape), 1e-5)


def random_memory():
    """Four slots and three pointers, one of each not valid and full of rubbish."""
    return Memory(
        frames=random((4, OBJECTS, CELLS, MEMORY_DIM), 4),
        time=random((4, MEMORY_DIM), 5),
        frames_valid=np.array([True, False, True, True]),
        pointers=random((OBJECTS, 3 * TOKENS, MEMORY_DIM), 6),
        pointers_valid=np.repeat([True, True, False], TOKENS),
    )


def test_memory_attention_and_gradients_equal_torch(meta, huggingface, ours):
    image, memory = random((GRID, GRID, DIM), 7), random_memory()
    cotangent = random((OBJECTS, GRID, GRID, DIM), 8)
    position, place = sine_positions(meta, GRID)

    def torch_inputs():
        frames, time, pointers = (double(x, True) for x in (memory.frames, memory.time, memory.pointers))
        queries = double(image.reshape(CELLS, 1, DIM), True)
        slots = np.flatnonzero(memory.frames_valid)
        arguments = (
            queries.expand(-1, OBJECTS, -1),
            position.expand(-1, OBJECTS, -1),
            [frames[slot].transpose(0, 1) for slot in slots],
            [time[slot] for slot in slots],
            place,
            [pointers[:, k * TOKENS : (k + 1) * TOKENS].reshape(OBJECTS, DIM) for k in range(2)],
        )
        return (queries, frames, time, pointers), arguments

    leaves, arguments = torch_inputs()
    meta.zero_grad()
    output = torch_memory_attention(meta.memory_attention, *arguments)
    (output * double(cotangent).flatten(1, 2).transpose(0, 1)).sum().backward()
    expected = output.detach().transpose(0, 1).reshape(cotangent.shape)

    def call(model, inputs):
        image, frames, time, pointers = inputs
        return model.memory_attention(image, memory._replace(frames=frames, time=time, pointers=pointers))

    inputs = (image, memory.frames, memory.time, memory.pointers)
    result, grads, input_grads = value_and_gradients(ours, call, inputs, cotangent)
    assert_close(result, expected, 1e-5)
    for mine, leaf in zip(input_grads, leaves, strict=True):
        assert_close(mine, leaf.grad.reshape(mine.shape), 1e-5)
    assert_gradients_close(grads, our_gradients(meta), 1e-5, ("memory_attention.",))

    _, arguments = torch_inputs()
    with torch.no_grad():
        again = torch_memory_attention(huggingface.memory_attention, *arguments)
    assert_close(result, again.reshape(cotangent.shape), 1e-5)


def torch_segment(meta, pixels, language, order):
    """The reference's loop, composed of Meta's modules: `order` holds (frame, direction), 0 = prompted."""
    position, place = sine_positions(meta, GRID)
    times = meta.maskmem_tpos_enc.reshape(-1, MEMORY_DIM)
    prompted, tracked, answers = {}, {}, {}
    for index, direction in order:
        levels = meta.image_encoder(nchw(pixels[index : index + 1]))["backbone_fpn"]
        image = levels[2].expand(OBJECTS, -1, -1, -1)
        sparse, dense = meta.sam_prompt_encoder(
            points=(torch.zeros(OBJECTS, 1, 2), -torch.ones(OBJECTS, 1, dtype=torch.int32)),
            boxes=None,
            masks=None,
        )
        if direction == 0:
            conditioned = image + meta.no_mem_embed.reshape(1, -1, 1, 1)
            sparse = torch.cat([sparse, double(language)[:, None]], 1)
        else:
            memories = [(frame, times[-1]) for frame, _ in prompted.values()]
            for distance in range(CONFIG.num_memories - 1, 0, -1):
                if (index - direction * distance, direction) in tracked:
                    frame, _ = tracked[index - direction * distance, direction]
                    memories.append((frame, times[distance - 1]))
            pointers = [p for j, (_, p) in prompted.items() if (index - j) * direction >= 0]
            for distance in range(1, CONFIG.max_object_pointers):
                if (index - direction * distance, direction) in tracked:
                    pointers.append(tracked[index - direction * distance, direction][1])
            frames, frame_times = zip(*memories, strict=True)
            conditioned = torch_memory_attention(
                meta.memory_attention,
                image.flatten(2).permute(2, 0, 1),
                position.expand(-1, OBJECTS, -1),
                frames,
                frame_times,
                place,
                pointers,
            )
            conditioned = conditioned.permute(1, 2, 0).reshape(image.shape)
        s0, s1 = meta.sam_mask_decoder.conv_s0(levels[0]), meta.sam_mask_decoder.conv_s1(levels[1])
        masks, ious, mask_tokens, scores = meta.sam_mask_decoder(
            image_embeddings=conditioned,
            image_pe=meta.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
            repeat_image=False,
            high_res_features=[s0, s1],
        )
        best = ious.argmax(-1)
        chosen = masks[torch.arange(OBJECTS), best]
        pointer = meta.obj_ptr_proj(mask_tokens[torch.arange(OBJECTS), best])
        pointer = torch.where(scores > 0, pointer, meta.no_obj_ptr)
        large = torch.nn.functional.interpolate(chosen[:, None], (CONFIG.image_size,) * 2, mode="bilinear")
        memory = meta.memory_encoder(image, 20 * large.sigmoid() - 10, skip_mask_sigmoid=True)
        frame = memory["vision_features"].flatten(2).permute(2, 0, 1)
        (tracked if direction else prompted)[(index, direction) if direction else index] = (frame, pointer)
        answers[index] = chosen, ious, scores[:, 0]
    return [torch.stack(x) for x in zip(*(answers[i] for i in sorted(answers)), strict=True)]


@pytest.fixture(scope="module")
def segment(ours):
    graphdef, state = nnx.split(ours)
    function = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state).segment_frames(*inputs))
    return lambda *inputs: function(state, *inputs), function


ORDERS = {
    "five at the start": (14, None, [*range(5)], [*range(5, 14)], []),
    "chosen": (13, [9, 3], [3, 9], [4, 5, 6, 7, 8, 10, 11, 12], [2, 1, 0]),
    "a short volume": (3, None, [0, 1, 2], [], []),
    "the last one": (9, [8], [8], [], [*range(7, -1, -1)]),
}


@pytest.mark.parametrize("case", ORDERS)
def test_volumes_equal_a_loop_of_torch_modules(meta, segment, case):
    num_frames, conditioning, prompted, forward, backward = ORDERS[case]
    pixels, language = random((14, CONFIG.image_size, CONFIG.image_size, 3), 9), random((OBJECTS, DIM), 10)
    order = [(i, 0) for i in prompted] + [(i, 1) for i in forward] + [(i, -1) for i in backward]
    with torch.no_grad():
        masks, ious, scores = torch_segment(meta, pixels, language, order)

    run, function = segment
    result = run(jnp.asarray(pixels), language, plan_frames(num_frames, CONFIG, conditioning, padded_to=14))
    assert function._cache_size() == 1, (
        "the number of frames and the choice of prompted ones must not recompile"
    )
    assert_close(result.ious[:num_frames], ious, 1e-4)
    assert_close(result.object_scores[:num_frames], scores, 1e-4)
    assert_close(result.masks[:num_frames], masks, 1e-4)
    assert not np.asarray(result.masks[num_frames:]).any()
