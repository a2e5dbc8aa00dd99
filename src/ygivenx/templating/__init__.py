"""Chat templates, rendered as transformers renders them; no module here knows a tokenizer.

inputs          what a template sees of a row
sandbox         the Jinja environment, and what a template may do in this process
confined        a rendering in a process with limits of the operating system
template        a rendering: inputs -> text
origins         text that knows where each of its characters comes from
writing         values that hold such texts, written as text
tracing         a rendering with provenance: inputs -> text with origins
placeholders    values that stand for any text, and the conditions under which a rendering holds for it
symbolic        a rendering over placeholders: what it proves is proven for many rows
"""
