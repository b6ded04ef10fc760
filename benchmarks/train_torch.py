"""The same update through the torch modules of transformers and peft: the worker that `train.py` drives.

Written as the reference trains: scores of the vocabulary at every position, and gradient checkpointing of the
language model where this library's configuration computes it again, too. Attention is torch's
scaled_dot_product_attention, the optimiser torch's fused AdamW. In float32 on a CPU; on a GPU under bfloat16
autocast, with frozen parameters in bfloat16.
"""

from __future__ import annotations

import contextlib
import resource
import time

import numpy as np
import peft
import torch
import torch.nn.functional as F
from torch import Tensor
from worker import serve
from worker_torch import Model, find_device, make_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# By beginning of the name: what trains beside adapters, and what does not even if all else does. The same
# as in unibiomed_jax.training.config.FreezeConfig.
RECIPE = (
    "projector.",
    "bridge.",
    "language.model.embed_tokens.",
    "language.lm_head.",
    "sam2.mask_decoder.",
    "sam2.prompt_encoder.",
)
FROZEN = (
    "sam2.prompt_encoder.point_embed.",
    "sam2.prompt_encoder.mask_embed.",
    "sam2.mask_decoder.iou_prediction_head.",
    "sam2.mask_decoder.pred_obj_score_head.",
)
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def choose_trainable(model: Model, setup: dict) -> list[Tensor]:
    """Attach the adapters and freeze the rest; returns what trains."""
    lora = setup["lora"]
    if lora["rank"]:
        adapter = peft.LoraConfig(
            r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=ADAPTED
        )
        peft.inject_adapter_in_model(adapter, model.language)
    for name, parameter in model.named_parameters():
        chosen = setup["all_trains"] or name.startswith(RECIPE) or ".lora_" in name
        parameter.requires_grad_(chosen and not name.startswith(FROZEN))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Read maps (masks, rows, columns) at points (masks, points, 2) in [0, 1]."""
    return F.grid_sample(maps[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


def choose_points(logits: Tensor, settings: dict) -> Tensor:
    """Mostly the least sure of uniform candidates, the rest anywhere."""
    masks, total = len(logits), settings["num_points"]
    unsure = int(settings["importance"] * total)
    candidates = torch.rand(masks, int(total * settings["oversample"]), 2, device=logits.device)
    best = (-sample(logits, candidates).abs()).topk(unsure, 1).indices
    chosen = candidates.take_along_dim(best[..., None], 1)
    return torch.cat([chosen, torch.rand(masks, total - unsure, 2, device=logits.device)], 1)


def loss_of(scores: Tensor, labels: Tensor, logits: Tensor, targets: Tensor, settings: dict) -> Tensor:
    """Token cross-entropy, and at sampled points mask cross-entropy and dice distance, weighted."""
    tokens = F.cross_entropy(scores[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    logits, targets = logits.flatten(0, 1).float(), targets.flatten(0, 1)
    with torch.no_grad():
        points = choose_points(logits, settings)
        truth = sample(targets, points)
    logits = sample(logits, points)
    masks = F.binary_cross_entropy_with_logits(logits, truth)
    probability = logits.sigmoid()
    overlap = 2 * (probability * truth).sum(1) + 1
    dice = 1 - overlap / (probability.sum(1) + truth.sum(1) + 1)
    return tokens + settings["mask_weight"] * masks + settings["dice_weight"] * dice.mean()


def prepare(setup: dict):
    """Make model, optimiser and batch from what the JAX worker said of its own, and `batch`, its arrays."""
    device, name = find_device()
    on_gpu = device == "cuda"
    model, _ = make_model(setup, device)
    trainable = choose_trainable(model, setup)
    if on_gpu:
        for parameter in model.parameters():
            parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
    if setup["recompute_language"]:
        model.language.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    options = setup["optim"]
    optimizer = torch.optim.AdamW(
        trainable,
        options["lr"],
        (options["beta1"], options["beta2"]),
        options["eps"],
        options["weight_decay"],
        fused=True,
    )
    with np.load(setup["batch"]) as file:
        host = {key: torch.from_numpy(file[key]) for key in file.files}
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

    def normalised(pixels: Tensor) -> Tensor:
        """(samples, 1, side, side, 3) bytes to (samples, 3, side, side)."""
        return (pixels[:, 0].movedim(-1, 1) / 255 - mean) / std

    def forward(batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        embeds = model.language.get_input_embeddings()(ids)
        visual = model.encode_tiles(normalised(batch["pixel_values"])).to(embeds.dtype)
        embeds = embeds.masked_scatter((ids == batch["image_id"])[..., None], visual)
        hidden = model.language.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        scores = model.language.lm_head(hidden)
        states = hidden[ids == batch["seg_id"]].view(len(ids), 1, -1)
        masks = model.decode_masks(model.encode_image(normalised(batch["sam_pixels"])), states)
        targets = batch["masks"][:, :, 0].float()
        return loss_of(scores, batch["labels"].long(), masks, targets, setup["loss"])

    def answer(_: dict) -> dict:
        begin = time.perf_counter()
        batch = {key: value.to(device) for key, value in host.items()}
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            loss = forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, options["clip"])
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated() if on_gpu else resident
        return {"seconds": seconds, "loss": value, "peak_bytes": peak}

    facts = {
        "name": f"{name}, peft {peft.__version__}",
        "precision": "bfloat16 autocast" if on_gpu else "float32",
        "trainable": sum(parameter.numel() for parameter in trainable),
    }
    return facts, answer


if __name__ == "__main__":
    serve(prepare)
