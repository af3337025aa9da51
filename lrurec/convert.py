"""Weights of the published implementation (yueqirex/LRURec, model/lru.py) made into ours.

Its `state_dict`, by name; d = hidden units, h = 2d:

| published | shape | ours |
|---|---|---|
| embedding.token.weight | (N + 1, d) | item_embedding.weight |
| embedding.layer_norm.{weight,bias} | (d,) | layer_norm.{weight,bias} |
| model.bias | (N + 1,) | item_bias |
| model.lru_blocks.{i}.lru_layer.params_log | (3, h) | blocks.{i}.lru.{nu,theta,gamma}_log |
| ….lru_layer.in_proj.{weight,bias} | complex64 (h, d), (h,) | ….lru.input_{weight,bias} as real pairs |
| ….lru_layer.out_proj.{weight,bias} | complex64 (d, h), (d,) | ….lru.output_weight as real pairs, output_bias real |
| ….lru_layer.layer_norm.{weight,bias} | (d,) | ….layer_norm.{weight,bias} |
| ….feed_forward.w_1, w_2, layer_norm | (4d, d), (d, 4d), (d,) | ….feed_forward.inner, outer, layer_norm |
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lrurec.bundle import Bundle, make_bundle
from lrurec.catalogue import Catalogue
from lrurec.config import LRURecConfig
from lrurec.errors import BundleError, CatalogueError, CheckpointError
from lrurec.published import named, one_line, read_published

ITEM_ID_BYTES = 4_096
"""A file of item ids may have so many bytes an item: what doesn't end is not read for ever."""

EMBEDDING = "embedding.token.weight"
BLOCK = re.compile(r"model\.lru_blocks\.(\d{1,4})\.")
LRU_BLOCK = "model.lru_blocks.{}."


def convert(checkpoint: Path | str, items: Path | str | None = None) -> Bundle:
    """The bundle of a published checkpoint: a `.pth`, or a `.npz` whose keys are its parameter names.

    `items` names a text file of one item id a line, for rows 1..N; without it the ids are "1".."N". Raises
    `CheckpointError` with one line. No code in a file is run: arrays and tensors only.
    """
    checkpoint = Path(checkpoint)
    published = read_published(checkpoint)
    config, weights = convert_weights(published, source=str(checkpoint))
    catalogue = _numbered(config.num_items) if items is None else _read_catalogue(Path(items), config.num_items)
    try:
        return make_bundle(config, weights, catalogue, {"converted_from": checkpoint.name}, source=str(checkpoint))
    except BundleError as error:
        raise CheckpointError(str(error)) from error


def convert_weights(published: Mapping[str, Tensor], *, source: str) -> tuple[LRURecConfig, dict[str, Tensor]]:
    """Our config and weights out of a published state_dict. The sizes are read from the shapes.

    Raises `CheckpointError` for a name too many or too few, a wrong shape or dtype, NaN and infinities.
    """
    config = _config_of(published, source)
    expected = _published_shapes(config)
    if missing := sorted(expected.keys() - published.keys()):
        raise CheckpointError(f"{source} lacks {missing[0]!r} ({len(missing)} missing); is it an LRURec state_dict?")
    if unknown := sorted(published.keys() - expected.keys()):
        raise CheckpointError(
            f"{source} holds {named(unknown[0])}, which LRURec doesn't have; is it an LRURec state_dict?"
        )
    for name, (shape, dtype) in expected.items():
        _check_tensor(name, published[name], shape, dtype, source)
    return config, _rename(published, config.num_blocks)


def _config_of(published: Mapping[str, Tensor], source: str) -> LRURecConfig:
    embedding = published.get(EMBEDDING)
    if embedding is None or embedding.ndim != 2 or min(embedding.shape[0] - 1, embedding.shape[1]) < 1:
        given = "none" if embedding is None else f"shape {_short(embedding.shape)}"
        raise CheckpointError(f"{source}: {EMBEDDING!r} is {given}; it must be (items + 1, hidden units)")
    blocks = {int(found[1]) for name in published if (found := BLOCK.match(name))}
    if not blocks or blocks != set(range(len(blocks))):
        raise CheckpointError(f"{source} has blocks {_short(sorted(blocks))}; they must be 0, 1, … without a gap")
    rows, width = embedding.shape
    return LRURecConfig(num_items=rows - 1, hidden_units=width, num_blocks=len(blocks))


