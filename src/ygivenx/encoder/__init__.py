"""From a row to sequences: render, prove, tokenize, weigh. A stage is a module, with functions from values to values.

encode       `Encoder`, the entry point: rows in batches and processes
chats        one conversation through all stages, top to bottom

render       1. a conversation under its template; its renderings; the nouns up to the tokenizer; tags around thoughts
repairs         the strategies: other ways to write a row, the least change first
prove        2. candidates; the contract: F begins with P, and the output ends in what ends the turn
turns           which token ends a turn: a table; turns that a repair puts together
content         what a template leaves out, whether a repair says what the row says, special tokens that a row writes
tokenize     3. texts to ids, with each token's place; whether the ids of what inference shows begin those of the text
segments        which characters, and then which tokens, are of which kind
weigh        4. sequences with weights, and their length

policy       what is chosen for all rows: options, and how much each part of a row weighs
proofs       for speed alone: candidates proven once for all rows of a shape
texts        rows that aren't conversations: pairs, token ids, chats that were rendered already
ways_out     the options that were tried on a refused row and take it
"""
