"""Rows of files become encoded rows: on all cores, with progress, and kept for the next run.

What is kept lies in the user's cache, one folder for each file, under a hash of all that the rows depend on: the bytes
of the file, how it is read, the encoder, its tokenizer, and the code that encodes.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import pickle
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, NamedTuple, Self

import numpy as np
from rich.console import Console

from .. import __version__, encoded
from ..disk import sync_all
from ..encoded import EncodedRows
from ..errors import ConfigError, DataError, nearest
from ..rows.files import count_of_rows
from ..sequence import Example, Rejected
from .config import DataSection, EncodedRowOptions
from .inputs import Account, open_rows, quarantine_file, say
from .progress import shown
from .quiet import quiet

CHUNK = 512  # rows that are encoded at a time: their texts go to the tokenizer together
ALONE = (
    8192  # starting processes takes seconds, as long as encoding some thousand rows: they begin behind these
)
CHUNK_APART = 32768  # rows of which each process takes a part, where a pool starts for them alone
AHEAD = 4  # chunks of each process that may wait: memory holds no more
ROWS, REJECTED, ACCOUNT = "rows.arrow", "rejected.jsonl", "account.json"
# What encoded rows, and the account of them, depend on.
CODE = ("rows", "templating", "encoder", "encoded.py", "sequence.py", "commands/inputs.py")


class EncodedPart(NamedTuple):
    """What some rows became: a table of the accepted ones, their account, and the others."""

    table: Any
    account: Account
    rejected: list[Rejected]


def part_of(items: Iterable[Example | Rejected]) -> EncodedPart:
    """One for each row, as an encoder or a reader gave it."""
    account, examples, rejected = Account(""), list[Example](), list[Rejected]()
    for item in items:
        if isinstance(item, Rejected):
            rejected.append(item)
        else:
            account.accept(item)
            examples.append(item)
    rows = [(-1 if e.index is None else e.index, n, s) for e in examples for n, s in enumerate(e)]
    return EncodedPart(encoded.table_of(rows), account, rejected)


# -- on all cores ------------------------------------------------------------------------------------------


class Cores:
    """An encoder in several processes, which start when there is enough to do for them. A context manager."""

    def __init__(self, encoder: Any, processes: int) -> None:
        self._encoder, self._processes = encoder, processes
        self._pool: ProcessPoolExecutor | None = None
        self._alone = ALONE if processes > 1 else None  # rows that are still encoded here; None: all

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def parts(self, reader: Iterable[Any]) -> Iterator[EncodedPart]:
        """Every row in exactly one part, in order. Raises ConfigError where a process dies."""
        rows = iter(reader)
        for chunk in chunks(islice(rows, self._alone), CHUNK):
            self._alone = None if self._alone is None else self._alone - len(chunk)
            yield encode_chunk(self._encoder, chunk)
        waiting: deque[Future[EncodedPart]] = deque()
        try:
            for chunk in chunks(rows, CHUNK):
                waiting.append(self._started().submit(_encode_there, chunk))
                if len(waiting) > AHEAD * self._processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            fix = "--processes 1 encodes in this one; fewer processes take less memory"
            raise ConfigError("a process that encodes rows has died", why=str(error), fix=fix) from error

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # A copy of the encoder travels once to each process, not with each chunk.
            spawn = get_context("spawn")  # a fork of a process with threads may hang
            self._pool = ProcessPoolExecutor(self._processes, spawn, _adopt, (pickle.dumps(self._encoder),))
        return self._pool


def chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items; the last one may be shorter."""
    while chunk := list(islice(items, size)):
        yield chunk


def encode_chunk(encoder: Any, chunk: list[Any]) -> EncodedPart:
    """What a reader's rows become; those that it rejected stay so."""
    examples, rejected = encoder.batch([r for r in chunk if not isinstance(r, Rejected)])
    return part_of([*(r for r in chunk if isinstance(r, Rejected)), *examples, *rejected])


_adopted: list[Any] = []  # in a process of `Cores`: the encoder that it was started with


def _adopt(encoder: bytes) -> None:
    _adopted[:] = [pickle.loads(encoder)]


def _encode_there(chunk: list[Any]) -> EncodedPart:
    return encode_chunk(_adopted[0], chunk)


def items_of(reader: Iterable[Any], encoder: Any, processes: int = 1) -> Iterator[Any]:
    """For each row its example or a Rejected: what forms for other trainers and rated replies are made of."""
    rows = iter(reader)
    for size, some in (
        ((CHUNK, islice(rows, ALONE)), (CHUNK_APART, rows)) if processes > 1 else ((CHUNK, rows),)
    ):
        options = {"processes": processes} if size == CHUNK_APART else {}
        for chunk in chunks(some, size):
            examples, rejected = encoder.batch([r for r in chunk if not isinstance(r, Rejected)], **options)
            yield from (*(r for r in chunk if isinstance(r, Rejected)), *examples, *rejected)


