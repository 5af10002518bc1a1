"""Decision trees in bincode: nodes in preorder, read and written without recursion.

split  u32 0, u64 feature, f32 threshold, left node, right node
leaf   u32 1, u64 column (classifiers) or f32 value (regressors), u64 n_samples
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hocket.errors import HocketError, Reason
from hocket.packages.apr.bincode import Codec, Reader
from hocket.packages.model import Tree

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hocket.packages.model import Floats, Integers

_SPLIT: Final = 0
_LEAF: Final = 1
_TAG: Final = struct.Struct("<I")
_SPLIT_RECORD: Final = struct.Struct("<IQf")
_SPLIT_NODE: Final = np.dtype([("tag", "<u4"), ("feature", "<u8"), ("threshold", "<f4")])
_COLUMN_LEAF: Final = np.dtype([("tag", "<u4"), ("value", "<u8"), ("n_samples", "<u8")])
_VALUE_LEAF: Final = np.dtype([("tag", "<u4"), ("value", "<f4"), ("n_samples", "<u8")])


def _walk(reader: Reader, leaf_bytes: int) -> tuple[list[int], list[int]]:
    """Byte offset of every node, and index of every right child (-1 for a leaf)."""
    data, size = reader.data, len(reader.data)
    offsets: list[int] = []
    right: list[int] = []
    pending: list[tuple[int, int]] = []  # splits whose right child is still to come, with its depth
    depth = 0
    while True:
        if size - reader.position < _SPLIT_NODE.itemsize:  # no leaf is smaller than a split
            raise reader.bad("the payload ends inside a tree")
        tag = _TAG.unpack_from(data, reader.position)[0]
        offsets.append(reader.position)
        if len(offsets) > reader.nodes_left:
            raise reader.too_large("tree nodes", reader.limits.tree_nodes)
        if tag == _SPLIT:
            depth += 1
            if depth > reader.limits.tree_depth:
                raise reader.too_large("splits on the way to a leaf", reader.limits.tree_depth)
            pending.append((len(right), depth))
            right.append(-1)
            reader.position += _SPLIT_NODE.itemsize
        elif tag == _LEAF:
            right.append(-1)
            reader.take(leaf_bytes)
            if not pending:
                reader.nodes_left -= len(offsets)
                return offsets, right
            parent, depth = pending.pop()
            right[parent] = len(offsets)
        else:
            raise reader.bad(f"a tree node has tag {tag}")


def _records(reader: Reader, offsets: NDArray[np.int64], node: np.dtype[Any]) -> NDArray[Any]:
    """The node records at byte offsets that are known to lie inside the payload."""
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(reader.data, np.uint8), node.itemsize)
    records: NDArray[Any] = windows[offsets].view(node)
    return records[:, 0]


def _column(reader: Reader, numbers: NDArray[np.uint64], bound: int, what: str) -> NDArray[np.int64]:
    if numbers.size and int(numbers.max()) >= bound:
        raise reader.too_large(what, bound)
    return numbers.astype(np.int64)


def _finite(reader: Reader, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(numbers).all():
        raise reader.bad("a tree holds a number that is not finite")
    return numbers


def _tree(leaf_node: np.dtype[Any]) -> Codec[Tree]:
    columns = leaf_node is _COLUMN_LEAF

    def read(reader: Reader) -> Tree:
        offset_list, right_list = _walk(reader, leaf_node.itemsize)
        offsets, right = np.array(offset_list, np.int64), np.array(right_list, np.int64)
        is_split = right >= 0
        splits = _records(reader, offsets[is_split], _SPLIT_NODE)
        leaves = _records(reader, offsets[~is_split], leaf_node)
        feature, left = np.full_like(right, -1), np.full_like(right, -1)
        threshold, n_samples = np.zeros(right.size, np.float32), np.zeros_like(right)
        answers: Integers | Floats = (
            _column(reader, leaves["value"], reader.limits.labels, "labels")
            if columns
            else _finite(reader, leaves["value"])
        )
        value = np.zeros(right.size, answers.dtype)
        feature[is_split] = _column(reader, splits["feature"], reader.limits.features, "features")
        threshold[is_split] = _finite(reader, splits["threshold"])
        left[is_split] = np.flatnonzero(is_split) + 1
        value[~is_split] = answers
        n_samples[~is_split] = _column(reader, leaves["n_samples"], 2**63, "samples in a leaf")
        tree = Tree(feature, threshold, left, right, value, n_samples)
        for array in (feature, threshold, left, right, value, n_samples):
            array.flags.writeable = False
        return tree

    def write(out: bytearray, tree: Tree) -> None:
        arrays = (tree.feature, tree.threshold, tree.left, tree.right, tree.value, tree.n_samples)
        nodes = list(zip(*(array.tolist() for array in arrays), strict=True))
        leaf = struct.Struct("<IQQ" if columns else "<IfQ")
        pending, written = [0], 0
        while pending:
            node = pending.pop()
            written += 1
            if not 0 <= node < len(nodes) or written > len(nodes):
                raise HocketError(Reason.BAD_PAYLOAD, "a tree's children do not form a tree")
            feature, threshold, left, right, value, n_samples = nodes[node]
            if feature < 0:
                out += leaf.pack(_LEAF, value, n_samples)
            else:
                out += _SPLIT_RECORD.pack(_SPLIT, feature, threshold)
                pending += (right, left)
        if written != len(nodes):
            raise HocketError(Reason.BAD_PAYLOAD, "a tree has nodes that its root does not reach")

    return Codec(read, write)


COLUMN_TREE: Final = _tree(_COLUMN_LEAF)
VALUE_TREE: Final = _tree(_VALUE_LEAF)
