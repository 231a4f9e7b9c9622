"""Low-bit weights through transformers: `from_pretrained`, `save_pretrained`, Trainer and its checkpoints."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="Trainer needs accelerate, which the dev extra brings")
from command_runs import far
from safetensors.torch import load_file, save_file
from trainer_runs import RELEASED, ROWS, Run, arguments, make_model, stored, train
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from apollo_optim import InputError, LowBitWeight, quantize_weights
from apollo_optim.integrations.low_bit import IS_4, METHOD, LowBitConfig, quantize
from apollo_optim.integrations.transformers import apollo


def opened(folder: Path, dtype: str = "bfloat16", **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **how)


def assert_same(one: Any, other: Any) -> None:
    a, b = stored(one), stored(other)
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert t.dtype == b[name].dtype
        assert torch.equal(t, b[name]), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A Llama whose weights moved a little since they were quantised, and its directory, in several files."""
    model, folder = quantize(make_model(dtype="bfloat16"), LowBitConfig(4, 32)), tmp_path_factory.mktemp("saved")
    train_steps(model, folder / "run")
    model.save_pretrained(folder / "model", max_shard_size="20KB")
    return model, folder / "model"


def train_steps(model: Any, out: Path, steps: int = 3) -> None:
    args = TrainingArguments(**arguments(out, max_steps=steps, save_strategy="no"))
    Trainer(model, args, train_dataset=ROWS, optimizer_cls_and_kwargs=apollo("apollo-mini", args, model)).train()


@pytest.mark.parametrize(("kind", "dtype", "bits"), [("llama", "bfloat16", 8), ("gpt2", "float32", 4)])
def test_float_weights_are_quantised_as_they_are_read(tmp_path, kind, dtype, bits):
    model = make_model(kind, dtype)
    model.save_pretrained(tmp_path)
    ours = opened(tmp_path, dtype, quantization_config=LowBitConfig(bits, 32))
    names = quantize_weights(model, bits, 32)
    assert [name for name, p in ours.named_parameters() if isinstance(p, LowBitWeight)] == names
    for (name, p), (_, q) in zip(ours.named_parameters(), model.named_parameters(), strict=True):
        assert p.dtype == q.dtype
        assert p.requires_grad
        assert torch.equal(p, q), name


def test_no_float_copy_of_the_model_is_made(tmp_path, monkeypatch):
    """Each weight is quantised before the next is read."""
    made: list[int] = []
    real = LowBitWeight.from_float

    def counting(value, *how):
        floats = sum(p.numel() for p in loading[0].parameters() if not p.is_meta and not isinstance(p, LowBitWeight))
        made.append(floats)
        return real(value, *how)

    model = make_model()
    model.save_pretrained(tmp_path)
    loading: list[Any] = []
    real_init = type(model).__init__
    monkeypatch.setattr(
        type(model), "__init__", lambda self, *a, **k: (real_init(self, *a, **k), loading.append(self))[0]
    )
    monkeypatch.setattr(LowBitWeight, "from_float", staticmethod(counting))
    opened(tmp_path, quantization_config=LowBitConfig(8, 32))
    matrices = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    assert len(made) == 14
    assert max(made) <= sum(p.numel() for p in model.parameters()) - matrices


def test_a_directory_holds_the_codes(saved):
    model, folder = saved
    files = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert "model.layers.0.mlp.up_proj.weight.codes" in files
    assert "model.layers.0.mlp.up_proj.weight" not in files
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": METHOD, "bits": 4, "group_size": 32, "targets": ["attn", "mlp"], "exclude": []}
    assert len(list(folder.glob("*.safetensors"))) > 2
    again = opened(folder)
    assert_same(model, again)
    assert sum(isinstance(p, LowBitWeight) for p in again.parameters()) == 14


def test_dequantised_and_quantised_again_codes_move(saved, tmp_path):
    """What the files are for."""
    model, folder = saved
    opened(folder).dequantize().save_pretrained(tmp_path)
    assert not any("codes" in name for name in load_file(tmp_path / "model.safetensors"))
    floats = opened(tmp_path)
    assert not hasattr(floats.config, "quantization_config")
    assert torch.equal(floats.lm_head.weight, model.lm_head.weight)
    assert torch.equal(floats.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight.dequantize())
    one, other = stored(model), stored(quantize(floats, LowBitConfig(4, 32)))
    codes = [name for name in one if name.endswith("codes")]
    assert sum((one[name] != other[name]).sum() for name in codes) > 0.1 * sum(one[name].numel() for name in codes)


