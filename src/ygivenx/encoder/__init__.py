"""From a row to sequences: render, prove, tokenize, weigh. Read the modules in this order.

policy       how much each part of a row weighs
segments     which characters, and then which tokens, are of which kind
candidates   the nouns: renderings of a conversation, turns, candidates
thoughts     the tags around a thought, by template
tokens       texts to ids, with each token's place; `pieces`: where a text can be cut
repairs      the strategies: other ways to write a row, the least change first
ends         which token ends a turn: a table
contract     which characters are y: F begins with P, and the output ends in what ends the turn
joining      repairs inside a turn
dropped      what a template leaves out, and whether a repair says what the row says
control      special tokens that a row writes itself
refusals     why not, in the user's words; `ways_out`: the options that were tried on the row and take it
assemble     what all rows have in common: options, sequences, length
chats        one conversation through all stages, top to bottom; a candidate's ids are checked here
proofs       for speed alone: candidates proven once for all rows of a shape
pairs        plain x and y; `token_jobs`: rows of ids; `rendered_text`: chats that were rendered already
encode       `Encoder`: rows in batches and processes
"""
