"""Low-bit weights through transformers' `from_pretrained` and `save_pretrained`, 4.57 and 5: the files hold codes.

>>> from apollo_optim.integrations.low_bit import LowBitConfig
>>> model = AutoModelForCausalLM.from_pretrained(name, quantization_config=LowBitConfig(bits=8))
>>> model.save_pretrained("out")  # opened by from_pretrained("out") wherever this module was imported

A directory that was saved, and a Trainer that goes on from its checkpoint, have the weights bitwise: to dequantise and
quantise them again would move most of the codes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from apollo_optim.core.errors import InputError
from apollo_optim.core.names import as_tuple
from apollo_optim.core.storage import is_finite, parts
from apollo_optim.quant import LowBitWeight
from apollo_optim.quant.quantize import Chosen, check_format, choose_weights, quantize_module

__all__ = ["LowBitConfig", "LowBitQuantizer", "quantize"]

METHOD = "apollo-low-bit"  # in config.json
IS_4 = transformers.__version__.startswith("4.")
LOADED = "_is_hf_initialized"  # transformers' mark of what it has read, and must not draw anew


@register_quantization_config(METHOD)
class LowBitConfig(QuantizationConfigMixin):
    """Which weights are stored in few bits, and how: the arguments of `quantize_weights`.

    Raises InputError for other bits and group sizes.
    """

    def __init__(
        self,
        bits: int = 8,
        group_size: int = 128,
        targets: str | Sequence[str] = ("attn", "mlp"),
        exclude: str | Sequence[str] = (),
        quant_method: str = METHOD,
    ) -> None:
        check_format(bits, group_size)
        self.quant_method: Any = quant_method
        self.bits, self.group_size = bits, group_size
        self.targets, self.exclude = list(as_tuple(targets)), list(as_tuple(exclude))

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: a file says what it is, whatever the defaults become. transformers 4 asks for it, and has none."""
        return self.to_dict()


