"""Decision trees in bincode: nodes in preorder, read and written without recursion.

split  u32 0, u64 feature, f32 threshold, left node, right node
leaf   u32 1, u64 column (classifiers) or f32 value (regressors), u64 n_samples
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import numpy as np

from hocket.errors import HocketError, Reason
from hocket.packages.apr.bincode import Codec, Reader
from hocket.packages.model import Tree

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hocket.packages.model import Floats, Integers

_SPLIT: Final = 0
_LEAF: Final = 1
_WORD_BYTES: Final = 4
_SPLIT_WORDS: Final = 4
_COLUMN_LEAF_WORDS: Final = 5
_VALUE_LEAF_WORDS: Final = 4
_SPLIT_RECORD: Final = struct.Struct("<IQf")
_FIRST_WORDS: Final = 512
"""Of a payload, looked at for a tree; twice as many each time when it goes on."""


def _walk(reader: Reader, leaf_words: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """A tree's words, and at which of them each node begins, in preorder. Moves the reader past the tree.

    The one loop over nodes, so it does as little as it can: everything else is done on arrays.
    """
    words = np.frombuffer(reader.data, "<u4", reader.rest // _WORD_BYTES, reader.position)
    depth_max = reader.limits.tree_depth
    nodes: list[int] = []
    pending = [0]  # depths of the right children still to come, above one that ends the tree
    word = depth = looked_at = 0
    while pending and looked_at < len(words) and len(nodes) <= reader.nodes_left:
        looked_at = 2 * looked_at or _FIRST_WORDS
        tags = np.minimum(words[:looked_at], _LEAF + 1).astype(np.uint8).tobytes()
        end = len(tags)
        while word < end and pending:
            tag = tags[word]
            nodes.append(word)
            if tag == _SPLIT:
                depth += 1
                if depth > depth_max:
                    raise reader.too_large("splits on the way to a leaf", depth_max)
                pending.append(depth)
                word += _SPLIT_WORDS
            elif tag == _LEAF:
                depth = pending.pop()
                word += leaf_words
            else:
                reader.position += word * _WORD_BYTES
                raise reader.bad(f"a tree node has tag {words[word]}")
    if len(nodes) > reader.nodes_left:
        raise reader.too_large("tree nodes", reader.limits.tree_nodes)
    if pending or word > len(words):
        raise reader.bad("the payload ends inside a tree")
    reader.nodes_left -= len(nodes)
    reader.position += word * _WORD_BYTES
    return words, np.array(nodes, np.int64)


def _right_children(is_split: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Index of every right child in preorder, -1 for a leaf.

    Count at each node the right children still to come. A split adds one, which is there until its left child's last
    leaf has passed: so its right child is the next node with the same count as the split itself.
    """
    steps = np.where(is_split, 1, -1)
    to_come = np.cumsum(steps) - steps
    alike = np.argsort(to_come.astype(np.min_scalar_type(int(to_come.max()))), kind="stable")
    right = np.empty_like(alike)
    right[alike[:-1]] = alike[1:]
    right[~is_split] = -1
    return right


def _column(reader: Reader, words: NDArray[np.uint32], at: NDArray[np.int64], bound: int, what: str) -> Integers:
    """The u64 at each of these words."""
    numbers = words[at + 1].astype(np.uint64)
    numbers <<= np.uint64(32)
    numbers |= words[at]
    if numbers.size and numbers.max() >= bound:
        raise reader.too_large(what, bound)
    return numbers.view(np.int64)


def _f32(reader: Reader, words: NDArray[np.uint32], at: NDArray[np.int64]) -> Floats:
    """The finite f32 at each of these words."""
    numbers: Floats = words[at].view("<f4")
    if not np.isfinite(numbers).all():
        raise reader.bad("a tree holds a number that is not finite")
    return numbers


def _tree(leaf_words: int) -> Codec[Tree]:
    columns = leaf_words == _COLUMN_LEAF_WORDS

    def read(reader: Reader) -> Tree:
        words, nodes = _walk(reader, leaf_words)
        is_split = words[nodes] == _SPLIT
        splits, leaves = nodes[is_split], nodes[~is_split]
        right = _right_children(is_split)
        feature, left = np.full_like(right, -1), np.full_like(right, -1)
        threshold, n_samples = np.zeros(right.size, np.float32), np.zeros_like(right)
        answers = (
            _column(reader, words, leaves + 1, reader.limits.labels, "labels")
            if columns
            else _f32(reader, words, leaves + 1)
        )
        value = np.zeros(right.size, answers.dtype)
        feature[is_split] = _column(reader, words, splits + 1, reader.limits.features, "features")
        threshold[is_split] = _f32(reader, words, splits + 3)
        left[is_split] = np.flatnonzero(is_split) + 1
        value[~is_split] = answers
        n_samples[~is_split] = _column(reader, words, leaves + leaf_words - 2, 2**63, "samples in a leaf")
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


COLUMN_TREE: Final = _tree(_COLUMN_LEAF_WORDS)
VALUE_TREE: Final = _tree(_VALUE_LEAF_WORDS)