def accepted_of(items: Iterable[Any], account: Account) -> Iterator[Any]:
    """The accepted ones; the account counts all."""
    for item in items:
        if isinstance(item, Rejected):
            account.reject(item)
        else:
            account.accept(item)
            yield item


def hand_over(reader: Any, encoder: Any, form: str, output: Path, account: Account, processes: int) -> int:
    """Write a reader's rows in the form of another trainer; how many there are. See rows/export.py."""
    from ..encoder.rated import PreferenceEncoder
    from ..rows.export import RATED, form_of, unfit, write_examples

    form_of(form)
    items = items_of(reader, PreferenceEncoder(encoder) if form in RATED else encoder, processes)
    written = write_examples(accepted_of((unfit(item, form) for item in items), account), output, form)
    if written.reweighted:
        what = f"{written.reweighted:,} have weights other than 0 and 1"
        say(f"{what}: {form} has no column for them, they count 1 there")
    return written.rows


def rated_rows(paths: list[str], data: DataSection, encoder: Any) -> tuple[list[Any], dict[str, Any]]:
    """The rows of rated replies of one or several files, in memory, and their account, which is printed."""
    left, examples, total = data.limit, list[Any](), Account("", data.quarantine)
    for name in files_of(paths):
        reader = open_rows(name, replace(data, limit=left))
        before, total.format = total.read, "; ".join(filter(None, (total.format, reader.format)))
        examples += accepted_of(items_of(reader, encoder, data.processes), total)
        left = None if left is None else left - (total.read - before)
    document = total.close()
    if not examples:
        raise ConfigError(
            "no row was accepted", where=", ".join(paths), fix="the reasons are above; try `ygx show`"
        )
    return examples, document


def accepted(parts: Iterable[EncodedPart], account: Account) -> Iterator[Any]:
    """The tables of the accepted rows; the account counts all."""
    for part in parts:
        account.add(part.account)
        for row in part.rejected:
            account.reject(row)
        yield part.table


# -- kept for the next run ---------------------------------------------------------------------------------


def kept_rows(
    paths: list[str], data: DataSection, encoder: Any, console: Console, seed: int = 0
) -> tuple[EncodedRows, dict[str, Any]]:
    """The encoded rows of one or several files, at least one row, and their account, which is printed.

    Raises ConfigError if no row was accepted, and for a name in `data.mix` that no file has.
    """
    names = files_of(paths)
    weights = _weights(names, data.mix)
    left, parts, total = data.limit, list[EncodedRows](), Account("")
    with Cores(encoder, data.processes) as cores, _quarantine(data.quarantine) as quarantine:
        for number, name in enumerate(names):
            folder = _kept(name, replace(data, limit=left), encoder, cores, console)
            account = Account.of(json.loads((folder / ACCOUNT).read_text(encoding="utf-8")))
            total.add(account)
            quarantine(folder / REJECTED)
            rows = EncodedRows.open(folder / ROWS, Path(name).name if len(names) > 1 else "")
            rows.counts = _counts(rows, weights[number], np.random.default_rng((seed, number)))
            parts.append(rows)
            left = None if left is None else left - account.read
    document = total.close()
    if not total.accepted:
        fix = "the reasons are above; try `ygx show`"
        raise ConfigError("no row was accepted", where=", ".join(paths), fix=fix)
    return EncodedRows.joined(parts), document


def files_of(paths: list[str]) -> list[str]:
    """Paths as they stand, but those with * or ? as the files that they match, in order. Raises DataError for none."""
    found: list[str] = []
    for path in paths:
        pattern = not Path(path).exists() and not path.startswith("hf:") and glob.has_magic(path)
        matched = sorted(glob.glob(path, recursive=True)) if pattern else [path]
        if not matched:
            raise DataError("no file matches", where=path)
        found += matched
    return found


