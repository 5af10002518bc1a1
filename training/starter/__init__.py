"""The starter kit: a small base language model and its experts, made from seeds.

    make starter

A closed world (`words`, `world`), one module per task (`sql`, `cypher`, ...), the text a base learns from (`corpus`),
its tokenizer and its training (`tokenizer`, `pretrain`), the experts, packed and signed (`build`), and what all of them
are worth on held-out data (`scores`). Only `pretrain` and `build` need torch.
"""
