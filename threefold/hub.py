"""Names as the ecosystem knows them -> a local directory.

Decisions:
- What exists as a path is that path; a run directory stands for the model in it. Only then is a name a name on the hub.
- The local cache is asked first and the hub only for what is not there, so that a model once fetched needs no network.
  A snapshot is believed only if it holds what is needed: other programs fetch single files, and downloads break off.
- Only data is fetched: configurations, tokenizers and safetensors. Pickled weights and code stay where they are.
- A file is used once its content has the hash that the hub gave for it (SHA-256 of large files, git's SHA-1 of small
  ones). What was verified is noted beside the cache by size and time, so that it is read again only when it changed.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from threefold import console, files
from threefold.errors import DiskError, HubError, ModelError, UsageError
from threefold.strict_json import read_json, read_object

Need = Literal["model", "tokenizer"]

ALLOWED = ["*.json", "*.safetensors", "*.model", "*.spm", "*.txt", "*.jinja"]
HEAD = ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DESCRIBED = ("config.json", "adapter_config.json")  # by one of them a directory is a model, or an adapter
TOKENIZERS = (("tokenizer.json",), ("*.model",), ("vocab.txt",), ("vocab.json", "merges.txt"),
              ("source.spm", "target.spm", "vocab.json"))  # one of them, whole
IGNORED = ["onnx/*", "openvino/*", "coreml/*", "original/*", "consolidated*.safetensors", "*.bin.index.json"]
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_NOTED = "threefold-verified.json"


def resolve(name: str | os.PathLike[str], *, revision: str | None = None, cache_dir: str | Path | None = None,
            endpoint: str | None = None, needs: Sequence[Need] = ("model",), local_files_only: bool = False,
            force_download: bool = False, token: str | bool | None = None) -> Path:
    """The local path of a model: an existing path, the model of a run directory, or a hub name (`gpt2`, `org/name`,
    `org/name@revision`), which is fetched when it is not in the local cache.

    needs             what a cached copy must hold to be used without asking the hub; a tokenizer alone is fetched
                      without the weights
    local_files_only  never ask the hub
    force_download    ask it in any case, and fetch every file again
    token             for what is gated or private: the token, True for the one that is logged in, False for none

    Raises `ModelError` (a path that is not there, a run without a model), `UsageError` (no name at all) and `HubError`.
    """
    path = Path(os.path.expanduser(name))
    if local_files_only and force_download:
        raise UsageError("`local_files_only` and `force_download` contradict each other", hint="leave one of them out")
    if os.path.exists(path):  # false, not an error, for names that no file can have
        inside = _inside(path)
        if revision is not None and revision_of(inside) != revision:
            console.warn(f"`{name}` is a path here, so the revision `{revision}` is not looked for",
                         hint="if a model on the hub was meant, call this from another folder")
        return inside
    text = os.fspath(name)
    if _is_path(text):
        raise ModelError(f"there is no `{text}`", hint=_near_path(path))
    text, _, pinned = text.partition("@")
    if not _NAME.fullmatch(text) or ".." in text or "--" in text:
        raise UsageError(f"`{text}` is neither a path that exists nor a name on the hub",
                         hint="names look like `gpt2` or `org/name`, with `@revision` where one is meant")
    fetch = _Fetch(text, revision or pinned or None, cache_dir, endpoint, needs, token)
    return fetch.run(local_files_only, force_download)


def missing(folder: Path, needs: Sequence[Need] = ("model",)) -> list[str]:
    """What a snapshot lacks of what is needed: names of files, or words for one of several."""
    lacks: list[str] = []
    if "model" in needs:
        wanted = ["config.json"] + ([WEIGHTS] if (folder / WEIGHTS).is_file() else _shards(folder))
        lacks += [name for name in (*wanted, *_beside(folder)) if not (folder / name).is_file()]
    if "tokenizer" in needs and not any(all(any(p.is_file() for p in folder.glob(name)) for name in kind)
                                        for kind in TOKENIZERS):
        lacks.append("tokenizer.json")
    return lacks


def _beside(folder: Path) -> Sequence[str]:
    """What a classifier over pooled states has beside its body (`model/pooling.py`), which other programs do not fetch."""
    with contextlib.suppress(HubError):
        if "classifier_pooling" in read_object(folder / "config.json", error=HubError):
            return HEAD
    return ()


def _shards(folder: Path) -> list[str]:
    """The files of weights in parts, their index included; the one file of weights where there is no index."""
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    with contextlib.suppress(HubError):
        index = read_json(folder / INDEX, 2**26, error=HubError)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if isinstance(names, dict) and names:
            return sorted({str(name) for name in names.values()})
    return [WEIGHTS]  # an index that says nothing: whether there is a better one, the hub knows


def revision_of(path: str | os.PathLike[str]) -> str | None:
    """The commit on the hub that a resolved directory holds, if it came from there."""
    folder = Path(path)
    return folder.name if folder.parent.name == "snapshots" else None


def _inside(path: Path) -> Path:
    """A run directory stands for its model or its adapter, the directory of a tour for its decoder's model."""
    if path.is_dir() and not any((path / name).exists() for name in DESCRIBED):
        for inner in (path / "model", path / "decoder" / "model"):
            if any((inner / name).exists() for name in DESCRIBED):
                return inner
        if (path / "recipe.toml").exists():
            raise ModelError(f"the run `{path}` has no finished model yet",
                             hint="run its command again to resume it; RUN/model is written when it ends")
    return path


