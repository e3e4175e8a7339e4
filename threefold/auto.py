"""The ecosystem's own names: AutoModelForCausalLM, AutoModel, AutoTokenizer; and `load`, two lines to a model.

Decisions:
- Arguments are transformers', and none is dropped in silence: each is followed, or asks for what happens anyway
  (`_ANYWAY`), or is refused by name with the reason.
- `trust_remote_code` is accepted and runs nothing: a model directory is data.
- Weights keep the dtype that they are stored in unless another is asked for, as in transformers 5.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from threefold import device as machine
from threefold import files, hub
from threefold.errors import ModelError, UsageError, did_you_mean
from threefold.generation.arguments import generate_ids
from threefold.model.cache import Cache
from threefold.model.config import TransformerConfig
from threefold.model.heads import CausalLM, Output
from threefold.model.weights import load_model, save_model
from threefold.strict_json import read_json
from threefold.text.pretrained import NAMED, PretrainedTokenizer

StrPath = str | os.PathLike[str]
Dtype = str | torch.dtype | None

# Words of transformers that ask for what is done in any case, with the values that do, and what is said of others.
_ANYWAY: dict[str, tuple[tuple[Any, ...], str]] = {
    "trust_remote_code": ((True, False), "no code of a model directory is ever run"),
    "use_safetensors": ((True,), "other weights are pickles, which can run code: only safetensors are read"),
    "use_fast": ((True,), "there is one tokenizer, over the `tokenizers` library"),
    "low_cpu_mem_usage": ((True, False), "how weights are read does not depend on it"),
    "resume_download": ((True,), "a download that broke off always goes on"),
    "attn_implementation": (("sdpa",), "attention is torch's; its weights come with `output_attentions=True`"),
    "max_memory": ((), "one device holds the whole model: choose it with `device_map`"),
    "offload_folder": ((), "nothing is moved to disk: the model must fit its device"),
}
_HUB = ("revision", "cache_dir", "local_files_only", "force_download", "token")
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


class GenerativeLM(CausalLM):
    """A `CausalLM` that also generates and saves itself; `generation_config` is its generation_config.json."""

    def __init__(self, model: CausalLM, generation_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(model.transformer, model.lm_head, model.config)
        self.notes = model.notes
        self.generation_config = dict(generation_config or {})
        self.train(model.training)

    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]] | None = None,
        attention_mask: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        """The given ids and new ones behind them, (B, T + new) int64; arguments as in `generation.arguments`."""
        return generate_ids(self, input_ids, attention_mask, defaults=self.generation_config, **arguments)

    def save_pretrained(self, path: StrPath, *, dtype: Dtype = None, safe_serialization: bool = True) -> None:
        """Write a Hugging Face directory: config, generation config, and weights in their own dtype unless said."""
        if not safe_serialization:
            raise UsageError(
                "`safe_serialization=False` asks for a format that can carry code",
                hint="leave it out: safetensors is read everywhere",
            )
        folder = files.make_dirs(path)
        save_model(self, folder, dtype)
        if self.generation_config:
            import json

            files.write_atomic(folder / "generation_config.json", json.dumps(self.generation_config, indent=2) + "\n")


class BodyModel(nn.Module):
    """A decoder without its head: ids -> hidden states."""

    def __init__(self, model: GenerativeLM) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    @property
    def config(self) -> TransformerConfig:
        """The description of the model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.model.dtype

    def num_parameters(self) -> int:
        """The number of parameters of the body, without a head of its own."""
        return sum(p.numel() for p in self.model.transformer.parameters())

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """`last_hidden_state` (B, T, D), and what else was asked for; arguments as those of the language model."""
        if use_cache and past_key_values is None:
            past_key_values = Cache()
        trace = self.model.transformer(
            input_ids,
            attention_mask=attention_mask,
            positions=position_ids,
            cache=past_key_values,
            with_states=output_hidden_states,
            with_attentions=output_attentions,
        )
        return Output(None, None, past_key_values, trace.hidden_states, trace.attentions, trace.last)

    def save_pretrained(self, path: StrPath, *, dtype: Dtype = None) -> None:
        """Write the whole model, its head included."""
        self.model.save_pretrained(path, dtype=dtype)


