"""Turn a soft prompt saved by torch into safetensors: `python -m training.soft_prompt style.pt style.safetensors`.

A `.pt` or `.bin` file is a pickle, which a service never loads. This reads one with torch's restricted unpickler, which
knows tensors and no code, on the machine of whoever trained it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save

from hocket.errors import HocketError, Reason

_NAME = "prompt_embeddings"
_DIMENSIONS = 2


def convert(source: Path, target: Path) -> tuple[int, int]:
    """Write the one matrix of a saved soft prompt as safetensors, under PEFT's name.

    Args:
        source: What `torch.save` wrote: a matrix [tokens, hidden], or a mapping that holds one.
        target: The safetensors file to write.

    Returns:
        Tokens and hidden size.

    Raises:
        HocketError: `BAD_WEIGHTS` if the file holds anything but one finite floating-point matrix, `BAD_REQUEST` if a
            file cannot be read or written.
    """
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise HocketError(Reason.BAD_REQUEST, f"cannot read {source}: {error.strerror}") from error
    except Exception as error:  # on what it did not write, torch's unpickler fails in any way at all
        raise HocketError(
            Reason.BAD_WEIGHTS, f"{source} holds something else than tensors: save the embedding matrix alone"
        ) from error
    values = list(loaded.values()) if isinstance(loaded, dict) else [loaded]
    if len(values) != 1 or not isinstance(values[0], torch.Tensor):
        raise HocketError(Reason.BAD_WEIGHTS, f"{source} must hold one tensor, the embedding matrix")
    matrix = values[0]
    if matrix.ndim != _DIMENSIONS or not matrix.is_floating_point() or not torch.isfinite(matrix).all():
        raise HocketError(
            Reason.BAD_WEIGHTS,
            f"{source} holds {matrix.dtype} {list(matrix.shape)}: a soft prompt is a matrix of finite numbers, "
            "tokens by hidden size",
        )
    kept = matrix if matrix.dtype in {torch.float32, torch.float16, torch.bfloat16} else matrix.float()
    try:
        target.write_bytes(save({_NAME: kept.contiguous()}))
    except OSError as error:
        raise HocketError(Reason.BAD_REQUEST, f"cannot write {target}: {error.strerror}") from error
    tokens, hidden = matrix.shape
    return int(tokens), int(hidden)


def main() -> int:
    """The command line; 0 done, 2 refused."""
    parser = argparse.ArgumentParser(prog="python -m training.soft_prompt", description=__doc__)
    parser.add_argument("source", type=Path, help="what torch saved (.pt or .bin)")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    arguments = parser.parse_args()
    try:
        tokens, hidden = convert(arguments.source, arguments.target)
    except HocketError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(
        f"{arguments.target}: {tokens} tokens of {hidden} values. Name it in soft_prompts[].path of the manifest, "
        "and pack again.\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