@register_quantizer(METHOD)
class LowBitQuantizer(HfQuantizer):
    """What transformers asks about low-bit weights: it loads and saves them, and trains all of them, without adapters.

    Float weights are quantised one by one as they are read. Codes and scales are read into two buffers, of a module
    that stands where the weight will be and gives them the names of the files: `up_proj.weight.codes`.
    """

    requires_calibration = False
    requires_parameters_quantization = True  # transformers 4
    is_trainable = is_qat_trainable = is_compileable = True
    quantization_config: LowBitConfig

    def __init__(self, quantization_config: LowBitConfig, **settings: Any) -> None:
        super().__init__(quantization_config, **settings)
        self._chosen: Chosen = {}  # while a model is loaded
        self._names: set[str] = set()

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    # --- loading ---

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        config = self.quantization_config
        self._chosen = choose_weights(model, config.targets, config.exclude)
        self._names = {name for names in self._chosen.values() for name in names.values()}
        if self.pre_quantized:
            for module, names in self._chosen.items():
                for own, name in names.items():
                    _take_apart(module, own, name, config)
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        return not self.pre_quantized and param_name in self._names

    def create_quantized_param(self, model: nn.Module, value: Tensor, name: str, device: Any, **_: Any) -> None:
        """Of transformers 4, with a float weight that was read."""
        module_name, _dot, own = name.rpartition(".")
        model.get_submodule(module_name)._parameters[own] = self._quantized(value.to(device))

    def get_quantize_ops(self) -> "LowBitQuantizer":
        """Of transformers 5, which then calls `convert`."""
        return self

    def convert(self, tensors: dict[str, Any], *, full_layer_name: str, **_: Any) -> dict[str, nn.Parameter]:
        (value,) = tensors.values()
        return {full_layer_name: self._quantized(value[0] if isinstance(value, list) else value)}

    def _quantized(self, value: Tensor) -> nn.Parameter:
        config = self.quantization_config
        return nn.Parameter(LowBitWeight.from_float(value.detach(), config.bits, config.group_size))

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Of transformers 4, which knows before it loads."""
        if self.pre_quantized:
            owners = {name.rpartition(".")[0] for name in self._names}
            _refuse_missing(key for key in missing_keys if any(key.startswith(f"{owner}.") for owner in owners))
        return missing_keys

    def get_special_dtypes_update(self, model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Of transformers 4, which guesses what fits where."""
        return {}

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        if self.pre_quantized and not IS_4:
            known = model.state_dict(keep_vars=True)
            owners = tuple(f"{name.rpartition('.')[0]}." for name in self._names)
            _refuse_missing(key for key, t in known.items() if key.startswith(owners) and not hasattr(t, LOADED))
        for module, names in self._chosen.items():
            for own in names:
                if isinstance(part := module._modules.get(own), _Parts):
                    del module._modules[own]
                    module.register_parameter(own, nn.Parameter(part.joined()))
            quantize_module(module, self._chosen, self.quantization_config.bits, self.quantization_config.group_size)
            module.register_load_state_dict_pre_hook(_take_parts)  # type: ignore[no-untyped-call]
        for name, p in model.named_parameters():
            if isinstance(p, LowBitWeight) and not is_finite(p):
                raise InputError(f"{name} is not finite: it cannot be quantised")
        self._chosen, self._names = {}, set()
        return model

    # --- saving, and back ---

    def get_state_dict_and_metadata(
        self, model: nn.Module, *_: Any, **__: Any
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Codes and scales in the place of every low-bit weight."""
        plain: dict[str, Any] = {}
        for name, value in model.state_dict().items():
            made_of = parts(value) if isinstance(value, LowBitWeight) else {"": value}
            plain |= {f"{name}.{part}" if part else name: own for part, own in made_of.items()}
        return plain, {}

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """The model in floats, for those who know no low-bit weights. An optimizer that it has keeps the old ones."""
        for module in model.modules():
            for own, p in module.named_parameters(recurse=False):
                if isinstance(p, LowBitWeight):
                    module._parameters[own] = nn.Parameter(p.dequantize(dtype), p.requires_grad)
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        return model


def quantize(model: PreTrainedModel, config: LowBitConfig | None = None) -> PreTrainedModel:
    """The same for a model that is there already, in place: `save_pretrained` saves its codes from then on.

    Call it before the optimizer is built and before adapters are added. Weights that `quantize_weights` made low-bit
    stay as they are, if they are of these bits. Raises InputError as that does, and for a model that is quantised.
    """
    config = config or LowBitConfig()
    if getattr(model, "hf_quantizer", None) is not None:
        raise InputError(f"the model is quantised already, by {type(model.hf_quantizer).__name__}")
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise InputError("the model has adapters already: quantise it first, then add them")
    quantizer = LowBitQuantizer(config, pre_quantized=False)
    quantizer.preprocess_model(model)
    quantizer.postprocess_model(model)
    for name, p in model.named_parameters():
        if isinstance(p, LowBitWeight) and (p.bits, p.group_size) != (config.bits, config.group_size):
            raise InputError(f"{name} has {p.bits} bits in groups of {p.group_size}: {config} cannot describe it")
    model.hf_quantizer = quantizer  # type: ignore[assignment]  # as from_pretrained does
    model.config.quantization_config = config
    return model


class _Parts(nn.Module):
    """Codes and scales of a weight that is being loaded."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: LowBitWeight) -> None:
        super().__init__()
        self.weight = weight  # no parameter: it has no memory
        for name, part in parts(weight).items():
            self.register_buffer(name, part)

    def joined(self) -> LowBitWeight:
        return self.weight.of_parts(self.codes, self.scales.to(self.weight.scales.dtype))  # transformers 4 widens them


def _take_apart(module: nn.Module, own: str, name: str, config: LowBitConfig) -> None:
    """Put buffers for codes and scales where a weight on the meta device is."""
    p = module._parameters.pop(own)
    assert p is not None  # it was there when it was chosen
    if IS_4 and p.dtype is torch.float16:
        raise InputError(
            f"{name}: transformers 4 would read scales in float16, which has no room for small ones: load the model "
            "with dtype=torch.bfloat16, then call model.half()"
        )
    module.add_module(own, _Parts(LowBitWeight.from_float(p.detach(), config.bits, config.group_size)))
    module._is_hf_initialized = True  # type: ignore[assignment]  # else transformers would draw a weight here


def _refuse_missing(keys: Iterable[str]) -> None:
    if missing := sorted(keys):
        raise InputError(
            f"the files have no {missing[0]} ({len(missing)} in all), which their config.json says: not all of the "
            "files are there, or another model's"
        )


def _take_parts(module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """Before `load_state_dict` of a module: codes and scales go into its weights, which then are all it finds."""
    errors: list[str] = others[-1]
    for own, p in module.named_parameters(recurse=False):
        if not isinstance(p, LowBitWeight):
            continue
        for name, part in parts(p).items():
            key = f"{prefix}{own}.{name}"
            if key not in state_dict:
                continue
            value = state_dict.pop(key)
            if (value.shape, value.dtype) == (part.shape, part.dtype):
                part.copy_(value)
            else:
                errors.append(f"{key} is {tuple(value.shape)} {value.dtype}, not {tuple(part.shape)} {part.dtype}")
            state_dict[f"{prefix}{own}"] = p