class AutoModelForCausalLM:
    """`AutoModelForCausalLM.from_pretrained("gpt2")`."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: StrPath,
        *,
        dtype: Dtype = None,
        torch_dtype: Dtype = None,
        device_map: Any = None,
        revision: str | None = None,
        cache_dir: StrPath | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        token: str | bool | None = None,
        **others: Any,
    ) -> GenerativeLM:
        """The language model of a run directory, a Hugging Face directory or a hub name, in evaluation mode.

        dtype       `float32`, `bfloat16`, ... or torch's own; None or `auto`: as the weights are stored
        device_map  None: the CPU; `auto`, a device, or `{"": device}`: all of the model there
        revision, cache_dir, local_files_only, force_download, token    of a hub name, see `hub.resolve`

        Raises `ModelError` for a directory that is not understood, `HubError` for a name that cannot be fetched,
        `UsageError` for an argument that cannot be followed.
        """
        _refuse(others, ("dtype", "torch_dtype", "device_map", *_HUB))
        folder = hub.resolve(
            path_or_name,
            revision=revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            force_download=force_download,
            token=token,
        )
        model = GenerativeLM(load_model(folder, _dtype(dtype, torch_dtype)), _generation_config(folder))
        where = _device(device_map)
        return model if where is None else model.to(where)


class AutoModel:
    """`AutoModel.from_pretrained("gpt2")`: the body alone."""

    @classmethod
    def from_pretrained(cls, path_or_name: StrPath, **arguments: Any) -> BodyModel:
        """As `AutoModelForCausalLM.from_pretrained`; the result gives `last_hidden_state`."""
        return BodyModel(AutoModelForCausalLM.from_pretrained(path_or_name, **arguments))


class AutoTokenizer:
    """`AutoTokenizer.from_pretrained("gpt2")`."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: StrPath,
        *,
        revision: str | None = None,
        cache_dir: StrPath | None = None,
        padding_side: str | None = None,
        truncation_side: str | None = None,
        model_max_length: int | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        token: str | bool | None = None,
        **others: Any,
    ) -> PretrainedTokenizer:
        """The tokenizer of a model, given as for models; special tokens may be named anew (`pad_token=`)."""
        named: dict[str, Any] = {
            name: others.pop(name)
            for name in NAMED
            if name in others
        }
        _refuse(others, ("padding_side", "truncation_side", "model_max_length", *NAMED, *_HUB))
        folder = hub.resolve(
            path_or_name,
            revision=revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            needs=("tokenizer",),
            local_files_only=local_files_only,
            force_download=force_download,
            token=token,
        )
        tokenizer = PretrainedTokenizer.load(folder)
        named |= {
            "padding_side": padding_side,
            "truncation_side": truncation_side,
            "model_max_length": model_max_length,
        }
        for name, value in named.items():
            if value is not None:
                setattr(tokenizer, name, value)
        return tokenizer


def load(
    path_or_name: StrPath, *, dtype: Dtype = None, device: str | torch.device | None = None
) -> tuple[GenerativeLM, PretrainedTokenizer]:
    """(model, tokenizer) of a run directory, the directory of a tour, a Hugging Face directory or a hub name."""
    folder = hub.resolve(path_or_name, needs=("model", "tokenizer"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device), AutoTokenizer.from_pretrained(
        folder
    )


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise ModelError(f"`{path}` holds no object")
    return found


def _dtype(dtype: Dtype, torch_dtype: Dtype) -> torch.dtype | None:
    asked = torch_dtype if dtype is None else dtype
    if asked is None or asked == "auto" or isinstance(asked, torch.dtype):
        return None if isinstance(asked, str) else asked
    name = asked.removeprefix("torch.")
    if name not in _DTYPES:
        raise UsageError(f"`dtype` is {asked!r}", hint=did_you_mean(name, [*_DTYPES, "auto"]))
    return _DTYPES[name]


def _device(device_map: Any) -> torch.device | None:
    if isinstance(device_map, Mapping):
        places = set(map(str, device_map.values()))
        if len(places) != 1:
            raise UsageError(
                f"`device_map` spreads the model over {', '.join(sorted(places))}",
                hint="one device holds the whole model",
            )
        device_map = next(iter(device_map.values()))
    if device_map is None:
        return None
    if isinstance(device_map, torch.device):
        return device_map
    return machine.pick_device(f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map))


def _refuse(others: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise `UsageError` for what is neither known nor done in any case; None says nothing."""
    for name, value in others.items():
        if name not in _ANYWAY:
            raise UsageError(
                f"`{name}` is not a known argument of from_pretrained", hint=did_you_mean(name, [*known, *_ANYWAY])
            )
        values, reason = _ANYWAY[name]
        if value is not None and not any(value is one or value == one for one in values):
            raise UsageError(f"`{name}={value!r}` cannot be followed: {reason}", hint=f"leave `{name}` out")
