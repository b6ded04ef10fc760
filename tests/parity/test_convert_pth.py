"""Training files and published starting weights, made with torch and peft themselves."""

import copy
import json
import os
import shutil

import numpy as np
import pytest

from unibiomed_jax.config.presets import SAM2_VARIANTS
from unibiomed_jax.parameters import LoraInfo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from micro_checkpoint import (  # noqa: E402
    MICRO,
    assert_same_tensors,
    micro_tensors,
    read_all,
    run_command,
    write_released,
)
from safetensors.torch import save_file  # noqa: E402

from unibiomed_jax import checkpoint  # noqa: E402
from unibiomed_jax.conversion import from_torch, sources, to_torch  # noqa: E402
from unibiomed_jax.conversion.oracles.language import torch_language  # noqa: E402
from unibiomed_jax.conversion.tables.qwen2 import TORCH_EMBEDDING, TORCH_HEAD  # noqa: E402
from unibiomed_jax.conversion.tables.sam2 import PREFIX  # noqa: E402
from unibiomed_jax.errors import InputError  # noqa: E402
from unibiomed_jax.inputs.tokenizer import UNIBIOMED_TOKENS, Tokenizer  # noqa: E402

RANK, ALPHA = 8, 24
LAYERS = [*(f"{x}_proj" for x in "qkvo"), "gate_proj", "up_proj", "down_proj"]
# What the reference trains besides the adapters.
TRAINED = ("mlp1.", "text_hidden_fcs.", *(f"{PREFIX}{x}." for x in
           ("sam_mask_decoder", "sam_prompt_encoder", "memory_encoder", "memory_attention")))  # fmt: skip


def language_model():
    """The golden checkpoint's language model in transformers."""
    model = torch_language(sources.released(MICRO).config.language)
    prefix = "language_model."
    tensors = {n.removeprefix(prefix): torch.tensor(v) for n, v in micro_tensors().items() if prefix in n}
    model.load_state_dict(tensors)
    return model


@pytest.fixture(scope="module")
def adapted():
    """The language model with random adapters, and new embeddings and head, as training leaves it."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(language_model(), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


def trained_values(adapted, *, whole=False):
    """The state_dict a training run saves: what was trained, or with `whole` everything."""
    tensors = micro_tensors()
    rng = np.random.default_rng(1)
    kept = {
        (name.replace("g_weight", "gamma") if name.startswith(PREFIX) else name): torch.tensor(
            values + rng.standard_normal(values.shape).astype(np.float32)
            if name.startswith(TRAINED)
            else values
        )
        for name, values in tensors.items()
        if name.startswith(TRAINED) or (whole and not name.startswith("language_model."))
    }
    state = {
        ("mllm.model." + name if name.startswith(("mlp1.", "vision_model.")) else name): value
        for name, value in kept.items()
    }
    for name, value in adapted.state_dict().items():
        if whole or "lora_" in name or "embed_tokens" in name or "lm_head" in name:
            state[f"mllm.model.language_model.{name}"] = value
    return state


def save(path, content):
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def training_file(adapted, tmp_path_factory):
    return save(
        tmp_path_factory.mktemp("pth") / "iter_1.pth", {"state_dict": trained_values(adapted), "meta": {}}
    )


def read(file, base=MICRO, sam2_file=None, *, rank=RANK, alpha=ALPHA, keep_lora=False):
    return sources.trained(file, base, sam2_file, rank=rank, alpha=alpha, keep_lora=keep_lora)


def expected_tensors(adapted):
    """The released tensors after training, with the adapters merged by peft."""
    expected = micro_tensors()
    for name, value in trained_values(adapted).items():
        name = name.removeprefix("mllm.model.").replace("gamma", "g_weight")
        if name in expected:
            expected[name] = value.numpy()
    merged = copy.deepcopy(adapted).merge_and_unload().state_dict()
    return expected | {f"language_model.{name}": value.numpy() for name, value in merged.items()}


def assert_close_tensors(found, expected):
    """Equal bits, except for merged kernels: within float32 rounding of a sum of RANK products."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        if any(f"{layer}.weight" in name for layer in LAYERS) and name.startswith("language_model."):
            assert np.abs(found[name] - values).max() <= 2e-6 * np.abs(values).max(), name
        else:
            assert np.array_equal(found[name], values), name


# ------------------------------------------------------------------------------------------------------------
# Training files


