"""Examples as the tensors of a pass: side by side and padded, or several in a row.

Packed examples must not see each other. Each has positions of its own, from 0, and no attention mask is given: from
the positions that begin again transformers makes the mask that keeps them apart, for the attention of torch (sdpa) as
for others. Rows stay rows: all of a batch in one, as kernels for packed data want it, makes torch's mask as large as
the square of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NO_LOSS: Final = -100
"""The label of a token that carries no loss, as torch has it."""


@dataclass(frozen=True, slots=True)
class Collator:
    """Makes batches.

    Attributes:
        pad_id: What fills rows up.
    """

    pad_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and either `attention_mask` or `position_ids`, all int64 `[rows, tokens]`.

        Rows with `seq_lengths` hold several examples of these lengths; then all of them do.
        """
        is_packed = "seq_lengths" in rows[0]
        size = (len(rows), max(len(row["input_ids"]) for row in rows))
        ids = torch.full(size, self.pad_id)
        labels = torch.full(size, NO_LOSS)
        places = torch.zeros(size, dtype=torch.int64)
        for place, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[place, :length] = torch.tensor(row["input_ids"])
            labels[place, :length] = torch.tensor(row["labels"])
            if is_packed:
                lengths = row["seq_lengths"]
                places[place, :length] = torch.cat([torch.arange(each) for each in lengths])
                starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
                labels[place, starts] = NO_LOSS  # no example foretells how the next begins
            else:
                places[place, :length] = 1
        return {"input_ids": ids, "labels": labels, "position_ids" if is_packed else "attention_mask": places}
