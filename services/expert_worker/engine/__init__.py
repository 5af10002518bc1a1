"""The engine that answers text: one base language model, and a weighted set of experts of its own for every request.

base.py -> the model, its tokenizer, its identity      folding.py -> a package becomes an `AdapterExpert`
hocket/prompts.py -> text becomes tokens               mixing.py, projection.py -> experts composed in the pass
scheduler.py -> which sequences run, and how far       attention.py, pages.py -> keys and values of their past
runner.py -> one pass                                  sampling.py, detokenizer.py -> logits become text
engine.py -> the thread that does this step by step, and the streams that join it to the event loop
"""