def test_adapters_are_merged_as_peft_merges_them(adapted, training_file, tmp_path):
    from_torch.convert(read(training_file), tmp_path / "converted")
    to_torch.convert(tmp_path / "converted", tmp_path / "back")
    found, expected = read_all(tmp_path / "back"), expected_tensors(adapted)
    assert_close_tensors(found, expected)
    kernel = "language_model.model.layers.1.mlp.up_proj.weight"
    assert np.abs(found[kernel] - micro_tensors()[kernel]).max() > 0.1, "the adapters must change something"


@pytest.mark.parametrize("form", ["flat", "legacy", "whole"])
def test_other_forms_of_the_file_are_the_same(adapted, training_file, tmp_path, form):
    state = trained_values(adapted, whole=form == "whole")
    if form == "whole":
        assert any("base_layer.weight" in name for name in state)
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=form != "legacy")
    expected, found = read(training_file).tensors, read(tmp_path / "x.pth").tensors
    assert_same_tensors({n: t.read() for n, t in found.items()}, {n: t.read() for n, t in expected.items()})


def test_merging_rounds_once_from_float32(adapted, training_file, tmp_path):
    """A bfloat16 kernel becomes the bfloat16 nearest to the float32 sum."""
    rounded = {name: torch.tensor(v).bfloat16() for name, v in micro_tensors().items()}
    base = write_released(tmp_path / "base", {})
    save_file(rounded, base / "model.safetensors")
    source = read(training_file, base)
    state = torch.load(training_file, weights_only=True)["state_dict"]
    name = "language_model.model.layers.0.self_attn.k_proj.weight"
    lora = "mllm.model.language_model.base_model.model.model.layers.0.self_attn.k_proj.lora_{}.default.weight"
    update = state[lora.format("B")].double() @ state[lora.format("A")].double()
    exact = (rounded[name].double() + ALPHA / RANK * update).numpy()
    found = source.tensors[name].read()
    assert found.dtype == np.dtype("bfloat16")
    assert np.abs(found.astype(np.float64) - exact).max() <= 2.0**-8 * np.abs(exact).max()
    nearest = torch.tensor(exact).float().bfloat16().float().numpy()
    assert (found.astype(np.float32) == nearest).mean() > 0.999


def test_adapters_kept_apart_are_merged_later_or_handed_to_peft(adapted, training_file, tmp_path):
    converted = tmp_path / "converted"
    from_torch.convert(read(training_file, keep_lora=True), converted)
    expected = expected_tensors(adapted)
    loaded = checkpoint.load(converted, merge_lora=False)
    assert loaded.lora == LoraInfo(RANK, ALPHA)
    down = loaded.params["language_model"]["layers"]["mlp"]["down_proj"]
    state = adapted.state_dict()
    layer = "base_model.model.model.layers.1.mlp.down_proj"
    assert np.array_equal(down["lora"]["a"][1], state[f"{layer}.lora_A.default.weight"].numpy().T)
    assert np.array_equal(down["lora"]["b"][1], state[f"{layer}.lora_B.default.weight"].numpy().T)
    kernel = checkpoint.load(converted).params["language_model"]["layers"]["mlp"]["down_proj"]["kernel"]
    merged = expected["language_model.model.layers.1.mlp.down_proj.weight"].T
    assert np.abs(kernel[1] - merged).max() <= 2e-6 * np.abs(merged).max()

    to_torch.convert(converted, tmp_path / "merged")
    assert_close_tensors(read_all(tmp_path / "merged"), expected)

    to_torch.convert(converted, tmp_path / "apart", adapter=True)
    found = read_all(tmp_path / "apart")
    assert np.array_equal(found["language_model.model.layers.1.mlp.down_proj.weight"],
                          micro_tensors()["language_model.model.layers.1.mlp.down_proj.weight"])  # fmt: skip
    base = language_model()
    prefix = "language_model."
    base.load_state_dict({n.removeprefix(prefix): torch.tensor(v) for n, v in found.items() if prefix in n})
    again = peft.PeftModel.from_pretrained(base, tmp_path / "apart" / "adapter").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, adapted(ids).logits)


def test_the_command_reads_a_training_file(training_file, tmp_path, monkeypatch, capsys):
    options = ("--base", MICRO, "--lora-rank", RANK, "--lora-alpha", ALPHA)
    assert run_command(monkeypatch, from_torch, training_file, tmp_path / "out", *options) == 0
    assert "Converted 425 tensors" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# Refused


