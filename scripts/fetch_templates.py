"""Chat templates of current models, out of packages that carry them, as FOLDER/SOURCE--NAME.jinja.

python scripts/fetch_templates.py FOLDER

The templates are their authors' and aren't ours to ship: the folder is for `benchmarks/encode_matrix.py --templates`
alone. From PyPI: llama-cpp-python's source (llama.cpp's collection), axolotl, xinference; from the environment: TRL;
from `.tokenizers/` (make tokenizers): the tokenizers' own. 150 MB are read. Copies of one text, white space apart, are
counted once, by the first source that has it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

PACKAGES = {
    "llamacpp": "llama-cpp-python==0.3.36",
    "axolotl": "axolotl==0.19.0",
    "xinference": "xinference==4.1.0",
}
TOKENIZERS = Path(__file__).resolve().parents[1] / ".tokenizers"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as temporary:
        for name, template in templates(Path(temporary)):
            text = " ".join(template.split())
            if "{" in text and text not in seen:
                seen.add(text)
                (folder / f"{name}.jinja").write_text(template)
    print(f"{len(seen)} templates in {folder}")


def templates(temporary: Path) -> Iterator[tuple[str, str]]:
    """(SOURCE--NAME, template), the sources that are nearest to a model first."""
    for file in sorted(TOKENIZERS.glob("*/tokenizer_config.json")):
        template = json.loads(file.read_text()).get("chat_template")
        if isinstance(template, str):
            yield f"npm--{file.parent.name}", template
    yield from _of_trl()
    for source, package in PACKAGES.items():
        for name, template in _of_archive(_downloaded(package, temporary)):
            yield f"{source}--{name}", template


def _of_trl() -> Iterator[tuple[str, str]]:
    found = find_spec("trl")
    if found and found.origin:
        for file in sorted((Path(found.origin).parent / "chat_templates").glob("*.jinja")):
            if not file.stem.endswith("_training"):
                yield f"trl--{file.stem}", file.read_text()


def _downloaded(package: str, folder: Path) -> Path:
    """The archive of a package: its wheel, or for llama.cpp's templates the source."""
    kind = ["--no-binary", ":all:"] if package.startswith("llama") else []
    before = set(folder.iterdir())
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *kind, "-d", str(folder), package]
    subprocess.run(command, check=True)
    (archive,) = set(folder.iterdir()) - before
    return archive


def _of_archive(archive: Path) -> Iterator[tuple[str, str]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as files:
            for name in sorted(files.namelist()):
                yield from (
                    _of_file(name, files.read(name).decode("utf-8", "replace")) if _wanted(name) else ()
                )
    else:
        with tarfile.open(archive) as files:
            for member in sorted(files.getmembers(), key=lambda m: m.name):
                file = files.extractfile(member) if _wanted(member.name) else None
                if file:
                    yield from _of_file(member.name, file.read().decode("utf-8", "replace"))


def _wanted(name: str) -> bool:
    return bool(re.search(r"templates/[^/]*\.jinja$|xinference/model/llm/models/.*\.json$", name))


def _of_file(name: str, text: str) -> Iterator[tuple[str, str]]:
    if name.endswith(".jinja"):
        yield Path(name).stem, text
        return
    models = json.loads(text)
    for model in models if isinstance(models, list) else [models]:
        if isinstance(model.get("chat_template"), str):
            yield model["model_name"], model["chat_template"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
