"""Guards: one line each of the core modules, the change that takes it away, and the tests that have to notice.

`mutate.py` applies them. A guard whose loss no test can notice says why in `survives`: the change then makes the same
numbers at another price, or can't be reached.
"""

from __future__ import annotations

from typing import NamedTuple


class Guard(NamedTuple):
    """`old`, which stands once in `module` of src/ygivenx, becomes `new`; `tests` are pytest's arguments."""

    what: str
    module: str
    old: str
    new: str
    tests: str
    survives: str = ""


FOREST = "tests/test_forest.py tests/test_reference.py -k 'not encoder'"
OBJECTIVE = (
    "tests/test_objective.py tests/test_streaming.py tests/test_log_probs.py -m 'not model and not full'"
)
HEAD = "tests/test_head.py tests/test_reweight.py -m 'not full'"
CHECKPOINT = "tests/test_checkpoint.py"
PACKS = "tests/test_packs.py"
POLICY = "tests/test_policy.py"
LIMITS = "tests/test_families.py -k 'limit or position or length or frequencies' -m 'not full and not model'"
KINDS = "tests/test_template_kinds.py"
ENCODER = "tests/test_reference.py tests/test_faults.py tests/test_chats.py tests/test_encode.py -m 'not full and not model'"
RATED = "tests/test_preference_trainer.py tests/test_rated.py -m 'not full'"
SCORERS = "tests/test_scorers.py"
PROOFS = "tests/test_faults.py tests/test_shapes.py -m 'not full and not model'"