def without(state, name):
    return {key: value for key, value in state.items() if name not in key}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: without(s, "layers.1.mlp.up_proj.lora_B"), "1.mlp.up_proj.lora_B.weight is missing"),
        (lambda s: s | {"mllm.model.mlp1.9.weight": torch.ones(3)}, "mlp1.9.weight has no place"),
        (lambda s: s | {"mllm.model.mlp1.0.weight": torch.ones(3)}, r"mlp1.0.weight has shape \(3,\)"),
        (lambda s: s | {"mlp1.0.weight": s["mllm.model.mlp1.0.weight"]}, "sets mlp1.0.weight twice"),
        (lambda s: s | {"text_hidden_fcs.0.bias": "seven"}, "0.bias' is a str, not a tensor"),
        (lambda s: s | {"text_hidden_fcs.0.bias": torch.ones(64, dtype=torch.int64)}, "torch.int64 numbers"),
        (lambda s: s | {"mllm.model.vision_model.attn.qkv.lora_A.default.weight": torch.ones(3)},
         "vision_model.attn.qkv.lora_A.weight has no place"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(adapted, tmp_path, change, reason):
    file = save(tmp_path / "x.pth", {"state_dict": change(trained_values(adapted))})
    with pytest.raises(InputError, match=reason):
        read(file)


def test_adapters_of_another_rank_ask_for_their_alpha(training_file):
    with pytest.raises(
        InputError, match=f"rank {RANK}, not 128; pass --lora-rank {RANK} and the --lora-alpha"
    ):
        read(training_file, rank=128)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_no_pickled_code_runs(tmp_path):
    file = save(tmp_path / "x.pth", {"state_dict": {}, "history": Bomb(tmp_path / "ran")})
    with pytest.raises(InputError, match="holds objects besides tensors"):
        read(file)
    assert not (tmp_path / "ran").exists()


def test_damaged_files_are_named(training_file, tmp_path):
    content = training_file.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        (tmp_path / "x.pth").write_bytes(content[:size])
        with pytest.raises(InputError, match=r"x.pth (cannot be read|holds objects)"):
            read(tmp_path / "x.pth")
    with pytest.raises(InputError, match="y.pth is missing"):
        read(tmp_path / "y.pth")


# ------------------------------------------------------------------------------------------------------------
# Published starting weights


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """InternVL and SAM2 as they are published, in miniature."""
    root = tmp_path_factory.mktemp("published")
    tensors = micro_tensors()
    rows = len(tensors[TORCH_EMBEDDING]) - len(UNIBIOMED_TOKENS)
    internvl = {
        name: values[:rows].copy() if name in (TORCH_EMBEDDING, TORCH_HEAD) else values
        for name, values in tensors.items()
        if not name.startswith((PREFIX, "text_hidden_fcs."))
    }
    values = json.loads((MICRO / "config.json").read_text())
    values["llm_config"]["vocab_size"] = rows
    folder = write_released(
        root / "internvl", internvl, llm_config=values["llm_config"], model_type="internvl_chat",
        template="internvl2_5", architectures=["InternVLChatModel"],
    )  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        content = json.loads((folder / name).read_text())
        if name == "tokenizer.json":
            content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < rows]
        elif name == "added_tokens.json":
            content = {token: number for token, number in content.items() if number < rows}
        else:
            content["added_tokens_decoder"] = {
                number: token
                for number, token in content["added_tokens_decoder"].items()
                if int(number) < rows
            }
        (folder / name).write_text(json.dumps(content))
    state = {
        name.removeprefix(PREFIX).replace("g_weight", "gamma"): torch.tensor(v)
        for name, v in tensors.items()
        if name.startswith(PREFIX)
    }
    return folder, save(root / "sam2.pt", {"model": state}), rows


def test_what_a_training_file_lacks_is_said(adapted, tmp_path, monkeypatch, capsys):
    values = trained_values(adapted)
    few = {name: value for name, value in values.items() if "mlp1" not in name}
    options = ("--base", MICRO, "--lora-rank", RANK, "--lora-alpha", ALPHA, "--overwrite")
    for state, said in ((values, []), (few, ["mlp1.*"])):
        file = save(tmp_path / "trained.pth", {"state_dict": state})
        assert run_command(monkeypatch, from_torch, file, tmp_path / "out", *options) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "holds nothing of" in line]
        assert [line.split("nothing of ")[1].split(",")[0] for line in lines] == said


