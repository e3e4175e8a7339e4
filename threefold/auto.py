"""The ecosystem's own names: AutoModelForCausalLM, AutoModel, AutoTokenizer; and `load`, two lines to a model.

Decisions:
- Arguments are transformers', and none is dropped in silence: each is followed, or asks for what happens anyway
  (`_ANYWAY`), or is refused by name with the reason.
- `trust_remote_code` is accepted and runs nothing: a model directory is data.
- A device that is named and not there is passed over with a note, since the same line must run on a laptop and on a server.
- What is asked for decides the head. `load` asks for what the directory was saved for.
- Weights keep the dtype that they are stored in unless another is asked for, as in transformers 5.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from threefold import device as machine
from threefold import files, hub
from threefold.errors import ModelError, UsageError, did_you_mean
from threefold.generation.arguments import generate_ids, settings_of
from threefold.model import adapters
from threefold.model.base import KEPT, Model
from threefold.model.classifiers import Body, Discriminator, PooledClassifier, SequenceClassifier, TokenClassifier
from threefold.model.language import CausalLM, MaskedLM, Seq2SeqLM
from threefold.model.opening import open_model
from threefold.model.pooling import Pooling, is_classifier, read_pooling, write_pooling
from threefold.model.weights import load_config, save_model, saved_task
from threefold.strict_json import read_object
from threefold.text.encoded import UNBOUNDED
from threefold.text.pretrained import NAMED, PretrainedTokenizer
from threefold.text.tokenizer import Tokenizer

StrPath = str | os.PathLike[str]
Dtype = str | torch.dtype | None

# Words of transformers that ask for what is done in any case, with the values that do, and what is said of others.
_ANYWAY: dict[str, tuple[tuple[Any, ...], str]] = {
    "trust_remote_code": ((True, False), "no code of a model directory is ever run"),
    "use_safetensors": ((True,), "other weights are pickles, which can run code: only safetensors are read"),
    "use_fast": ((True,), "there is one tokenizer, over the `tokenizers` library"),
    "low_cpu_mem_usage": ((True, False), "how weights are read does not depend on it"),
    "resume_download": ((True,), "a download that broke off always goes on"),
    "attn_implementation": (("sdpa", "eager"), "attention is torch's; its weights come with `output_attentions=True`"),
    "max_memory": ((), "one device holds the whole model: choose it with `device_map`"),
    "offload_folder": ((), "nothing is moved to disk: the model must fit its device"),
}
_SPREAD = ("balanced", "balanced_low_0", "sequential")  # words for several devices, of which one is taken
_HUB = ("revision", "cache_dir", "local_files_only", "force_download", "token")
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Saved(Model):
    """A model that writes itself. `name_or_path` is where it is from."""

    name_or_path: str

    def save_pretrained(self, path: StrPath, *, dtype: Dtype = None, safe_serialization: bool = True) -> None:
        """Write a Hugging Face directory: config, generation config, and weights in their own dtype unless said."""
        if not safe_serialization:
            raise UsageError(
                "`safe_serialization=False` asks for a format that can carry code",
                hint="leave it out: safetensors is read everywhere",
            )
        if any(side.use for side in adapters.sides(self)):
            raise UsageError("an adapter stands beside the weights, which would be saved without it",
                             hint="put it into them with adapters.merge(model), or save it alone with adapters.save")
        save_model(self, files.make_dirs(path), dtype)
        if self.kept:
            described = {**read_object(Path(path) / "config.json"), **self.kept}
            files.write_atomic(Path(path) / "config.json", json.dumps(described, indent=2) + "\n")


class Generating(Saved):
    """A model that also writes text; `generation_config` says how (`settings_of`)."""

    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]] | None = None,
        attention_mask: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        """The given ids and new ones behind them, (B, T + new) int64; of an encoder-decoder what it writes, (B, 1 + new).
        Arguments as in `generation.arguments`."""
        return generate_ids(self, input_ids, attention_mask, defaults=self.generation_config, **arguments)  # type: ignore[arg-type]

    def save_pretrained(self, path: StrPath, *, dtype: Dtype = None, safe_serialization: bool = True) -> None:
        """As `Saved.save_pretrained`, with the generation config that was loaded."""
        Saved.save_pretrained(self, path, dtype=dtype, safe_serialization=safe_serialization)
        if self.generation_config:
            files.write_atomic(Path(path) / "generation_config.json", json.dumps(self.generation_config, indent=2) + "\n")


class GenerativeLM(Generating, CausalLM):
    """A `CausalLM` that generates and saves itself."""


class GenerativeSeq2SeqLM(Generating, Seq2SeqLM):
    """A `Seq2SeqLM` that generates and saves itself."""


class _MaskedLM(Saved, MaskedLM): ...


class _Body(Saved, Body):
    """A body that also makes one vector of a text, where its directory says how, or `pooling` is set."""

    pooling: Pooling | None = None
    _tokenizer: PretrainedTokenizer | None = None

    @torch.inference_mode()
    def encode(self, texts: str | Sequence[str], batch_size: int = 32, normalize_embeddings: bool = False) -> np.ndarray:
        """float32 vectors (N, D) of texts, (D,) of one, as sentence-transformers gives them. Texts longer than the context
        are cut."""
        if self.pooling is None:
            raise UsageError("this model does not say how states become one vector", hint='set it: model.pooling = Pooling("mean")')
        if self._tokenizer is None:
            self._tokenizer = PretrainedTokenizer.load(self.name_or_path)
            if self._tokenizer.pad_token is None:
                self._tokenizer.pad_token = self._tokenizer.eos_token
        rows = [texts] if isinstance(texts, str) else list(texts)
        longest = min(self._tokenizer.model_max_length, self.config.max_position_embeddings, self.pooling.longest or UNBOUNDED)
        found = np.zeros((len(rows), self.config.hidden_size), dtype=np.float32)
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        for first in range(0, len(rows), batch_size):
            part = order[first:first + batch_size]
            given = self._tokenizer([rows[n] for n in part], padding=True, truncation=True, return_tensors="pt", max_length=longest)
            mask = given["attention_mask"].to(self.device)
            states = self.hidden(given["input_ids"].to(self.device), attention_mask=mask).float()
            vectors = self.pooling(states, mask)
            found[part] = (torch.nn.functional.normalize(vectors, dim=-1) if normalize_embeddings else vectors).cpu().numpy()
        return found[0] if isinstance(texts, str) else found

    def save_pretrained(self, path: StrPath, *, dtype: Dtype = None, safe_serialization: bool = True) -> None:
        """As `Saved.save_pretrained`, with how vectors are made."""
        Saved.save_pretrained(self, path, dtype=dtype, safe_serialization=safe_serialization)
        if self.pooling is not None:
            write_pooling(Path(path), self.pooling, width=self.config.hidden_size)


class _SequenceClassifier(Saved, SequenceClassifier): ...


class _PooledClassifier(Saved, PooledClassifier): ...


class _TokenClassifier(Saved, TokenClassifier): ...


class _Discriminator(Saved, Discriminator): ...


# A model that was loaded is the same object, of a class that can do more.
_MORE: dict[type[Model], type[Model]] = {
    CausalLM: GenerativeLM, MaskedLM: _MaskedLM, Body: _Body, SequenceClassifier: _SequenceClassifier, PooledClassifier: _PooledClassifier,
    TokenClassifier: _TokenClassifier, Discriminator: _Discriminator, Seq2SeqLM: GenerativeSeq2SeqLM,
}


class _Auto:
    """`from_pretrained` for one kind of head. `tasks` are what it may stand for, the first that a family has is taken;
    none stands for what a directory was saved for."""

    tasks: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: StrPath,
        *,
        dtype: Dtype = None,
        torch_dtype: Dtype = None,
        device_map: Any = None,
        num_labels: int | None = None,
        revision: str | None = None,
        cache_dir: StrPath | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        token: str | bool | None = None,
        **others: Any,
    ) -> Any:
        """The model of a run directory, a Hugging Face directory or a hub name, in evaluation mode.

        dtype       `float32`, `bfloat16`, ... or torch's own; None or `auto`: as the weights are stored
        device_map  None: the CPU; `auto`, a device, or `{"": device}`: all of the model there. One that this machine
                    lacks gives the CPU and a note
        num_labels  classes of a head that classifies; None: those that config.json names
        revision, cache_dir, local_files_only, force_download, token    of a hub name, see `hub.resolve`

        Raises `ModelError` for a directory that is not understood, `HubError` for a name that cannot be fetched,
        `UsageError` for an argument that cannot be followed or a family without such a head.
        """
        _refuse(others, ("dtype", "torch_dtype", "device_map", "num_labels", *_HUB))
        folder = hub.resolve(
            path_or_name,
            revision=revision,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            force_download=force_download,
            token=token,
        )
        model = open_model(folder, _dtype(dtype, torch_dtype), cls._task, num_labels)
        model.__class__ = _MORE[type(model)]
        assert isinstance(model, Saved)
        described = read_object(folder / "config.json") or adapters.details(folder)
        model.kept = {key: described[key] for key in KEPT if described.get(key) is not None}
        model.name_or_path = str(folder)
        if isinstance(model, _Body):
            try:
                model.pooling = read_pooling(folder)
            except ModelError as problem:  # its states are as good as any
                model.notes.append(f"no vectors of texts: {problem}")
        if isinstance(model, Generating):
            model.generation_config = settings_of(folder)
        where = place(device_map, model.notes)
        return model if where is None else model.to(where)

    @classmethod
    def _task(cls, folder: Path) -> str | None:
        family, _ = load_config(folder)
        found = next((task for task in cls.tasks if task in family.heads), None)
        if found is None and cls.tasks:
            others = [auto.__name__ for auto in AUTO_MODELS if set(auto.tasks) & set(family.heads)]
            raise UsageError(f"a `{family.name}` model has no head for {cls.__name__}", hint=f"it has {', '.join(others)}")
        return found


class AutoModelForCausalLM(_Auto):
    """`AutoModelForCausalLM.from_pretrained("gpt2")`: predicts the next token."""

    tasks = ("causal",)


class AutoModelForMaskedLM(_Auto):
    """Predicts hidden tokens."""

    tasks = ("masked",)


class AutoModelForPreTraining(_Auto):
    """With the heads that the family was pretrained with."""

    tasks = ("pretraining", "replaced", "masked", "causal", "seq2seq")


class AutoModelForSeq2SeqLM(_Auto):
    """Writes one text while it reads another."""

    tasks = ("seq2seq",)


class AutoModelForSequenceClassification(_Auto):
    """Judges a text."""

    tasks = ("classify",)


class AutoModelForTokenClassification(_Auto):
    """Judges each token."""

    tasks = ("tag",)


class AutoModel(_Auto):
    """`AutoModel.from_pretrained("gpt2")`: the body alone, which gives `last_hidden_state`."""

    tasks = ("body", "encoder")

    @classmethod
    def _task(cls, folder: Path) -> str | None:
        alone = saved_task(folder) == "encoder" or (is_classifier(folder) and "encoder" in load_config(folder)[0].heads)
        return "encoder" if alone else super()._task(folder)


class AutoModelForTextEncoding(_Auto):
    """What reads a text: the body, of an encoder-decoder its encoder."""

    tasks = ("encoder", "body")


AUTO_MODELS: tuple[type[_Auto], ...] = (
    AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification, AutoModelForTextEncoding, AutoModelForTokenClassification)


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
        if adapters.is_adapter(folder) and not any((folder / name).is_file() for name in Tokenizer.FILES):  # as PEFT leaves it
            folder = hub.resolve(adapters.described(folder)[0], needs=("tokenizer",))
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


def load(path_or_name: StrPath, *, dtype: Dtype = None, device: str | torch.device | None = None) -> tuple[Any, PretrainedTokenizer]:
    """(model, tokenizer) of a run directory, the directory of a tour, a Hugging Face directory or a hub name. The model is
    of the class that the directory was saved for: one that generates, judges, fills gaps, or a body."""
    folder = hub.resolve(path_or_name, needs=("model", "tokenizer"))
    return _Auto.from_pretrained(folder, dtype=dtype, device_map=device), AutoTokenizer.from_pretrained(folder)


def _dtype(dtype: Dtype, torch_dtype: Dtype) -> torch.dtype | None:
    asked = torch_dtype if dtype is None else dtype
    if asked is None or asked == "auto" or isinstance(asked, torch.dtype):
        return None if isinstance(asked, str) else asked
    name = asked.removeprefix("torch.")
    if name not in _DTYPES:
        raise UsageError(f"`dtype` is {asked!r}", hint=did_you_mean(name, [*_DTYPES, "auto"]))
    return _DTYPES[name]


def place(device_map: Any, notes: list[str]) -> torch.device | None:
    """The one device that is asked for, as in `from_pretrained`; None where none is. What is not there is noted."""
    if isinstance(device_map, Mapping):
        places = set(map(str, device_map.values()))
        if len(places) != 1:
            raise UsageError(
                f"`device_map` spreads the model over {', '.join(sorted(places))}",
                hint="one device holds the whole model",
            )
        device_map = next(iter(device_map.values()))
    if device_map is None or (isinstance(device_map, torch.device) and device_map.type not in ("cuda", "mps")):
        return device_map
    name = f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map)
    if name in _SPREAD:
        name = "auto"
    try:
        return machine.pick_device(name, note=notes.append)
    except UsageError as problem:
        if not re.fullmatch(r"(cuda|mps)(:\d+)?", name):
            raise
        notes.append(f"computing on the CPU: {problem}")
        return torch.device("cpu")


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
