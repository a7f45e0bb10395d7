"""Data, from files to micro-batches.

row_files   a file or data set -> rows, unchanged
rows        a row -> conversation, prompt by the published template, gold texts (messages: lists of messages)
templates   a row -> prompt by the tokenizer's chat template (thoughts: what models think before they answer)
encoding    prompt and response -> token ids (special_tokens: texts that only spell special tokens)
token_file  token ids <-> .bin/.idx (prompt_format: whether files, tokenizers and models fit)
dataset     all of these -> the examples of a split
sampler     optimizer step -> examples
batching    examples -> micro-batches
preprocess  text -> token files, in worker processes (workers)
"""