GUARDS = [
    # The forest
    Guard("weights add up where sequences meet", "forest.py",
          "weight[path] += sequences[i].weights", "weight[path] = np.maximum(weight[path], sequences[i].weights)", FOREST),
    Guard("weights add up in float64", "forest.py",
          "end, weight = np.full(count, count), np.zeros(count)",
          "end, weight = np.full(count, count), np.zeros(count, np.float32)", FOREST),
    Guard("a subtree ends where its last path does", "forest.py",
          "end[path[k:]] = n", "end[path[k:]] = n + 1", FOREST),
    Guard("a branch's parent is the last shared node", "forest.py",
          "parent[n] = path[k - 1] if k else -1", "parent[n] = path[k - 2] if k > 1 else -1", FOREST),
    Guard("a node's depth is its position", "forest.py",
          "depth[n:stop] = np.arange(k, k + stop - n)", "depth[n:stop] = np.arange(0, stop - n)", FOREST),
    Guard("only nodes with children are fed", "forest.py",
          "self.end > np.arange(len(self.end)) + 1", "self.end > np.arange(len(self.end))", FOREST),
    Guard("a root is no target", "forest.py",
          "chosen & (self.parent >= 0)", "chosen & (self.parent >= -1)", FOREST),
    Guard("edges in the order of their rows", "forest.py",
          "nodes = nodes[np.argsort(self.parent[nodes], kind=\"stable\")]", "nodes = nodes[::-1]", FOREST),
    Guard("ids that differ don't merge", "packing.py",
          "differs = keys[1:] != keys[:-1]", "differs = keys[1:] != keys[1:]", FOREST),
    Guard("a shorter sequence shares no more than it has", "packing.py",
          "at + first[parted] - 1", "at + first[parted]", FOREST),
    Guard("a negative id is refused", "forest.py", "if not 0 <= id_ < LARGEST:", "if not id_ < LARGEST:", FOREST),
    Guard("an id of more than 31 bits is refused", "forest.py", "if not 0 <= id_ < LARGEST:", "if id_ < 0:", FOREST),
    Guard("a sequence without tokens is refused", "forest.py", "        if not len(s):\n", "        if False:\n", FOREST),
    Guard("packs hold at most max_tokens", "packing.py", "if cost > room:", "if cost > 2 * room:", FOREST),
    Guard("packs may be full to the token", "packing.py", "if cost > room:", "if cost >= room:", FOREST),
    Guard("the epoch is a part of the order", "packing.py",
          "np.random.default_rng((seed, epoch))", "np.random.default_rng(seed)", FOREST),
    # The loss
    Guard("weights count", "objective.py",
          "shares = (edges.weights / np.float64(weight_sum))", "shares = (np.sign(edges.weights) / np.float64(weight_sum))",
          OBJECTIVE),
    Guard("the denominator adds up in float64", "objective.py",
          "edges.weights.sum(dtype=np.float64)", "edges.weights.sum(dtype=np.float32)", OBJECTIVE),
    Guard("0 / 0 is no loss", "objective.py", "if not weight_sum > 0:", "if False:", OBJECTIVE),
    Guard("a given denominator is used", "objective.py",
          "if denominator is None else float(denominator)", "if True else float(denominator)", OBJECTIVE),
    Guard("log p in the order of the edges", "objective.py",
          "np.argsort(np.concatenate(which))", "np.arange(len(np.concatenate(which)))", OBJECTIVE),
    Guard("an edge meets its own hidden state", "forest.py",
          "        place[rows] = np.arange(len(rows))\n", "        place[rows] = np.arange(len(rows))[::-1]\n", OBJECTIVE),
    # The head
    Guard("a sum that is no number is computed again", "head/tiles.py",
          "(~(sums.e[: self.b - self.a] <= HUGE_SUM))", "((sums.e[: self.b - self.a] > HUGE_SUM))", HEAD),
    Guard("vast sums are shifted by the maximum", "head/tiles.py", "if len(far):", "if False:", HEAD),
    Guard("the target is left out of its own sum", "head/tiles.py",
          "self.without_target.add_to(z, start)", "pass", HEAD),
    Guard("what bfloat16 rounds off is added", "head/tiles.py", "z.copy_(out).add_(lost)", "z.copy_(out)", HEAD),
    Guard("the cap's slope is in the gradient", "head/tiles.py", "            z *= slope\n", "            pass\n", HEAD),
    Guard("the bias of these tokens", "head/tiles.py",
          "z += head.bias[start : start + len(out), None]", "z += head.bias[: len(out), None]", HEAD),
    Guard("log Z by expm1 and log1p", "head/edges.py",
          "torch.log1p(self.sums[a:b] + torch.expm1(self.picked[self.first[a:b]] - shift))",
          "(self.sums[a:b].float() + (self.picked[self.first[a:b]] - shift).float().exp()).log().double()", HEAD),
    Guard("of a row's targets the most probable one is left out", "head/edges.py",
          "torch.argsort(picked, descending=True)", "torch.argsort(picked)", HEAD),
    Guard("the target's own term of the entropy", "head/edges.py",
          "self.moments + target.exp() * target.clamp_min(NOTHING)", "self.moments", HEAD),
    Guard("a masked token's term of the entropy is 0", "head/tiles.py",
          "torch.clamp(z, min=NOTHING, out=again)", "again.copy_(z)", HEAD),
    Guard("z-loss is of logsumexp", "head/edges.py",
          "lse = (self.shift + self.log_z)[self.column]", "lse = self.log_z[self.column]", HEAD),
    Guard("weights that cancel", "head/edges.py",
          "c = torch.where(c.abs() < 1e-12 * size, 1e-12 * size, c)", "c = c + 0", HEAD),
    Guard("float16 isn't multiplied in float16", "head/edges.py",
          "torch.float32 if slow or weight.dtype == torch.float16", "torch.float32 if slow", HEAD),
    Guard("scale before the cap", "head/logit_head.py", "z = product * self.scale", "z = product", HEAD),
    Guard("the cap's slope", "head/logit_head.py", "slope = 1 - z * z", "slope = torch.ones_like(z)", HEAD),
    Guard("a mask is no index", "head/selective.py", "if index.dtype not in INDEX_DTYPES:", "if False:", HEAD),
    Guard("no index outside the head", "head/selective.py",
          "if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:", "if False:", HEAD),
    Guard("no second derivatives in silence", "head/selective.py", "if torch.is_grad_enabled():", "if False:", HEAD),
    # Checkpoints
    Guard("a file's hash is compared", "training/checkpoint.py",
          "if path.stat().st_size != size or _hash(path) != sha256:", "if path.stat().st_size != size:", CHECKPOINT),
    Guard("a missing file is noticed", "training/checkpoint.py",
          "if not path.is_file():\n            raise CheckpointError(\"a file is missing\"",
          "if not path.is_file():\n            continue\n            raise CheckpointError(\"a file is missing\"", CHECKPOINT),
    Guard("a manifest without files is none", "training/checkpoint.py", "    if not entries:\n", "    if False:\n", CHECKPOINT),
    Guard("the newest is the one with most steps", "training/checkpoint.py", "key=_step)", "key=str)", CHECKPOINT),
    Guard("the best one stays", "training/checkpoint.py",
          "if protect is None or path.resolve() != Path(protect).resolve():", "if True:", CHECKPOINT),
    Guard("rotation doesn't count what lies ahead", "training/checkpoint.py",
          "if _step(p) <= step]", "if True]", CHECKPOINT),
    Guard("another run's checkpoints are refused", "training/checkpoint.py",
          "if others and (found is None", "if False and (found is None", CHECKPOINT),
    Guard("one that is replaced is put aside first", "training/checkpoint.py",
          "        os.rename(final, aside)\n", "        shutil.rmtree(final)\n", CHECKPOINT),
    Guard("what a crash left is mended", "training/checkpoint.py", "    mend(run_dir)\n", "", CHECKPOINT),
    # Packs
    Guard("weights are a part of the fingerprint", "encoded.py", "    digest.update(s.weights.tobytes())\n", "", PACKS),
    Guard("ids are a part of the fingerprint", "encoded.py",
          "hashlib.blake2b(s.ids.tobytes(), digest_size=16)", "hashlib.blake2b(digest_size=16)", PACKS),
    Guard("the packs are a part of the fingerprint", "training/packs.py", "self.plan.bounds, np.array", "np.array", PACKS),
    Guard("packs without weight are left out", "training/packs.py", "weight > 0))\n", "weight > -1))\n", PACKS),
    Guard("ranks get equally many", "training/packs.py", "while len(self) % ranks:", "while False:", PACKS),
    Guard("a filler weighs nothing", "training/packs.py",
          "np.zeros(len(ids), np.float32)", "np.r_[0, np.ones(len(ids) - 1)].astype(np.float32)", PACKS),
    Guard("a mean per sequence", "training/packs.py",
          'if denominator != "sequence" or not total > 0:', "if True:", PACKS),
    Guard("the epoch is a part of the order", "training/packs.py",
          "np.random.default_rng((self.seed, self.epoch))", "np.random.default_rng(self.seed)", PACKS),
    # Lengths
    Guard("no position beyond the last", "models/position_limits.py",
          "if self.most is not None and longest > self.most:", "if self.most is not None and longest > self.most + 1:", LIMITS),
    Guard("no length beyond that of the frequencies", "models/position_limits.py",
          "if longest <= switch or", "if longest <= switch + 1 or", LIMITS),
    # Policies
    Guard("a factor is for what the model produces", "encoder/policy.py",
          "weight if part.output and part.kind == kind else 1.0", "weight if part.kind == kind else 1.0", POLICY),
    Guard("only the last reply", "encoder/policy.py", "float(part.output and part.last)", "float(part.output)", POLICY),
    Guard("a message's own weight", "encoder/policy.py",
          "float(policy(part)) * part.weight", "float(policy(part))", POLICY),
    Guard("a weight is finite and not negative", "encoder/policy.py",
          "if not 0 <= weight < math.inf:", "if False:", POLICY),
    Guard("a reply by role is what the model produces", "encoder/policy.py",
          "part.role in chosen and (part.output or part.role != \"assistant\")", "part.role in chosen", POLICY),
    # The contract
    Guard("the reply continues the prompt", "encoder/prove.py",
          "continues = rendered.renderer.begins(text, shown)", "continues = True", ENCODER),
    Guard("one text serves all turns only if it begins with each", "encoder/prove.py",
          "if shares and all(begins(text, t.proven) for t in turns):", "if shares:", ENCODER),
    Guard("no stop inside a reply", "encoder/turns.py",
          "if found[0] in tokens.stops and written:", "if False:", ENCODER),
    Guard("a header that nothing asks for isn't trained", "encoder/prove.py",
          "if _writes_header(tokens, rendered, i):\n        raise", "if False:\n        raise", ENCODER),
    Guard("a header of a template without prompts isn't trained", "encoder/prove.py",
          "if continues and _trains_header(", "if False and _trains_header(", ENCODER),
    Guard("the end is sought behind the prompt", "encoder/prove.py",
          "after = max(last, len(shown) if continues else 0)", "after = last", ENCODER),
    Guard("where an empty reply stands is proven", "encoder/prove.py",
          "if at < 0 or filled[:at] + filled[at + 1 :] != text:", "if False:", ENCODER),
    # The end of a turn
    Guard("the first stop ends a turn", "encoder/turns.py", "first = (shared or stops)[0]", "first = (shared or stops)[-1]", ENCODER),
    Guard("a turn ends where generation stops", "encoder/turns.py",
          "if tokens.declares_stops and found.token not in tokens.stops:", "if False:", ENCODER),
    Guard("an eos is put behind nothing but white space", "encoder/turns.py",
          "    if rest.strip():\n        fix = \"if one", "    if False:\n        fix = \"if one", ENCODER),
    Guard("of several stops none is chosen unasked", "encoder/turns.py",
          "\"append_end\" if len(tokens.stops) > 1 else \"only_end\"", "\"only_end\"", ENCODER),
    Guard("the next header ends a turn only where this text ends", "encoder/turns.py",
          "header.start() == common == len(text)", "header.start() == common", ENCODER),
    # A row's text is no control
    Guard("a special token in a text is refused", "encoder/content.py",
          "        if found := tokens.has_control(text):\n", "        if (found := tokens.has_control(text)) and False:\n", ENCODER),
    Guard("one that row and template write together is refused", "encoder/content.py",
          "if cuts and control == \"refuse\":", "if False:", ENCODER),
    Guard("a reply that the template changes is refused", "encoder/content.py",
          "if not any(_bare(form, marks) in found for form in as_json):", "if False:", KINDS),
    Guard("a header stands behind the end of the turn before", "encoder/prove.py",
          "and bool(tokens.control(shown, spoken, common))", "", KINDS),
    Guard("the token that begins a reply's own header ends none", "encoder/turns.py",
          "return token in {m[0] for m in tokens.control(rendered.prompts[i], spoken)}", "return False", KINDS),
    Guard("an unfinished thought isn't trained after an empty one", "encoder/turns.py",
          "if rendered.tags.unclosed(rendered.inputs.messages[i]):", "if False:", ENCODER),
    Guard("names of fields are texts", "encoder/content.py", "            yield here, str(key)\n", "", ENCODER),
    Guard("one that a normaliser makes is refused", "encoder/tokenize.py", "if written.strip() != token:", "if False:", ENCODER),
    # Borders
    Guard("no token stands across the border", "encoder/tokenize.py",
          "if across(encoded, character) is not None:", "if False:", ENCODER),
    Guard("white space before the border is encoded as without what follows", "encoder/tokenize.py",
          "if before and encoded.text[character - 1].isspace():", "if False:", ENCODER),
    Guard("without offsets the ids of the prompt are compared", "encoder/tokenize.py",
          "if np.array_equal(prefix, encoded.ids[: len(prefix)]) else None", "if True else None", ENCODER),
    Guard("texts aren't joined where a space is put before each", "encoder/tokenize.py", "if self._puts_space:", "if False:", ENCODER),
    Guard("an eos that is no token is refused", "encoder/tokenize.py",
          "if token and tokenizer.encode(token, add_special_tokens=False) != [", "if False and tokenizer.encode(token, add_special_tokens=False) != [", ENCODER),
    # Proofs of a shape
    Guard("no control token between a template's words and a row's", "encoder/proofs.py",
          "return filled_in if all(_forges_nothing(o, tokens) for c in filled_in for o in c.outlines) else None", "return filled_in", PROOFS),
    Guard("the template decides alike", "encoder/proofs.py", "if not self.conditions.hold_for(texts):", "if False:", PROOFS),
    Guard("no control token in a text", "encoder/proofs.py",
          "not any(map(chat.options.tokens.has_control, found[1]))", "True", PROOFS,
          survives="`_forges_nothing` refuses the proof too: this one spares the work"),
    Guard("weights are a part of the shape", "encoder/proofs.py",
          "= [given.get(\"weight\")]", "= [None]", PROOFS),
    # What leaves the encoder
    Guard("a first token has no weight", "encoder/weigh.py", "if weights[:1].any():", "if False:", ENCODER),
    Guard("a row without a trained token is refused", "encoder/weigh.py",
          "    if not trained:\n", "    if False:\n", ENCODER),
    Guard("what is too long is refused", "encoder/weigh.py", "if overflow not in (\"drop_reply\", \"truncate\"):", "if False:", ENCODER),
    # Rated replies
    Guard("a row counts once, however many pairs it has", "training/rated.py",
          "[row.weight / max(1, count)] * count", "[row.weight] * count", RATED),
    Guard("of dapo a reply counts by its tokens", "training/rated.py",
          "if objective.policy_gradient and objective.policy_gradient.by_tokens:", "if False:", RATED),
    Guard("a token without a logged probability has a ratio of 1", "training/rated.py",
          "torch.where(logged.isnan(), log_p, logged)", "logged", RATED),
    Guard("the better reply comes first", "training/rated.py",
          "(a + start, b + start)", "(b + start, a + start)", RATED),
    Guard("the weights of tokens multiply their log p", "training/rated.py",
          "(values * weight).double()", "values.double()", RATED),
    Guard("KTO compares with another row's reply", "training/rated.py",
          "self.rows[(i + 1) % len(self.rows)]", "self.rows[i]", RATED),
    Guard("a pack that fills a rank weighs nothing", "training/rated.py",
          "np.zeros_like(batch.weight)", "batch.weight", "tests/test_ranks.py -m full -k rated"),
    Guard("the supervised loss refuses rated replies", "objective.py",
          "if any(isinstance(item, RatedExample) for item in items):", "if False:", RATED),
    Guard("replies of the same tokens are refused", "encoder/rated.py",
          "if len(replies) > 1 and len({_ids(r) for r in replies}) == 1:", "if False:", RATED),
    # Scorers
    Guard("windows move by their stride", "scores/requests.py",
          "length, stride or limit)", "length, limit)", SCORERS),
    Guard("a null of a file is −∞", "scores/choices.py",
          "return -math.inf if value is None", "return math.inf if value is None", SCORERS),
]  # fmt: skip