def _weights(names: list[str], mix: Mapping[str, float]) -> list[float]:
    """The weight of each file; `mix` calls it by its path, its name, or its name without what follows the dot."""
    called = [{name, Path(name).name, Path(name).name.split(".")[0]} for name in names]
    for key, value in mix.items():
        known = sorted(set().union(*called))
        if key not in known:
            what = f"no file is called {key!r}{nearest(key, known)}"
            raise ConfigError(what, where="mix", fix=f"known: {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1000:
            fix = "give a number: 2 sees its rows twice in an epoch, 0.5 half of them"
            raise ConfigError(f"mix {key}={value!r}", fix=fix)
    return [next((float(v) for k, v in mix.items() if k in own), 1.0) for own in called]


def _counts(rows: EncodedRows, weight: float, rng: np.random.Generator) -> Any:
    """int64 [sequences]: how often each is seen; of a fraction, a part of the rows by chance, all their turns alike."""
    firsts = np.cumsum(rows.turn == 0) - 1
    count = int(firsts[-1]) + 1 if len(firsts) else 0
    # Of 2.3 all rows count twice, and three tenths of them once more.
    once_more = rng.permutation(count) < round(weight % 1 * count)
    return int(weight) + once_more[firsts].astype(np.int64)


@contextmanager
def _quarantine(path: str | None) -> Iterator[Callable[[Path], None]]:
    """A function that adds the rejected rows of a folder to the file that was asked for."""
    if path is None:
        yield lambda rejected: None
        return
    with quarantine_file(path) as file:

        def add(rejected: Path) -> None:
            if rejected.is_file():
                with rejected.open(encoding="utf-8") as rows:
                    shutil.copyfileobj(rows, file)

        yield add


def _kept(name: str, data: DataSection, encoder: Any, cores: Cores, console: Console) -> Path:
    """The folder with the encoded rows of a file, made now if it isn't there."""
    root = Path(
        data.cache or os.environ.get("YGIVENX_CACHE") or Path.home() / ".cache" / "ygivenx" / "encoded"
    )
    folder = root / _key(name, data, encoder)
    if (folder / ACCOUNT).is_file():
        say(f"{name}: encoded before, kept in {folder}", console)
        return folder
    try:
        # Rows may be private, and /tmp or a home on a server is read by others.
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        staging = Path(mkdtemp(dir=root))
        try:
            encode_into(staging, name, data, cores, console)
            sync_all(staging)
            with suppress(OSError):  # another run was faster
                staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        fix = "--cache DIR keeps them elsewhere"
        raise ConfigError("encoded rows can't be kept", where=str(root), why=str(error), fix=fix) from error
    return folder


def encode_into(folder: Path, name: str, data: EncodedRowOptions, cores: Cores, console: Console) -> Account:
    """Write a file's encoded rows, the rejected ones and their account into a folder."""
    reader = open_rows(name, data)
    account = Account(reader.format, str(folder / REJECTED))
    tables = accepted(cores.parts(reader), account)
    total = count_of_rows(name, data.limit)
    parts = shown(console, tables, lambda: f"encoding {name}", lambda _: account.read, total)
    encoded.write(parts, folder / ROWS)
    account.end()
    (folder / ACCOUNT).write_text(json.dumps(account.kept()), encoding="utf-8")
    return account


# -- what encoded rows depend on ---------------------------------------------------------------------------


def _key(name: str, data: EncodedRowOptions, encoder: Any) -> str:
    _, (tokenizer, policy, options) = encoder.__reduce__()
    # The time changes what is kept only where the template writes it; else no run would find the last one's rows.
    now = {} if encoder.writes_time else {"now": None}
    read_as = {f: getattr(data, f) for f in ("format", "x", "y", "plain", "split", "roles", "limit")}
    libraries = {n: version(n) for n in ("transformers", "tokenizers", "jinja2", "pyarrow")}
    versions = [__version__, libraries, _code()]
    facts = [versions, _content(name), read_as, _tokenizer(tokenizer), policy, {**options, **now}]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _content(name: str) -> str:
    """What a file, or each file below a directory, holds; of a hub's data set its commit."""
    path = Path(name.removeprefix("hf:"))
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    # A name that is never met again: what a hub holds may have changed since.
    if not all(p.is_file() for p in files):
        return _commit_of(str(path).partition(":")[0]) if name.startswith("hf:") else ""
    return _hashes(files)


def _commit_of(repository: str) -> str:
    """The commit that the hub has of a data set now; where that can't be asked, what no other run has."""
    try:
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(repository).sha)
    except Exception:  # no network, no such repository: whoever reads the rows says so
        return uuid.uuid4().hex


@cache
def _code() -> str:
    here = Path(encoded.__file__).parent
    return _hashes([f for c in CODE for f in sorted((here / c).rglob("*.py")) or [here / c]])


def _tokenizer(tokenizer: Any) -> str:
    """All that a tokenizer saves of itself."""
    with TemporaryDirectory() as folder, quiet():
        tokenizer.save_pretrained(folder)
        return _hashes(sorted(p for p in Path(folder).rglob("*") if p.is_file()))


def _hashes(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