def test_published_weights_start_a_training(published, tmp_path):
    folder, file, rows = published
    from_torch.convert(sources.starting_weights(folder, file, seed=3), tmp_path / "converted")
    to_torch.convert(tmp_path / "converted", tmp_path / "back")
    found, golden = read_all(tmp_path / "back"), micro_tensors()
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        if name in (TORCH_EMBEDDING, TORCH_HEAD):
            new = found[name][rows:]
            assert np.array_equal(found[name][:rows], values[:rows])
            assert new.shape == (5, 64) and 0.015 < new.std() < 0.025 and abs(new.mean()) < 0.005
        elif name.startswith("text_hidden_fcs."):
            assert found[name].shape == values.shape
            assert np.abs(found[name]).max() <= 64**-0.5 and found[name].std() > 0.5 * 64**-0.5
        else:
            assert np.array_equal(found[name], values), name
    assert not np.array_equal(found[TORCH_EMBEDDING][rows:], found[TORCH_HEAD][rows:])
    loaded = checkpoint.read_config(tmp_path / "converted")
    assert loaded.template == "phi3_chat" and loaded.sam2 == SAM2_VARIANTS["micro"]
    assert sources.released(tmp_path / "back").config == loaded, "the result is a release like any other"

    for name in ("converted/tokenizer", "back"):
        tokenizer = Tokenizer.from_folder(tmp_path / name)
        assert tokenizer.encode("".join(UNIBIOMED_TOKENS)) == list(range(rows, rows + 5))
        assert tokenizer.vocab_size == rows + 5
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert again.encode("[SEG]", add_special_tokens=False) == [rows]

    same = sources.starting_weights(folder, file, seed=3).tensors
    other = sources.starting_weights(folder, file, seed=4).tensors
    for name in (TORCH_EMBEDDING, TORCH_HEAD, "text_hidden_fcs.0.weight", "text_hidden_fcs.2.bias"):
        assert np.array_equal(same[name].read(), found[name]), name
        assert not np.array_equal(other[name].read(), found[name]), name


def test_a_training_file_over_published_weights(published, training_file, adapted, tmp_path):
    folder, file, _ = published
    from_torch.convert(read(training_file, folder, file), tmp_path / "converted")
    to_torch.convert(tmp_path / "converted", tmp_path / "back")
    assert_close_tensors(read_all(tmp_path / "back"), expected_tensors(adapted))

    partial = save(tmp_path / "x.pth", without(trained_values(adapted), "text_hidden_fcs.2"))
    with pytest.raises(InputError, match="text_hidden_fcs.2.weight is missing"):
        read(partial, folder, file)


def test_wrong_pairs_are_refused(published, tmp_path):
    folder, file, _ = published
    with pytest.raises(InputError, match="InternVL2.5 without SAM2; add its file with --sam2"):
        sources.released(folder)
    with pytest.raises(InputError, match="already holds SAM2; leave out --sam2"):
        sources.starting_weights(MICRO, file)
    newer = torch.load(file, weights_only=True)
    newer["model"]["obj_ptr_tpos_proj.weight"] = torch.ones(8, 32)
    with pytest.raises(InputError, match=r"is SAM 2.1 \(it holds obj_ptr_tpos_proj.weight\)"):
        sources.starting_weights(folder, save(tmp_path / "sam2.1.pt", newer))
    with pytest.raises(InputError, match="no SAM2 of a known size"):
        sources.starting_weights(folder, save(tmp_path / "other.pt", {"model": {"x": torch.ones(3)}}))


def test_a_tokenizer_that_ends_elsewhere_is_refused(published, tmp_path):
    folder, file, rows = published

    shutil.copytree(folder, tmp_path / "internvl")
    path = tmp_path / "internvl" / "tokenizer_config.json"
    content = json.loads(path.read_text())
    del content["added_tokens_decoder"][str(rows - 1)]
    path.write_text(json.dumps(content))
    source = sources.starting_weights(tmp_path / "internvl", file)
    with pytest.raises(InputError, match=f"ends at id {rows - 2} but the embedding has {rows} rows"):
        from_torch.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