def test_other_ways_in(saved, tmp_path):
    """Onto a device, into a head of another task, as float32, by torch's own words, and by pickle."""
    model, folder = saved
    assert_same(model, opened(folder, device_map="cpu"))
    other = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, pad_token_id=0, dtype=torch.bfloat16
    )
    assert torch.equal(other.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    wide = opened(folder, "float32")
    assert wide.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert torch.equal(wide.model.layers[0].mlp.up_proj.weight.scales, model.model.layers[0].mlp.up_proj.weight.scales)
    fresh = quantize(make_model(dtype="bfloat16"), LowBitConfig(4, 32))
    fresh.load_state_dict(stored(model))
    assert_same(model, fresh)
    assert_same(model, pickle.loads(pickle.dumps(fresh)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    out = tmp_path_factory.mktemp("plain")
    return train(out, **HOW, save_steps=3), out


HOW: dict[str, Any] = {"dtype": "bfloat16", "bits": 8, "max_steps": 5}


@pytest.mark.parametrize("callbacks", [(), RELEASED])
def test_trainer_goes_on_bitwise(plain, tmp_path, callbacks):
    run, out = plain
    resumed = train(tmp_path, **HOW, callbacks=callbacks, resume=out / "checkpoint-3", save_strategy="no")
    assert far(run.weights, resumed.weights) == far(run.state, resumed.state) == 0.0
    codes = {name: t for name, t in run.weights.items() if name.endswith("codes")}
    assert {t.dtype for t in codes.values()} == {torch.int8}
    start = stored(quantize(make_model(dtype="bfloat16"), LowBitConfig(8, 32)))
    assert all((t != start[name]).any() for name, t in codes.items())


def test_the_best_checkpoint_comes_back_bitwise(tmp_path):
    how = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 4, "load_best_model_at_end": True}
    model = quantize(make_model(dtype="bfloat16"), LowBitConfig(8, 32))
    args = TrainingArguments(**arguments(tmp_path, learning_rate=1.0, **how))  # a rate that makes it worse
    made = apollo("apollo-mini", args, model)
    trainer = Trainer(model, args, train_dataset=ROWS, eval_dataset=ROWS[:4], optimizer_cls_and_kwargs=made)
    trainer.train()
    assert_same(model, opened(Path(trainer.state.best_model_checkpoint)))


def test_stacks_of_experts(tmp_path):
    """transformers 5 stacks the experts of a layer, and takes the stacks apart when it saves floats."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes))
    model.save_pretrained(tmp_path / "float")
    config = LowBitConfig(8, 32, targets=("attn", "experts"))
    loaded = opened(tmp_path / "float", "float32", quantization_config=config)
    assert sum(isinstance(p, LowBitWeight) for p in loaded.parameters()) == 4 + (4 * 3 if IS_4 else 2)
    loaded.save_pretrained(tmp_path / "codes")
    assert_same(loaded, opened(tmp_path / "codes", "float32"))


def damaged(folder: Path, out: Path, damage: Any) -> Path:
    out.mkdir()
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    damage(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out


SCALES = "model.layers.1.mlp.up_proj.weight.scales"


def test_files_that_lack_something_or_hold_what_no_weight_has(saved, tmp_path):
    _, folder = saved
    assert_same(opened(damaged(folder, tmp_path / "whole", lambda tensors: None)), opened(folder))
    with pytest.raises(InputError, match=rf"the files have no {SCALES} \(1 in all\)"):
        opened(damaged(folder, tmp_path / "lacks", lambda tensors: tensors.pop(SCALES)))
    with pytest.raises(InputError, match=r"up_proj.weight is not finite"):
        opened(damaged(folder, tmp_path / "nan", lambda tensors: tensors[SCALES].fill_(torch.nan)))
    with pytest.raises(RuntimeError, match="mismatch"):
        opened(
            damaged(folder, tmp_path / "short", lambda tensors: tensors.update({SCALES: tensors[SCALES][:4].clone()}))
        )


def test_a_state_of_another_size_is_refused(saved):
    model, _ = saved
    state = stored(model)
    state[SCALES] = state[SCALES][:4]
    with pytest.raises(RuntimeError, match=rf"{SCALES} is \(4, 2\) torch.bfloat16, not \(128, 2\)"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"bits": 3}, "bits=3: a weight can have 8 or 4"),
        ({"group_size": 3}, "group_size=3: an even number"),
    ],
)
def test_wrong_numbers(how, said):
    with pytest.raises(InputError, match=said):
        LowBitConfig(**how)


def test_models_that_cannot_be_quantised():
    model = quantize(make_model())
    with pytest.raises(InputError, match="quantised already, by LowBitQuantizer"):
        quantize(model)
    with pytest.raises(InputError, match="'atn' matches nothing"):
        quantize(make_model(), LowBitConfig(targets="atn"))
    mixed = make_model()
    quantize_weights(mixed, 4, targets="mlp")
    with pytest.raises(InputError, match="has 4 bits in groups of 128"):
        quantize(mixed, LowBitConfig(8))
    adapted = make_model()
    adapted.peft_config = {"default": object()}
    with pytest.raises(InputError, match="adapters already: quantise it first"):
        quantize(adapted)


@pytest.mark.skipif(not IS_4, reason="transformers 5 reads scales as they are")
def test_float16_of_transformers_4(saved):
    with pytest.raises(InputError, match="float16, which has no room"):
        opened(saved[1], "float16")


@pytest.mark.skipif(IS_4, reason="transformers 4 casts scales to the model's dtype")
def test_float16(saved):
    model = opened(saved[1], "float16")
    assert torch.equal(
        model.model.layers[0].mlp.up_proj.weight.scales, saved[0].model.layers[0].mlp.up_proj.weight.scales
    )


def test_what_is_written_is_read_by_the_config_alone(saved):
    assert AutoConfig.from_pretrained(saved[1]).quantization_config["bits"] == 4