def _is_path(text: str) -> bool:
    """Whether a name that does not exist was meant as a path: it says so, or the folder it names is there."""
    parent = os.path.dirname(text)
    return text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1 or bool(
        parent and os.path.isdir(parent))


def _near_path(path: Path) -> str:
    """`did you mean` for a path: what is there, at the first of its parts that is not."""
    for part in [*reversed(path.parents), path]:
        if not part.exists():
            with contextlib.suppress(OSError):
                near = difflib.get_close_matches(part.name, [p.name for p in part.parent.iterdir()], n=1)
                if near:
                    return f"did you mean `{part.parent / near[0]}`?"
            return f"`{part.parent}` has no `{part.name}`"
    return ""


class _Fetch:
    """One model on its way from the hub."""

    def __init__(self, name: str, revision: str | None, cache_dir: str | Path | None, endpoint: str | None,
                 needs: Sequence[Need], token: str | bool | None) -> None:
        self.name, self.revision = name, revision
        self.cache_dir, self.endpoint, self.needs, self.token = cache_dir, endpoint, needs, token
        self.lacks: list[str] | None = None  # what the copy in the cache lacks; None where there is no copy

    def run(self, local: bool, force: bool) -> Path:
        """The verified snapshot: from the cache, else from the hub; fetched a second time if a file is damaged."""
        folder = self._cached()
        if local:
            return self._local(folder)
        if folder is None or self.lacks or force:
            console.say(f"fetching `{self.name}` from {self._where()}")
            folder = self._fetched(force)
        if damaged := verify(folder):
            console.warn(f"`{self.name}`: `{damaged[0]}` in the cache is damaged, fetching it again")
            self._drop(folder, damaged)
            folder = self._fetched()
            if damaged := verify(folder):
                self._drop(folder, damaged)
                raise HubError(f"`{self.name}`: `{damaged[0]}` does not have the hash that the hub gives for it, twice",
                               hint="the connection or the server changes files: fetch it over another one")
        return folder

    def _where(self) -> str:
        from huggingface_hub import constants

        return f"{self.endpoint or constants.ENDPOINT}/{self.name}"

    def _snapshot(self, *, local: bool, force: bool = False) -> Path:
        """The library's folder. Of a local one, `missing` judges whether it is whole: the library knows that only of those
        that it listed itself, and then misses files that nobody needs."""
        from huggingface_hub import snapshot_download

        weights = () if "model" in self.needs else ("*.safetensors", INDEX)
        return Path(snapshot_download(self.name, revision=self.revision, cache_dir=self.cache_dir,
                                      endpoint=self.endpoint, allow_patterns=[] if local else ALLOWED,
                                      ignore_patterns=[*IGNORED, *weights], local_files_only=local,
                                      force_download=force, token=self.token))

    def _cached(self) -> Path | None:
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = self._snapshot(local=True)
        except LocalEntryNotFoundError:
            return None
        self.lacks = missing(folder, self.needs)
        return folder

    def _local(self, folder: Path | None) -> Path:
        """The snapshot in the cache, if it is whole; nothing is asked for and nothing removed."""
        damaged = verify(folder) if folder is not None and not self.lacks else []
        if folder is None or self.lacks or damaged:
            what = f"its copy of `{damaged[0]}` there is damaged" if damaged else self._lack() or "it is not there"
            raise HubError(f"`{self.name}` cannot be taken from the hub's cache: {what}, and `local_files_only` is set",
                           hint="leave `local_files_only` out once, where there is a network")
        return folder

    def _lack(self) -> str:
        return f"its copy there lacks {', '.join(f'`{name}`' for name in self.lacks[:5])}" if self.lacks else ""

    def _fetched(self, force: bool = False) -> Path:
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if console.is_quiet() or not console.is_terminal():
            disable_progress_bars()
        try:
            folder = self._snapshot(local=False, force=force)
            if missing(folder, self.needs):  # the library takes a part for the whole where the hub does not answer
                HfApi(endpoint=self.endpoint, token=self.token).repo_info(self.name, revision=self.revision or "main")
            return folder
        except Exception as error:  # the library raises its own, its HTTP client's and the system's errors
            raise self._error(error) from error

    def _error(self, error: Exception) -> HubError | DiskError:
        """The library's error in our words: what, from where, and what to do without a network."""
        from huggingface_hub import errors, is_offline_mode

        if isinstance(error, OSError) and error.errno and isinstance(error.filename, str):
            return files.disk_error(error, error.filename, "write to the hub's cache")
        elsewhere = f"where there is a network, `hf download {self.name} --local-dir DIR`; then give DIR for the name"
        if is_offline_mode():
            cached = f"in the hub's cache {self._lack()}" if self.lacks else "not in the hub's cache"
            return HubError(f"`{self.name}` is no path here and {cached}, and HF_HUB_OFFLINE is set", hint=elsewhere)
        if isinstance(error, errors.GatedRepoError):
            return HubError(f"`{self.name}` is gated: {self._where()} gives it to those who asked for it",
                            hint="ask on its page, then log in: hf auth login")
        if isinstance(error, errors.RevisionNotFoundError):
            return HubError(f"`{self.name}` has no revision `{self.revision}` ({self._where()})")
        if isinstance(error, errors.RepositoryNotFoundError):
            near = difflib.get_close_matches(self.name, [p.name for p in Path().iterdir() if p.is_dir()], n=1)
            hint = f"did you mean the folder `{near[0]}`?" if near else "a private one needs a login: hf auth login"
            return HubError(f"there is no path `{self.name}`, and no model at {self._where()}", hint=hint)
        cause: BaseException = error
        while cause.__cause__ is not None and isinstance(cause, errors.LocalEntryNotFoundError):
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]
        lack = f" (in the cache, {self._lack()})" if self.lacks else ""
        return HubError(f"`{self.name}` is no path here, and cannot be fetched from {self._where()}: {reason}{lack}",
                        hint=elsewhere)

    def _drop(self, folder: Path, damaged: list[str]) -> None:
        for name in damaged:
            files.remove_tree((folder / name).resolve())
            files.remove_tree(folder / name)


def verify(folder: Path, *, note: bool = True) -> list[str]:
    """Files of a snapshot in the hub's cache whose content does not have their hash. Elsewhere nothing is known: []."""
    if revision_of(folder) is None:
        return []
    noted_at = folder.parent.parent / _NOTED
    noted = _read_noted(noted_at)
    damaged, seen = [], dict(noted)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        blob = path.resolve()
        if blob.parent.name != "blobs":
            continue
        status = blob.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        if noted.get(blob.name) == stamp:
            continue
        if _hash_as(blob, blob.name) == blob.name:
            seen[blob.name] = stamp
        else:
            damaged.append(str(path.relative_to(folder)))
    if note and seen != noted:
        with contextlib.suppress(DiskError):  # a cache that cannot be written is verified again next time
            files.write_atomic(noted_at, json.dumps(seen))
    return damaged


def _read_noted(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        noted = json.loads(path.read_bytes())
        if isinstance(noted, dict):
            return noted
    return {}


def _hash_as(path: Path, name: str) -> str:
    """The hash of a file in the kind that `name` is: SHA-256, or SHA-1 as git computes it; `name` for any other."""
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return files.sha256(path)
    if not re.fullmatch(r"[0-9a-f]{40}", name):
        return name
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