def _published_shapes(config: LRURecConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    rows, d, h = config.num_items + 1, config.hidden_units, config.state_channels
    real, pair = torch.float32, torch.complex64
    norm = {"layer_norm.weight": ((d,), real), "layer_norm.bias": ((d,), real)}
    block = {
        "lru_layer.params_log": ((3, h), real),
        "lru_layer.in_proj.weight": ((h, d), pair),
        "lru_layer.in_proj.bias": ((h,), pair),
        "lru_layer.out_proj.weight": ((d, h), pair),
        "lru_layer.out_proj.bias": ((d,), pair),
        "feed_forward.w_1.weight": ((4 * d, d), real),
        "feed_forward.w_1.bias": ((4 * d,), real),
        "feed_forward.w_2.weight": ((d, 4 * d), real),
        "feed_forward.w_2.bias": ((d,), real),
        **{f"{part}.{name}": value for part in ("lru_layer", "feed_forward") for name, value in norm.items()},
    }
    return {
        EMBEDDING: ((rows, d), real),
        "model.bias": ((rows,), real),
        **{f"embedding.{name}": value for name, value in norm.items()},
        **{
            LRU_BLOCK.format(index) + name: value for index in range(config.num_blocks) for name, value in block.items()
        },
    }


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, source: str) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        given = f"{str(tensor.dtype).removeprefix('torch.')} {_short(tensor.shape)}"
        allowed = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        raise CheckpointError(f"{source}: {name!r} is {given}; it must be {allowed}")
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{source}: {name!r} holds NaN or infinite numbers; was that training broken off?")


def _rename(published: Mapping[str, Tensor], num_blocks: int) -> dict[str, Tensor]:
    weights = {"item_embedding.weight": published[EMBEDDING], "item_bias": published["model.bias"]}
    for kind in ("weight", "bias"):
        weights[f"layer_norm.{kind}"] = published[f"embedding.layer_norm.{kind}"]
    for index in range(num_blocks):
        theirs = LRU_BLOCK.format(index)
        block = {name.removeprefix(theirs): value for name, value in published.items() if name.startswith(theirs)}
        weights |= {f"blocks.{index}.{name}": value for name, value in _rename_block(block).items()}
    return weights


def _rename_block(block: Mapping[str, Tensor]) -> dict[str, Tensor]:
    nu_log, theta_log, gamma_log = block["lru_layer.params_log"]
    renamed = {
        "lru.nu_log": nu_log,
        "lru.theta_log": theta_log,
        "lru.gamma_log": gamma_log,
        "lru.input_weight": torch.view_as_real(block["lru_layer.in_proj.weight"]),
        "lru.input_bias": torch.view_as_real(block["lru_layer.in_proj.bias"]),
        "lru.output_weight": torch.view_as_real(block["lru_layer.out_proj.weight"]),
        "lru.output_bias": block["lru_layer.out_proj.bias"].real,
    }
    for kind in ("weight", "bias"):
        renamed[f"layer_norm.{kind}"] = block[f"lru_layer.layer_norm.{kind}"]
        renamed[f"feed_forward.inner.{kind}"] = block[f"feed_forward.w_1.{kind}"]
        renamed[f"feed_forward.outer.{kind}"] = block[f"feed_forward.w_2.{kind}"]
        renamed[f"feed_forward.layer_norm.{kind}"] = block[f"feed_forward.layer_norm.{kind}"]
    return renamed


def _numbered(num_items: int) -> Catalogue:
    return Catalogue(str(row) for row in range(1, num_items + 1))


def _read_catalogue(path: Path, num_items: int) -> Catalogue:
    """The ids of a file of one id a line. Raises `CheckpointError`."""
    if not path.is_file():
        raise CheckpointError(f"{path} cannot be read: it is no file; name a file of one item id a line")
    try:
        if path.stat().st_size > num_items * ITEM_ID_BYTES:
            raise CheckpointError(f"{path} is far too long for {num_items:,} items; it must hold one item id a line")
        return Catalogue.from_text(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, CatalogueError) as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; name a file of one item id a line") from error


def _short(sizes: Sequence[int]) -> str:
    """A list of numbers that a file gives, no longer than a line may be."""
    text = str(list(sizes[:20]))
    return text if len(sizes) <= 20 else f"{text[:-1]}, …]"
