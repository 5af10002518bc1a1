"""The engine that answers text: one base language model, and a weighted set of experts of its own for every request.

base.py -> the model, its tokenizer, its identity      folding.py -> a package becomes an `AdapterExpert`
checkpoint.py, self_check.py -> what is refused        rotary.py, quantised.py -> how a base may be served otherwise
hocket/prompts.py -> text becomes tokens               mixing.py, projection.py -> experts composed in the pass
scheduler.py -> which sequences run, and how far       attention.py, pages.py -> keys and values of their past
runner.py -> one pass                                  sampling.py, detokenizer.py -> logits become text
prefixes.py -> pages that are found again              fairness.py -> whose turn it is among tenants
passes.py -> passes that fail, and whom they cost      answer.py -> the stream of one answer
engine.py -> the thread that does this step by step, and the streams that join it to the event loop
"""
