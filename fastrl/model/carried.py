"""Files of a model's or a tokenizer's folder that are not read here but that others need: they travel from
checkpoint to checkpoint.

They are kept in memory, because a run may remove the checkpoint that it was resumed from.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

Files = dict[str, bytes]  # path inside the folder -> contents

OF_MODEL = (  # processors of images and sound, licences, and code that config.json's auto_map names
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
    "*.py",
)
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*")
OF_TOKENIZER = (  # spellings of the same vocabulary that older or other programs read
    *TEMPLATES,
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tokenizer.model.v*",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "tekken.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenization_*.py",
)


def read_carried(folder: Path, patterns: Iterable[str]) -> Files:
    """The files of the folder that fit one of the patterns."""
    wanted = tuple(patterns)
    files = {}
    for path in (*folder.glob("*"), *folder.glob("additional_chat_templates/*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and any(fnmatch(name, pattern) for pattern in wanted):
            files[name] = path.read_bytes()
    return files


def write_carried(folder: Path, files: Files, *, without: Iterable[str] = ()) -> None:
    """Write the files that the folder does not have yet, but for those that fit `without`."""
    left_out = tuple(without)
    for name, contents in files.items():
        path = folder / name
        if path.exists() or any(fnmatch(name, pattern) for pattern in left_out):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
